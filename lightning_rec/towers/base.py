"""The two contracts: what an item tower and a user tower must do.

A tower is an ordinary ``torch.nn.Module`` with three moments in its life:

1. ``__init__`` takes plain values only (numbers, strings, a peft config), so that it can be written in YAML,
   shown by ``--help`` and stored in a checkpoint. It creates no parameters.
2. ``configure`` is called once, when the size of the catalogue is known. It creates the parameters.
3. ``prepare`` is called whenever a data set is attached, after the weights are loaded. Most towers need none; the
   text tower tokenises, or encodes and caches the catalogue's text here.

A complete item tower of your own::

    from torch import nn
    from lightning_rec.towers import ItemTower

    class HashedItemTower(ItemTower):
        '''Items share a small table of vectors: row modulo the number of buckets.'''

        def __init__(self, dim: int = 64, buckets: int = 1000) -> None:
            super().__init__()
            self.dim = dim
            self.buckets = buckets

        def configure(self, catalogue):
            self.table = nn.Embedding(self.buckets, self.dim)

        def forward(self, items):
            return self.table(items.rows % self.buckets)

Name it in YAML, and it works with every command::

    model:
      item_tower:
        class_path: my_towers.HashedItemTower
        init_args: {dim: 64, buckets: 5000}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch, UserBatch


class Tower(nn.Module, ABC):
    """What item and user towers share.

    Attributes:
        dim: width ``d`` of the vectors that the tower returns.
    """

    dim: int

    def prepare(self, catalogue: CatalogueView) -> None:
        """Called whenever a data set is attached, after the weights are loaded. Nothing to do by default."""

    def language_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of a pretrained language model inside this tower: they get their own learning rate."""
        return ()

    def auxiliary_loss(self) -> Tensor | None:
        """What this tower adds to the loss of the training step whose ``forward`` it has just run, already weighted.

        :class:`~lightning_rec.TwoTower` asks once a step, after the objective. None, the default: nothing. A tower
        that keeps something of ``forward`` for it does so in training only, and lets go of it here.
        """
        return None


def parameter_summary(module: nn.Module) -> dict[str, int]:
    """How many parameters a module has, each counted once however often it is shared.

    A frozen language model counts too, though its vectors are cached and its weights are not loaded.

    Returns:
        ``{"trainable": ..., "total": ...}``.
    """
    parameters = list(module.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    # a TextEncoder says how large the model is that it keeps out of its parameters
    encoders: list[Any] = [part for part in module.modules() if hasattr(part, "frozen_parameters")]
    sizes = {encoder.folder: encoder.frozen_parameters for encoder in encoders if encoder.frozen_parameters}
    for encoder in encoders:
        if not encoder.frozen_parameters:  # it has the same model among its own parameters
            sizes.pop(encoder.folder, None)
    total = sum(parameter.numel() for parameter in parameters)
    return {"trainable": trainable, "total": total + sum(sizes.values())}


class ItemTower(Tower):
    """Turns items into vectors. See the module's docstring for a complete example."""

    #: True when the vectors depend on the row number of an item, so that a checkpoint fits its own catalogue only.
    uses_ids: bool = True
    #: True when the tower reads ``ItemBatch.texts``, the variants of texts that a training step may bring, or, where it
    #: has ``text_fields``, ``ItemBatch.fields``.
    reads_variants: bool = False
    #: The fields of the item table that the tower reads as texts of their own; empty: it reads the items' texts.
    text_fields: Sequence[str] = ()

    def configure(self, catalogue: CatalogueView) -> None:
        """Creates the parameters, sized by the catalogue. Called once, before weights are loaded."""

    @abstractmethod
    def forward(self, items: ItemBatch) -> Tensor:
        """Encodes a table of items.

        Args:
            items: ``n`` distinct catalogue rows; row 0 is padding and its vector is never used.

        Returns:
            ``(n, d)`` item vectors.
        """


class UserTower(Tower):
    """Turns histories (and texts, and ids) of users into interest vectors in the space of the item vectors."""

    #: True when the tower holds a vector for each user, so that a checkpoint fits its own users only.
    uses_ids: bool = False

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates the parameters. Called once, after the item tower's ``configure``, before weights are loaded.

        Args:
            catalogue: sizes and texts of the data.
            item_tower: the item tower of the run: its ``dim`` is the width that this tower must return, and a
                language user tower may share its language model.
        """
        self.dim = item_tower.dim

    def knows(self, users: UserBatch) -> Tensor:
        """``(b,)`` True where the tower has something to go by; the other users are answered by popularity.

        By default that is a history. A tower that reads ids or texts overrides it.
        """
        return users.lengths > 0

    @abstractmethod
    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """Reads the users' histories.

        Args:
            users: ``b`` users with histories of up to ``t`` events, oldest first, right-padded.
            items: ``(n, d)`` vectors of the step's item table; ``items[users.history]`` is ``(b, t, d)``.

        Returns:
            ``(b, t, d)``: at every step of the history the interest after that event, from what came up to it and
            nothing later; or ``(b, 1, d)``: one interest vector from the whole history (a tower that cannot be causal).
            ``users.texts`` and ``users.times`` are those of the whole history: a tower that returns a vector a step
            must not let a step see them beyond itself.
        """


class CandidateAwareUserTower(UserTower):
    """A user tower whose interest depends on the candidate that is asked about.

    It works where candidates are few and known beforehand, that is with impressions. Ranking a whole catalogue with it
    would mean an interest vector for every pair of user and item, so the other commands refuse it.
    """

    @abstractmethod
    def attend(self, users: UserBatch, items: Tensor, candidates: Tensor) -> Tensor:
        """The interest in each candidate.

        Args:
            users: ``b`` users with histories of up to ``t`` events, oldest first, right-padded.
            items: ``(n, d)`` vectors of the step's item table.
            candidates: ``(b, c, d)`` vectors of each user's candidates.

        Returns:
            ``(b, c, d)`` interest vectors: the score of a candidate is its dot product with its own.
        """

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """Refuses.

        Raises:
            TypeError: always, with the remedy.
        """
        raise TypeError(
            f"{type(self).__name__} looks at the candidates, so it cannot rank a whole catalogue: use it with "
            "lightning_rec.ImpressionTwoTower and a data module of impressions, or choose another user tower."
        )
