"""The catalogue after a change, made beside the one that readers see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rec.recommend.lives import PUBLISHED, publications_or_errors
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
        refused: takes up the errors of changes that do not fit, by raw id; all others are made. None: the first one
            is raised.

    Attributes:
        state: the present catalogue.
        texts: what is to be encoded, each once: see :meth:`~lightning_rec.recommend.artefact.Artefact.reading`.

    Raises:
        RequestError: a text that the towers cannot read, or a time of publication that nobody can.
    """

    def __init__(
        self,
        state: CatalogueState,
        changes: Sequence[ItemChange],
        artefact: Artefact,
        refused: dict[str, RequestError] | None = None,
    ) -> None:
        self.state = state
        self._artefact = artefact
        self._alive: dict[int, bool] = {}
        self._renewed: dict[int, str] = {}  # rows of which a tower reads something else, and what
        self._births: dict[int, int | None] = {}  # None for that of the artefact
        self._values: dict[str, Any] = {}
        if any(change.rewrites for change in changes):  # a removal copies nothing
            self._values = {name: list(getattr(state, name)) for name in ("ids", "texts", "display")}
            self._values["rows"] = dict(state.rows)
            self._values["attributes"] = {name: list(column) for name, column in state.attributes.items()}
        for change, published in zip(changes, self._publications(changes), strict=True):
            try:
                self._apply(change, published)
            except RequestError as error:
                if refused is None:
                    raise
                refused[change.item] = error
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

    def _publications(self, changes: Sequence[ItemChange]) -> Sequence[int | RequestError | None]:
        """When the items of changes were published, as far as it matters; see :class:`~.lives.Lives`."""
        if self.state.lives is None and self.state.context is None:
            return [None] * len(changes)
        return publications_or_errors(
            [
                {"item_id": change.item, PUBLISHED: change.fields.get(PUBLISHED) if change.rewrites else None}
                for change in changes
            ]
        )

    def _apply(self, change: ItemChange, published: int | RequestError | None) -> None:
        """Writes down a change, or nothing of it where it does not fit."""
        row = self._get("rows").get(change.item, 0)
        if not row and (change.removed or change.added is None):
            return  # of what the artefact lacks, and nobody has added
        if change.rewrites:
            row = self._write(row, change, published)
        self._alive[row] = not change.removed

    def _write(self, row: int, change: ItemChange, published: int | RequestError | None) -> int:
        attributes = self._values["attributes"]
        known = row and not change.anew
        fields = {name: column[row] if known else None for name, column in attributes.items()} | dict(change.fields)
        text = self._artefact.item_text(fields)
        reading = self._artefact.reading(fields, text)
        renewed = not row or reading != self._reading_before(row)
        encoded = renewed and not (row and self._is_as_exported(row, reading))
        if encoded and self._artefact.field_reading is None:
            self._artefact.check_text_tower()
        if isinstance(published, RequestError):
            raise published
        row = row or self._append(change.item)
        for name, value in fields.items():
            attributes.setdefault(name, [None] * len(self._values["ids"]))[row] = value
        if renewed:
            self._renewed[row] = reading
        self._values["texts"][row] = text
        self._values["display"][row] = display_of(fields, text, change.item)
        self._bear(row, change, published)
        return row

    def _append(self, id_: str) -> int:
        row = self._values["rows"][id_] = len(self._values["ids"])
        for name, value in (("ids", id_), ("texts", ""), ("display", "")):
            self._values[name].append(value)
        for column in self._values["attributes"].values():
            column.append(None)
        return int(row)

    def _bear(self, row: int, change: ItemChange, published: int | None) -> None:
        """Notes the birth of an item that was added or says when it was published."""
        exported = row < len(self._artefact.ids)
        if published is not None:
            self._births[row] = published
        elif change.added is not None and (change.anew or not exported):
            self._births[row] = change.added
        elif PUBLISHED in change.fields and exported:
            self._births[row] = None

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
