"""What comes between scores and an answer: attributes that must match, quotas, diversity."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rec.recommend.types import RequestError


def values_of(value: Any) -> list[str]:
    """The values of an attribute as strings: a list of them, one, or none."""
    if value is None or value == "":
        return []
    return [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]


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
    """``(n_rows,)`` True where an item has, for every field, one of the allowed values."""
    allowed = torch.ones(n_rows, dtype=torch.bool)
    for name, wanted in where.items():
        values = set(values_of(wanted))
        allowed &= torch.tensor([not values.isdisjoint(values_of(value)) for value in attributes[name]])
    return allowed


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
