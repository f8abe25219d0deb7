"""The baselines that a model of impressions must beat: recency popularity, popularity and chance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rec import checkpoint as saved
from lightning_rec.data.batch import Batch
from lightning_rec.impression import ImpressionTwoTower
from lightning_rec.metrics import ImpressionMetric
from lightning_rec.towers import ConstantUserTower, PopularityItemTower


class ImpressionPopularity(ImpressionTwoTower):
    """Scores a candidate by how often it was clicked, or by chance. There is nothing to train.

    Counts become ``log(1 + count)``, which changes no order and suits the calibration of click probabilities.

    Args:
        kind: ``recent``: clicks before the request, each halved with every half-life since (the data module's
            ``half_life``): of a news log the baseline to beat; ``total``: clicks in training; ``random``: a number
            drawn from impression and item.
        seed: of the random numbers.
        metrics: metrics of validation and test; see :class:`ImpressionTwoTower`.

    Example::

        model: {class_path: lightning_rec.ImpressionPopularity, init_args: {kind: recent}}
    """

    def __init__(
        self,
        kind: Literal["recent", "total", "random"] = "recent",
        seed: int = 0,
        metrics: list[ImpressionMetric] | None = None,
    ) -> None:
        super().__init__(PopularityItemTower(), ConstantUserTower(), metrics=metrics)
        saved.save_plain_hyperparameters(self)
        self.kind = kind
        self.seed = seed

    def candidate_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(b, c)`` scores, and ``(b,)`` True: no user is unknown to a count.

        Raises:
            ValueError: when recent clicks are asked for and the data has no times.
        """
        assert batch.impressions is not None
        shown = batch.impressions
        known = torch.ones(len(shown), dtype=torch.bool, device=shown.candidates.device)
        if self.kind == "total":
            return torch.log1p(self.train_counts[shown.candidates].float()), known
        if self.kind == "random":
            assert batch.index is not None
            return drawn(self.seed, batch.index[:, None], shown.candidates), known
        if shown.popularity is None:
            raise ValueError(
                "kind: recent counts the clicks before a request, and the impressions have no times: use kind: total."
            )
        return torch.log1p(shown.popularity), known


def drawn(seed: int, left: Tensor, right: Tensor) -> Tensor:
    """A number in [0, 1) for each pair of integers: the same wherever and whenever it is asked for.

    Args:
        seed: another seed gives other numbers.
        left: int64.
        right: int64, of a shape that fits.

    Returns:
        float32 of the common shape: the high bits of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    state = _mix(_mix(torch.full_like(left, seed)) + left)
    return ((_mix(state + right) >> 40) & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15; int64 wraps around
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
