"""The catalogue as a reader sees it: one immutable state after another, never a mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_rec.recommend.explore import LastLayer
from lightning_rec.recommend.index import ExactIndex, Index
from lightning_rec.recommend.lives import PUBLISHED, Lives, publications
from lightning_rec.recommend.rerank import Fields
from lightning_rec.recommend.types import RequestError

_DISPLAY_LENGTH = 80


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
        whole: for a state of :meth:`at` that of all items, whenever they live.
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
    whole: CatalogueState | None = field(default=None, repr=False)

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
        """The same catalogue, in which only items that are alive at a moment are ``alive``.

        Args:
            moment: seconds since 1970.
        """
        if self.lives is None:
            return self
        kept: tuple[int, int, CatalogueState] | None = self.__dict__.get("_kept")
        if kept is None or not kept[0] <= moment < kept[1]:
            alive = self.alive & self.lives.at(moment)
            state = replace(self, alive=alive, index=self.index.limited(self.ready, ~alive), whole=self)
            # of several threads that come here at once each makes its own, and the last one's is kept
            self.__dict__["_kept"] = kept = (*self.lives.span(moment), state)
        return kept[2]

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

    def with_items(
        self,
        items: Sequence[Mapping[str, Any]],
        text_of: Callable[[Mapping[str, Any]], str],
        encode: Callable[[list[str]], Tensor],
        ready: Callable[[Tensor], Tensor],
        moment: int = 0,
    ) -> CatalogueState:
        """The next state, with items added or changed.

        Args:
            items: fields of each item, ``item_id`` among them; a field that a changed item does not name stays. Of
                a removed item nothing stays.
            text_of: what the item tower reads of fields.
            encode: ``(m, d)`` vectors of texts as the user tower reads them.
            ready: makes such vectors ready for the product.
            moment: seconds since 1970, the birth of new items that do not say when they were published.
        """
        if not items:
            return self
        ids, rows = list(self.ids), dict(self.rows)
        texts, display = list(self.texts), list(self.display)
        attributes = {name: list(column) for name, column in self.attributes.items()}
        changed: dict[int, None] = {}  # rows whose text, and so whose vector, changed
        living: list[int] = []
        for item in items:
            id_ = item["item_id"]
            row = rows.get(id_)
            if row is None:
                row = rows[id_] = len(ids)
                ids.append(id_)
                texts.append("")
                display.append("")
                for column in attributes.values():
                    column.append(None)
            elif row < len(self) and not bool(self.alive[row]) and row not in living:
                for column in attributes.values():
                    column[row] = None
            for name, value in item.items():
                if name != "item_id":
                    attributes.setdefault(name, [None] * len(ids))[row] = value
            fields = {name: column[row] for name, column in attributes.items()}
            text = text_of(fields)
            if text != texts[row] or row >= len(self.ids):
                texts[row] = text
                changed[row] = None
            display[row] = _display(fields, text, id_)
            living.append(row)
        grown = len(ids) - len(self.ids)
        raw = torch.cat([self.raw, self.raw.new_zeros(grown, self.raw.shape[1])])
        prepared = torch.cat([self.ready, self.ready.new_zeros(grown, self.ready.shape[1])])
        if changed:
            places = torch.tensor(list(changed))
            raw[places] = encode([texts[row] for row in changed]).to(raw.dtype)
            prepared[places] = ready(raw[places]).to(prepared.dtype)
        alive = torch.cat([self.alive, torch.zeros(grown, dtype=torch.bool)])
        alive[torch.tensor(living)] = True
        counts = torch.cat([self.counts, self.counts.new_zeros(grown)])
        lives = self.lives
        if lives is not None:
            lives = lives.with_born(self._births(items, living, attributes, moment), len(ids))
        return self._next(
            ids=ids,
            rows=rows,
            texts=texts,
            display=display,
            attributes=attributes,
            raw=raw,
            ready=prepared,
            counts=counts,
            alive=alive,
            lives=lives,
        )

    def _births(
        self,
        items: Sequence[Mapping[str, Any]],
        rows: Sequence[int],
        attributes: Mapping[str, Sequence[Any]],
        moment: int,
    ) -> dict[int, int]:
        """Row -> birth of what is new, was removed, or says when it was published."""
        column = attributes.get(PUBLISHED)
        told = [{"item_id": item["item_id"]} for item in items]
        come = [row >= len(self) or not bool(self.alive[row]) for row in rows]
        for fields, item, row, new in zip(told, items, rows, come, strict=True):
            if column is not None and (new or PUBLISHED in item):
                fields[PUBLISHED] = column[row]
        published = publications(told)
        return {
            row: moment if time is None else time
            for row, time, new in zip(rows, published, come, strict=True)
            if new or time is not None
        }

    def without(self, ids: Sequence[str]) -> CatalogueState:
        """The next state, with items removed.

        Raises:
            RequestError: an id that is not there; then nothing is removed.
        """
        if not ids:
            return self
        alive = self.alive.clone()
        alive[torch.tensor([self.row(id_) for id_ in ids])] = False
        return self._next(alive=alive)

    def _next(self, **changes: Any) -> CatalogueState:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__} | changes
        values["generation"] = self.generation + 1
        values["index"] = build_index(self.index, values["ready"], values["alive"])
        return CatalogueState(**values)


def build_index(like: Index, ready: Tensor, alive: Tensor) -> Index:
    """A new index of the same kind that never finds what is not alive."""
    return like.build(ready, ~alive)


def _display(fields: Mapping[str, Any], text: str, id_: str) -> str:
    for name in ("title", "name"):
        if isinstance(fields.get(name), str) and fields[name].strip():
            return str(fields[name]).strip()
    return (text if len(text) <= _DISPLAY_LENGTH else text[: _DISPLAY_LENGTH - 1].rstrip() + "…") or id_
