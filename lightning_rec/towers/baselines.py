"""The baselines every recommender must beat: popularity, all of it or that of late, and matrix factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rec.data.batch import CatalogueView, ItemBatch, UserBatch
from lightning_rec.towers.base import ItemTower, UserTower
from lightning_rec.towers.fusion import id_table


class PopularityItemTower(ItemTower):
    """An item is the number of its training interactions. With :class:`ConstantUserTower` that number is the score.

    There is nothing to train: use it with ``validate``, ``test`` and ``predict``, with the dot-product score.
    """

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.dim = 1

    def configure(self, catalogue: CatalogueView) -> None:
        """Makes room for the counts, and takes them where the data is there."""
        # In the checkpoint: it scores by the interactions it was fitted on, whatever data is attached later.
        self.register_buffer("counts", torch.zeros(catalogue.n_rows, 1))
        self.prepare(catalogue)

    def prepare(self, catalogue: CatalogueView) -> None:
        """Takes the counts of the training data, unless a checkpoint brought its own."""
        if catalogue.counts is not None and not bool(self.counts.any()):
            # Exact in float32 up to 16,777,216 interactions of one item.
            self.counts.copy_(catalogue.counts[:, None])

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, 1)`` counts."""
        return self.counts if items.whole else self.counts[items.rows]


class RecencyPopularityItemTower(ItemTower):
    """An item is what it was read of late: its training interactions, each halved with every half-life since.

    With :class:`ConstantUserTower` that number is the score: the baseline to beat where items are short-lived, such as
    news. The half-life is the data module's ``recency_half_life``. The weights are taken at the newest training
    interaction; at any later moment all of them have shrunk by the same factor, so that the order of the items does not
    depend on when a request is made.

    There is nothing to train: use it with ``validate``, ``test`` and ``predict``, with the dot-product score.
    """

    recent_counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.dim = 1

    def configure(self, catalogue: CatalogueView) -> None:
        """Makes room for the counts, and takes them where the data is there."""
        # In the checkpoint: it scores by the interactions it was fitted on, whatever data is attached later.
        self.register_buffer("recent_counts", torch.zeros(catalogue.n_rows, 1))
        if catalogue.recent_counts is not None:
            self.recent_counts.copy_(catalogue.recent_counts[:, None])

    def prepare(self, catalogue: CatalogueView) -> None:
        """Takes the counts of the training data, unless a checkpoint brought its own.

        Raises:
            ValueError: when the data has no times.
        """
        if bool(self.recent_counts.any()):
            return
        if catalogue.recent_counts is None:
            raise ValueError(
                "RecencyPopularityItemTower needs the times of the interactions, and the data has none. Map a column "
                "to timestamp, or use PopularityItemTower."
            )
        self.recent_counts.copy_(catalogue.recent_counts[:, None])

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, 1)`` counts."""
        return self.recent_counts if items.whole else self.recent_counts[items.rows]


class ConstantUserTower(UserTower):
    """Every user is a vector of ones, at every step."""

    def knows(self, users: UserBatch) -> Tensor:
        """Popularity answers everyone."""
        return users.lengths >= 0

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """``(b, t, d)`` ones."""
        return items.new_ones(()).expand(*users.history.shape, self.dim)


class IdUserTower(UserTower):
    """One learned vector a user, whatever the history: with :class:`IdItemTower` this is matrix factorisation.

    Koren, Bell and Volinsky, "Matrix Factorization Techniques for Recommender Systems", IEEE Computer 2009, without
    biases. An unknown user (row 0) has a zero vector.

    Args:
        init_std: standard deviation of the vectors before training.
    """

    uses_ids = True

    def __init__(self, init_std: float = 0.02) -> None:
        super().__init__()
        self.init_std = init_std

    def knows(self, users: UserBatch) -> Tensor:
        """True for users with a vector of their own."""
        return users.users > 0

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates one vector a user."""
        super().configure(catalogue, item_tower)
        self.table = id_table(catalogue.n_users, self.dim, self.init_std)

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """``(b, t, d)``: the same vector at every step."""
        return self.table(users.users)[:, None].expand(-1, users.history.shape[1], -1)
