"""The typed batches that pass from the data to the towers, and what a tower may know of a catalogue.

This is the one file of the data room that towers may import. All positions and rows are ``int64``; row 0
and position 0 stand for padding everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            step come first, items that are needed only as history after them. Row 0 inside a training history is an
            event that was masked.
        whole: True when ``rows`` is ``arange(n_rows)``, the whole catalogue: a tower may then skip its gather.
        texts: training with text augmentation: the ``n`` texts of this step, variants of the catalogue's. None: the
            catalogue's own texts.
        fields: the same for a tower that reads fields of the items (``ItemTower.text_fields``): ``n`` variants of each
            of these. None: the catalogue's own fields.
    """

    rows: Tensor
    whole: bool = False
    texts: list[str] | None = None
    fields: dict[str, list[str]] | None = None

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
class ImpressionBatch(_Movable):
    """What ``b`` users were shown, each at one moment, and what they clicked of it.

    Attributes:
        candidates: ``(b, c)`` positions in the step's item table (in evaluation and prediction: catalogue rows),
            right-padded with 0. In training a row may be a click and some non-clicks of its impression only. An item
            that was shown twice stands here twice.
        sizes: ``(b,)`` number of real candidates of each row; 0 is possible.
        labels: ``(b, c)`` float32: 1 clicked, 0 not clicked, NaN unlabelled or padding. None when nothing is labelled.
        weights: ``(b, c)`` float32: how many candidates of the impression each one stands for (non-clicks that were
            drawn from more stand for several), 0 at padding. None: each for itself.
        positions: ``(b, c)`` int64: place on the page at which the candidate was shown, from 1; 0 unknown or padding.
            None when the data has none.
        propensities: ``(b, c)`` float32: given probability that the candidate was looked at; NaN unknown or padding.
            None when the data has none.
        ages: ``(b, c)`` float32: hours from the item's publication to the request, at least 0; NaN unknown or
            padding. None when the data has no times.
        popularity: ``(b, c)`` float32: clicks of the candidate before the request, each halved with every half-life
            that has passed since. None when the data has no times.
        dwell: ``(b, c)`` float32: seconds spent on the candidate; NaN where there are none. None when the data has
            none.
        times: ``(b,)`` int64 seconds since 1970 of the requests. None when the data has no times.
    """

    candidates: Tensor
    sizes: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None
    positions: Tensor | None = None
    propensities: Tensor | None = None
    ages: Tensor | None = None
    popularity: Tensor | None = None
    dwell: Tensor | None = None
    times: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """``(b, c)`` True where there is a candidate."""
        steps = torch.arange(self.candidates.shape[1], device=self.candidates.device)
        return steps < self.sizes[:, None]

    def __len__(self) -> int:
        return int(self.candidates.shape[0])


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
            (Bengio and Senecal, 2008; Yi et al., RecSys 2019), or None when the candidates are the same in every step:
            the whole catalogue, or all of it that is trained on.
        known: ``(b, k)`` training: catalogue rows of the user's training positives, padded with 0. With
            impressions whose histories are augmented also the events of the history as it was.
        seen: ``(b, s)`` evaluation and prediction: catalogue rows that the user has already touched and that must
            not be recommended, padded with 0. None when seen items are kept.
        ratings: shaped like ``targets``: the rating of each target, NaN where there is none. None without ratings.
        index: ``(b,)`` evaluation and prediction: the number of each user in the order in which users were asked for.
            With impressions: the number of each impression in the order of the files.
        impressions: what the users were shown; None for data of plain interactions. Row ``i`` belongs to
            ``users`` row ``i``, whose history ends before the request.
        times: ``(b,)`` int64 evaluation and prediction: time of each request in seconds since 1970. None when the data
            has no times, and in training.
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
    impressions: ImpressionBatch | None = None
    times: Tensor | None = None


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
        rating_mean: mean of the training ratings, or None without data or ratings.
        fields: the fields of the item table, cleaned: one value a catalogue row, a string or a list of strings
            (``""`` or ``[]`` where an item has none, and for padding). Empty when a checkpoint is loaded without data.
        groups: ``(n_rows,)`` int64 number of the category of each row, 0 where it has none. None without data or
            categories.
        recent_counts: ``(n_rows,)`` float32 training interactions of each row, each halved with every half-life
            between it and the newest training interaction. None when the data has no times.
    """

    n_rows: int
    n_users: int = 1
    texts: Sequence[str] = field(default=(), repr=False)
    counts: Tensor | None = field(default=None, repr=False)
    digest: str = ""
    ids_digest: str = ""
    users_digest: str = ""
    rating_range: tuple[float, float] | None = None
    rating_mean: float | None = None
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict, repr=False)
    groups: Tensor | None = field(default=None, repr=False)
    recent_counts: Tensor | None = field(default=None, repr=False)
