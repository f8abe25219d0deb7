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
    def forward(self, interest: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Args are ``(..., d)`` interest vectors and ``(n, d)`` item vectors; returns them ready for the product."""


class Dot(Score):
    """The plain dot product."""

    def forward(self, interest: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors as they are."""
        return interest, items


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
        log_scale = torch.tensor(-math.log(temperature))
        if learn:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, interest: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors, the interest vectors multiplied by the inverse temperature."""
        scale = self.log_scale.clamp(0.0, math.log(100.0)).exp()
        return F.normalize(interest, dim=-1, eps=1e-6) * scale, F.normalize(items, dim=-1, eps=1e-6)
