"""Histories in one SQLite file: the default of the service."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_rec.recommend.store import HistoryStore
from lightning_rec.recommend.types import Event

_VERSION = 1
_MOST_IDLE = 16
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, item TEXT NOT NULL, time INTEGER NOT NULL, id TEXT
);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user, time, seq);
CREATE UNIQUE INDEX IF NOT EXISTS event_ids ON events (user, id) WHERE id IS NOT NULL;
CREATE TABLE IF NOT EXISTS item_changes (item TEXT PRIMARY KEY, number INTEGER NOT NULL, content TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS item_changes_by_number ON item_changes (number);
"""
_LAST = "SELECT coalesce(max(number), 0) FROM item_changes"


@dataclass(eq=False)
class _Waiting:
    """An append that waits for the next transaction."""

    user: str
    events: Sequence[Event]
    new: int = 0
    done: bool = False
    error: Exception | None = None


class SQLiteStore(HistoryStore):
    """Histories in an SQLite file with a write-ahead log.

    An append returns after its transaction is on the disk (``synchronous = FULL``), so that an acknowledged event
    outlives a crash of the process and of the machine. Appends of several threads that wait at the same time share one
    transaction. Several processes may use one file.

    Args:
        path: the file; made, readable by its owner only, where it does not exist.
        timeout: seconds to wait for another process that writes.

    Raises:
        ValueError: the file is no database of this store.
    """

    failures = (sqlite3.Error,)

    def __init__(self, path: str | os.PathLike[str], timeout: float = 10.0) -> None:
        self.path = Path(path).expanduser()
        self.timeout = timeout
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
        self._idle: list[sqlite3.Connection] = []  # readers that nobody uses at the moment
        self._closed = False
        self._empty_log = False  # True: the log still holds what was deleted
        self._waiting: list[_Waiting] = []
        self._queue = threading.Lock()
        self._writing = threading.Lock()
        try:
            self._writer = self._connect()
            self._check_version()
            self._writer.executescript(_SCHEMA)
            self._writer.execute(f"PRAGMA user_version = {_VERSION}")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} cannot be used as a store of histories ({error}). Name another file."
            ) from error

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # what a user asks to be forgotten is overwritten
        return connection

    def _check_version(self) -> None:
        found = int(self._writer.execute("PRAGMA user_version").fetchone()[0])
        foreign = found == 0 and self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found not in (0, _VERSION) or foreign:
            raise ValueError(
                f"{self.path} is a database of {'something else' if foreign else f'format {found}'}, not of this "
                f"store's format {_VERSION}. Name another file."
            )

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A connection of one's own: with a write-ahead log it never waits for a writer.

        They are lent and not kept by thread: a server's threads come and go, and each would leave a file open.
        """
        with self._queue:
            idle = self._idle.pop() if self._idle else None
        connection = idle or self._connect()
        try:
            yield connection
        finally:
            with self._queue:
                kept = not self._closed and len(self._idle) < _MOST_IDLE
                if kept:
                    self._idle.append(connection)
            if not kept:
                connection.close()

    def append(self, user: str, events: Sequence[Event]) -> int:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`; on the disk when it returns."""
        if not events:
            return 0
        mine = _Waiting(user, events)
        with self._queue:
            self._waiting.append(mine)
        with self._writing:
            if not mine.done:
                with self._queue:
                    batch, self._waiting = self._waiting, []
                self._write(batch)
        if mine.error is not None:
            raise mine.error
        return mine.new

    def _write(self, batch: list[_Waiting]) -> None:
        now = int(time.time())
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for waiting in batch:
                waiting.new = sum(
                    self._writer.execute(
                        "INSERT OR IGNORE INTO events (user, item, time, id) VALUES (?, ?, ?, ?)",
                        (waiting.user, event.item, now if event.time is None else event.time, event.id),
                    ).rowcount
                    for event in waiting.events
                )
            self._writer.execute("COMMIT")
        except Exception as error:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            for waiting in batch:
                waiting.error = error
        for waiting in batch:
            waiting.done = True
        self._try_to_empty_log()

    def read(self, user: str, newest: int) -> list[Event]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        with self._reader() as reader:
            found = reader.execute(
                "SELECT item, time, id FROM events WHERE user = ? ORDER BY time DESC, seq DESC LIMIT ?",
                (user, max(newest, 0)),
            ).fetchall()
        return [Event(*row) for row in reversed(found)]

    def delete(self, user: str) -> int:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`; what the log still held is gone too.

        The log is emptied as soon as no reader needs it: that is tried for a second, and then again at later writes.
        """
        with self._writing:
            gone = int(self._writer.execute("DELETE FROM events WHERE user = ?", (user,)).rowcount)
            self._empty_log = True
        for _ in range(20):
            with self._writing:
                self._try_to_empty_log()
            if not self._empty_log:
                break
            time.sleep(0.05)
        return gone

    def _try_to_empty_log(self) -> None:
        if self._empty_log:
            self._writer.execute("PRAGMA busy_timeout = 0")  # nobody waits for this
            try:
                busy = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            except sqlite3.OperationalError:  # another process writes
                busy = True
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {int(1000 * self.timeout)}")
            self._empty_log = bool(busy)

    def export(self, user: str) -> list[Event]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        with self._reader() as reader:
            found = reader.execute(
                "SELECT item, time, id FROM events WHERE user = ? ORDER BY time, seq", (user,)
            ).fetchall()
        return [Event(*row) for row in found]

    def items(self, user: str) -> set[str]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        with self._reader() as reader:
            return {row[0] for row in reader.execute("SELECT DISTINCT item FROM events WHERE user = ?", (user,))}

    def users(self, limit: int) -> list[str]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        with self._reader() as reader:
            found = reader.execute("SELECT DISTINCT user FROM events LIMIT ?", (max(limit, 0),)).fetchall()
        return [row[0] for row in found]

    def item_changes(self, after: int = 0) -> tuple[int, dict[str, str]]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        with self._reader() as reader:
            reader.execute("BEGIN")  # both questions see the file as it was at one moment
            try:
                last = int(reader.execute(_LAST).fetchone()[0])
                found = reader.execute("SELECT item, content FROM item_changes WHERE number > ?", (after,)).fetchall()
            finally:
                reader.execute("COMMIT")
        return last, dict(found)

    def write_item_changes(self, texts: Mapping[str, str], last: int) -> int:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`; on the disk when it returns."""
        with self._writing:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                if int(self._writer.execute(_LAST).fetchone()[0]) != last:
                    self._writer.execute("ROLLBACK")
                    return 0
                self._writer.executemany(
                    "INSERT OR REPLACE INTO item_changes (item, number, content) VALUES (?, ?, ?)",
                    [(item, last + 1, text) for item, text in texts.items()],
                )
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            return last + 1

    def close(self) -> None:
        """Closes all connections."""
        with self._writing:
            with self._queue:
                self._closed = True
                idle, self._idle = self._idle, []
            for connection in (*idle, self._writer):
                connection.close()
