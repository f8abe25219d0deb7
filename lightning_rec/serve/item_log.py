"""Changes of items live in the store: they outlast restarts and reloads, and every replica of the store has them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_rec.recommend.catalogue_state import CatalogueState
from lightning_rec.recommend.item_changes import ItemChange
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.store import HistoryStore
from lightning_rec.recommend.types import RequestError
from lightning_rec.serve.logs import LOG

Make = Callable[[CatalogueState], Sequence[ItemChange]]


class _Overtaken(Exception):
    """Somebody else wrote to the store in between."""


class ItemLog:
    """What is noted of items in a store, as one recommender follows it.

    Of each item one note is kept, of all that was said of it together: what is kept grows with the items that were
    ever changed, not with the changes. No note is ever dropped, also not of an item that was added and removed: other
    replicas, and an artefact that has the item, have yet to hear that it is away. A store, the memory of a replica and
    the time of a start therefore grow by a note for each item that comes and goes; the catalogue does not, since of an
    item that is away a new process makes no row and encodes nothing. A history that holds it passes over it then.

    A note outlasts artefacts. It adds to what a newer artefact has of an item, and an item that was removed stays so
    until it is added again. A note of an item that the artefact lacks and nobody added says nothing there. The notes do
    not tell artefacts apart: those of one store should be exports of one catalogue, as its histories are of one.

    A change is checked against all that others wrote before it, made ready, written to the store, and only then seen by
    readers: what is refused is not written, and what was written is on every replica, in the same order.

    Args:
        store: the store of histories.
        recommender: what is to have the changes.
        count: is told of items that were ``made`` (changed by a call), ``followed`` (of others, or of an earlier
            process) or ``refused`` by the artefact.
    """

    def __init__(
        self, store: HistoryStore, recommender: Recommender, count: Callable[[str, int], None] = lambda what, n: None
    ) -> None:
        self._store = store
        self._recommender = recommender
        self._count = count
        self._last = 0
        self._notes: dict[str, ItemChange] = {}
        self._closed = False
        self._first = True  # nothing was followed yet
        #: Held while the catalogue is brought to what the store has.
        self.lock = threading.RLock()

    @property
    def behind(self) -> bool:
        """Whether the store has changes that the recommender lacks. No text is read for that."""
        return self._store.item_changes(2**53)[0] != self._last

    def close(self) -> None:
        """Takes no more changes: another recommender has taken over."""
        self._closed = True

    def follow(self) -> int:
        """Applies what was written since the last look, all of it in one step; says how many items it was."""
        with self.lock:
            last, texts = self._store.item_changes(self._last)
            if last < self._last:
                LOG.warning("The store has lost changes of items; they stay in this process until it ends.")
                last, texts = self._store.item_changes()
                self._notes = {}
            notes = [ItemChange.from_json(item, text) for item, text in texts.items()]
            notes.sort(key=lambda note: note.place or (0, 0))  # new rows come in the order of their additions
            self._apply(notes)
            self._notes.update((note.item, note) for note in notes)
            self._last = last
            return len(notes)

    def _apply(self, notes: Sequence[ItemChange]) -> None:
        """What the artefact refuses keeps nothing else away."""
        if not notes:
            self._first = False
            return
        refused: dict[str, RequestError] = {}
        before = self._recommender.state.rows
        self._recommender.change_items(lambda state: notes, refused=refused)
        self._count("followed", len(notes) - len(refused))
        if refused:
            codes = sorted({error.code for error in refused.values()})
            LOG.warning(
                "The artefact refuses changes of items.", extra={"fields": {"items": len(refused), "codes": codes}}
            )
            self._count("refused", len(refused))
        if self._first:
            kinds = Counter(_kind(note, note.item in before) for note in notes if note.item not in refused)
            LOG.info("The store's changes of items are applied.", extra={"fields": dict(sorted(kinds.items()))})
        self._first = False

    def change(self, make: Make) -> int | None:
        """Makes a change that a call asks for.

        Args:
            make: the change, given the catalogue; it may be asked several times.

        Returns:
            The generation of the catalogue; None where another recommender has taken over.

        Raises:
            RequestError: it does not fit. Then nothing is changed, and nothing written.
        """
        encoded: dict[str, Tensor] = {}
        self.follow()
        self._recommender.encode_changes(self._whole(make), encoded)  # takes long, and holds up no other change
        while True:
            with self.lock:
                if self._closed:
                    return None
                self.follow()
                try:
                    return self._recommender.change_items(self._whole(make), self._write, encoded)
                except _Overtaken:
                    continue

    def _whole(self, make: Make) -> Make:
        """With all that was said of the items before."""
        return lambda state: [change.after(self._notes.get(change.item)) for change in make(state)]

    def _write(self, changes: Sequence[ItemChange]) -> None:
        notes = [
            replace(change, place=(self._last + 1, number)) if change.added is not None and not change.place else change
            for number, change in enumerate(changes)
        ]
        number = self._store.write_item_changes({note.item: note.to_json() for note in notes}, self._last)
        if not number:
            raise _Overtaken
        self._last = number
        self._notes.update((note.item, note) for note in notes)
        self._count("made", len(notes))


def _kind(note: ItemChange, there: bool) -> str:
    """What a note does to an artefact; ``there``: whether that has the item."""
    if note.removed or note.added is None:
        return ("removed" if note.removed else "changed") if there else "not_in_artefact"
    return "changed" if there else "added"
