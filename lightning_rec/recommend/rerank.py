"""What comes between scores and an answer: attributes that must match, quotas, diversity."""

from __future__ import annotations

import difflib
import threading
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_rec.data.table import plain_text
from lightning_rec.recommend.types import RequestError


def values_of(value: Any) -> list[str]:
    """The values of an attribute as strings: a list of them, one, or none.

    True and ``1.0`` are ``true`` and ``1``, as the readers of tables and the service write them, so that a value in a
    request is compared with that of an item in one spelling.
    """
    if value is None or value == "":
        return []
    parts = value if isinstance(value, list | tuple) else [value]
    return [text for part in parts if (text := plain_text(part)) is not None]


class RowsByValue:
    """The rows of the items that have a value in one field.

    Args:
        column: one value a row.
    """

    def __init__(self, column: Sequence[Any]) -> None:
        places: dict[str, int] = {}
        found, rows = array("q"), array("q")
        for row, value in enumerate(column):
            for part in values_of(value):
                found.append(places.setdefault(part, len(places)))
                rows.append(row)
        which = np.array(found, dtype=np.int64)
        self._places = places
        # rows come in order, and a stable sort keeps it within each value
        self._rows: NDArray[np.int64] = np.array(rows, dtype=np.int64)[np.argsort(which, kind="stable")]
        self._starts = np.concatenate([[0], np.bincount(which, minlength=len(places)).cumsum()])

    def __getitem__(self, value: str) -> NDArray[np.int64]:
        """The rows, ascending; none for a value that no item has."""
        place = self._places.get(value)
        return self._rows[:0] if place is None else self._rows[self._starts[place] : self._starts[place + 1]]


class Fields(Mapping[str, Sequence[Any]]):
    """The attributes of one catalogue, and for each field that was asked about the rows of its values.

    It is never changed: a catalogue with other attributes has another one.

    Args:
        columns: one value a row for each field.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = columns
        self._by_value: dict[str, RowsByValue] = {}
        self._making = threading.Lock()

    def __getitem__(self, name: str) -> Sequence[Any]:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def by_value(self, name: str) -> RowsByValue:
        """The rows of each value of a field, made when the field is first asked about."""
        found = self._by_value.get(name)
        if found is None:
            with self._making:  # once, though several threads come here at the same time
                found = self._by_value.get(name)
                if found is None:
                    found = self._by_value[name] = RowsByValue(self._columns[name])
        return found


def check_fields(asked: Mapping[str, Any], attributes: Mapping[str, Sequence[Any]], option: str) -> None:
    """Refuses a field that the items do not have.

    Raises:
        RequestError: with the code ``unknown_field``.
    """
    for name in asked:
        if name not in attributes:
            near = difflib.get_close_matches(name, attributes, n=1)
            raise RequestError(
                f"{option} names the field {name!r}, which the items do not have.",
                "unknown_field",
                (f"Did you mean {near[0]!r}? " if near else "") + f"The fields are: {', '.join(attributes) or 'none'}.",
            )


def matching(where: Mapping[str, Any], attributes: Mapping[str, Sequence[Any]], n_rows: int) -> Tensor:
    """``(n_rows,)`` True where an item has, for every field, one of the allowed values.

    Args:
        where: for each field a value, or a list of allowed ones.
        attributes: one value a row for each field; :class:`Fields` remember which rows have a value.
        n_rows: number of rows.
    """
    fields = attributes if isinstance(attributes, Fields) else Fields(attributes)
    allowed = np.ones(n_rows, dtype=bool)
    for name, wanted in where.items():
        by_value = fields.by_value(name)
        one = np.zeros(n_rows, dtype=bool)
        for value in values_of(wanted):
            one[by_value[value]] = True
        allowed &= one
    return torch.from_numpy(allowed)


class Quota:
    """Counts how often each value of some fields has been taken; items without a value are not limited.

    Args:
        at_most: largest number of items for each value of a field.
        attributes: one value a row for each field.
    """

    def __init__(self, at_most: Mapping[str, int], attributes: Mapping[str, Sequence[Any]]) -> None:
        self._limits = [(limit, attributes[name], Counter[str]()) for name, limit in at_most.items()]

    def take(self, row: int) -> bool:
        """Takes a row if no quota is full; says whether it did."""
        if not all(counts[value] < limit for limit, column, counts in self._limits for value in values_of(column[row])):
            return False
        for _, column, counts in self._limits:
            counts.update(values_of(column[row]))
        return True


def select(rows: Sequence[int], quota: Quota, k: int) -> list[int]:
    """Places in ``rows`` (best first) of the first ``k`` that the quota lets through."""
    chosen: list[int] = []
    for place, row in enumerate(rows):
        if len(chosen) == k:
            break
        if quota.take(row):
            chosen.append(place)
    return chosen


def diversify(
    scores: Tensor, vectors: Tensor, rows: Sequence[int], quota: Quota, k: int, diversity: float
) -> list[int]:
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).

    Each step takes the item with the largest ``(1 - diversity) * relevance - diversity * similarity``, where relevance
    is the score scaled to 0 .. 1 over the pool and similarity the largest cosine with what was taken before.

    Args:
        scores: ``(p,)`` scores of the pool, best first.
        vectors: ``(p, d)`` item vectors of the pool.
        rows: catalogue rows of the pool.
        quota: what may be taken.
        k: how many.
        diversity: between 0 and 1.

    Returns:
        Places in the pool, in the order in which they were taken.
    """
    span = (scores[0] - scores[-1]).clamp_min(1e-12)
    relevance = (1 - diversity) * (scores - scores[-1]) / span
    unit = F.normalize(vectors, dim=-1)
    nearest = torch.zeros(len(rows))  # nothing taken: the best score comes first
    open_places = torch.ones(len(rows), dtype=torch.bool)
    chosen: list[int] = []
    while len(chosen) < k and bool(open_places.any()):
        value = (relevance - diversity * nearest).masked_fill(~open_places, -torch.inf)
        place = int(value.argmax())
        open_places[place] = False
        if not quota.take(rows[place]):
            continue
        similarity = unit @ unit[place]
        nearest = similarity if not chosen else torch.maximum(nearest, similarity)
        chosen.append(place)
    return chosen
