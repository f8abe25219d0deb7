"""The contract of a ranking metric: what a batch of evaluated users looks like, and what a metric does with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import Metric


@dataclass
class RankingResult:
    """The outcome of ranking the whole catalogue for ``b`` users.

    Attributes:
        ranks: ``(b, m)`` int64, 1 is the top, 0 is padding; see :func:`lightning_rec.metrics.target_ranks`.
        targets: ``(b, m)`` catalogue rows that were to be found, padded with 0.
        recommended: ``(b, k)`` catalogue rows, best first, padded with 0; ``k`` is the largest that any metric of the
            run asked for. None when none did.
        scores: ``(b, k)`` scores of ``recommended``, ``-inf`` where it is padding.
        counts: ``(n_rows,)`` training interactions of each catalogue row, or None when unknown.
        n_items: number of items in the catalogue, padding not counted; a cut-off above it is clamped to it. None
            takes it from ``counts``.
    """

    ranks: Tensor
    targets: Tensor
    recommended: Tensor | None = None
    scores: Tensor | None = None
    counts: Tensor | None = None
    n_items: int | None = None

    def __post_init__(self) -> None:
        if self.n_items is None and self.counts is not None:
            self.n_items = self.counts.shape[0] - 1


class RankingMetric(Metric, ABC):
    """A metric of full rankings, fed one :class:`RankingResult` a batch.

    States are sums (``dist_reduce_fx="sum"``), so that batches and processes can be added in any order, and never grow
    with the number of users. A metric of your own::

        import torch
        from lightning_rec.metrics import RankingMetric, RankingResult

        class MedianScoreGap(RankingMetric):
            '''Mean gap between the first and the last recommended score.'''

            def __init__(self, k: int = 10) -> None:
                super().__init__()
                self.k = k
                self.add_state("gaps", torch.zeros(()), dist_reduce_fx="sum")
                self.add_state("users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

            def update(self, result: RankingResult) -> None:
                self.gaps += (result.scores[:, 0] - result.scores[:, self.k - 1]).sum()
                self.users += len(result.scores)

            def compute(self):
                return {f"score_gap@{self.k}": self.gaps / self.users}

    Attributes:
        k: how many recommended rows the metric reads; 0 when ranks are enough.
    """

    # Torchmetrics' own switches: the value of one batch needs no state of earlier ones, and nothing is differentiated.
    full_state_update = False
    is_differentiable = False

    k: int = 0

    def configure(self, n_rows: int, counts: Tensor | None = None) -> None:
        """Called once, before the first batch, when the catalogue is known. Nothing to do by default.

        Args:
            n_rows: number of catalogue rows, padding included: the size of a state with an entry for every item.
            counts: ``(n_rows,)`` training interactions of each row, or None when unknown.
        """

    @abstractmethod
    def update(self, result: RankingResult) -> None:
        """Adds a batch of users."""

    @abstractmethod
    def compute(self) -> Any:
        """The figures so far: a scalar tensor (named after the class) or a dict of names to scalar tensors."""
