"""Towers with biases: the rating models of the Netflix prize, and any two towers with a bias each on top.

The vectors are laid out so that a plain dot product is the model: an item is ``[content, q_i, b_i, 1]`` and a user is
``[content, p_u, 1, b_u]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch, UserBatch
from lightning_rec.towers.base import ItemTower, UserTower
from lightning_rec.towers.fusion import id_table


class BiasItemTower(ItemTower):
    """An item's bias, and optionally latent factors and the vector of another item tower.

    With :class:`BiasUserTower` and ``lightning_rec.objectives.RatingHead``, which adds the mean rating, this is

    - with ``factors: 0`` the user-item bias model: ``mu + b_u + b_i``;
    - with factors biased matrix factorisation: ``mu + b_u + b_i + p_u · q_i``
      (Koren, "Factorization Meets the Neighborhood", KDD 2008, equations 1 and 3);
    - with ``content`` a hybrid: the dot product of two other towers, text towers for example, is added, and a bias read
      from the content joins the learned one, so that cold items have a bias as well.

    Koren's squared norms are the ``weight_decay`` of ``torch.optim.Adam`` (not of AdamW, whose decay is no gradient):
    ``weight_decay`` is twice his lambda divided by the number of training ratings.

    An item without training interactions has no bias and no factors of its own. With a content tower that reads texts,
    items that have no row are encoded by their text (``encode_texts``) and are then such items too.

    Args:
        factors: number of latent factors.
        content: another item tower, whose vector is part of this tower's.
        init_std: standard deviation of the factors before training. Biases start at 0.
    """

    uses_ids = True
    warm: Tensor

    def __init__(self, factors: int = 0, content: ItemTower | None = None, init_std: float = 0.1) -> None:
        super().__init__()
        if factors < 0:
            raise ValueError(f"factors is a number of latent factors, at least 0, but is {factors}.")
        self.factors = factors
        self.content = content
        self.init_std = init_std

    def configure(self, catalogue: CatalogueView) -> None:
        """Creates the biases and the factors, and configures the content tower."""
        width = 0
        if self.content is not None:
            self.content.configure(catalogue)
            width = self.content.dim
            self.content_bias = nn.Linear(width, 1)
            nn.init.zeros_(self.content_bias.weight)
            nn.init.zeros_(self.content_bias.bias)
        self.dim = width + self.factors + 2
        self.bias = id_table(catalogue.n_rows, 1, 0.0)
        if self.factors:
            self.table = id_table(catalogue.n_rows, self.factors, self.init_std)
        warm = torch.ones(catalogue.n_rows) if catalogue.counts is None else catalogue.counts.cpu() > 0
        # 1 where an item was trained on, part of the checkpoint: which items are cold is a fact of the training data.
        self.register_buffer("warm", warm.to(torch.float32)[:, None].clone())

    def prepare(self, catalogue: CatalogueView) -> None:
        """Attaches the data to the content tower."""
        if self.content is not None:
            self.content.prepare(catalogue)

    def __getattr__(self, name: str) -> Any:
        # only with a content tower that reads texts is there anything to encode new items by
        if name == "encode_texts":
            content = self._modules.get("content")
            if content is not None and hasattr(content, "encode_texts"):
                return self._encode_texts
        return super().__getattr__(name)

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Vectors of items that have no row, by the content tower.

        Args:
            texts: ``n`` item texts, made by the template of the training data.

        Returns:
            ``(n, d)`` item vectors, as an item of the catalogue without training interactions has.
        """
        content: Tensor = self.content.encode_texts(texts)  # type: ignore[union-attr,operator]  # looked up before
        bias = self.content_bias(content)
        parts = [content.new_zeros(len(content), self.factors)] if self.factors else []
        return torch.cat([content, *parts, bias, torch.ones_like(bias)], -1)

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, d)`` vectors ``[content, q_i, b_i, 1]``."""
        warm = self.warm if items.whole else self.warm[items.rows]
        bias = (self.bias.weight if items.whole else self.bias(items.rows)) * warm
        parts = []
        if self.content is not None:
            content = self.content(items)
            parts.append(content)
            bias = bias + self.content_bias(content)
        if self.factors:
            parts.append((self.table.weight if items.whole else self.table(items.rows)) * warm)
        return torch.cat([*parts, bias, torch.ones_like(bias)], -1)

    def language_parameters(self) -> Iterable[nn.Parameter]:
        """What is trained of the content tower's language model."""
        return () if self.content is None else self.content.language_parameters()


class BiasUserTower(UserTower):
    """A user's bias, and the factors and content that :class:`BiasItemTower` has too.

    A user without training ratings has no bias and no factors: all of them start at 0 and move with the user's ratings
    only. Such a user is told the bias of the items, and what the content says.

    Args:
        content: another user tower, such as ``LanguageUserTower`` or ``PooledUserTower``: its interest vector is
            multiplied with the vector of the item tower's ``content``. It reads the content vectors of the history.
        ids: learn a bias and factors for each user. Without, only content tells users apart, and new users are no
            different from old ones.

    Raises:
        ValueError: when neither ids nor content are wanted.
    """

    def __init__(self, content: UserTower | None = None, ids: bool = True) -> None:
        super().__init__()
        if content is None and not ids:
            raise ValueError("A BiasUserTower without ids knows nothing of users: give it a content tower.")
        self.content = content
        self.ids = ids
        self.uses_ids = ids or (content is not None and content.uses_ids)

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates the biases and the factors, and configures the content tower.

        Raises:
            TypeError: when the item tower is no :class:`BiasItemTower`.
            ValueError: when only one of the two towers has content.
        """
        super().configure(catalogue, item_tower)
        if not isinstance(item_tower, BiasItemTower):
            raise TypeError(
                f"BiasUserTower goes with BiasItemTower, but the item tower is {type(item_tower).__name__}: set "
                "model.item_tower.class_path to lightning_rec.towers.BiasItemTower, and give the other item tower to "
                "it as content."
            )
        if (self.content is None) != (item_tower.content is None):
            raise ValueError(
                "Only one of BiasItemTower and BiasUserTower has a content tower: give both one, or neither."
            )
        self.width = 0
        if self.content is not None and item_tower.content is not None:
            self.content.configure(catalogue, item_tower.content)
            self.width = item_tower.content.dim
            self.content_bias = nn.Linear(self.width, 1)
            nn.init.zeros_(self.content_bias.weight)
            nn.init.zeros_(self.content_bias.bias)
        self.factors = item_tower.factors
        if self.ids:
            self.bias = id_table(catalogue.n_users, 1, 0.0)
            if self.factors:
                # Zeros: the items' factors are random, so both move, and a user without ratings stays at zero.
                self.table = id_table(catalogue.n_users, self.factors, 0.0)

    def knows(self, users: UserBatch) -> Tensor:
        """True for users of the data, and for those whom the content tower knows."""
        known = users.users > 0 if self.ids else torch.zeros_like(users.users, dtype=torch.bool)
        return known if self.content is None else known | self.content.knows(users)

    def prepare(self, catalogue: CatalogueView) -> None:
        """Attaches the data to the content tower."""
        if self.content is not None:
            self.content.prepare(catalogue)

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """``(b, t, d)`` vectors ``[content, p_u, 1, b_u]``; ``t`` is 1 where that of the content tower is.

        Args:
            users: ``b`` users with histories of up to ``t`` events.
            items: ``(n, d)`` vectors of the item tower.
        """
        content = None if self.content is None else self.content(users, items[:, : self.width])
        steps = users.history.shape[1] if content is None else content.shape[1]
        shape = (len(users), steps)
        bias = self._at_steps(self.bias, users, steps) if self.ids else items.new_zeros(*shape, 1)
        parts = []
        if content is not None:
            parts.append(content)
            bias = bias + self.content_bias(content)
        if self.factors:
            parts.append(
                self._at_steps(self.table, users, steps) if self.ids else items.new_zeros(*shape, self.factors)
            )
        return torch.cat([*parts, items.new_ones(*shape, 1), bias], -1)

    @staticmethod
    def _at_steps(table: nn.Embedding, users: UserBatch, steps: int) -> Tensor:
        return table(users.users)[:, None].expand(-1, steps, -1)

    def language_parameters(self) -> Iterable[nn.Parameter]:
        """What is trained of the content tower's own language model."""
        return () if self.content is None else self.content.language_parameters()
