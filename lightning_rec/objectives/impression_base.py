"""The contract of an objective of impressions."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class ImpressionObjective(nn.Module, ABC):
    """Turns the scores of what was shown into a loss. It computes in float32 whatever the precision of the run."""

    @abstractmethod
    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        propensities: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of ``b`` impressions.

        Args:
            scores: ``(b, c)`` scores of the candidates, any value at padding.
            labels: ``(b, c)`` 1 clicked, 0 not clicked, NaN unlabelled or padding (which count for nothing).
            weights: ``(b, c)`` how many candidates of the impression each stands for; None: each for itself.
            positions: ``(b, c)`` places on the page from 1, 0 unknown; None when the data has none.
            propensities: ``(b, c)`` given probabilities that a candidate was looked at, NaN unknown; None without.
            extra: ``(b, e)`` scores of negatives from other impressions of the step, ``-inf`` where a candidate may
                not serve this impression; already corrected for how often they are drawn. None without.

        Returns:
            A scalar: the mean over the units of the objective (see :meth:`units`), or 0, still attached to the graph,
            when there are none.
        """

    @abstractmethod
    def units(self, labels: Tensor, weights: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        """Scalar: what the mean is over (clicks, or labelled candidates), for the mean over several devices.

        Args:
            labels: as in :meth:`forward`.
            weights: as in :meth:`forward`.
            extra: as in :meth:`forward`.
        """

    def probability(self, scores: Tensor) -> Tensor | None:
        """The probability of a click that a score stands for, any shape; None when the objective gives none."""
        return None
