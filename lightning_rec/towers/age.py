"""What the age and the clicks of an item at the request add to its score: news die in a day."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class _BucketBias(nn.Module):
    """A learned number for each bucket of a quantity, with equal width in ``log(1 + quantity)``."""

    def __init__(self, buckets: int, highest: float, option: str) -> None:
        super().__init__()
        if buckets < 1:
            raise ValueError(f"buckets is a number of buckets of at least 1, but is {buckets}.")
        if not highest > 0:
            raise ValueError(f"{option} must be positive, but is {highest}.")
        self.buckets = buckets
        self.highest = highest
        self.bias = nn.Parameter(torch.zeros(buckets + 1))

    def bucket(self, quantity: Tensor) -> Tensor:
        """The bucket of each quantity, any shape: 0 unknown (NaN), 1 the smallest."""
        share = torch.log1p(quantity.float().clamp(min=0)) / math.log1p(self.highest)
        numbers = (share * self.buckets).nan_to_num(-1.0).floor().clamp(-1, self.buckets - 1)
        return numbers.long() + 1

    def forward(self, quantity: Tensor) -> Tensor:
        """What each quantity adds to a score, any shape."""
        return self.bias[self.bucket(quantity)]


class AgeBias(_BucketBias):
    """A learned number for each bucket of age, added to the score of a candidate.

    Buckets have equal width in ``log(1 + hours)``, so that the first hours are told apart and the last weeks are not.
    An unknown age has a number of its own. All numbers are 0 before training.

    Args:
        buckets: number of buckets of known ages.
        max_hours: older items fall into the last bucket.

    Raises:
        ValueError: when there is no bucket or no time.
    """

    def __init__(self, buckets: int = 16, max_hours: float = 720.0) -> None:
        super().__init__(buckets, max_hours, "max_hours")


class PopularityBias(_BucketBias):
    """A learned number for each bucket of recent clicks, added to the score of a candidate.

    It reads the clicks before the request, each halved with every half-life since (``data.popularity_half_life``), as
    in PP-Rec (Qi et al., "News Recommendation with Popularity-aware User Interest", ACL 2021), where time-aware
    popularity is a part of the score. All numbers are 0 before training.

    Args:
        buckets: number of buckets, of equal width in ``log(1 + clicks)``.
        max_clicks: items with more fall into the last bucket.

    Raises:
        ValueError: when there is no bucket or no click.
    """

    def __init__(self, buckets: int = 32, max_clicks: float = 1000.0) -> None:
        super().__init__(buckets, max_clicks, "max_clicks")
