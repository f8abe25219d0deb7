"""How far predicted ratings are from the given ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class RatingMetrics(Metric):
    """Root mean squared error and mean absolute error over the targets that have a rating.

    ``compute`` gives ``rmse``, ``mae`` and ``ratings``, the number of ratings in the averages; without any, the two
    errors are NaN.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    squared: Tensor
    absolute: Tensor
    ratings: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squared", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("absolute", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("ratings", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, rating: Tensor) -> None:
        """Adds targets.

        Args:
            predicted: predicted ratings, any shape.
            rating: the given ratings, of the same shape; NaN where there is none.
        """
        rated = ~torch.isnan(rating)
        error = predicted[rated].float() - rating[rated].float()
        self.squared += error.square().sum()
        self.absolute += error.abs().sum()
        self.ratings += rated.sum()

    def compute(self) -> dict[str, Tensor]:
        """``{"rmse": ..., "mae": ..., "ratings": ...}``."""
        return {
            "rmse": (self.squared / self.ratings).sqrt(),
            "mae": self.absolute / self.ratings,
            "ratings": self.ratings.float(),
        }
