"""How well the candidates of an impression are ordered: AUC, MRR and NDCG, as the MIND data set defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rec.metrics.impression_base import ImpressionMetric, ImpressionResult

# Figures lie in [0, 1] and are summed as whole numbers of 2^-32, as in RankingMetrics: the same total in any order.
_UNIT = 2.0**32


class ImpressionRanking(ImpressionMetric):
    """AUC, MRR and NDCG of each impression, averaged over impressions (Wu et al., "MIND: a large-scale dataset for news
    recommendation", ACL 2020).

    - ``auc``: share of the pairs of a click and a non-click that the scores order rightly, a tie counting half.
    - ``mrr``: mean, over the clicks of the impression, of 1 / rank. (Not of the first click alone: that is what MIND's
      own evaluation does.)
    - ``ndcg@k``: gain ``2^label - 1``, so 1 for a click, discounted by ``log2(1 + rank)``, over the best possible.
    - ``impressions``: number of impressions in the averages.
    - ``impressions_skipped``: those that lack a click or a non-click, which no order can be good or bad for.

    In MRR and NDCG ties are broken against the model: a click stands behind every non-click with the same score, so
    that constant scores earn no credit. A score of NaN counts as the worst one for its candidate. Candidates without a
    label are left out, the others close up. A candidate that was shown twice counts twice.

    Args:
        ks: cut-offs of NDCG.

    Raises:
        ValueError: for a cut-off below 1.
    """

    totals: Tensor
    impressions: Tensor
    skipped: Tensor

    def __init__(self, ks: Sequence[int] = (5, 10)) -> None:
        super().__init__()
        if not ks or min(ks) < 1:
            raise ValueError(f"The cut-offs `ks` are {list(ks)}; give at least one, each at least 1.")
        self.ks = tuple(ks)
        self.add_state("totals", torch.zeros(2 + len(self.ks), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("impressions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("skipped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, result: ImpressionResult) -> None:
        """Adds a batch; reads ``scores``, ``labels`` and ``sizes``."""
        lists = Sorted.of(result.scores, result.labels, result.sizes)
        fit = (lists.clicks.any(1)) & (lists.rest.any(1))
        self.impressions += fit.sum()
        self.skipped += (~fit).sum()
        lists = lists[fit]
        figures = [auc(lists), mrr(lists), *(ndcg(lists, k) for k in self.ks)]
        self.totals += torch.stack([(x * _UNIT).round().long().sum() for x in figures])

    def compute(self) -> dict[str, Tensor]:
        """``{"auc": ..., "mrr": ..., "ndcg@5": ..., ...}``; NaN when no impression could be measured."""
        means = (self.totals.cpu().double() / _UNIT / self.impressions.cpu()).float().to(self.totals.device)
        figures = dict(zip(("auc", "mrr", *(f"ndcg@{k}" for k in self.ks)), means, strict=True))
        return figures | {"impressions": self.impressions.float(), "impressions_skipped": self.skipped.float()}


@dataclass
class Sorted:
    """The labelled candidates of each impression from the best to the worst score, then everything else.

    Attributes:
        scores: ``(b, c)`` scores in that order.
        clicks: ``(b, c)`` True at clicks. Of equal scores, clicks come last.
        rest: ``(b, c)`` True at non-clicks.
    """

    scores: Tensor
    clicks: Tensor
    rest: Tensor

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor, sizes: Tensor) -> Sorted:
        """Sorts the candidates of impressions; see :class:`ImpressionResult` for the shapes."""
        real = torch.arange(labels.shape[1], device=labels.device) < sizes[:, None]
        clicks, rest = (labels == 1) & real, (labels == 0) & real
        # Two stable sorts: by kind (non-click, click, neither), then by score.
        first = torch.where(rest, 0, torch.where(clicks, 1, 2)).argsort(dim=1, stable=True)
        worst = torch.where(rest, torch.inf, -torch.inf).to(scores.dtype)
        ordered = torch.where(scores.isnan() | ~(clicks | rest), worst, scores).gather(1, first)
        ordered, second = ordered.sort(dim=1, descending=True, stable=True)
        order = first.gather(1, second)
        return cls(ordered, clicks.gather(1, order), rest.gather(1, order))

    def __getitem__(self, rows: Tensor) -> Sorted:
        return Sorted(self.scores[rows], self.clicks[rows], self.rest[rows])


def auc(lists: Sorted) -> Tensor:
    """``(b,)`` share of pairs in the right order, ties half: the area under the ROC curve."""
    before = lists.rest.cumsum(1)  # at a click: non-clicks with a score as high as its own or higher
    place = torch.arange(lists.scores.shape[1], device=lists.scores.device).expand_as(before)
    tied = torch.zeros_like(lists.rest)
    tied[:, 1:] = lists.scores[:, 1:] == lists.scores[:, :-1]
    start = torch.where(tied, 0, place).cummax(1).values  # where the candidates of this score begin
    higher = (before - lists.rest.long()).gather(1, start)
    clicks, rest = lists.clicks.sum(1), lists.rest.sum(1)
    lost = (lists.clicks * (before + higher)).sum(1)  # counted twice, so that a tie is one half
    return (2 * clicks * rest - lost) / (2 * clicks * rest)


def mrr(lists: Sorted) -> Tensor:
    """``(b,)`` mean of 1 / rank over the clicks of each impression."""
    rank = torch.arange(1, lists.scores.shape[1] + 1, device=lists.scores.device)
    return (lists.clicks / rank).sum(1) / lists.clicks.sum(1)


def ndcg(lists: Sorted, k: int) -> Tensor:
    """``(b,)`` NDCG of the first ``k`` candidates, with gain 1 for a click."""
    k = min(k, lists.scores.shape[1])
    gains = 1 / torch.log2(torch.arange(2, k + 2, device=lists.scores.device, dtype=torch.float32))
    best = gains.cumsum(0)
    clicks = lists.clicks.sum(1).clamp(1, k) if k else lists.clicks.sum(1)
    return (lists.clicks[:, :k] * gains).sum(1) / best[clicks - 1]
