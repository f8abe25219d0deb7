"""Who asked to be forgotten stays so: after a restart, after a reload, and on every replica of one store."""

from __future__ import annotations

import hashlib

from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.store import HistoryStore
from lightning_rec.recommend.types import Event

#: The store's own entry for forgotten users; no client can name it, since ids with NUL are refused.
ENTRY = "\0forgotten"


class Forgotten:
    """Notes in the store of histories whom the artefact must not know any more.

    Of a user only a digest is kept.

    Args:
        store: the store of histories.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store
        self._known: set[str] = set()

    def add(self, user: str) -> None:
        """Notes a user; durable before it returns."""
        digest = _digest(user)
        self._store.append(ENTRY, [Event(digest, 0, digest)])
        self._known.add(digest)

    def look_again(self) -> None:
        """Lets the next :meth:`apply` look for everyone, whoever was looked for before."""
        self._known = set()

    def apply(self, recommender: Recommender, everyone: bool = False) -> int:
        """Forgets noted users in what a recommender's artefact knows.

        Args:
            recommender: the recommender.
            everyone: also those who were noted before the last call, for a recommender that is new.

        Returns:
            How many users were looked for.
        """
        noted = {event.item for event in self._store.export(ENTRY)}
        wanted = noted if everyone else noted - self._known
        self._known |= noted
        users = recommender.artefact.users
        if wanted and users is not None:
            for user in users.ids:
                if _digest(user) in wanted:
                    users.forget(user)
        return len(wanted)


def _digest(user: str) -> str:
    return hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()
