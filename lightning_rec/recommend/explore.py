"""Showing what the model is not sure of: an upper confidence bound, and Thompson draws, over the last layer.

The score of an item is linear in its vector, so that the last layer is a linear model whose uncertainty has a closed
form. An item whose direction the training data has seldom met is uncertain (the neural-linear bandit: Riquelme, Tucker
and Snoek, "Deep Bayesian Bandits Showdown", ICLR 2018; LinUCB: Li et al., WWW 2010).
"""

from __future__ import annotations

import torch
from torch import Tensor


class LastLayer:
    """The uncertainty of scores, for one catalogue.

    The precision of the weights is ``I + sum of count * x x'`` over the items' unit-scaled vectors.

    Args:
        vectors: ``(n, d)`` item vectors, ready for the product; row 0 is padding.
        counts: ``(n,)`` training interactions of each item.
    """

    def __init__(self, vectors: Tensor, counts: Tensor) -> None:
        self._vectors = vectors
        x = vectors.double()
        #: The typical length of an item vector: uncertainty is told in scores, whatever the scale of the vectors.
        self.scale = float(x[1:].norm(dim=1).mean().clamp_min(1e-12)) if len(x) > 1 else 1.0
        x = x / self.scale
        precision = torch.eye(x.shape[1], dtype=torch.float64) + x.t() @ (x * counts.double()[:, None])
        self._factor = torch.linalg.cholesky(precision)
        self._deviation: Tensor | None = None

    @property
    def deviation(self) -> Tensor:
        """``(n,)`` standard deviation of each item's score: ``sqrt(x' A^-1 x)``; 0 for padding."""
        if self._deviation is None:
            x = self._vectors.double() / self.scale
            half = torch.linalg.solve_triangular(self._factor, x.t(), upper=False)
            self._deviation = half.square().sum(0).sqrt().float()
        return self._deviation

    def draw(self, interest: Tensor, strength: float, seed: int | None) -> Tensor:
        """An interest vector drawn around ``interest`` ``(d,)``; its scores deviate as :attr:`deviation` says."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        noise = torch.randn(interest.shape[0], 1, dtype=torch.float64, generator=generator)
        step = torch.linalg.solve_triangular(self._factor.t(), noise, upper=True)[:, 0] / self.scale
        return interest + strength * step.to(interest.dtype)
