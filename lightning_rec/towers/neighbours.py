"""Nearest neighbours by text inside two trained towers: what frozen vectors say of the newest items is kept as it is.

A projection that is trained on few interactions loses much of what a frozen language model knows of the variants of a
product, which is what cold items are found by. Here the score is what the two towers say, plus a learned weight times
the cosine between the candidate's text and those of the newest events. An item that has no id part, because it is cold
or because ``id_dropout`` took it away for a step, has a weight and an offset of its own; dropped items teach both, so
that cold and warm items share one scale.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch, UserBatch
from lightning_rec.towers.base import ItemTower
from lightning_rec.towers.item import TextIdItemTower
from lightning_rec.towers.user import SequenceUserTower, history_vectors
from lightning_rec.towers.whitening import Whitening

# An optimizer like Adam moves every parameter by about the learning rate a step; these want larger strides.
_GAIN = 10.0


class NeighbourItemTower(TextIdItemTower):
    """A :class:`TextIdItemTower` whose vectors also carry the direction of the item's frozen text vector.

    The vector is ``[text and id | text direction | one number]``, ``dim + neighbour_dims + 1`` wide. It goes with
    :class:`NeighbourUserTower`.

    Args:
        neighbour_dims: the text directions are rotated to the catalogue's principal axes and cut to so many.
        neighbour_features: what a direction is made of: ``centre``: the unit vector less the catalogue's mean;
            ``whiten``: the whitened vector (see :class:`~lightning_rec.towers.whitening.Whitening`), in which what few
            texts differ by counts more.
        neighbour_eps: ``whiten_eps`` of that whitening.
        **options: see :class:`TextIdItemTower`; the language model is frozen.

    Raises:
        ValueError: when the language model is tuned, or narrower than ``neighbour_dims``.
    """

    centre: Tensor
    axes: Tensor
    directions: Tensor | None

    def __init__(
        self,
        neighbour_dims: int = 64,
        neighbour_features: Literal["centre", "whiten"] = "centre",
        neighbour_eps: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.neighbour_dims = neighbour_dims
        self.neighbour_features = neighbour_features
        self.neighbour_eps = neighbour_eps

    def configure(self, catalogue: CatalogueView) -> None:
        """Creates the parts of :class:`TextIdItemTower`, the axes, and what an item without id part has of its own."""
        super().configure(catalogue)
        if not self.frozen:
            raise ValueError(
                f"NeighbourItemTower keeps the vectors of a frozen language model, but tune is {self.encoder.tune}: "
                "set tune to frozen and leave peft out, or use TextIdItemTower."
            )
        width = self.encoder.width
        if not 1 <= self.neighbour_dims <= width:
            raise ValueError(f"neighbour_dims is {self.neighbour_dims}; it lies between 1 and the width, {width}.")
        self.inner_dim, self.dim = self.dim, self.dim + self.neighbour_dims + 1
        # in the checkpoint, so that a new item is seen as training saw the old ones
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("axes", torch.zeros(width, self.neighbour_dims))
        self.register_buffer("directions", None, persistent=False)
        self.bare = nn.Parameter(torch.tensor([1.0, 0.0]) / _GAIN)  # weight and offset of an item without id part

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, catalogue: CatalogueView) -> None:
        """Encodes the catalogue or finds it in the disk cache, as :class:`TextItemTower` does."""
        super().prepare(catalogue)
        if not catalogue.texts:
            return
        vectors = self.encoder.encode_cached(catalogue.texts, self._place).to(self._place)
        if not self.axes.any():
            unit = F.normalize(vectors[1:] if len(vectors) > 1 else vectors, dim=-1).double()
            if self.neighbour_features == "whiten":
                whitening = Whitening(unit.shape[1], self.neighbour_dims, self.neighbour_eps)
                whitening.measure(unit)
                self.centre.copy_(whitening.mean)
                self.axes.copy_(whitening.matrix)
            else:
                centred = unit - unit.mean(0)
                self.centre.copy_(unit.mean(0))
                axes = torch.linalg.eigh(centred.t() @ centred).eigenvectors  # the least variance first
                self.axes.copy_(axes.flip(1)[:, : self.neighbour_dims])
        self.directions = self._direction(vectors)
        self.directions[0] = 0  # a masked event of a history points nowhere

    def _direction(self, vectors: Tensor) -> Tensor:
        """``(n, neighbour_dims)`` unit vectors of ``(n, width)`` vectors of the encoder."""
        return F.normalize((F.normalize(vectors, dim=-1) - self.centre) @ self.axes, dim=-1)

    def _with_direction(self, fused: Tensor, direction: Tensor, has_id: Tensor) -> Tensor:
        weight, offset = _GAIN * self.bare
        scale = has_id + (1 - has_id) * weight
        return torch.cat([fused, scale * direction, (1 - has_id) * offset], dim=-1)

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, dim)`` item vectors; of text alone where an item was never trained on."""
        features = self._features(items)  # raises where nothing is prepared
        assert self.directions is not None
        direction = self.directions if items.whole else self.directions[items.rows]
        fused, has_id = self._parts(items, features)
        return self._with_direction(fused, direction, has_id)

    def from_features(self, features: Tensor) -> Tensor:
        """``(n, dim)`` item vectors of ``(n, width)`` vectors of the encoder, of items that have no row."""
        fused = super().from_features(features)
        return self._with_direction(fused, self._direction(features), torch.zeros_like(fused[:, :1]))


class _Width:
    """Stands for an item tower of another width, for the tower that reads its vectors' first part."""

    def __init__(self, dim: int) -> None:
        self.dim = dim


class NeighbourUserTower(SequenceUserTower):
    """A :class:`SequenceUserTower` beside the text directions of the newest events; see :class:`NeighbourItemTower`.

    The directions of the events up to each step are averaged with weights that shrink by a learned factor with every
    event that came later.

    Args:
        neighbour_weight: what the cosine counts before training.
        **options: see :class:`SequenceUserTower`.

    Raises:
        ValueError: when the item tower is not a :class:`NeighbourItemTower`.
    """

    def __init__(self, neighbour_weight: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        self.neighbour_weight = neighbour_weight

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates the sequence tower of the inner width, and the weights of the neighbours."""
        if not isinstance(item_tower, NeighbourItemTower):
            raise ValueError(
                f"NeighbourUserTower reads the text directions of a NeighbourItemTower, but the item tower is "
                f"{type(item_tower).__name__}: change model.item_tower.class_path, or use SequenceUserTower."
            )
        super().configure(catalogue, _Width(item_tower.inner_dim))  # type: ignore[arg-type]  # it reads dim alone
        self.inner_dim, self.dim = self.dim, item_tower.dim
        self.neighbours = nn.Parameter(
            torch.tensor([self.neighbour_weight, 1.0]) / _GAIN
        )  # weight, and how fast events fade

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """``(b, t, dim)`` interest after every event; zero vectors for users without history."""
        interest = super().forward(users, items[:, : self.inner_dim])
        # What an item without id part adds belongs to it as a candidate, not to its direction in a history.
        direction = F.normalize(history_vectors(users, items[:, self.inner_dim : -1]), dim=-1)
        weight, fading = _GAIN * self.neighbours
        steps = torch.arange(direction.shape[1], device=items.device)
        age = (steps[:, None] - steps).to(items.dtype)
        share = (-F.softplus(fading) * age).masked_fill(age < 0, -torch.inf).softmax(-1)
        some = (users.lengths > 0)[:, None, None]
        near = torch.cat([weight * (share @ direction), torch.ones_like(direction[..., :1])], dim=-1)
        return torch.cat([interest, near.masked_fill(~some, 0.0)], dim=-1)
