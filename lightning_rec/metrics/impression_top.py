"""What stands at the top of a ranked impression: variety of categories, popularity, novelty."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rec.metrics.fixed_point import parts, whole
from lightning_rec.metrics.impression_base import ImpressionMetric, ImpressionResult

_FIGURES = ("category_share", "category_entropy", "category_diversity", "popularity", "novelty")


class ImpressionTop(ImpressionMetric):
    """Categories and popularity of the ``k`` best candidates of each impression, averaged over impressions.

    Labels are not needed. Of equal scores the candidate that was shown first is the better one. Of an impression with
    fewer than ``k`` candidates all are looked at.

    - ``category_share@k``: distinct categories divided by the candidates that have one: 1 when no two share a category.
    - ``category_entropy@k``: entropy of the categories in bits: 0 for one category, ``log2 k`` for all different.
    - ``category_diversity@k``: share of the pairs with different categories, the intra-list diversity (Smyth and
      McClave, "Similarity vs. diversity", ICCBR 2001; Ziegler et al., WWW 2005).
    - ``popularity@k``: mean of ``log(1 + training clicks)``.
    - ``novelty@k``: mean of ``-log2`` of the item's share of the training clicks, an item without clicks counting as if
      it had one (Vargas and Castells, RecSys 2011).

    Figures of categories leave out candidates without a category, and impressions where none (for the diversity:
    fewer than two) of the first ``k`` has one. Figures whose categories or counts are unknown are not reported.

    Args:
        k: how many candidates of each impression to look at.

    Raises:
        ValueError: when ``k`` is below 1.
    """

    totals: Tensor
    impressions: Tensor

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1.")
        self.k = k
        self._counts: Tensor | None = None
        self._groups: Tensor | None = None
        self.add_state("totals", torch.zeros(len(_FIGURES), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("impressions", torch.zeros(len(_FIGURES), dtype=torch.int64), dist_reduce_fx="sum")

    def configure(self, n_rows: int, counts: Tensor | None = None, groups: Tensor | None = None) -> None:
        """Keeps counts and categories for batches that bring none."""
        self._counts, self._groups = counts, groups

    def update(self, result: ImpressionResult) -> None:
        """Adds a batch; reads ``scores``, ``sizes``, ``rows``, ``counts`` and ``groups``."""
        real = torch.arange(result.scores.shape[1], device=result.scores.device) < result.sizes[:, None]
        # Padding behind all that is real, whatever the scores: two stable sorts.
        scores = result.scores.masked_fill(result.scores.isnan(), -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, (~real).gather(1, order).long().argsort(dim=1, stable=True))[:, : self.k]
        rows, real = result.rows.gather(1, order), real.gather(1, order)
        groups = self._groups if result.groups is None else result.groups
        counts = self._counts if result.counts is None else result.counts
        if groups is not None:
            self._add_categories(torch.where(real, groups.to(rows.device)[rows], 0))
        if counts is not None:
            number, clicks = real.sum(1), counts.to(rows.device)[rows].float()
            information = counts[1:].sum().clamp(min=1).float().log2().to(rows.device) - clicks.clamp(min=1).log2()
            for at, values in ((3, clicks.log1p()), (4, information)):
                self._add(at, (values * real).sum(1), number, number > 0)

    def compute(self) -> dict[str, Tensor]:
        """``{"category_share@10": ..., ...}``, without the figures that no impression could be measured by."""
        means = (parts(self.totals) / self.impressions.cpu()).float().to(self.totals.device)
        known = (self.impressions > 0).tolist()
        return {f"{name}@{self.k}": means[at] for at, name in enumerate(_FIGURES) if known[at]}

    def _add(self, at: int, total: Tensor, number: Tensor, counted: Tensor) -> None:
        self.totals[at] += whole(total[counted] / number[counted]).sum()
        self.impressions[at] += counted.sum()

    def _add_categories(self, groups: Tensor) -> None:
        has = groups > 0
        number = has.sum(1)
        same = (groups[:, :, None] == groups[:, None, :]) & has[:, None, :] & has[:, :, None]
        alike = same.sum(2)  # candidates of the same category, the candidate itself among them
        self._add(0, torch.where(has, 1 / alike.clamp(min=1), 0).sum(1), number, number > 0)
        surprise = torch.where(has, torch.log2(number[:, None] / alike.clamp(min=1)), 0)
        self._add(1, surprise.sum(1), number, number > 0)
        pairs = number * (number - 1)
        self._add(2, pairs - (alike.sum(1) - number), pairs, number > 1)
