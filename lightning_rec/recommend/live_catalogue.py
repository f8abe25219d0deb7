"""The part of a recommender that its items change in, while others read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.catalogue_state import CatalogueState
from lightning_rec.recommend.index import ExactIndex
from lightning_rec.recommend.item_changes import ItemChange, additions, removals, updates
from lightning_rec.recommend.next_catalogue import NextCatalogue
from lightning_rec.recommend.types import RequestError

#: Texts after which the language model is let go of for others who wait for it.
_TEXTS = 32
_PAUSE = 0.001  # seconds; a lock that is taken again at once is had by nobody else


class LiveCatalogue:
    """The items of a recommender.

    Every method may be called from several threads. Whoever reads works on one :attr:`state` from beginning to end and
    waits for nobody who changes it: the next state is made beside it, its texts are encoded first of all, and it takes
    the place of the old one in one step.

    Args:
        artefact: the opened folder.
        now: the moment of every change, in seconds since 1970; None: the current time.
    """

    def __init__(self, artefact: Artefact, now: int | None = None) -> None:
        self.artefact = artefact
        self.now = now
        self._writing = threading.Lock()
        alive = torch.ones(len(artefact.ids), dtype=torch.bool)
        alive[0] = False
        self._state = CatalogueState(
            generation=1,
            ids=artefact.ids,
            rows={id_: row for row, id_ in enumerate(artefact.ids) if row},
            texts=artefact.texts,
            display=artefact.display,
            attributes=artefact.attributes,
            raw=artefact.raw_vectors,
            ready=artefact.vectors,
            counts=artefact.counts,
            alive=alive,
            index=ExactIndex(artefact.vectors, ~alive),
            lives=artefact.lives,
            context=artefact.context,
        )

    @property
    def state(self) -> CatalogueState:
        """The catalogue at this moment."""
        return self._state

    @property
    def generation(self) -> int:
        """Number of the catalogue; grows with every change of the items."""
        return self._state.generation

    @property
    def n_items(self) -> int:
        """Number of items that can be recommended."""
        return self._state.n_items

    def item(self, id_: str) -> dict[str, Any]:
        """The fields of an item.

        Raises:
            RequestError: there is no such item.
        """
        state = self._state
        row = state.row(id_)
        fields = {name: column[row] for name, column in state.attributes.items() if column[row] is not None}
        return {"item_id": id_, "text": state.display[row], **fields}

    def add_items(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Adds items, which text towers encode at once. An item that is there already is refused.

        Args:
            rows: fields of each item, ``item_id`` among them.

        Returns:
            The generation of the new catalogue.

        Raises:
            RequestError: no or a repeated ``item_id``, an item that is there already, or towers that read no text.
                Then nothing is added.
        """
        moment = self.moment()
        return self.change_items(lambda state: additions(state, rows, moment))

    def update_items(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Changes fields of items; fields that a row does not name stay. Text towers encode the new text at once.

        An item whose text changes is then known by its new text alone, also where the tower has an id vector for it
        (``TextIdItemTower``, ``SideIdItemTower``, ``BiasItemTower``): what that said of the old one is lost until the
        next fit, or until it has its old text again. A change of fields that are not in the text leaves the vector as
        it is.

        Returns:
            The generation of the new catalogue.

        Raises:
            RequestError: no or a repeated ``item_id``, an unknown item, or towers that read no text.
        """
        return self.change_items(lambda state: updates(state, rows))

    def remove_items(self, ids: Sequence[str]) -> int:
        """Takes items out of all later answers. Histories that hold them are still read, for as long as it is known
        what they were: by the artefact, or in this process.

        Returns:
            The generation of the new catalogue.

        Raises:
            RequestError: an unknown item. Then nothing is removed.
        """
        return self.change_items(lambda state: removals(state, ids))

    def change_items(
        self,
        make: Callable[[CatalogueState], Sequence[ItemChange]],
        record: Callable[[Sequence[ItemChange]], None] = lambda changes: None,
        encoded: dict[str, Tensor] | None = None,
        refused: dict[str, RequestError] | None = None,
    ) -> int:
        """Changes items in one step.

        Args:
            make: the changes, given the catalogue; asked again where that has changed meanwhile.
            record: is told of the changes when nothing can refuse them any more, and before anybody sees them; where
                it raises an error, nothing is changed.
            encoded: vectors of texts, where :meth:`encode_changes` was called beforehand; None: it is called now.
            refused: afterwards has the errors of changes that do not fit, by raw id; all others are made. None: they
                are raised.

        Returns:
            The generation of the new catalogue.

        Raises:
            RequestError: a change that does not fit, without ``refused``. Then nothing is changed.
        """
        if encoded is None:
            self.encode_changes(make, encoded := {}, refused)
        with self._writing:
            changes = make(self._state)
            if changes:
                if refused is not None:
                    refused.clear()  # the catalogue may be another one than that whose texts were encoded
                draft = NextCatalogue(self._state, changes, self.artefact, refused)
                self._encode(draft.texts, encoded)  # none, unless somebody else was faster
                state = draft.made(encoded)
                record(changes)
                self._state = state
            return self._state.generation

    def encode_changes(
        self,
        make: Callable[[CatalogueState], Sequence[ItemChange]],
        encoded: dict[str, Tensor],
        refused: dict[str, RequestError] | None = None,
    ) -> None:
        """Encodes the texts of changes that are to come, which takes long; others may change items meanwhile.

        Args:
            make: see :meth:`change_items`.
            encoded: text -> vector; what is missing is added.
            refused: see :meth:`change_items`.

        Raises:
            RequestError: a change that does not fit, without ``refused``.
        """
        state = self._state
        self._encode(NextCatalogue(state, make(state), self.artefact, refused).texts, encoded)

    def _encode(self, texts: Sequence[str], encoded: dict[str, Tensor]) -> None:
        missing = sorted((text for text in texts if text not in encoded), key=len)  # alike ones are padded least
        for start in range(0, len(missing), _TEXTS):
            if start:
                time.sleep(_PAUSE)
            some = missing[start : start + _TEXTS]
            encoded.update(zip(some, self.artefact.encode_readings(some).detach(), strict=True))

    def moment(self, now: int | None = None) -> int:
        """The moment that is given, else that of the recommender, else the current time; in seconds since 1970."""
        if now is None:
            now = self.now
        return int(time.time()) if now is None else now
