"""Hit rate, recall, precision, NDCG, MRR and MAP from the ranks of the targets, over all of them and by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_rec.metrics.base import RankingMetric, RankingResult

# Every user's figure lies in [0, 1] and is summed as a whole number of 2^-32: whole numbers add up to the same total in
# any order, so that one process and several, and any size of batch, report the same figure to the last digit.
_UNIT = 2.0**32


def _dcg_table(k: int, like: Tensor) -> Tensor:
    """``(k + 1,)`` discounted gain of the first 0, 1 .. k places when each of them is a hit."""
    gains = 1 / torch.log2(torch.arange(2, k + 2, device=like.device, dtype=torch.float32))
    return torch.cat([gains.new_zeros(1), gains.cumsum(0)])


def hit_rate(ranks: Tensor, k: int) -> Tensor:
    """HR@k: 1 when any target is among the first k, else 0."""
    return ((ranks > 0) & (ranks <= k)).any(1).float()


def recall(ranks: Tensor, k: int) -> Tensor:
    """Recall@k: share of the user's targets that are among the first k."""
    return ((ranks > 0) & (ranks <= k)).sum(1) / (ranks > 0).sum(1)


def precision(ranks: Tensor, k: int) -> Tensor:
    """Precision@k: share of the first k places that hold a target."""
    return ((ranks > 0) & (ranks <= k)).sum(1) / k


def ndcg(ranks: Tensor, k: int) -> Tensor:
    """NDCG@k with binary gains: sum of 1 / log2(1 + rank) over the hits, divided by that of ``min(targets, k)`` hits at
    the top (Järvelin and Kekäläinen, 2002).
    """
    hit = (ranks > 0) & (ranks <= k)
    gained = (hit / torch.log2(1.0 + ranks.clamp(min=1))).sum(1)
    return gained / _dcg_table(k, ranks)[(ranks > 0).sum(1).clamp(max=k)]


def reciprocal_rank(ranks: Tensor, k: int) -> Tensor:
    """MRR@k: 1 / rank of the best target when it is among the first k, else 0."""
    best = ranks.masked_fill(ranks == 0, torch.iinfo(ranks.dtype).max).amin(1)
    return (best <= k) / best


def average_precision(ranks: Tensor, k: int) -> Tensor:
    """MAP@k: sum, over the hits, of the precision at the hit's place, divided by ``min(targets, k)``."""
    ordered = ranks.masked_fill(ranks == 0, torch.iinfo(ranks.dtype).max).sort(1).values
    place = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    return ((ordered <= k) * (place / ordered)).sum(1) / (ranks > 0).sum(1).clamp(max=k)


_FIGURES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "hr": hit_rate,
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "mrr": reciprocal_rank,
    "map": average_precision,
}


def popularity_thirds(counts: Tensor) -> Tensor:
    """Which third of the training interactions each item belongs to.

    Items are lined up from the most to the least touched, and the line is cut where a third and two thirds of all
    *interactions* have passed (not of all items, which would put nearly every interaction into the first third). Items
    with equal counts share a slice: the one in which the first of them falls.

    Args:
        counts: ``(n_rows,)`` training interactions of each row.

    Returns:
        ``(n_rows,)`` int64: 0 head, 1 torso, 2 tail. Items without interactions are tail.
    """
    counts = counts.cpu().to(torch.int64)
    levels, members = counts.unique(return_inverse=True)
    mass = torch.zeros_like(levels).scatter_add_(0, members, counts)
    more_popular = mass.flip(0).cumsum(0).flip(0) - mass
    third = (3 * more_popular // mass.sum().clamp(min=1)).clamp(max=2)
    third[levels == 0] = 2
    return third[members]


class RankingMetrics(RankingMetric):
    """The usual figures of a full ranking, averaged over users, at several cut-offs and for slices of the targets.

    With ``k`` above the number of items, the cut-off is the number of items (the figure keeps the name of the ``k``
    that was asked for). A user without a target is not counted.

    - ``hr@k``: 1 when any target is among the first k.
    - ``recall@k``: hits / number of targets.
    - ``precision@k``: hits / k.
    - ``ndcg@k``: binary gains, divided by the best that ``min(targets, k)`` hits can reach.
    - ``mrr@k``: 1 / rank of the best target, 0 beyond k.
    - ``map@k``: precision at each hit, summed and divided by ``min(targets, k)``.
    - ``users``: number of users in the averages.

    A slice keeps the ranks of the full ranking and looks at the targets of one kind only, as if the others were
    irrelevant; its figures are averages over the users with at least one such target, whose number is
    ``<slice>/users``. An empty slice reports ``users`` alone. Slices of the targets, by training interactions:

    - ``cold`` without any, ``warm`` with some;
    - ``head``, ``torso``, ``tail``: the most touched items that hold a third of all interactions, the next third, and
      the rest, cold items included (:func:`popularity_thirds`).

    Args:
        ks: cut-offs.
        names: which of ``hr``, ``recall``, ``precision``, ``ndcg``, ``mrr``, ``map`` to report.
        slices: which of ``cold``, ``warm``, ``head``, ``torso``, ``tail`` to report besides all targets.

    Raises:
        ValueError: for an unknown name or slice, or a cut-off below 1.
    """

    totals: Tensor
    users: Tensor

    def __init__(
        self,
        ks: Sequence[int] = (10,),
        names: Sequence[str] = ("hr", "recall", "precision", "ndcg", "mrr", "map"),
        slices: Sequence[str] = (),
    ) -> None:
        super().__init__()
        _check_known("figure", names, tuple(_FIGURES))
        _check_known("slice", slices, _SLICES)
        if not ks or min(ks) < 1:
            raise ValueError(f"The cut-offs `ks` are {list(ks)}; give at least one, each at least 1.")
        self.ks = tuple(ks)
        self.names = tuple(names)
        self.slices = tuple(slices)
        self._kinds: tuple[Tensor, Tensor] | None = None
        shape = (1 + len(self.slices), len(self.names), len(self.ks))
        self.add_state("totals", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("users", torch.zeros(shape[0], dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, result: RankingResult) -> None:
        """Adds the users of ``result``; reads ``ranks``, and for slices ``targets`` and ``counts``.

        Raises:
            ValueError: when slices are asked for and ``result.counts`` is None.
        """
        self._add(0, result.ranks, result.n_items)
        if self.slices:
            member = self._members(result)
            for at, name in enumerate(self.slices, start=1):
                self._add(at, result.ranks * member(name), result.n_items)

    def compute(self) -> dict[str, Tensor]:
        """``{"ndcg@10": ..., "users": ..., "cold/ndcg@10": ..., "cold/users": ...}``; NaN when no user had a target."""
        figures: dict[str, Tensor] = {}
        means = (self.totals.cpu().double() / _UNIT / self.users.cpu()[:, None, None]).float().to(self.totals.device)
        for at, name in enumerate(("", *self.slices)):
            prefix = f"{name}/" if name else ""
            if not name or self.users[at] > 0:
                for i, figure in enumerate(self.names):
                    for j, k in enumerate(self.ks):
                        figures[f"{prefix}{figure}@{k}"] = means[at, i, j]
            figures[f"{prefix}users"] = self.users[at].float()
        return figures

    def _add(self, at: int, ranks: Tensor, n_items: int | None) -> None:
        ranks = ranks[(ranks > 0).any(1)] if ranks.shape[1] else ranks[:0]
        if ranks.shape[0] == 0:
            return
        self.users[at] += ranks.shape[0]
        for i, name in enumerate(self.names):
            for j, k in enumerate(self.ks):
                value = _FIGURES[name](ranks, k if n_items is None else min(k, n_items))
                self.totals[at, i, j] += (value * _UNIT).round().to(torch.int64).sum()

    def _members(self, result: RankingResult) -> Callable[[str], Tensor]:
        counts, targets = result.counts, result.targets
        if counts is None:
            raise ValueError(
                f"The slices {list(self.slices)} need the training interactions of each item, which are unknown here. "
                "Evaluate with the data module of the run, or set `slices: []`."
            )
        # The thirds are worked out once for a counts vector, not once a batch.
        if self._kinds is None or self._kinds[0] is not counts:
            self._kinds = (counts, popularity_thirds(counts))
        third = self._kinds[1].to(targets.device)[targets]
        cold = counts.to(targets.device)[targets] == 0
        masks = {"cold": cold, "warm": ~cold, "head": third == 0, "torso": third == 1, "tail": third == 2}
        return lambda name: masks[name]


_SLICES = ("cold", "warm", "head", "torso", "tail")


def _check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"There is no {what} {name!r}; the known ones are {', '.join(known)}.")
