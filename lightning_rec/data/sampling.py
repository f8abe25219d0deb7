"""Negatives that are never a known positive of the user, drawn exactly and in bounded time.

Drawing and throwing away what is known takes ever longer for a user who knows nearly everything. Here the known rows
are cut out of the distribution beforehand, so that every draw counts: the cost of ``n`` draws for a user with ``k``
known rows is O((n + k) log n_rows), whatever the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rows = NDArray[np.int64]
Weights = NDArray[np.float64]
Distribution = Literal["uniform", "popularity"]


def _check_known(known: Rows, n_rows: int) -> None:
    if len(known) and not (known[0] >= 1 and known[-1] < n_rows and np.all(np.diff(known) > 0)):
        raise ValueError(f"Known rows are distinct, ascending and between 1 and {n_rows - 1} (see known_rows).")


def known_rows(items: ArrayLike) -> Rows:
    """The distinct rows of a history in ascending order, padding left out: what the functions here call known."""
    distinct = np.unique(np.asarray(items, np.int64))
    return distinct[np.searchsorted(distinct, 1) :]


def complement_uniform(rng: np.random.Generator, n_rows: int, known_sorted: ArrayLike, n: int) -> Rows:
    """Draws uniformly, with replacement, from rows ``1 .. n_rows - 1`` without the known ones.

    A rank among the unknown rows is drawn and shifted by the number of known rows before it.

    Args:
        rng: source of randomness.
        n_rows: catalogue rows, padding included.
        known_sorted: ``(k,)`` distinct known rows, ascending.
        n: number of draws.

    Returns:
        ``(n,)`` int64 rows; empty when every row is known.
    """
    known = np.asarray(known_sorted, np.int64)
    _check_known(known, n_rows)
    drawn = _uniform(rng, n_rows, [known], n)[0]
    return drawn if n_rows - 1 > len(known) else drawn[:0]


def complement_weighted(
    rng: np.random.Generator, cumulative_weights: Weights, weights: Weights, known_sorted: ArrayLike, n: int
) -> Rows:
    """Draws in proportion to weights, with replacement, from rows ``1 .. n_rows - 1`` without the known ones.

    The known rows cut the others into gaps. A gap is drawn by its weight, then a row in it, both by the inverse of
    the cumulative weights. The weight of a gap is a difference of two sums, exactly 0 for a gap without rows, so that
    a known row cannot come out through rounding even when it holds nearly all the weight. The weight of a row counts
    to within 1e-16 of the sum of all weights.

    Args:
        rng: source of randomness.
        cumulative_weights: ``(n_rows,)`` float64 ``cumsum(weights)``.
        weights: ``(n_rows,)`` float64, not negative, ``weights[0] == 0``.
        known_sorted: ``(k,)`` distinct known rows, ascending.
        n: number of draws.

    Returns:
        ``(n,)`` int64 rows; empty when no unknown row has weight.
    """
    known = np.asarray(known_sorted, np.int64)
    _check_known(known, len(weights))
    if len(cumulative_weights) != len(weights) or weights[0] != 0:
        raise ValueError("weights[0] belongs to padding and is 0, and there is one cumulative weight a weight.")
    drawn = _weighted(rng, cumulative_weights, [known], n)[0]
    return drawn if n and drawn[0] else drawn[:0]


def _flatten(known: Sequence[Rows]) -> tuple[Rows, Rows, Rows]:
    """Rows of all users one after the other, the user of each, and the ``(b + 1,)`` offsets."""
    lengths = np.fromiter(map(len, known), np.int64, len(known))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.concatenate([*known, np.empty(0, np.int64)]).astype(np.int64)
    return flat, np.repeat(np.arange(len(known)), lengths), offsets


def _uniform(rng: np.random.Generator, n_rows: int, known: Sequence[Rows], n: int) -> Rows:
    """``(b, n)`` draws, 0 for users who know every row."""
    flat, user, offsets = _flatten(known)
    unknown = n_rows - 1 - np.diff(offsets)
    rank = rng.integers(0, np.maximum(unknown, 1)[:, None], size=(len(known), n))
    # Unknown rows before each known row. The users' stretches are set apart, so that one search serves them all.
    before = flat - 1 - (np.arange(len(flat)) - offsets[user])
    apart = np.arange(len(known))[:, None] * np.int64(n_rows + 1)
    shift = np.searchsorted(before + apart[user, 0], rank + apart, side="right") - offsets[:-1, None]
    return np.where(unknown[:, None] > 0, rank + 1 + shift, 0)


def _weighted(rng: np.random.Generator, cumulative: Weights, known: Sequence[Rows], n: int) -> Rows:
    """``(b, n)`` draws, 0 for users to whom no row with weight is unknown."""
    flat, user, offsets = _flatten(known)
    n_rows, n_users = len(cumulative), len(known)
    # User u has k + 1 gaps, at start[u] .. start[u + 1]; gap j holds the rows low[j] .. high[j] (none when low > high).
    start = offsets + np.arange(n_users + 1)
    low, high = np.ones(start[-1], np.int64), np.full(start[-1], n_rows - 1, np.int64)
    at = np.arange(len(flat)) + user
    high[at] = flat - 1
    low[at + 1] = flat + 1
    mass = np.maximum(cumulative[np.maximum(high, low - 1)] - cumulative[low - 1], 0.0)
    total = np.concatenate([[0.0], np.cumsum(mass)])
    floor, ceiling = total[start[:-1], None], total[start[1:], None]
    some = (ceiling > floor)[:, 0]

    spot = _between(rng, floor, ceiling, (n_users, n))
    gap = np.searchsorted(total[1:], spot, side="right")
    gap = np.where(some[:, None], gap, start[:-1, None])
    first, last = low[gap], np.maximum(high[gap], low[gap] - 1)
    row = np.searchsorted(cumulative, _between(rng, cumulative[first - 1], cumulative[last], (n_users, n)), "right")
    return np.where(some[:, None], np.clip(row, first, np.maximum(last, first)), 0)


def _between(rng: np.random.Generator, low: Weights, high: Weights, size: tuple[int, int]) -> Weights:
    """Uniform draws in ``[low, high)``, never ``high`` itself by rounding."""
    return np.minimum(low + rng.random(size) * (high - low), np.nextafter(high, -np.inf))


class NegativeSampler:
    """Draws negatives from one distribution over the catalogue, leaving out what a user knows.

    Args:
        counts: ``(n_rows,)`` number of training interactions of each catalogue row; ``counts[0]``, padding, is not
            looked at.
        distribution: ``uniform``, or ``popularity``: in proportion to ``max(count, 1) ** power``. Rows never touched
            weigh as much as rows touched once, so that every row can be drawn and its log is finite.
        power: 1 draws by popularity itself, 0 uniformly; 0.75 is the usual mean (Mikolov et al., 2013).
        trained_only: rows never touched are not drawn at all.

    Raises:
        ValueError: no row to draw from, negative counts, an unknown distribution.
    """

    def __init__(
        self,
        counts: ArrayLike,
        distribution: Distribution = "uniform",
        power: float = 0.75,
        trained_only: bool = False,
    ) -> None:
        counts = np.asarray(counts, np.float64)
        if distribution not in ("uniform", "popularity"):
            raise ValueError(f"The distribution of negatives is 'uniform' or 'popularity', not {distribution!r}.")
        if counts.ndim != 1 or len(counts) < 2:
            raise ValueError("There is no item to draw negatives from: counts holds one number a catalogue row.")
        if not (np.isfinite(counts[1:]).all() and (counts[1:] >= 0).all()):
            raise ValueError("Counts of interactions are finite and not negative.")
        self.distribution = distribution
        self.n_rows = len(counts)
        self.weights = np.ones(self.n_rows) if distribution == "uniform" else np.maximum(counts, 1.0) ** power
        self.weights[0] = 0.0
        if trained_only:
            self.weights[counts == 0] = 0.0
            if not self.weights.any():
                raise ValueError("There is no item to draw negatives from: none has a training interaction.")
        self._by_weight = distribution != "uniform" or trained_only
        self.cumulative = np.cumsum(self.weights)

    @property
    def probabilities(self) -> Weights:
        """``(n_rows,)`` probability of each row in one draw when nothing is known; 0 for what is never drawn."""
        return self.weights / self.cumulative[-1]

    def sample(self, rng: np.random.Generator, known_sorted: ArrayLike, n: int) -> Rows:
        """Draws for one user, see ``complement_uniform`` and ``complement_weighted``.

        Returns:
            ``(n,)`` int64 rows; empty when the user knows every row that can be drawn.
        """
        if not self._by_weight:
            return complement_uniform(rng, self.n_rows, known_sorted, n)
        return complement_weighted(rng, self.cumulative, self.weights, known_sorted, n)

    def sample_batch(self, rng: np.random.Generator, known: Sequence[Rows], n: int) -> Rows:
        """Draws for several users at once.

        Args:
            rng: source of randomness.
            known: for each of ``b`` users the distinct known rows, ascending (see ``known_rows``).
            n: number of draws a user.

        Returns:
            ``(b, n)`` int64 rows; a row of zeros (padding) for a user who knows every row that can be drawn.
        """
        for rows in known:
            _check_known(rows, self.n_rows)
        if not self._by_weight:
            return _uniform(rng, self.n_rows, known, n)
        return _weighted(rng, self.cumulative, known, n)

    def log_expected(self, n_draws: int) -> Weights:
        """``(n_rows,)`` log of the expected number of times that each row is drawn in ``n_draws`` draws.

        That is ``log(n_draws * q)``, the log-q correction of a sampled softmax (Bengio and Senecal, 2008) whose
        candidates are kept with their repeats; ``-inf`` for padding.
        """
        with np.errstate(divide="ignore"):
            return np.log(n_draws * self.probabilities)

    def inclusion(self, n_draws: int) -> Weights:
        """``(n_rows,)`` probability that each row is drawn at least once, ``1 - (1 - q) ** n_draws``.

        Its log is the correction when the candidates of a step are distinct. Computed so that it keeps its digits
        for the smallest ``q``.
        """
        with np.errstate(divide="ignore"):
            return -np.expm1(n_draws * np.log1p(-self.probabilities))
