"""How an interest vector and an item vector make a score: always a dot product, of vectors made ready for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Score(nn.Module, ABC):
    """Makes vectors ready, so that objectives, metrics and indexes need to know the dot product only."""

    @abstractmethod
    def interest(self, vectors: Tensor) -> Tensor:
        """Interest vectors ``(..., d)``, ready for the product."""

    @abstractmethod
    def items(self, vectors: Tensor) -> Tensor:
        """Item vectors ``(n, d)``, ready for the product."""


class Dot(Score):
    """The plain dot product."""

    def interest(self, vectors: Tensor) -> Tensor:
        """The vectors as they are."""
        return vectors

    def items(self, vectors: Tensor) -> Tensor:
        """The vectors as they are."""
        return vectors


class Cosine(Score):
    """The cosine divided by a temperature.

    Args:
        temperature: divides the cosine; at 0.05 scores lie between -20 and 20.
        learn: learn the temperature, bounded between 0.01 and 1 (Radford et al., ICML 2021, bound it likewise).
    """

    def __init__(self, temperature: float = 0.05, learn: bool = False) -> None:
        super().__init__()
        if not 0.01 <= temperature <= 1:
            raise ValueError(f"The temperature must lie between 0.01 and 1, but is {temperature}.")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn)

    def interest(self, vectors: Tensor) -> Tensor:
        """Unit vectors times the inverse temperature."""
        scale = self.log_scale.clamp(0.0, math.log(100.0)).exp()
        return F.normalize(vectors, dim=-1, eps=1e-6) * scale

    def items(self, vectors: Tensor) -> Tensor:
        """Unit vectors."""
        return F.normalize(vectors, dim=-1, eps=1e-6)
