"""Which store of histories a setting means."""

from __future__ import annotations

from lightning_rec.recommend.store import HistoryStore, MemoryStore


def open_store(url: str) -> HistoryStore:
    """Opens a store.

    Args:
        url: ``memory:`` (gone when the process ends), ``sqlite:FILE``, or the address of a Redis server as
            ``redis://HOST:PORT/DB``, ``rediss://...`` or ``unix://...``.

    Raises:
        ValueError: another kind of address, or a file that is something else.
    """
    if url in ("memory", "memory:"):
        return MemoryStore()
    if url.startswith("sqlite:"):
        from lightning_rec.serve.sqlite_store import SQLiteStore

        path = url.removeprefix("sqlite:").removeprefix("//")
        if not path:
            raise ValueError("The store sqlite: names no file: write sqlite:FILE, such as sqlite:events.sqlite.")
        return SQLiteStore(path)
    if url.startswith(("redis://", "rediss://", "unix://")):
        from lightning_rec.serve.redis_store import RedisStore

        return RedisStore(url)
    raise ValueError(f"{url!r} is no store of histories: use memory:, sqlite:FILE or redis://HOST:PORT/DB.")
