"""Histories in Redis, shared by several replicas of the service."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rec.recommend.store import HistoryStore
from lightning_rec.recommend.types import Event

# One script is one atomic step: an event is either there with its id, or not at all.
# KEYS: events, ids, counter. ARGV: time, id or "", item, time, id or "", item, ...
_APPEND = """
local new = 0
for n = 1, #ARGV, 3 do
    if ARGV[n + 1] == "" or redis.call("SADD", KEYS[2], ARGV[n + 1]) == 1 then
        local number = redis.call("INCR", KEYS[3])
        redis.call("ZADD", KEYS[1], ARGV[n], string.format("%016d", number) .. ARGV[n + 2])
        new = new + 1
    end
end
return new
"""
_DELETE = """
local gone = redis.call("ZCARD", KEYS[1])
redis.call("DEL", KEYS[1], KEYS[2], KEYS[3])
return gone
"""
# KEYS: numbers, contents, last. ARGV: the number after which.
_CHANGES = """
local found = {redis.call("GET", KEYS[3]) or "0"}
for _, item in ipairs(redis.call("ZRANGEBYSCORE", KEYS[1], "(" .. ARGV[1], "+inf")) do
    found[#found + 1] = item
    found[#found + 1] = redis.call("HGET", KEYS[2], item)
end
return found
"""
# KEYS: the same. ARGV: the newest number that the caller knows, item, content, item, content, ...
_CHANGE = """
local last = redis.call("GET", KEYS[3]) or "0"
if last ~= ARGV[1] then
    return 0
end
local number = redis.call("INCR", KEYS[3])
for n = 2, #ARGV, 2 do
    redis.call("ZADD", KEYS[1], number, ARGV[n])
    redis.call("HSET", KEYS[2], ARGV[n], ARGV[n + 1])
end
return number
"""
#: In the place of a user in the keys of what was changed of items; no client can name it, since ids have no NUL.
_ITEMS = "\0items"
_NUMBER = 16  # digits before the JSON of an event: equal times stay in the order of arrival


class RedisStore(HistoryStore):
    """Histories in a Redis server: a sorted set by time for each user.

    An append returns when the server has it. Whether that outlives a crash of the server is the server's setting: use
    ``appendonly yes`` and ``appendfsync always`` for what a file of SQLite gives.

    Args:
        url: such as ``redis://localhost:6379/0`` or ``rediss://user:password@host:6379/0``.
        prefix: begins every key, so that several services may share a server.
        client: a ready client in the place of ``url``, such as a cluster's.
    """

    def __init__(
        self, url: str = "redis://localhost:6379/0", prefix: str = "lightning_rec", client: Any = None
    ) -> None:
        try:
            import redis
        except ImportError as error:
            raise ImportError(
                'Histories in Redis need the client: run `pip install "lightning_rec[redis]"`.'
            ) from error
        self.failures = (redis.RedisError,)
        if client is None:
            client = redis.Redis.from_url(url)
        self.prefix = prefix
        self._client = client
        self._append = client.register_script(_APPEND)
        self._delete = client.register_script(_DELETE)
        self._changes = client.register_script(_CHANGES)
        self._change = client.register_script(_CHANGE)
        client.ping()

    def _keys(self, user: str) -> list[str]:
        # What stands between the first { and the next } chooses the node of a cluster: the braces keep the keys of one
        # user together, unless nothing stands between them. The second colon keeps such keys apart from all others.
        nothing = not user or user.startswith("}")
        own = f"{self.prefix}::{{%{user}}}" if nothing else f"{self.prefix}:{{{user}}}"
        return [f"{own}:events", f"{own}:ids", f"{own}:count"]

    @property
    def _item_keys(self) -> list[str]:
        own = f"{self.prefix}:{{{_ITEMS}}}"
        return [f"{own}:numbers", f"{own}:contents", f"{own}:last"]

    @property
    def _users(self) -> str:
        return f"{self.prefix}:users"

    def append(self, user: str, events: Sequence[Event]) -> int:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        if not events:
            return 0
        now = int(time.time())
        arguments: list[Any] = []
        for event in events:
            content = json.dumps([event.item, event.id], ensure_ascii=False)
            arguments += [now if event.time is None else event.time, event.id or "", content]
        # first, so that a user with events is always listed
        self._client.sadd(self._users, user)
        new = int(self._append(keys=self._keys(user), args=arguments))
        self._client.sadd(self._users, user)  # again: who was being deleted meanwhile was taken off the list
        return new

    @staticmethod
    def _events(found: list[tuple[bytes, float]]) -> list[Event]:
        events = []
        for member, moment in found:
            item, id_ = json.loads(member[_NUMBER:])
            events.append(Event(item, int(moment), id_))
        return events

    def read(self, user: str, newest: int) -> list[Event]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        return self.read_many([user], newest)[0]

    def read_many(self, users: Sequence[str], newest: int) -> list[list[Event]]:
        """One round trip for all users."""
        if newest < 1:
            return [[] for _ in users]
        pipeline = self._client.pipeline(transaction=False)
        for user in users:
            pipeline.zrange(self._keys(user)[0], -newest, -1, withscores=True)
        return [self._events(found) for found in pipeline.execute()]

    def delete(self, user: str) -> int:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        gone = int(self._delete(keys=self._keys(user)))
        self._client.srem(self._users, user)
        return gone

    def export(self, user: str) -> list[Event]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        return self._events(self._client.zrange(self._keys(user)[0], 0, -1, withscores=True))

    def items(self, user: str) -> set[str]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        return {json.loads(member[_NUMBER:])[0] for member in self._client.zrange(self._keys(user)[0], 0, -1)}

    def users(self, limit: int) -> list[str]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        found: list[str] = []
        for member in self._client.sscan_iter(self._users, count=max(limit, 10)):
            if len(found) >= limit:
                break
            found.append(member.decode() if isinstance(member, bytes) else member)
        return found

    def item_changes(self, after: int = 0) -> tuple[int, dict[str, str]]:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        last, *found = self._changes(keys=self._item_keys, args=[after])
        texts = [part.decode() if isinstance(part, bytes) else part for part in found]
        return int(last), dict(zip(texts[::2], texts[1::2], strict=True))

    def write_item_changes(self, texts: Mapping[str, str], last: int) -> int:
        """See :class:`~lightning_rec.recommend.store.HistoryStore`."""
        arguments = [part for pair in texts.items() for part in pair]
        return int(self._change(keys=self._item_keys, args=[last, *arguments]))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()
