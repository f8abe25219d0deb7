"""A rating head: the stars that a user gives an item, from the two vectors of the pair."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.objectives.base import Objective, full_precision, no_positions
from lightning_rec.objectives.rating import checked_range

Bounds = Literal["none", "clip", "sigmoid"]


class RatingHead(Objective):
    """Predicts the rating of a user and an item from their two vectors; squared error.

    The prediction is a sum of up to three parts: the mean of the training ratings, the dot product ``u · i``, and a
    small network over ``[u, i, u * i]`` (the features of Neural Collaborative Filtering, He et al., WWW 2017, and of
    DeepCoNN's successors), whose width the item tower gives. With towers that hold biases
    (``lightning_rec.towers.BiasItemTower``, ``BiasUserTower``) the dot product is ``b_u + b_i + p_u · q_i``: the
    user-item bias model and biased matrix factorisation of Koren (KDD 2008). With neither part the head is the global
    mean, the first baseline to beat.

    Only the target of a position counts; the other candidates do not. Positions without a rating teach nothing, and
    the mean is over those with one. All ratings should be targets: set ``min_rating: 0`` in the data module where its
    domain leaves out low ratings. Ranking goes by the dot product alone.

    Args:
        mean: start from the mean of the training ratings.
        dot: add the dot product of the two vectors.
        hidden: width of the network's hidden layer; 0: no network.
        dropout: share of the network's inputs and of its hidden layer dropped in training.
        bounds: ``none``: any number can be predicted; ``clip``: predictions outside the range of the ratings become
            its ends in validation and test, never in training; ``sigmoid``: the sum goes through a sigmoid scaled to
            the range, so that a sum of 0 stands for the mean (without ``mean``, for the middle of the range).
        rating_range: lowest and highest rating; null takes them from the training data.

    Raises:
        ValueError: when a width or a share is impossible, or the lowest rating is not below the highest.

    Example::

        model:
          objective:
            class_path: lightning_rec.objectives.RatingHead
            init_args: {hidden: 32, dropout: 0.2, bounds: clip}
    """

    needs_rating = True
    rating_mean: Tensor

    def __init__(
        self,
        mean: bool = True,
        dot: bool = True,
        hidden: int = 0,
        dropout: float = 0.0,
        bounds: Bounds = "clip",
        rating_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if hidden < 0:
            raise ValueError(f"hidden is the width of a layer, at least 0 (no network), but is {hidden}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a share of at least 0 and below 1, but is {dropout}.")
        if bounds not in ("none", "clip", "sigmoid"):
            raise ValueError(f"bounds is none, clip or sigmoid, but is {bounds!r}.")
        self.mean = mean
        self.dot = dot
        self.hidden = hidden
        self.dropout = dropout
        self.bounds = bounds
        self._given = rating_range is not None
        self.rating_range = None if rating_range is None else checked_range(rating_range)
        # In the checkpoint: what is predicted must not depend on the data that is attached later. NaN: not measured.
        self.register_buffer("rating_mean", torch.tensor(float("nan"), dtype=torch.float32))
        self.network: nn.Module | None = None

    def configure(
        self,
        n_items: int | None = None,
        rating_range: tuple[float, float] | None = None,
        rating_mean: float | None = None,
        dim: int | None = None,
    ) -> None:
        """Takes the range and the mean of the training ratings, and creates the network.

        Raises:
            ValueError: when there is a network, and ``dim`` is unknown.
        """
        if not self._given and rating_range is not None:
            self.rating_range = checked_range(rating_range)
        if rating_mean is not None:
            self.rating_mean.fill_(rating_mean)
        if self.hidden:
            if dim is None:
                raise ValueError("A RatingHead with a network needs the width of the vectors: call configure(dim=...).")
            last = nn.Linear(self.hidden, 1)
            # A network that says 0 at first: training starts from the mean and the dot product.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.network = nn.Sequential(nn.Linear(3 * dim, self.hidden), nn.GELU(), nn.Dropout(self.dropout), last)

    def predict(self, dot: Tensor) -> Tensor:
        """The rating that a dot product stands for, any shape: what a head without a network predicts.

        Raises:
            ValueError: when the head has a network, which needs the vectors, or what it needs of the data is unknown.
        """
        if self.hidden:
            raise ValueError(
                "This RatingHead has a network over both vectors, so a dot product does not say the rating: call "
                "predict_pairs(interest, items)."
            )
        (dot,) = full_precision(dot)
        return self._limited(self._from_sum(dot if self.dot else torch.zeros_like(dot)))

    def predict_pairs(self, interest: Tensor, items: Tensor) -> Tensor:
        """The ratings of pairs.

        Args:
            interest: ``(p, d)`` interest vectors.
            items: ``(p, d)`` item vectors.

        Returns:
            ``(p,)`` ratings, within the range unless ``bounds`` is ``none``.

        Raises:
            ValueError: when the mean or the range is needed and unknown.
        """
        with torch.autocast(interest.device.type, enabled=False):
            return self._limited(self._raw(*full_precision(interest, items)))

    def _raw(self, interest: Tensor, items: Tensor) -> Tensor:
        total = (interest * items).sum(-1) if self.dot else interest.new_zeros(len(interest))
        if self.network is not None:
            features = torch.cat([interest, items, interest * items], -1)
            total = total + self.network(F.dropout(features, self.dropout, self.training))[:, 0]
        return self._from_sum(total)

    def _from_sum(self, total: Tensor) -> Tensor:
        """Adds the mean; a sigmoid keeps the result within the range."""
        if self.bounds != "sigmoid":
            return total + self._mean if self.mean else total
        low, high = self._range
        if self.mean:
            # where the sigmoid gives the mean; a mean at an end of the range would lie at infinity
            share = min(max((float(self._mean) - low) / (high - low), 1e-3), 1 - 1e-3)
            total = total + math.log(share / (1 - share))
        return low + (high - low) * torch.sigmoid(total)

    def _limited(self, rating: Tensor) -> Tensor:
        return rating.clamp(*self._range) if self.bounds == "clip" else rating

    @property
    def _mean(self) -> Tensor:
        if self.rating_mean.isnan():
            raise ValueError(
                "The mean of the training ratings is unknown: the data have no ratings, or "
                "`configure(rating_mean=...)` was not called. Map a rating column in the data module, or set "
                "`mean: false` in the objective."
            )
        return self.rating_mean

    @property
    def _range(self) -> tuple[float, float]:
        if self.rating_range is None:
            raise ValueError(
                "The range of the ratings is unknown: the data have no ratings, or `configure(rating_range=...)` was "
                "not called. Map a rating column in the data module, or set `rating_range: [1, 5]` in the objective."
            )
        return self.rating_range

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
            ValueError: when ``rating`` is None, or the mean or the range is needed and unknown.
        """
        if rating is None:
            raise ValueError(
                "RatingHead needs ratings, and the batch has none. Map a rating column in the data module, or choose "
                "another objective."
            )
        with torch.autocast(interest.device.type, enabled=False):
            rated = ~torch.isnan(rating)
            if not bool(rated.any()):
                # every parameter of the network gets its (zero) gradient too, as DDP expects
                unused = sum((parameter.sum() * 0 for parameter in self.parameters()), start=interest.new_zeros(()))
                return no_positions(interest, candidates) + unused
            interest, candidates = full_precision(interest[rated], candidates)
            # index_select on vectors has a fast backward pass on a CPU; indexing has not
            predicted = self._raw(interest, candidates.index_select(0, target[rated]))
            loss = (predicted - rating[rated].to(predicted.dtype)).square().mean()
            # a head that looks at neither vector still keeps the loss of trainable towers in the graph
            return loss if self.dot or self.hidden else loss + no_positions(interest, candidates)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return (
            f"mean={self.mean}, dot={self.dot}, hidden={self.hidden}, dropout={self.dropout}, bounds={self.bounds}, "
            f"rating_range={self.rating_range}"
        )
