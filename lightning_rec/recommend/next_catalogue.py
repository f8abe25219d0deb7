"""The catalogue after a change, made beside the one that readers see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rec.recommend.lives import PUBLISHED, publications
from lightning_rec.recommend.types import RequestError

if TYPE_CHECKING:
    from lightning_rec.recommend.artefact import Artefact
    from lightning_rec.recommend.catalogue_state import CatalogueState
    from lightning_rec.recommend.item_changes import ItemChange

_DISPLAY_LENGTH = 80


class NextCatalogue:
    """The next catalogue, as far as it can be told without a language model; :meth:`made` makes it of vectors.

    Args:
        state: the present catalogue, which stays as it is.
        changes: in order; those of one item add up.
        artefact: what the first catalogue was made of. An item that has again the text that it had there has again
            the vector, so that it does not matter what came in between.

    Attributes:
        state: the present catalogue.
        texts: what is to be encoded, each once: see :meth:`~lightning_rec.recommend.artefact.Artefact.reading`.

    Raises:
        RequestError: a change of an item that is not there, or a time of publication that cannot be read.
    """

    def __init__(self, state: CatalogueState, changes: Sequence[ItemChange], artefact: Artefact) -> None:
        self.state = state
        self._artefact = artefact
        self._alive: dict[int, bool] = {}
        self._renewed: dict[int, str] = {}  # rows of which a tower reads something else, and what
        rewritten = any(change.fields or change.added is not None for change in changes)
        self._values: dict[str, Any] = {}
        if rewritten:  # a removal copies nothing
            self._values = {name: list(getattr(state, name)) for name in ("ids", "texts", "display")}
            self._values["rows"] = dict(state.rows)
            self._values["attributes"] = {name: list(column) for name, column in state.attributes.items()}
        rows = [self._apply(change) for change in changes]
        self._births = self._born([pair for pair in zip(rows, changes, strict=True) if pair[0]])
        self._encoded = {row: said for row, said in self._renewed.items() if not self._is_as_exported(row, said)}
        self.texts = list(dict.fromkeys(self._encoded.values()))

    def _get(self, name: str) -> Any:
        return self._values.get(name, getattr(self.state, name))

    def _is_as_exported(self, row: int, reading: str) -> bool:
        exported = self._artefact
        return row < len(exported.texts) and self._reading(exported.attributes, row, exported.texts[row]) == reading

    def _reading(self, attributes: Mapping[str, Sequence[Any]], row: int, text: str) -> str:
        if self._artefact.field_reading is None:
            return text
        return self._artefact.reading({name: column[row] for name, column in attributes.items()}, text)

    def _reading_before(self, row: int) -> str:
        """What was read of an item that is there, before the change that is written down now."""
        if row in self._renewed:
            return self._renewed[row]
        return self._reading(self.state.attributes, row, self.state.texts[row])

    def _apply(self, change: ItemChange) -> int:
        """Writes down a change; returns its row, 0 where there is nothing to write."""
        row = self._get("rows").get(change.item, 0)
        fresh = not row
        if fresh and change.added is None:
            if change.removed:
                return 0
            raise RequestError(
                f"There is no item with the id {change.item!r}.", "unknown_item", "Add it first, or check the id."
            )
        if fresh:
            row = self._append(change.item)
        elif change.anew:
            for column in self._values["attributes"].values():
                column[row] = None
        if change.fields or change.added is not None:
            self._write(row, change, fresh)
        self._alive[row] = not change.removed
        return int(row)

    def _append(self, id_: str) -> int:
        row = self._values["rows"][id_] = len(self._values["ids"])
        for name, value in (("ids", id_), ("texts", ""), ("display", "")):
            self._values[name].append(value)
        for column in self._values["attributes"].values():
            column.append(None)
        return int(row)

    def _write(self, row: int, change: ItemChange, fresh: bool) -> None:
        attributes = self._values["attributes"]
        for name, value in change.fields.items():
            attributes.setdefault(name, [None] * len(self._values["ids"]))[row] = value
        fields = {name: column[row] for name, column in attributes.items()}
        text = self._artefact.item_text(fields)
        reading = self._artefact.reading(fields, text)
        if fresh or reading != self._reading_before(row):
            self._renewed[row] = reading
        self._values["texts"][row] = text
        self._values["display"][row] = display_of(fields, text, change.item)

    def _born(self, changed: Sequence[tuple[int, ItemChange]]) -> dict[int, int | None]:
        """Row -> birth, None for that of the artefact, of what was added or says when it was published."""
        if self.state.lives is None and self.state.context is None:
            return {}
        column = self._get("attributes").get(PUBLISHED)
        exported = len(self._artefact.ids)
        own = [change.added is not None and (row >= exported or change.anew) for row, change in changed]
        told = [
            {"item_id": change.item, PUBLISHED: column[row] if column and (new or PUBLISHED in change.fields) else None}
            for (row, change), new in zip(changed, own, strict=True)
        ]
        births: dict[int, int | None] = {}
        for (row, change), new, time in zip(changed, own, publications(told), strict=True):
            if time is not None or new:
                births[row] = change.added if time is None else time
            elif PUBLISHED in change.fields and row < exported:
                births[row] = None
        return births

    def made(self, encoded: Mapping[str, Tensor]) -> CatalogueState:
        """The next catalogue.

        Args:
            encoded: the vector of each of the :attr:`texts`, as the user tower reads it.
        """
        state, artefact = self.state, self._artefact
        n = len(self._get("ids"))
        grown = n - len(state)
        values: dict[str, Any] = dict(self._values)
        if grown or self._renewed:  # else what an index has prepared of the vectors goes on
            raw = torch.cat([state.raw, state.raw.new_zeros(grown, state.raw.shape[1])])
            ready = torch.cat([state.ready, state.ready.new_zeros(grown, state.ready.shape[1])])
            back = torch.tensor([row for row in self._renewed if row not in self._encoded], dtype=torch.int64)
            raw[back], ready[back] = artefact.raw_vectors[back], artefact.vectors[back]
            if self._encoded:
                places = torch.tensor(list(self._encoded))
                raw[places] = torch.stack([encoded[text] for text in self._encoded.values()]).to(raw.dtype)
                ready[places] = artefact.ready(raw[places]).to(ready.dtype)
            values |= {"raw": raw, "ready": ready}
        alive = torch.cat([state.alive, torch.zeros(grown, dtype=torch.bool)])
        changed = torch.tensor(list(self._alive), dtype=torch.int64)
        alive[changed] = torch.tensor(list(self._alive.values()), dtype=torch.bool)
        values["alive"] = alive
        if grown:
            values["counts"] = torch.cat([state.counts, state.counts.new_zeros(grown)])
        if state.lives is not None and artefact.lives is not None:
            values["lives"] = state.lives.with_born(self._births, n, artefact.lives)
        if state.context is not None and artefact.context is not None:
            values["context"] = state.context.with_born(self._births, n, artefact.context)
        return state.following(**values)


def display_of(fields: Mapping[str, Any], text: str, id_: str) -> str:
    """What a person reads of an item: its title, else the beginning of its text."""
    for name in ("title", "name"):
        if isinstance(fields.get(name), str) and fields[name].strip():
            return str(fields[name]).strip()
    return (text if len(text) <= _DISPLAY_LENGTH else text[: _DISPLAY_LENGTH - 1].rstrip() + "…") or id_
