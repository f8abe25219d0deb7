"""What was said of items after the artefact was exported: added, changed, removed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lightning_rec.recommend.checks import checked_items
from lightning_rec.recommend.types import RequestError

if TYPE_CHECKING:
    from lightning_rec.recommend.catalogue_state import CatalogueState


@dataclass(frozen=True)
class ItemChange:
    """A change of one item, or several in one.

    A catalogue is made of what the artefact has and of the change of each item. Whether it hears of every step or of
    all steps in one, and once or twice, it ends with the same items, and with the same of each.

    Of a removed item nothing is applied but that it is away. A catalogue that hears of all steps in one has it as the
    artefact has it, or has never had it, where one that heard of every step has what was known of it at the end. Only
    histories that hold the item can tell these apart: they are read with what there is of it, or pass over it.

    Attributes:
        item: raw id.
        fields: the fields that were given, with their newest values; others are as the artefact has them.
        removed: it was removed, and not added since.
        added: seconds since 1970 when it was added, its birth where it does not say when it was published; None: it
            was not added.
        anew: it was added after it had been there before: of its other fields nothing stays.
        place: where its row comes among those of added items: the number of the change that added it first, and the
            place there. None: it was not added, or no other process has to know.
    """

    item: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    removed: bool = False
    added: int | None = None
    anew: bool = False
    place: tuple[int, int] | None = None

    @property
    def rewrites(self) -> bool:
        """Whether it says something of the item beyond that it is there, or away."""
        return not self.removed and (bool(self.fields) or self.added is not None)

    def after(self, before: ItemChange | None) -> ItemChange:
        """Both in one.

        Args:
            before: what was said of the item before; None: nothing.
        """
        if before is None:
            return self
        if self.added is not None:
            return replace(self, anew=True, place=before.place or self.place)
        if self.removed:
            return replace(before, removed=True)
        return replace(before, fields={**before.fields, **self.fields}, removed=False)

    def to_json(self) -> str:
        """All but the id, as a store keeps it."""
        values = ((name, getattr(self, name)) for name in _KEPT)
        # by identity: the moment 0 equals False
        said = {name: value for name, value in values if value is not None and value is not False and value != {}}
        return json.dumps(said, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, item: str, text: str) -> ItemChange:
        """What :meth:`to_json` wrote."""
        said = {name: value for name, value in json.loads(text).items() if name in _KEPT}
        if said.get("place") is not None:
            said["place"] = tuple(said["place"])
        return cls(item, **said)


_KEPT = ("fields", "removed", "added", "anew", "place")


def additions(state: CatalogueState, rows: Sequence[Mapping[str, Any]], moment: int) -> list[ItemChange]:
    """Items that come.

    Args:
        state: the catalogue that they come to.
        rows: fields of each item, ``item_id`` among them.
        moment: seconds since 1970.

    Raises:
        RequestError: no or a repeated ``item_id``, or an item that is there already.
    """
    items = checked_items(rows)
    present, _ = state.living([item["item_id"] for item in items])
    if present:
        raise RequestError(
            f"The catalogue already has {state.ids[present[0]]!r}.", "item_exists", "Change it with update_items."
        )
    return [
        ItemChange(item["item_id"], _fields(item), added=moment, anew=item["item_id"] in state.rows) for item in items
    ]


def updates(state: CatalogueState, rows: Sequence[Mapping[str, Any]]) -> list[ItemChange]:
    """Items that change.

    Args:
        state: the catalogue that has them.
        rows: fields of each item, ``item_id`` among them.

    Raises:
        RequestError: no or a repeated ``item_id``, or an unknown item.
    """
    for item in checked_items(rows):
        state.row(item["item_id"])
    return [ItemChange(item["item_id"], _fields(item)) for item in rows]


def removals(state: CatalogueState, ids: Sequence[str]) -> list[ItemChange]:
    """Items that go.

    Args:
        state: the catalogue that has them.
        ids: raw ids; one that comes twice goes once.

    Raises:
        RequestError: an unknown item.
    """
    for id_ in ids:
        state.row(id_)
    return [ItemChange(id_, removed=True) for id_ in dict.fromkeys(ids)]


def _fields(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "item_id"}
