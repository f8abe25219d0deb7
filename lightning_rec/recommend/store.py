"""Where the histories of users live, and what was changed of items: the interface, and the simplest implementation."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_rec.recommend.types import Event


class HistoryStore(ABC):
    """Keeps what each user did, and what services changed of items.

    Every method may be called from several threads at once.
    """

    #: What the methods raise when the store is away, full or locked.
    failures: tuple[type[Exception], ...] = ()

    @abstractmethod
    def append(self, user: str, events: Sequence[Event]) -> int:
        """Adds events in the order given; durable (as far as the store is) before it returns.

        An event whose ``id`` the user already has is the same event sent again, and is left out. One without a time
        happened now.

        Returns:
            How many events were new.
        """

    @abstractmethod
    def read(self, user: str, newest: int) -> list[Event]:
        """The ``newest`` events of a user, oldest first: by time, and in the order of arrival where times are equal."""

    def read_many(self, users: Sequence[str], newest: int) -> list[list[Event]]:
        """:meth:`read` for several users; a store with a network between overrides it."""
        return [self.read(user, newest) for user in users]

    @abstractmethod
    def delete(self, user: str) -> int:
        """Forgets a user, and says how many events went."""

    @abstractmethod
    def export(self, user: str) -> list[Event]:
        """All that is kept of a user, oldest first."""

    def items(self, user: str) -> set[str]:
        """Raw ids of all items that a user's events name; a store that can tell without all events overrides it."""
        return {event.item for event in self.export(user)}

    @abstractmethod
    def users(self, limit: int) -> list[str]:
        """Up to ``limit`` users with at least one event."""

    @abstractmethod
    def item_changes(self, after: int = 0) -> tuple[int, dict[str, str]]:
        """What is noted of items, apart from all users: one text an item, its newest.

        Args:
            after: only what was written after the write with this number.

        Returns:
            The number of the newest write, 0 before there is one; and the texts by raw id. A write comes as a whole or
            not at all.
        """

    @abstractmethod
    def write_item_changes(self, texts: Mapping[str, str], last: int) -> int:
        """Notes something of items, in the place of what was noted of them; durable as events are.

        Args:
            texts: a text for each raw id.
            last: number of the newest write that the caller knows.

        Returns:
            The number of this write, ``last + 1``; 0 where somebody else has written since ``last``, and nothing is
            written.
        """

    def close(self) -> None:  # noqa: B027  # a store in memory holds nothing open
        """Lets go of files and connections. Nothing to do by default."""


class MemoryStore(HistoryStore):
    """Histories in the memory of the process: they are gone when it ends.

    Args:
        histories: what is known of users to begin with, oldest first.
    """

    def __init__(self, histories: Mapping[str, Sequence[Event]] | None = None) -> None:
        self._events: dict[str, list[Event]] = {}
        self._ids: dict[str, set[str]] = {}
        self._notes: dict[str, tuple[int, str]] = {}
        self._last = 0
        self._lock = threading.Lock()
        for user, events in (histories or {}).items():
            self.append(user, events)

    def append(self, user: str, events: Sequence[Event]) -> int:
        """See :class:`HistoryStore`."""
        with self._lock:
            kept, ids = self._events.setdefault(user, []), self._ids.setdefault(user, set())
            new = 0
            for event in events:
                if event.id is not None and event.id in ids:
                    continue
                if event.id is not None:
                    ids.add(event.id)
                kept.append(replace(event, time=int(time.time())) if event.time is None else event)
                new += 1
            kept.sort(key=lambda event: event.time or 0)  # stable: equal times stay in the order of arrival
            if not kept:
                del self._events[user], self._ids[user]
            return new

    def read(self, user: str, newest: int) -> list[Event]:
        """See :class:`HistoryStore`."""
        with self._lock:
            return self._events.get(user, [])[-newest:] if newest > 0 else []

    def delete(self, user: str) -> int:
        """See :class:`HistoryStore`."""
        with self._lock:
            self._ids.pop(user, None)
            return len(self._events.pop(user, []))

    def export(self, user: str) -> list[Event]:
        """See :class:`HistoryStore`."""
        with self._lock:
            return list(self._events.get(user, []))

    def items(self, user: str) -> set[str]:
        """See :class:`HistoryStore`."""
        with self._lock:
            return {event.item for event in self._events.get(user, [])}

    def users(self, limit: int) -> list[str]:
        """See :class:`HistoryStore`."""
        with self._lock:
            return list(self._events)[:limit]

    def item_changes(self, after: int = 0) -> tuple[int, dict[str, str]]:
        """See :class:`HistoryStore`."""
        with self._lock:
            return self._last, {item: text for item, (number, text) in self._notes.items() if number > after}

    def write_item_changes(self, texts: Mapping[str, str], last: int) -> int:
        """See :class:`HistoryStore`."""
        with self._lock:
            if last != self._last:
                return 0
            self._last += 1
            self._notes.update((item, (self._last, text)) for item, text in texts.items())
            return self._last
