"""The contract of a metric of impressions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import Metric


@dataclass
class ImpressionResult:
    """The scores of ``b`` impressions with up to ``c`` candidates each.

    Attributes:
        scores: ``(b, c)`` float32; what stands at padding is never read.
        labels: ``(b, c)`` float32: 1 clicked, 0 not, NaN unlabelled or padding.
        sizes: ``(b,)`` number of real candidates, which come first.
        rows: ``(b, c)`` catalogue rows of the candidates, 0 at padding.
        probabilities: ``(b, c)`` float32 probability of a click, or None when the model gives none.
        counts: ``(n_rows,)`` training clicks of each catalogue row, or None.
        groups: ``(n_rows,)`` number of the category of each row, 0 where it has none; or None.
    """

    scores: Tensor
    labels: Tensor
    sizes: Tensor
    rows: Tensor
    probabilities: Tensor | None = None
    counts: Tensor | None = None
    groups: Tensor | None = None


class ImpressionMetric(Metric, ABC):
    """A metric of impressions, fed one :class:`ImpressionResult` a batch. States are sums over impressions."""

    # Torchmetrics' own switches: the value of one batch needs no state of earlier ones, and nothing is differentiated.
    full_state_update = False
    is_differentiable = False

    def configure(self, n_rows: int, counts: Tensor | None = None, groups: Tensor | None = None) -> None:
        """Called once, before the first batch, when the catalogue is known. Nothing to do by default.

        Args:
            n_rows: number of catalogue rows, padding included.
            counts: ``(n_rows,)`` training clicks of each row, or None when unknown.
            groups: ``(n_rows,)`` number of the category of each row, or None.
        """

    @abstractmethod
    def update(self, result: ImpressionResult) -> None:
        """Adds a batch of impressions."""

    @abstractmethod
    def compute(self) -> Any:
        """The figures so far: a scalar tensor (named after the class) or a dict of names to scalar tensors."""
