"""What a live system would know of a candidate at the moment of a request: its age and its popularity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # an artefact is read without the libraries that a log is read with
    from lightning_rec.data.impressions import Impressions

Int = NDArray[np.int64]
Float32 = NDArray[np.float32]
_HOUR = 3600.0


class Ages:
    """Hours from the publication of an item to a request.

    An item whose publication is unknown counts from the first impression that showed it. That impression is never
    later than a request that shows the item, so that nothing of the future is used.

    Args:
        impressions: those that may be looked at, with times.
        visible: ``(n,)`` True where an impression may be looked at.
        published: ``(n_rows,)`` float64 seconds since 1970, NaN where unknown.
    """

    def __init__(self, impressions: Impressions, visible: NDArray[np.bool_], published: NDArray[np.float64]) -> None:
        assert impressions.times is not None
        first = np.full(len(published), np.inf)
        shown = visible[impressions.owner]
        np.minimum.at(
            first, impressions.candidates[shown], np.repeat(impressions.times, impressions.sizes)[shown].astype(float)
        )
        self.born = np.where(np.isnan(published), first, published)

    def __call__(self, rows: NDArray[Any], times: Int) -> Float32:
        """Ages of ``rows`` at ``times`` (of one shape), at least 0; NaN where nothing is known."""
        return hours_since(self.born[rows], times)


def hours_since(born: NDArray[np.float64], times: Int | int) -> Float32:
    """Hours from births to moments, at least 0; NaN where a birth is infinite, that is unknown."""
    hours = np.where(np.isinf(born), np.nan, np.maximum(times - born, 0.0) / _HOUR)
    return hours.astype(np.float32)


class Popularity:
    """Clicks of an item strictly before a moment, each halved with every half-life that has passed since.

    Args:
        rows: ``(e,)`` catalogue row of each click.
        times: ``(e,)`` int64 seconds since 1970.
        half_life: in hours.
    """

    def __init__(self, rows: NDArray[Any], times: Int, half_life: float) -> None:
        self.half_life = half_life * _HOUR
        order = np.lexsort((times, rows))
        self.rows, self.times = rows[order].astype(np.int64), times[order]
        self.first = int(times.min()) if len(times) else 0
        self.span = int(self.times.max()) - self.first + 2 if len(times) else 2
        self.keys = self.rows * self.span + (self.times - self.first)
        self.sums = self._scan()

    def _scan(self) -> NDArray[np.float64]:
        """``(e,)`` the decayed number of clicks of the same item up to each click, this one included.

        Each round doubles how many clicks back a sum reaches. Only differences of times are raised to a power, so that
        nothing overflows however long the log is, and nothing is subtracted.
        """
        sums = np.ones(len(self.rows))
        reach = 1
        while reach < len(sums):
            same = self.rows[reach:] == self.rows[:-reach]
            if not same.any():
                break
            decay = np.exp2((self.times[:-reach] - self.times[reach:])[same] / self.half_life)
            sums[reach:][same] += sums[:-reach][same] * decay  # the right side is finished before the left changes
            reach *= 2
        return sums

    def __call__(self, rows: NDArray[Any], times: Int) -> Float32:
        """Popularity of ``rows`` just before ``times`` (of one shape)."""
        if not len(self.keys):
            return np.zeros(rows.shape, dtype=np.float32)
        wanted = rows.astype(np.int64)
        last = np.searchsorted(self.keys, wanted * self.span + np.clip(times - self.first, 0, self.span - 1)) - 1
        found = (last >= 0) & (self.rows[last] == wanted)
        passed = np.where(found, times - self.times[last], 0)
        return np.where(found, self.sums[last] * np.exp2(-passed / self.half_life), 0.0).astype(np.float32)
