"""The catalogue as a reader sees it: one immutable state after another, never a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_rec.recommend.context import ContextIndex, ScoreContext
from lightning_rec.recommend.explore import LastLayer
from lightning_rec.recommend.index import ExactIndex, Index
from lightning_rec.recommend.lives import Lives
from lightning_rec.recommend.rerank import Fields
from lightning_rec.recommend.types import RequestError


@dataclass(frozen=True, eq=False)
class CatalogueState:
    """All that is known of the items at one moment.

    A row keeps its number for ever. A removed item keeps its row and its vector, so that a history that holds it is
    still read, but it never comes in an answer; added again, it lives again, with the fields that it is given then.

    Attributes:
        generation: grows by one with every change.
        ids: raw id of each row; ``ids[0] == ""`` is padding.
        rows: row of each raw id, removed ones among them.
        texts: what the item tower reads of each row.
        display: what a person reads of each row.
        attributes: one value a row for each field; always :class:`~lightning_rec.recommend.rerank.Fields`.
        raw: ``(n, d)`` item vectors as the user tower reads them.
        ready: ``(n, d)`` item vectors ready for the product with an interest vector.
        counts: ``(n,)`` training interactions; 0 for new items.
        alive: ``(n,)`` False for padding and removed items.
        index: finds the best of the living items.
        lives: when each item can be recommended; None: always.
        context: what the moment of a request adds to scores; None: nothing.
        whole: for a state of :meth:`at` that of all items, whenever they live.
        added: ``(n,)`` for a state of :meth:`at` what its moment adds to the score of each row; None: nothing.
    """

    generation: int
    ids: Sequence[str]
    rows: Mapping[str, int] = field(repr=False)
    texts: Sequence[str] = field(repr=False)
    display: Sequence[str] = field(repr=False)
    attributes: Mapping[str, Sequence[Any]] = field(repr=False)
    raw: Tensor = field(repr=False)
    ready: Tensor = field(repr=False)
    counts: Tensor = field(repr=False)
    alive: Tensor = field(repr=False)
    index: Index = field(repr=False)
    lives: Lives | None = field(default=None, repr=False)
    context: ScoreContext | None = field(default=None, repr=False)
    whole: CatalogueState | None = field(default=None, repr=False)
    added: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.attributes, Fields):
            object.__setattr__(self, "attributes", Fields(self.attributes))

    def __len__(self) -> int:
        """Number of rows, padding and removed items included."""
        return len(self.ids)

    @property
    def n_items(self) -> int:
        """Number of items that can come in an answer."""
        return int(self.alive.sum())

    def at(self, moment: int) -> CatalogueState:
        """The same catalogue at a moment: only items that are alive then are ``alive``, and scores are those of then.

        Args:
            moment: seconds since 1970.
        """
        state = self._living_at(moment)
        if state.context is None:
            return state
        kept: tuple[int, CatalogueState] | None = state.__dict__.get("_kept_scores")
        if kept is None or kept[0] != moment:
            added = state.context.at(moment)
            index = ContextIndex(state.ready, added, ~state.alive)
            scored = replace(state, index=index, added=added, whole=state.whole or state)
            scored.__dict__["popularity"] = state.popularity  # what the towers do not answer has no context
            # a second is the shortest span that a request can tell; of several threads the last one's is kept
            state.__dict__["_kept_scores"] = kept = (moment, scored)
        return kept[1]

    def _living_at(self, moment: int) -> CatalogueState:
        if self.lives is None:
            return self
        kept: tuple[int, int, CatalogueState] | None = self.__dict__.get("_kept")
        if kept is None or not kept[0] <= moment < kept[1]:
            alive = self.alive & self.lives.at(moment)
            state = replace(self, alive=alive, index=self.index.limited(self.ready, ~alive), whole=self)
            # of several threads that come here at once each makes its own, and the last one's is kept
            self.__dict__["_kept"] = kept = (*self.lives.span(moment), state)
        return kept[2]

    def scores(self, interest: Tensor, rows: Tensor) -> Tensor:
        """The scores of rows for an interest vector ``(d,)``: the dot products, and what the moment adds.

        Args:
            interest: ready for the product.
            rows: int64, any shape.
        """
        products = self.ready[rows] @ interest
        return products if self.added is None else products + self.added[rows]

    @property
    def _listed(self) -> Tensor:
        return self.alive if self.whole is None else self.whole.alive

    @cached_property
    def popularity(self) -> ExactIndex:
        """Finds the items with most training interactions; equal ones in the order of their rows."""
        # the small term breaks ties: counts are whole numbers, and it stays below one half
        order = torch.arange(len(self), 0, -1, dtype=torch.float64) / (2 * len(self) + 2)
        return ExactIndex((self.counts.double() + order)[:, None], ~self.alive)

    @cached_property
    def last_layer(self) -> LastLayer:
        """The uncertainty of scores."""
        return LastLayer(self.ready, self.counts) if self.whole is None else self.whole.last_layer

    def living(self, ids: Sequence[str]) -> tuple[list[int], list[str]]:
        """The rows of raw ids that the catalogue has, each once, and the ids that it lacks."""
        found: dict[int, None] = {}
        unknown = []
        listed = self._listed
        for id_ in ids:
            row = self.rows.get(id_, 0)
            if row and bool(listed[row]):
                found[row] = None
            else:
                unknown.append(id_)
        return list(found), unknown

    def row(self, id_: str) -> int:
        """The row of an item that was not removed.

        Raises:
            RequestError: with the code ``unknown_item``.
        """
        row = self.rows.get(id_, 0)
        if not row or not bool(self._listed[row]):
            raise RequestError(
                f"There is no item with the id {id_!r}.", "unknown_item", "Add it first, or check the id."
            )
        return row

    def following(self, **changes: Any) -> CatalogueState:
        """The next state, with other values of some attributes, and an index of them."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__} | changes
        values["generation"] = self.generation + 1
        values["index"] = build_index(self.index, values["ready"], values["alive"])
        return CatalogueState(**values)


def build_index(like: Index, ready: Tensor, alive: Tensor) -> Index:
    """A new index of the same kind that never finds what is not alive."""
    return like.build(ready, ~alive)
