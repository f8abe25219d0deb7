"""Random changes of training histories: crop, mask and reorder. Pure functions on numpy.

Only what a tower reads is changed, and only in training. What is to be found stays as it was, and a step whose history
would know something later than itself is not supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Mask = NDArray[np.bool_]

_CROP, _CROP_PLACE, _REORDER, _REORDER_PLACE, _REORDER_KEYS, _MASK, _MASK_KEYS = range(7)


@dataclass(frozen=True)
class HistoryAugmentation:
    """Crop, reorder and mask training histories, in this order, each with a probability of its own.

    The augmentations of Xie et al., "Contrastive Learning for Sequential Recommendation" (CL4SRec, ICDE 2022), on the
    input of the usual training. What is drawn depends on the seed, the epoch and the sample only, so that a resumed run
    and any number of devices or workers see the same.

    Targets are never changed. After a crop the steps inside it are supervised by what really followed them. In a
    reordered stretch, the steps whose history would hold an event later than themselves (their own target may be it)
    are not supervised. A masked event stays in its place as an unknown item, row 0: a zero vector to id vectors, unless
    the whole catalogue is scored, which trains a vector for it; the vector of an empty text to text towers. Times stay
    in their places and in order. Users' texts are not changed.

    Of an impression the history alone is changed, never what was shown, its labels, or what is known to be no negative
    of the user. What follows the whole history is learned from, so that a crop keeps the newest events.

    Args:
        crop: probability that a history is cut to a random stretch of itself. Where only the end of a sample is
            supervised (``supervision: random`` or ``last``), the stretch is the newest.
        crop_ratio: length of the stretch as a share of the history, at least one event.
        mask: probability that some events of a history are masked.
        mask_ratio: share of the events that are masked, rounded down.
        reorder: probability that a random stretch of a history is shuffled.
        reorder_ratio: length of that stretch as a share of the history, rounded down.

    Raises:
        ValueError: a number outside its range.
    """

    crop: float = 0.0
    crop_ratio: float = 0.6
    mask: float = 0.0
    mask_ratio: float = 0.3
    reorder: float = 0.0
    reorder_ratio: float = 0.6

    def __post_init__(self) -> None:
        for name in ("crop", "mask", "reorder"):
            chance, ratio = getattr(self, name), getattr(self, f"{name}_ratio")
            if not 0 <= chance <= 1:
                raise ValueError(f"history_augmentation.{name} is a probability from 0 to 1, not {chance}.")
            if not 0 < ratio <= 1:
                raise ValueError(
                    f"history_augmentation.{name}_ratio is a share of the history, above 0 and at most 1, not {ratio}."
                )
        if self.mask_ratio == 1:
            raise ValueError("history_augmentation.mask_ratio is below 1: of an all-masked history nothing is learned.")

    def cropped(
        self, starts: Int, ends: Int, seed: Sequence[int], numbers: Int, keep_end: bool = False
    ) -> tuple[Int, Int]:
        """Cuts some samples to a stretch of themselves.

        Args:
            starts: ``(s,)`` offset of the first event of each sample.
            ends: ``(s,)`` offset after its last event, which is a target only.
            seed: seed of the run, and epoch.
            numbers: ``(s,)`` number of each sample in the data set.
            keep_end: leave the ends as they are.

        Returns:
            New starts and ends: at least one event before the last, where there was one.
        """
        if not self.crop:
            return starts, ends
        steps = ends - starts - 1
        kept = np.minimum(np.maximum((steps * self.crop_ratio).astype(np.int64), 1), steps)
        kept = np.where(uniform(seed, numbers, _CROP)[:, 0] < self.crop, kept, steps)
        room = steps - kept
        shift = room if keep_end else _choose(uniform(seed, numbers, _CROP_PLACE)[:, 0], room + 1)
        starts = starts + shift
        return starts, starts + kept + 1

    def changed(self, history: Int, mask: Mask, seed: Sequence[int], numbers: Int) -> tuple[Int, Mask]:
        """Reorders and masks some histories.

        Args:
            history: ``(s, t)`` catalogue rows, oldest first, right-padded.
            mask: ``(s, t)`` True where there is an event.
            seed: seed of the run, and epoch.
            numbers: ``(s,)`` number of each sample in the data set.

        Returns:
            ``(s, t)`` rows, 0 where an event is masked; and ``(s, t)`` True where there is an event and nothing up to
            it happened after it, so that it may be supervised. That is always so for the last event.
        """
        lengths, width = mask.sum(1), mask.shape[1]
        known = mask
        chosen = np.flatnonzero(uniform(seed, numbers, _REORDER)[:, 0] < self.reorder)
        if len(chosen) and width:
            order = self._order(lengths[chosen], width, seed, numbers[chosen])
            history, known = history.copy(), mask.copy()
            history[chosen] = np.take_along_axis(history[chosen], order, axis=1)
            known[chosen] &= np.maximum.accumulate(order, axis=1) == np.arange(width)
        chosen = np.flatnonzero(uniform(seed, numbers, _MASK)[:, 0] < self.mask)
        if len(chosen) and width:
            masked = np.zeros_like(mask)
            masked[chosen] = self._masked(lengths[chosen], mask[chosen], seed, numbers[chosen])
            history = np.where(masked, 0, history)
        return history, known

    def _order(self, lengths: Int, width: int, seed: Sequence[int], numbers: Int) -> Int:
        """``(s, t)`` which event comes to each place."""
        size = (lengths * self.reorder_ratio).astype(np.int64)
        first = _choose(uniform(seed, numbers, _REORDER_PLACE)[:, 0], lengths - size + 1)[:, None]
        places = np.arange(width)
        inside = (places >= first) & (places < first + size[:, None])
        drawn = first + size[:, None] * uniform(seed, numbers, _REORDER_KEYS, width)
        return np.argsort(np.where(inside, drawn, places), axis=1, kind="stable")

    def _masked(self, lengths: Int, mask: Mask, seed: Sequence[int], numbers: Int) -> Mask:
        """``(s, t)`` True where an event is masked."""
        size = (lengths * self.mask_ratio).astype(np.int64)[:, None]
        keys = np.where(mask, uniform(seed, numbers, _MASK_KEYS, mask.shape[1]), np.inf)
        last = np.take_along_axis(np.sort(keys, axis=1), np.maximum(size - 1, 0), axis=1)
        return (keys <= last) & (size > 0)


def _choose(drawn: NDArray[np.float64], sizes: Int) -> Int:
    """A whole number below each size."""
    return np.minimum((drawn * sizes).astype(np.int64), sizes - 1)


def uniform(seed: Sequence[int], numbers: Int, purpose: int, width: int = 1) -> NDArray[np.float64]:
    """Random numbers that depend on nothing but the arguments, without a loop over samples.

    A counter-based generator: the mixing function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over its input.

    Args:
        seed: any whole numbers.
        numbers: ``(s,)`` number of each sample.
        purpose: what the numbers are for, so that different draws of one sample are independent.
        width: how many are drawn for each sample.

    Returns:
        ``(s, width)`` numbers from 0 up to, not including, 1.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in (*seed, purpose):
        state = _mixed(state + np.array([part % 2**64], dtype=np.uint64))
    state = _mixed(state + np.asarray(numbers).astype(np.uint64))
    draws = np.arange(width).astype(np.uint64)
    state = _mixed(state[:, None] + draws)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # products wrap around, as they should
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
