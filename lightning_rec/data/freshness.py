"""When an item is alive, and how much it was read of late. Pure functions on numpy and torch.

News die in a day: what a newsroom can recommend at a moment is what has been published by then and is not yet too old.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.histories import Histories
from lightning_rec.data.moments import moment_text
from lightning_rec.data.split import Moment, read_moment
from lightning_rec.data.timestamps import parse_times

Int = NDArray[np.int64]

#: Later than any time: the birth of an item that nothing tells of, the death of one that never dies.
NEVER = np.iinfo(np.int64).max
#: The field of the item table that holds the time of publication.
PUBLISHED = "published"
_HOUR = 3600.0


@dataclass
class Lifetimes:
    """From when until when each item can be recommended: at time ``t`` where ``born <= t <= dies``.

    Attributes:
        born: ``(n_rows,)`` int64 seconds since 1970; ``NEVER`` for padding and for an item without a known birth.
        dies: ``(n_rows,)`` int64 seconds since 1970; ``NEVER`` where there is no limit.
        max_age: the limit in hours, or infinity.
    """

    born: Int
    dies: Int
    max_age: float
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, born: Int, max_age: float) -> Lifetimes:
        """Lives of ``max_age`` hours.

        Args:
            born: ``(n_rows,)`` as above.
            max_age: hours; infinity lets an item live on once it is born.
        """
        life = max_age * _HOUR
        dies = np.full(len(born), NEVER, dtype=np.int64)
        # A life so long that its end is no int64 has none; neither has one that never began.
        if life < 2.0**62:
            limited = born < 2**62
            dies[limited] = born[limited] + int(life)
        return cls(born, dies, max_age)

    def describe(self, missed: int) -> str:
        """What is a candidate, and how many test targets are none, for the protocol."""
        old = f" and at most {self.max_age:g} hours old" if np.isfinite(self.max_age) else ""
        return (
            f"candidates are the items alive when a user asks, born by then{old}; {missed:,} of the test targets are "
            "not and count as misses"
        )

    def alive(self, rows: Int, times: Int) -> NDArray[np.bool_]:
        """True where a row is alive at its time; both of one shape."""
        return (self.born[rows] <= times) & (times <= self.dies[rows])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``born`` and ``dies`` as tensors on a device; they are moved there once."""
        if device not in self._moved:
            self._moved[device] = (torch.from_numpy(self.born).to(device), torch.from_numpy(self.dies).to(device))
        return self._moved[device]


def lifetimes(
    catalogue: Catalogue, rows: Int, times: Int | None, max_age: float | Literal["all"] | None
) -> Lifetimes | None:
    """From when until when each item can be recommended; None: always.

    Args:
        catalogue: of the run.
        rows: ``(e,)`` catalogue row of every interaction of the log.
        times: ``(e,)`` seconds since 1970, or None.
        max_age: hours; ``all`` or None for no limit.

    Raises:
        ValueError: a limit without times, or a publication that is no time.
    """
    if max_age is None or isinstance(max_age, str):
        return None
    if times is None:
        raise ValueError(
            "max_age needs times, and the interactions have none. Map a column to timestamp, or set data.max_age: all."
        )
    return Lifetimes.of(births(catalogue, rows, times), max_age)


def asked_at(times: Int | None, request_time: Moment | None) -> int | None:
    """The moment for which predictions are made: the one asked for, or that of the newest interaction.

    Args:
        times: ``(e,)`` seconds since 1970, or None.
        request_time: seconds since 1970 or an ISO date or time.

    Raises:
        ValueError: a moment is asked for, and there are no times.
    """
    if times is None or not len(times):
        if request_time is not None:
            raise ValueError("request_time needs times, and the interactions have none. Map a column to timestamp.")
        return None
    return int(times.max()) if request_time is None else read_moment(request_time, np.sort(times), "request_time")


def births(catalogue: Catalogue, rows: Int, times: Int) -> Int:
    """The birth of each item: its publication, or the first interaction with it where that is earlier or all there is.

    A birth told by an interaction is the time of that interaction, so that at any earlier moment the item is not alive:
    nothing of the future is used. An item that was read before it was published, as clocks differ, is born when it was
    read.

    Args:
        catalogue: whose item table may have a field ``published``.
        rows: ``(e,)`` catalogue row of every interaction of the log, 0 for unknown items.
        times: ``(e,)`` seconds since 1970.

    Returns:
        ``(n_rows,)`` int64 seconds since 1970, ``NEVER`` where nothing is known and for padding.

    Raises:
        ValueError: a publication cannot be read as a time.
    """
    born = publications(catalogue)
    np.minimum.at(born, rows, times)
    born[0] = NEVER
    return born


def publications(catalogue: Catalogue) -> Int:
    """``(n_rows,)`` int64 seconds since 1970 of the field ``published``; ``NEVER`` where an item has none.

    Raises:
        ValueError: naming an item, when a publication cannot be read as a time.
    """
    born = np.full(len(catalogue), NEVER, dtype=np.int64)
    if catalogue.table is None or PUBLISHED not in catalogue.table.column_names:
        return born
    values = [moment_text(value) for value in catalogue.attribute(PUBLISHED)]
    filled = np.flatnonzero([value is not None for value in values])
    if not len(filled):
        return born
    found = parse_times(pa.chunked_array([pa.array([values[row] for row in filled], pa.string())]))
    if found.bad:
        place, why = next(iter(found.bad.items()))
        raise ValueError(
            f"The item {catalogue.ids[filled[place]]!r} has a {PUBLISHED} time that cannot be used: {why} "
            f"({len(found.bad):,} of {len(filled):,} items). Correct it, or leave the field out of the items: an item "
            "is then born with its first interaction."
        )
    born[filled] = found.seconds
    return born


def recent_counts(histories: Histories, counted: NDArray[np.bool_], n_rows: int, half_life: float) -> Tensor | None:
    """Interactions of each row, each halved with every half-life between it and the newest of them.

    Args:
        histories: the events.
        counted: ``(n,)`` the events that count, those of training.
        n_rows: of the catalogue.
        half_life: in hours.

    Returns:
        ``(n_rows,)`` float32; what is older than about 150 half-lives counts as nothing. None without times.
    """
    if histories.times is None:
        return None
    times = histories.times[counted]
    weights = np.exp2((times - times.max(initial=0)) / (half_life * _HOUR))
    return torch.from_numpy(np.bincount(histories.items[counted], weights, minlength=n_rows).astype(np.float32))
