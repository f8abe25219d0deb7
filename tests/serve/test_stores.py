"""Every store keeps the same contract; a killed process loses nothing that it acknowledged."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_rec.recommend import Event, HistoryStore, MemoryStore
from lightning_rec.serve.sqlite_store import SQLiteStore
from lightning_rec.serve.stores import open_store


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HistoryStore]:
    if request.param == "redis":
        from lightning_rec.serve.redis_store import RedisStore

        opened: HistoryStore = RedisStore(request.getfixturevalue("redis_url"), prefix=tmp_path.name)
    else:
        opened = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "events.sqlite")
    yield opened
    opened.close()


def test_order_is_by_time_then_arrival(store: HistoryStore) -> None:
    assert store.append("u", [Event("b", 20), Event("a", 10)]) == 2
    assert store.append("u", [Event("c", 20), Event("d", 5)]) == 2
    assert [event.item for event in store.read("u", 10)] == ["d", "a", "b", "c"]
    assert [event.item for event in store.read("u", 2)] == ["b", "c"]
    assert [event.item for event in store.export("u")] == ["d", "a", "b", "c"]
    assert store.read("u", 0) == []
    assert store.read_many(["u", "nobody"], 1) == [[Event("c", 20)], []]


def test_an_event_sent_twice_is_one(store: HistoryStore) -> None:
    event = Event("a", 10, "e1")
    assert store.append("u", [event, event, Event("b", 11, "e2")]) == 2
    assert store.append("u", [event]) == 0
    assert store.append("other", [event]) == 1
    assert store.append("u", [Event("a", 10), Event("a", 10)]) == 2
    assert len(store.read("u", 10)) == 4


def test_users_and_forgetting(store: HistoryStore) -> None:
    assert store.append("nobody", []) == 0
    store.append("u", [Event("a", 1, "x")])
    store.append("v", [Event("a", 1)])
    assert sorted(store.users(10)) == ["u", "v"]
    assert len(store.users(1)) == 1
    assert store.delete("u") == 1
    assert store.delete("u") == 0
    assert store.users(10) == ["v"]
    assert store.export("u") == []
    assert store.append("u", [Event("b", 1, "x")]) == 1


def test_without_a_time_it_happened_now(store: HistoryStore) -> None:
    before = int(time.time())
    store.append("u", [Event("a")])
    moment = store.read("u", 1)[0].time
    assert moment is not None
    assert before <= moment <= time.time()


@pytest.mark.parametrize("user", ["", "a b", "{x}", "ü/../é", "'; DROP TABLE events; --", "x" * 500, "}", "}a"])
def test_any_id_will_do(store: HistoryStore, user: str) -> None:
    item = '"\\ \u2028 😀 ' + user
    store.append(user, [Event(item, 1, user or "id")])
    assert store.read(user, 5) == [Event(item, 1, user or "id")]
    assert store.users(5) == [user]


def test_what_is_noted_of_items(store: HistoryStore) -> None:
    assert store.item_changes() == (0, {})
    assert store.write_item_changes({"a": "1", "ü \u2028 '": '{"x":"😀"}'}, 0) == 1
    assert store.write_item_changes({"b": "late"}, 0) == 0, "somebody has written since"
    assert store.write_item_changes({"b": "1"}, 7) == 0, "no such write"
    assert store.write_item_changes({"a": "2", "c": "1"}, 1) == 2
    assert store.item_changes() == (2, {"a": "2", "ü \u2028 '": '{"x":"😀"}', "c": "1"})
    assert store.item_changes(1) == (2, {"a": "2", "c": "1"})
    assert store.item_changes(2) == store.item_changes(99) == (2, {})
    assert store.users(10) == []
    for user in ("", "a", "items", "\0items"):
        assert store.delete(user) == 0
        assert store.export(user) == []
    assert store.item_changes(1)[1] == {"a": "2", "c": "1"}, "no user's data"


def test_writers_of_items_at_once_take_turns(store: HistoryStore) -> None:
    """Each write is of two items with one text, and says what it follows: a reader never sees one of them alone."""
    wrong: list[object] = []

    def write(name: str) -> None:
        done = 0
        while done < 15:
            last, found = store.item_changes()
            if len(set(found.values())) > 1:
                wrong.append(found)
            done += bool(store.write_item_changes({"left": f"{name}{done}", "right": f"{name}{done}"}, last))

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.item_changes()[0] == 30


def test_threads_at_once(store: HistoryStore) -> None:
    def write(number: int) -> None:
        for step in range(20):
            store.append(f"u{step % 3}", [Event("a", step, f"{number}-{step}"), Event("a", step, f"shared-{step}")])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(store.export(f"u{n}")) for n in range(3)) == 4 * 20 + 20


def test_threads_that_come_and_go_leave_no_connection_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = SQLiteStore._connect
    monkeypatch.setattr(SQLiteStore, "_connect", lambda self: opened.append(original(self)) or opened[-1])
    store = SQLiteStore(tmp_path / "events.sqlite")
    store.append("u1", [Event("a", 1)])
    for _ in range(30):  # a server's worker threads end when they have had nothing to do for a while
        thread = threading.Thread(target=store.read, args=("u1", 5))
        thread.start()
        thread.join()
    assert len(opened) == 2, "the writer and one reader"
    store.close()
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError):
            connection.execute("SELECT 1")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text("this is no database, but a long enough text to be read as a header of one " * 20)
    with pytest.raises(ValueError, match="cannot be used"):
        SQLiteStore(path)
    foreign = sqlite3.connect(tmp_path / "foreign.sqlite")
    foreign.execute("CREATE TABLE t (x)")
    foreign.close()
    with pytest.raises(ValueError, match="something else"):
        SQLiteStore(tmp_path / "foreign.sqlite")


def test_only_the_owner_reads_the_file_and_a_full_disk_is_an_error(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "new" / "events.sqlite")
    assert (tmp_path / "new" / "events.sqlite").stat().st_mode & 0o077 == 0
    store._writer.execute("PRAGMA max_page_count = 8")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.append("u", [Event("x" * 1000, number) for number in range(200)])
    assert store.append("u", [Event("a", 1)]) == 1
    assert len(store.read("u", 500)) == 1


def test_stores_by_address(tmp_path: Path) -> None:
    assert isinstance(open_store("memory:"), MemoryStore)
    assert isinstance(open_store(f"sqlite:{tmp_path / 'a.sqlite'}"), SQLiteStore)
    for wrong in ("sqlite:", "mysql://x", ""):
        with pytest.raises(ValueError, match="sqlite:FILE"):
            open_store(wrong)


_WRITER = """
import sys, threading
from lightning_rec.recommend.types import Event
from lightning_rec.serve.sqlite_store import SQLiteStore
store = SQLiteStore(sys.argv[1])
lock = threading.Lock()
def write(client):
    for number in range(10**6):
        store.append(f"user{client}", [Event("item", number, f"{client}-{number}")])
        with lock:
            sys.stdout.write(f"{client}-{number}\\n"); sys.stdout.flush()
for client in range(4):
    threading.Thread(target=write, args=(client,), daemon=True).start()
threading.Event().wait()
"""


def test_killed_and_restarted_it_has_every_acknowledged_event_once(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    acknowledged: set[str] = set()
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        fresh: list[str] = []
        for line in process.stdout:
            fresh.append(line.strip())
            if len(fresh) == 60:
                os.kill(process.pid, signal.SIGKILL)
                break
        fresh += [line.strip() for line in process.stdout.read().splitlines() if line.endswith(tuple("0123456789"))]
        process.wait()
        acknowledged.update(fresh[:-1])  # the last line may have been cut
    store = SQLiteStore(path)
    kept = [event.id for client in range(4) for event in store.export(f"user{client}")]
    assert len(kept) == len(set(kept))
    assert acknowledged <= set(kept)


_CHANGER = """
import sys
from lightning_rec.serve.sqlite_store import SQLiteStore
store = SQLiteStore(sys.argv[1])
for number in range(10**6):
    assert store.write_item_changes({f"i{number % 50}": str(number), "newest": str(number)}, number)
    sys.stdout.write(f"{number}\\n"); sys.stdout.flush()
"""


def test_killed_it_has_every_acknowledged_change_of_items(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    process = subprocess.Popen([sys.executable, "-c", _CHANGER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(int(line))
        if len(seen) == 80:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    last, found = SQLiteStore(path).item_changes()
    assert last >= 80
    assert found["newest"] == str(last - 1)
    assert len(found) == 51
    assert found[f"i{(last - 1) % 50}"] == str(last - 1)


def test_a_file_of_an_older_version_is_used_on(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite")
    store.append("u", [Event("a", 1)])
    store._writer.execute("DROP TABLE item_changes")
    store.close()
    store = SQLiteStore(tmp_path / "events.sqlite")
    assert store.write_item_changes({"a": "1"}, 0) == 1
    assert store.read("u", 5) == [Event("a", 1)]


def test_redis_is_shared_by_replicas(redis_url: str) -> None:
    one, two = open_store(redis_url), open_store(redis_url)
    one.append("shared", [Event("a", 1, "x")])
    assert two.append("shared", [Event("a", 1, "x")]) == 0
    assert two.read("shared", 5) == [Event("a", 1, "x")]
    one.close()
    two.close()


class _Quiet:
    """What a store needs of a client before it is asked anything."""

    def register_script(self, script: str) -> None:
        return None

    def ping(self) -> bool:
        return True


def test_the_keys_of_a_user_lie_on_one_node_of_a_cluster() -> None:
    crc = pytest.importorskip("redis.crc", reason="the extra redis is not installed")
    from lightning_rec.serve.redis_store import RedisStore

    store = RedisStore(client=_Quiet(), prefix="shop")
    users = ["", "}", "}a", "}{a}", "%}", "%}a", "a", "{", "{a}", "{}", "a}b", "ü", "::{%}a", "%"]
    keys = [store._keys(user) for user in users]
    for user, own in zip(users, keys, strict=True):
        assert len({crc.key_slot(key.encode()) for key in own}) == 1, user
    keys.append(store._item_keys)
    assert len({crc.key_slot(key.encode()) for key in store._item_keys}) == 1
    assert len({key for own in keys for key in own}) == 3 * len(users) + 3, "no two users share a key"
    assert store._keys("a{b}")[0] == "shop:{a{b}}:events", "what older versions wrote is still found"
    assert len({crc.key_slot(store._keys(f"user{n}")[0].encode()) for n in range(50)}) > 40
