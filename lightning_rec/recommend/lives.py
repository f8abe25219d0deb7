"""When an item can be recommended, for runs whose candidates are what is alive when a user asks (``data.max_age``)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_rec.data.moments import moment_text
from lightning_rec.recommend.types import RequestError

#: The columns of ``items.parquet``, seconds since 1970; null: never.
BORN, DIES = "born", "dies"
#: The part of the manifest, and the field of an item that holds its publication.
LIVES, PUBLISHED = "lives", "published"
_NEVER = torch.iinfo(torch.int64).max
_HOUR = 3600.0
#: Writings of which each text reads the same, whatever others of them stand in its column: seconds, and ISO dates,
#: without those that 64 bits of nanoseconds may not hold.
_ALIKE = (re.compile(r"[1-9][0-9]{8,10}"), re.compile(r"(1[789]|2[01])[0-9]{2}-[0-9]{1,2}-[0-9]{1,2}([T ].*)?"))


@dataclass(frozen=True, eq=False)
class Lives:
    """From when until when each row can be recommended: at a moment ``t`` where ``born <= t <= dies``.

    Attributes:
        born: ``(n,)`` int64 seconds since 1970; the largest int64 for never.
        dies: ``(n,)`` likewise.
        max_age: how long an item lives, in hours; infinity: for ever.
    """

    born: Tensor
    dies: Tensor
    max_age: float

    @classmethod
    def of(cls, table: pa.Table, part: Mapping[str, Any]) -> Lives:
        """Of the items of an artefact.

        Args:
            table: ``items.parquet``, one row an item.
            part: what the manifest says: ``max_age``, None for no limit.
        """
        born, dies = (
            torch.tensor([_NEVER, *table.column(name).fill_null(_NEVER).to_pylist()], dtype=torch.int64)
            for name in (BORN, DIES)
        )
        return cls(born, dies, math.inf if part["max_age"] is None else float(part["max_age"]))

    def at(self, moment: int) -> Tensor:
        """``(n,)`` True where a row is alive."""
        return (self.born <= moment) & (moment <= self.dies)

    def span(self, moment: int) -> tuple[int, int]:
        """The span of time, from the first number to before the second, in which the same rows are alive."""
        ends = self.dies[self.dies < _NEVER] + 1
        changes = torch.cat([self.born[self.born < _NEVER], ends])
        past, future = changes[changes <= moment], changes[changes > moment]
        return int(past.max()) if len(past) else -_NEVER, int(future.min()) if len(future) else _NEVER

    def check(self, listed: Tensor, moment: int, folder: Path) -> None:
        """Warns when no item is alive.

        Args:
            listed: ``(n,)`` True for the items of the catalogue.
            moment: seconds since 1970.
            folder: of the artefact, for the message.
        """
        if not bool((listed & self.at(moment)).any()):
            warnings.warn(
                f"No item of {folder} is alive: each lives for {self.max_age:g} hours. Answers will be empty until "
                "items are added; export a newer run, or give the moment of the requests (now).",
                stacklevel=4,
            )

    def with_born(self, moments: Mapping[int, int | None], n: int, first: Lives | None = None) -> Lives:
        """With other births.

        Args:
            moments: row -> seconds since 1970, None for what the row had at first.
            n: how many rows there are now.
            first: the lives at first; None: these.
        """
        first = self if first is None else first
        added = self.born.new_full((n - len(self.born),), _NEVER)
        born, dies = torch.cat([self.born, added]), torch.cat([self.dies, added])
        life = int(self.max_age * _HOUR) if self.max_age * _HOUR < 2.0**62 else None
        for row, moment in moments.items():
            if moment is None:
                born[row], dies[row] = first.born[row], first.dies[row]
                continue
            born[row] = moment
            dies[row] = _NEVER if life is None else moment + life
        return replace(self, born=born, dies=dies)


def publications(fields: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """When items were published, in seconds since 1970, by their field ``published``; None for those without.

    Raises:
        RequestError: a time that cannot be read; with the code ``bad_published``.
    """
    found: list[int | None] = []
    for time in publications_or_errors(fields):
        if isinstance(time, RequestError):
            raise time
        found.append(time)
    return found


def publications_or_errors(fields: Sequence[Mapping[str, Any]]) -> list[int | RequestError | None]:
    """The same, with the error of each item in its place.

    What a time says depends on its own text alone, not on those beside it: an item that comes with others was
    published when it would have been alone.
    """
    texts = [moment_text(item.get(PUBLISHED)) for item in fields]
    read = _read({text for text in texts if text is not None})
    found: list[int | RequestError | None] = []
    for item, text in zip(fields, texts, strict=True):
        time = None if text is None else read[text]
        found.append(_error(item, time) if isinstance(time, str) else time)
    return found


def _error(item: Mapping[str, Any], wrong: str) -> RequestError:
    return RequestError(
        f"The item {item.get('item_id')!r} has a {PUBLISHED} time that cannot be used: {wrong}.",
        "bad_published",
        "Give seconds since 1970 or an ISO date and time, or leave it out: an item then lives from now on.",
    )


def _read(texts: Set[str]) -> dict[str, int | str]:
    """Text -> seconds since 1970, or what is wrong with it."""
    found: dict[str, int | str] = {}
    for writing in _ALIKE:  # many at once take a thousandth of the time
        alike = [text for text in texts if writing.fullmatch(text)]
        found |= {text: time for text, time in zip(alike, _column(alike), strict=True) if isinstance(time, int)}
    for text in texts - found.keys():
        found[text] = _column([text])[0]
    return found


def _column(texts: Sequence[str]) -> list[int | str]:
    """The times of texts that are written alike; in the place of others, what is wrong with them."""
    if not texts:
        return []
    from lightning_rec.data.timestamps import parse_times  # pandas takes a second to import

    times = parse_times(pa.chunked_array([pa.array(texts, pa.string())]))
    return [times.bad.get(row, int(seconds)) for row, seconds in enumerate(times.seconds)]


def moment(given: int | str | None) -> int | None:
    """Seconds since 1970 of a moment that somebody wrote: such a number, or an ISO date and time; None stays None.

    Raises:
        ValueError: it is neither.
    """
    try:
        return publications([{PUBLISHED: given}])[0]
    except RequestError:
        raise ValueError(f"now is {given!r}: give seconds since 1970, or a date such as 2019-11-10T12:00:00.") from None
