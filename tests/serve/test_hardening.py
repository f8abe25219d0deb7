"""What goes wrong around the service: other machines, a store that is away, guessed keys, swaps at a bad moment."""

import asyncio
import json
import logging
import sqlite3

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.recommend import Event, MemoryStore, Recommender, Request
from lightning_rec.serve.auth import parse
from lightning_rec.serve.logs import LOG, JsonLines
from lightning_rec.serve.sqlite_store import SQLiteStore


@pytest.mark.parametrize(("client", "status"), [("127.0.0.1", 200), ("::1", 200), ("192.0.2.7", 403), (None, 200)])
def test_without_keys_only_this_machine_is_answered(serve, client, status):
    """Whoever runs the application by a server of their own may listen wider than the settings say."""
    app, found = serve(), []

    async def call():
        scope = {
            "type": "http", "method": "GET", "path": "/v1/items/t01", "raw_path": b"/v1/items/t01", "query_string": b"",
            "headers": [(b"host", b"localhost")], "client": client and (client, 1), "server": ("localhost", 80),
            "scheme": "http", "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0"},
        }  # fmt: skip

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            found.append(message)

        await app(scope, receive, send)

    asyncio.run(call())
    assert found[0]["status"] == status


def test_guessing_keys_becomes_slow_for_the_guesser_alone(serve, ask):
    key = "read-" + "r" * 16
    app = serve(keys=f"{key} read", rate=0.001, burst=3)
    guesses = [ask(app, ("GET", "/v1/items/t01"), headers={"x-api-key": f"{n:020d}"}) for n in range(5)]
    assert [answer.status_code for answer in guesses] == [401, 401, 401, 429, 429]
    assert ask(app, ("GET", "/v1/items/t01"), headers={"x-api-key": key}).status_code == 200
    assert ask(app, ("GET", "/healthz")).status_code == 200


def test_a_key_that_no_header_carries_is_refused():
    with pytest.raises(ValueError, match=r"here, line 1: a key holds other than ASCII"):
        parse(["ключ-ключ-ключ-ключ read"], "here")


class Away(MemoryStore):
    """A store whose file is locked whenever it is asked to be."""

    failures = (sqlite3.Error,)
    away = False

    def _look(self):
        if self.away:
            raise sqlite3.OperationalError("database is locked")

    def append(self, user, events):
        self._look()
        return super().append(user, events)

    def read(self, user, newest):
        self._look()
        return super().read(user, newest)

    def export(self, user):
        self._look()
        return super().export(user)


@pytest.fixture
def store():
    return Away()


def test_a_store_that_is_away_is_told_as_such(serve, ask, folder, store):
    app = serve(Recommender.load(folder, store=store))
    store.away = True
    calls = [
        ("POST", "/v1/events", {"user": "u001", "events": [{"item": "t01"}]}),
        ("POST", "/v1/recommend", {"user": "u001", "k": 1}),
        ("GET", "/v1/users/u001"),
        ("GET", "/readyz"),
    ]
    for call in calls:
        answer = ask(app, call)
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable"), call
        assert answer.headers["retry-after"] == "1"
    store.away = False
    assert ask(app, calls[1]).status_code == 200


def test_a_store_that_goes_away_during_a_swap(serve, ask, folder, store, monkeypatch):
    """The new artefact serves already: that is told, and who asked to be forgotten is looked for again."""
    app = serve(Recommender.load(folder, store=store))
    holder = app.service.holder
    original, applied = holder.forgotten.apply, []

    def apply(recommender, everyone=False):
        applied.append(everyone)
        if len(applied) == 2:
            raise sqlite3.OperationalError("database is locked")
        return original(recommender, everyone)

    monkeypatch.setattr(holder.forgotten, "apply", apply)
    before = app.service.served.recommender
    holder.forgotten.add("u001")
    assert ask(app, ("POST", "/v1/reload")).status_code == 200
    now = app.service.served.recommender
    assert now is not before
    assert holder.last_reload["done"] is True
    assert holder.forgotten.apply(now) == 1  # the next look at the store finds all of them


def test_the_log_names_the_broken_file(serve, ask, folder):
    app = serve(folder)
    (folder / "items.parquet").write_bytes(b"broken")
    lines = []

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(json.loads(JsonLines().format(record)))

    handler = Kept()
    LOG.addHandler(handler)
    try:
        ask(app, ("POST", "/v1/reload"))
    finally:
        LOG.removeHandler(handler)
    assert any("items.parquet" in line.get("reason", "") for line in lines)


def test_an_answer_has_the_name_of_its_own_artefact(serve, within, folder):
    """Another takes over between two looks at what serves."""
    app = serve(folder)
    holder = app.service.holder
    first = holder.served

    class Turning:
        looks = 0

        def __get__(self, instance, owner):
            Turning.looks += 1
            return first

    async def work(client):
        return await client.post("/v1/recommend", json={"user": "u001", "k": 1})

    original = type(holder)
    patched = type("Turned", (original,), {"served": Turning()})
    del holder.__dict__["served"]
    holder.__class__ = patched
    try:
        assert within(app, work).status_code == 200
    finally:
        holder.__class__ = original
        holder.served = first
    assert Turning.looks == 1


def test_one_item_is_removed_by_its_path(serve, ask, folder):
    app = serve(folder)
    removed, gone, again = ask(app, ("DELETE", "/v1/items/t01"), ("GET", "/v1/items/t01"), ("DELETE", "/v1/items/t01"))
    assert removed.json()["items"] == 29
    assert (gone.status_code, again.status_code) == (404, 404)


def test_what_was_deleted_leaves_the_log_when_the_reader_is_gone(tmp_path):
    store = SQLiteStore(tmp_path / "events.sqlite")
    store.append("u1", [Event("a-very-secret-item", 1)])
    reader = sqlite3.connect(store.path)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
    assert store.delete("u1") == 1
    reader.close()
    store.append("u2", [Event("b", 1)])
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert not any(b"a-very-secret-item" in content for content in files)
    store.close()


def test_no_request_and_no_such_exploration(folder):
    recommender = Recommender.load(folder)
    assert recommender.recommend([]) == []
    with pytest.raises(ValueError, match=r"Choose of none, ucb, thompson"):
        recommender.recommend(Request(history=["t01"], explore="greedy"))
