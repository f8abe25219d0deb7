"""The typed batches that pass from the data to the towers, and what a tower may know of a catalogue.

This is the one file of the data room that towers may import. All positions and rows are ``int64``; row 0
and position 0 stand for padding everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

_B = TypeVar("_B", bound="_Movable")


@dataclass
class _Movable:
    """Moves and pins every tensor field, and every nested batch, in one call."""

    def _map(self: _B, function: Any) -> _B:
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor | _Movable):
                changed[item.name] = function(value)
        return replace(self, **changed)

    def to(self: _B, device: torch.device | str, non_blocking: bool = False) -> _B:
        """The same batch with its tensors on ``device``."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: _B) -> _B:
        """The same batch with its tensors in page-locked memory (called by ``DataLoader``)."""
        return self._map(lambda value: value.pin_memory())


@dataclass
class ItemBatch(_Movable):
    """The table of items of a step: distinct catalogue rows.

    Attributes:
        rows: ``(n,)`` catalogue rows, ``rows[0] == 0`` (padding), the rest distinct. The candidates of the
            step come first, items that are needed only as history after them.
        whole: True when ``rows`` is ``arange(n_rows)``, the whole catalogue: a tower may then skip its gather.
    """

    rows: Tensor
    whole: bool = False

    def __len__(self) -> int:
        return int(self.rows.shape[0])


@dataclass
class UserBatch(_Movable):
    """What the step knows of ``b`` users, each at one moment.

    Attributes:
        history: ``(b, t)`` positions in the step's item table, oldest first, **right-padded** with 0: a causal
            tower needs no padding mask, since padding comes after everything that is real.
        lengths: ``(b,)`` number of real events of each row, 0 for a user without history.
        users: ``(b,)`` user rows, 0 for an unknown user.
        times: ``(b, t)`` times of the events in seconds since 1970, or None when the data has no times.
        texts: ``b`` user texts (profile, reviews, titles of the newest history), or None when the data module
            makes none.
    """

    history: Tensor
    lengths: Tensor
    users: Tensor
    times: Tensor | None = None
    texts: list[str] | None = None

    @property
    def mask(self) -> Tensor:
        """``(b, t)`` True where the history holds an event."""
        steps = torch.arange(self.history.shape[1], device=self.history.device)
        return steps < self.lengths[:, None]

    def __len__(self) -> int:
        return int(self.history.shape[0])


@dataclass
class Batch(_Movable):
    """One step of training, evaluation or prediction.

    Attributes:
        users: histories and texts of the step's users.
        items: the table that ``users.history`` and, in training, ``targets`` point into. In evaluation and
            prediction the table is the whole catalogue, so that positions are catalogue rows.
        targets: training: ``(b, t)`` position in the table of the item that followed each step of the history,
            0 where there is none. Evaluation: ``(b, m)`` catalogue rows to be found, padded with 0.
            Prediction: None.
        n_candidates: training: the candidates are positions ``1 .. n_candidates`` of the table; every target is
            one of them. With the whole catalogue that is ``len(items) - 1``.
        log_q: ``(n_candidates,)`` log of the expected number of times each candidate is drawn for a step
            (Bengio and Senecal, 2008; Yi et al., RecSys 2019), or None when the candidates are the whole catalogue.
        known: ``(b, k)`` training: catalogue rows of the user's training positives, padded with 0.
        seen: ``(b, s)`` evaluation and prediction: catalogue rows that the user has already touched and that must
            not be recommended, padded with 0. None when seen items are kept.
        ratings: shaped like ``targets``: the rating of each target, NaN where there is none. None without ratings.
        index: ``(b,)`` evaluation and prediction: the number of each user in the order in which users were asked for.
    """

    users: UserBatch
    items: ItemBatch | None = None
    targets: Tensor | None = None
    n_candidates: int = 0
    log_q: Tensor | None = None
    known: Tensor | None = None
    seen: Tensor | None = None
    ratings: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class CatalogueView:
    """What a tower may know of the data when it is built.

    Attributes:
        n_rows: number of catalogue rows, padding row 0 included.
        n_users: number of user rows, padding row 0 included.
        texts: one text a catalogue row, ``texts[0] == ""``; empty when a checkpoint is loaded without its data.
        counts: ``(n_rows,)`` number of training interactions of each row; None without data.
        digest: a hash of ``texts`` (their content and order), for cache keys.
        ids_digest: a hash of the raw item ids in order: towers with id vectors fit one catalogue only.
        users_digest: a hash of the raw user ids in order.
        rating_range: lowest and highest rating, or None when the data has no ratings.
    """

    n_rows: int
    n_users: int = 1
    texts: Sequence[str] = field(default=(), repr=False)
    counts: Tensor | None = field(default=None, repr=False)
    digest: str = ""
    ids_digest: str = ""
    users_digest: str = ""
    rating_range: tuple[float, float] | None = None
