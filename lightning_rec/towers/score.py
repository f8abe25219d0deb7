"""How an interest vector and an item vector make a score: always a dot product, of vectors made ready for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# An optimizer like Adam moves every parameter by about the learning rate a step; scores want larger strides.
_REPEAT_GAIN = 10.0


class Score(nn.Module, ABC):
    """Makes vectors ready, so that objectives, metrics and indexes need to know the dot product only.

    A dot product cannot tell that an item was in the history already: what draws a user to an item's neighbours draws
    them to the item. Where seen items stay candidates, ``learn_repeats`` adds one number to the score of the items in
    the history, learned with everything else: far below zero where nobody takes the same thing twice, above it where
    people do (repeat consumption: Anderson et al., "The dynamics of repeat consumption", WWW 2014).

    Args:
        learn_repeats: learn what a repeat adds to the score.
    """

    def __init__(self, learn_repeats: bool = False) -> None:
        super().__init__()
        self.repeat_weight = nn.Parameter(torch.zeros(())) if learn_repeats else None

    @property
    def repeat(self) -> Tensor | None:
        """Scalar that is added to the score of items in the history, or None where that is not learned."""
        return None if self.repeat_weight is None else _REPEAT_GAIN * self.repeat_weight

    @abstractmethod
    def interest(self, vectors: Tensor) -> Tensor:
        """Interest vectors ``(..., d)``, ready for the product."""

    @abstractmethod
    def items(self, vectors: Tensor) -> Tensor:
        """Item vectors ``(n, d)``, ready for the product."""


class Dot(Score):
    """The plain dot product.

    Args:
        learn_repeats: learn what an item's being in the history adds to its score; see :class:`Score`.
    """

    def interest(self, vectors: Tensor) -> Tensor:
        """The vectors as they are."""
        return vectors

    def items(self, vectors: Tensor) -> Tensor:
        """The vectors as they are."""
        return vectors


_BOUNDS = (0.0, math.log(100.0))  # of the logarithm of the inverse temperature


class Cosine(Score):
    """The cosine divided by a temperature.

    Args:
        temperature: divides the cosine; at 0.05 scores lie between -20 and 20.
        learn: learn the temperature, bounded between 0.01 and 1 (Radford et al., ICML 2021, bound it likewise).
        learn_repeats: learn what an item's being in the history adds to its score; see :class:`Score`.
    """

    def __init__(self, temperature: float = 0.05, learn: bool = False, learn_repeats: bool = False) -> None:
        super().__init__(learn_repeats)
        if not 0.01 <= temperature <= 1:
            raise ValueError(f"The temperature must lie between 0.01 and 1, but is {temperature}.")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn)

    def interest(self, vectors: Tensor) -> Tensor:
        """Unit vectors times the inverse temperature."""
        if self.training and self.log_scale.requires_grad:
            with torch.no_grad():  # beyond a bound it would have no gradient, and never come back
                self.log_scale.clamp_(*_BOUNDS)
        return F.normalize(vectors, dim=-1, eps=1e-6) * self.log_scale.clamp(*_BOUNDS).exp()

    def items(self, vectors: Tensor) -> Tensor:
        """Unit vectors."""
        return F.normalize(vectors, dim=-1, eps=1e-6)
