"""What is recommended beyond whether it is right: coverage, novelty and the inequality of exposure."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rec.metrics.base import RankingMetric, RankingResult


class BeyondAccuracy(RankingMetric):
    """Coverage, novelty and Gini index of the first ``k`` recommendations of all users.

    - ``coverage@k``: share of the catalogue's items that were recommended at least once.
    - ``novelty@k``: mean of ``-log2 p(item)`` over everything recommended, where ``p`` is the item's share of the
      training interactions (Vargas and Castells, "Rank and relevance in novelty and diversity metrics for recommender
      systems", RecSys 2011). An item without interactions counts as if it had one, so that the figure stays finite.
      Left out when training counts are unknown.
    - ``gini@k``: inequality of exposure, from 0 (every item recommended equally often) to nearly 1 (one item takes
      all).

    The state is one number an item: how often it was recommended.

    Args:
        k: how many recommendations of each user to look at.

    Raises:
        ValueError: when ``k`` is below 1.
    """

    exposures: Tensor

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1.")
        self.k = k
        self.counts: Tensor | None = None
        self.add_state("exposures", torch.zeros(0, dtype=torch.int64), dist_reduce_fx="sum")

    def configure(self, n_rows: int, counts: Tensor | None = None) -> None:
        """Sizes the state; a process that meets no batch then still has one that can be added to the others'."""
        if self.exposures.numel() != n_rows:
            device = self.exposures.device
            self.add_state("exposures", torch.zeros(n_rows, dtype=torch.int64), dist_reduce_fx="sum")
            self.exposures = self.exposures.to(device)
        if counts is not None:
            self.counts = counts.detach().cpu()

    def update(self, result: RankingResult) -> None:
        """Adds the users of ``result``; reads ``recommended`` (its first ``k`` columns) and ``counts``.

        Raises:
            ValueError: when ``recommended`` is None, or the number of items is unknown.
        """
        if result.recommended is None:
            raise ValueError(
                f"BeyondAccuracy needs the recommended rows, and they were not computed. Ask for k >= {self.k} of them."
            )
        if self.exposures.numel() == 0:
            if result.n_items is None:
                raise ValueError(
                    "BeyondAccuracy needs the number of items. "
                    "Call `configure(n_rows)` or give `RankingResult.n_items`."
                )
            self.configure(result.n_items + 1, result.counts)
        elif self.counts is None and result.counts is not None:
            self.counts = result.counts.detach().cpu()
        rows = result.recommended[:, : self.k].flatten()
        self.exposures.scatter_add_(0, rows, (rows > 0).to(torch.int64))

    def compute(self) -> dict[str, Tensor]:
        """``{"coverage@10": ..., "novelty@10": ..., "gini@10": ...}``; NaN when nothing was recommended."""
        # On the processor, since sums over a catalogue want float64, which not every device has.
        exposures = self.exposures[1:].cpu().double()
        total, n = exposures.sum(), exposures.numel()
        figures = {f"coverage@{self.k}": (exposures > 0).double().mean()}
        if self.counts is not None:
            counts = self.counts[1:].double()
            information = counts.sum().clamp(min=1).log2() - counts.clamp(min=1).log2()
            figures[f"novelty@{self.k}"] = (exposures * information).sum() / total
        place = torch.arange(1, n + 1, dtype=torch.float64)
        figures[f"gini@{self.k}"] = ((2 * place - n - 1) * exposures.sort().values).sum() / (n * total)
        return {name: value.float().to(self.exposures.device) for name, value in figures.items()}
