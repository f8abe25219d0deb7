"""Regression on explicit ratings."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rec.objectives.base import Objective, full_precision, no_positions


class RatingRegression(Objective):
    """The sigmoid of the dot product, scaled to the range of the ratings, should be the rating: squared error.

    Only the target of a position counts; the other candidates do not. Positions without a rating teach nothing, and
    the mean is over those with one.

    Args:
        rating_range: lowest and highest rating; null takes them from the training data.

    Raises:
        ValueError: when the lowest rating is not below the highest.
    """

    needs_rating = True

    def __init__(self, rating_range: tuple[float, float] | None = None) -> None:
        super().__init__()
        self._given = rating_range is not None
        self.rating_range = None if rating_range is None else checked_range(rating_range)

    def configure(
        self,
        n_items: int | None = None,
        rating_range: tuple[float, float] | None = None,
        rating_mean: float | None = None,
        dim: int | None = None,
    ) -> None:
        """Takes the range of the data, unless one was given to the constructor."""
        if not self._given and rating_range is not None:
            self.rating_range = checked_range(rating_range)

    def predict(self, dot: Tensor) -> Tensor:
        """The rating that a dot product stands for; any shape.

        Raises:
            ValueError: when the range is not known yet.
        """
        if self.rating_range is None:
            raise ValueError(
                "The range of the ratings is unknown: the data have no ratings, or `configure(rating_range=...)` was "
                "not called. Map a rating column in the data module, or set `rating_range: [1, 5]` in the objective."
            )
        low, high = self.rating_range
        (dot,) = full_precision(dot)
        return low + (high - low) * torch.sigmoid(dot)

    def forward(
        self,
        interest: Tensor,
        candidates: Tensor,
        target: Tensor,
        *,
        owner: Tensor | None = None,
        known: Tensor | None = None,
        log_q: Tensor | None = None,
        rating: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Objective.forward`; only ``rating`` is used of the keyword arguments.

        Raises:
            ValueError: when ``rating`` is None, or the range is not known.
        """
        if rating is None:
            raise ValueError(
                "RatingRegression needs ratings, and the batch has none. Map a rating column in the data module, or "
                "choose another objective."
            )
        with torch.autocast(interest.device.type, enabled=False):
            rated = ~torch.isnan(rating)
            if not bool(rated.any()):
                return no_positions(interest, candidates)
            interest, candidates = full_precision(interest[rated], candidates)
            predicted = self.predict((interest * candidates[target[rated]]).sum(1))
            return (predicted - rating[rated].to(predicted.dtype)).square().mean()

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"rating_range={self.rating_range}"


def checked_range(rating_range: tuple[float, float]) -> tuple[float, float]:
    """The range as two floats.

    Raises:
        ValueError: when the lowest rating is not below the highest.
    """
    low, high = rating_range
    if not low < high:
        raise ValueError(f"rating_range is [{low}, {high}]; the lowest rating must be below the highest.")
    return float(low), float(high)
