"""What calls change of items outlasts restarts and reloads, and every replica of the store has it."""

from __future__ import annotations

import logging
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.recommend import Event, MemoryStore, Recommender
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.item_changes import ItemChange, additions, removals, updates
from lightning_rec.serve import service as service_module
from lightning_rec.serve.item_log import ItemLog
from lightning_rec.serve.stores import open_store

ADD = ("POST", "/v1/items", {"items": [{"item_id": "n1", "title": "red shoe", "colour": "red"}, {"item_id": "n2"}]})
PUT = ("PUT", "/v1/items", {"items": [{"item_id": "n1", "title": "green tea"}, {"item_id": "t02", "colour": "green"}]})
REMOVE = ("DELETE", "/v1/items", {"ids": ["t01"]})
REMOVE_NEW = ("DELETE", "/v1/items/n2")
ASKED = (
    ("GET", "/v1/items/n1"),
    ("GET", "/v1/items/n2"),
    ("GET", "/v1/items/t01"),
    ("GET", "/v1/items/t02"),
    ("POST", "/v1/recommend", {"user": "u001", "k": 200, "filter_seen": False}),
    ("POST", "/v1/recommend", {"history": ["n1", "t01", "t03"], "k": 200}),
    ("POST", "/v1/recommend", {"user": "u001", "k": 200, "where": {"colour": ["red", "green"]}, "filter_seen": False}),
    ("POST", "/v1/recommend", {"k": 200}),
)


@pytest.fixture(params=["sqlite", "redis"])
def url(request, tmp_path, monkeypatch):
    """The address of an empty store that several processes may use."""
    if request.param == "sqlite":
        return f"sqlite:{tmp_path / 'events.sqlite'}"
    found = request.getfixturevalue("redis_url")
    import redis

    redis.Redis.from_url(found).flushdb()
    return found


def told(ask, app):
    """The answers to ``ASKED``, without the number of the catalogue, which each process counts for itself."""
    found = []
    for response in ask(app, *ASKED):
        body = response.json()
        body.pop("generation", None)
        found.append((response.status_code, body))
    return found


def same(one, other):
    """Whether answers are the same, but for the rounding of texts that were encoded with others."""
    for (status, body), (other_status, other_body) in zip(one, other, strict=True):
        items, other_items = body.get("items", []), other_body.get("items", [])
        scores = {item["id"]: item["score"] for item in items}
        wanted = {item["id"]: pytest.approx(item["score"], rel=1e-5, abs=1e-5) for item in other_items}
        texts = [{item["id"]: item["text"] for item in part} for part in (items, other_items)]
        if (status, scores, texts[0], len(items)) != (other_status, wanted, texts[1], len(other_items)):
            return False
        if "items" not in body and body != other_body:
            return False
    return True


def changed(ask, app, *calls):
    for response in ask(app, *calls) if len(calls) > 1 else [ask(app, *calls)]:
        assert response.status_code == 200, response.text


def test_a_restart_keeps_what_was_changed(serve, ask, url):
    first = serve(store=url)
    changed(ask, first, ADD, PUT, REMOVE, REMOVE_NEW)
    before = told(ask, first)
    assert [status for status, _ in before] == [200, 404, 404, 200, 200, 200, 200, 200]
    assert before[0][1] == {"item_id": "n1", "text": "green tea", "title": "green tea", "colour": "red"}
    assert {item["id"] for item in before[6][1]["items"]} == {"n1", "t02"}
    again = serve(store=url)
    assert same(told(ask, again), before)
    assert again.service.served.recommender.generation == 2, "one step for all of it"
    assert 'lightning_rec_item_changes_total{kind="followed"} 4.0' in ask(again, ("GET", "/metrics")).text
    changed(ask, again, ("POST", "/v1/items", {"items": [{"item_id": "n2", "title": "lamp"}]}), ("POST", "/v1/reload"))
    assert ask(serve(store=url), ("GET", "/v1/items/n2")).json()["title"] == "lamp"


def test_a_reload_keeps_what_was_changed(serve, ask, url):
    app = serve(store=url)
    changed(ask, app, ADD, PUT, REMOVE, REMOVE_NEW)
    before, old = told(ask, app), app.service.served
    changed(ask, app, ("POST", "/v1/reload"))
    assert app.service.served is not old
    assert same(told(ask, app), before)
    assert old.items.change(lambda state: []) is None, "changes go to the new one"


def test_replicas_of_one_store_converge(serve, ask, url):
    here, there = serve(store=url), serve(store=url)
    changed(ask, here, ADD)
    # a call on a replica that has not looked yet is checked against what all others wrote
    assert ask(there, ADD).json()["code"] == "item_exists"
    changed(ask, there, PUT, REMOVE)
    changed(ask, here, REMOVE_NEW)
    there.service.holder.follow()
    assert same(told(ask, here), told(ask, there))
    assert here.service.served.recommender.state.ids == there.service.served.recommender.state.ids


def test_changes_on_two_replicas_at_once_converge(serve, ask, url):
    apps, failed = [serve(store=url), serve(store=url)], []

    def work(app, name):
        for number in range(8):
            rows = [{"item_id": f"{name}{number}", "title": f"thing {name} {number}"}, {"item_id": f"shared{number}"}]
            for row in rows:
                status = ask(app, ("POST", "/v1/items", {"items": [row]})).status_code
                if status not in (200, 409):
                    failed.append(status)
            changed(ask, app, ("PUT", "/v1/items", {"items": [{"item_id": f"shared{number}", "by": name}]}))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(apps, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    apps.append(serve(store=url))
    states = []
    for app in apps:
        app.service.holder.follow()
        states.append(app.service.served.recommender.state)
    assert states[0].n_items == 30 + 24
    for state in states[1:]:
        assert list(state.ids) == list(states[0].ids)
        assert list(state.attributes["by"]) == list(states[0].attributes["by"])
        assert state.texts == states[0].texts
    assert same(told(ask, apps[0]), told(ask, apps[1]))
    assert same(told(ask, apps[0]), told(ask, apps[2]))


def test_another_replica_looks_by_itself(serve, ask, within, url, monkeypatch):
    monkeypatch.setattr(service_module, "LOOK_FOR_ITEMS", 0.05)
    here, there = serve(store=url), serve(store=url)

    async def life(client):
        import anyio

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(there.service.watch)
            assert (await client.get("/v1/items/n1")).status_code == 404
            await anyio.to_thread.run_sync(changed, ask, here, ADD)
            with anyio.fail_after(10):
                while (await client.get("/v1/items/n1")).status_code == 404:
                    await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()

    within(there, life)


def test_a_refused_change_is_not_written(serve, ask, url):
    app = serve(store=url)
    bad = ask(
        app,
        ("POST", "/v1/items", {"items": [{"item_id": "new"}, {"item_id": "t01"}]}),
        ("POST", "/v1/items", {"items": [{"item_id": "new"}, {"item_id": "new"}]}),
        ("PUT", "/v1/items", {"items": [{"item_id": "t01", "title": "x"}, {"item_id": "none"}]}),
        ("DELETE", "/v1/items", {"ids": ["t01", "none"]}),
        ("DELETE", "/v1/items/none"),
    )
    assert [response.status_code for response in bad] == [409, 400, 404, 404, 404]
    assert app.service.holder.store.item_changes() == (0, {})
    assert app.service.served.recommender.generation == 1


def test_without_a_language_model_nothing_is_written(serve, ask, artefact_of, url):
    app = serve(artefact_of("matrix_factorisation"), store=url)
    assert ask(app, ADD).json()["code"] == "no_text_tower"
    assert app.service.holder.store.item_changes() == (0, {})
    changed(ask, app, ("DELETE", "/v1/items/t01"))
    assert ask(serve(app.service.holder.folder, store=url), ("GET", "/v1/items/t01")).status_code == 404


def test_what_an_artefact_refuses_is_told_and_keeps_nothing_else_away(made, artefact_of, caplog):
    store, counted = MemoryStore(), []
    log = ItemLog(store, Recommender.load(made, store=store))
    log.change(lambda state: additions(state, [{"item_id": f"n{n}", "title": "lamp"} for n in range(5)], 7))
    log.change(lambda state: removals(state, ["t01"]))
    assert store.write_item_changes({"gone": ItemChange("gone", {"title": "x"}).to_json()}, 2) == 3
    encoder = artefact_of("matrix_factorisation")
    for folder, refused, told in (
        (made, 0, {"added": 5, "not_in_artefact": 1, "removed": 1}),
        (encoder, 5, {"not_in_artefact": 1, "removed": 1}),
    ):
        counted.clear()
        caplog.clear()
        recommender = Recommender.load(folder, store=store)
        follower = ItemLog(store, recommender, lambda *what: counted.append(what))
        with caplog.at_level(logging.INFO, "lightning_rec.serve"):
            assert follower.follow() == 7
            assert follower.follow() == 0
        assert counted == [("followed", 7 - refused)] + [("refused", 5)] * (refused > 0)
        warned = [record.fields for record in caplog.records if record.levelno == logging.WARNING]
        assert warned == [{"items": 5, "codes": ["no_text_tower"]}] * (refused > 0), "one line, not one an item"
        assert [record.fields for record in caplog.records if record.levelno == logging.INFO] == [told]
        assert recommender.n_items == 29 + 5 - refused
        assert not follower.behind
    follower.change(lambda state: removals(state, ["t02"]))  # it goes on
    assert set(store.item_changes(3)[1]) == {"t02"}
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning_rec.serve"):
        log.follow()
    assert not caplog.records, "only at the start"


def test_what_an_artefact_cannot_read_can_be_removed_for_good(made, artefact_of):
    store = MemoryStore()
    log = ItemLog(store, Recommender.load(made, store=store))
    log.change(lambda state: updates(state, [{"item_id": "t01", "title": "lamp"}]))
    log.change(lambda state: removals(state, ["t01", "t02"]))
    log.change(lambda state: additions(state, [{"item_id": "t02", "title": "lamp"}, {"item_id": "n"}], 7))
    log.change(lambda state: removals(state, ["n"]))
    folder = artefact_of("matrix_factorisation")
    shop = Recommender.load(folder, store=store)
    log = ItemLog(store, shop)
    assert log.follow() == 3
    assert not shop.state.living(["t01"])[0]
    assert "n" not in shop.state.rows
    log.change(lambda state: removals(state, ["t02"]))  # its addition was refused, and the artefact has it
    for recommender in (shop, Recommender.load(folder, store=store), Recommender.load(made, store=store)):
        ItemLog(store, recommender).follow()
        assert recommender.state.living(["t01", "t02", "n"]) == ([], ["t01", "t02", "n"])
    log = ItemLog(store, recommender)
    log.change(lambda state: additions(state, [{"item_id": "n", "title": "back"}], 9))
    assert recommender.item("n") == {"item_id": "n", "title": "back", "text": "back"}


def test_one_note_an_item_and_no_more_reads_than_needed(made):
    store = MemoryStore()
    recommender = Recommender.load(made, store=store, now=77)
    log = ItemLog(store, recommender)
    log.change(lambda state: additions(state, [{"item_id": "n", "title": "a"}, {"item_id": "m"}], 5))
    for number in range(4):
        log.change(lambda state, number=number: updates(state, [{"item_id": "n", "stock": str(number)}]))
    log.change(lambda state: removals(state, ["t01"]))
    last, texts = store.item_changes()
    assert last == 6
    assert {item: ItemChange.from_json(item, text) for item, text in texts.items()} == {
        "n": ItemChange("n", {"title": "a", "stock": "3"}, added=5, place=(1, 0)),
        "m": ItemChange("m", added=5, place=(1, 1)),
        "t01": ItemChange("t01", removed=True),
    }
    generation = recommender.generation
    assert log.follow() == 0
    assert recommender.generation == generation


def test_a_store_that_was_emptied_takes_changes_again(made, caplog):
    store = MemoryStore()
    log = ItemLog(store, Recommender.load(made, store=store))
    for id_ in ("t01", "t02", "t03"):
        log.change(lambda state, id_=id_: removals(state, [id_]))
    store._last, store._notes = 0, {}
    with caplog.at_level(logging.WARNING, "lightning_rec.serve"):
        log.change(lambda state: removals(state, ["t04"]))
    assert store.item_changes() == (1, {"t04": '{"removed":true}'})
    assert "lost" in caplog.text


def test_the_language_model_is_loaded_only_for_texts_and_the_service_says_when_it_is_ready(
    serve, ask, tmp_path, monkeypatch
):
    url = f"sqlite:{tmp_path / 'events.sqlite'}"
    first = serve(store=url)
    changed(ask, first, REMOVE)
    encode, encoded, leave = Artefact.encode_texts, [], threading.Event()

    def slow(self, texts):
        encoded.extend(texts)
        assert leave.wait(20)
        return encode(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Artefact, "encode_texts", slow)
        assert ask(serve(store=url), ("GET", "/readyz")).status_code == 200
        assert not encoded
    changed(ask, first, ADD)
    monkeypatch.setattr(Artefact, "encode_texts", slow)
    from lightning_rec.serve.app import create_app
    from lightning_rec.serve.settings import Settings

    app = create_app(first.service.holder.folder, Settings(store=url, warm_up=False))
    try:
        ready, answer, item = ask(
            app, ("GET", "/readyz"), ("POST", "/v1/recommend", {"user": "u001"}), ("GET", "/v1/items/n1")
        )
        assert (ready.status_code, ready.json()["code"]) == (503, "items_pending")
        assert ready.headers["retry-after"] == "1"
        assert answer.json()["path"] == "towers"
        assert item.status_code == 404
        leave.set()
        for _ in range(200):
            if ask(app, ("GET", "/readyz")).status_code == 200:
                break
            time.sleep(0.05)
        assert ask(app, ("GET", "/readyz")).json()["items"] == 31
        assert sorted(encoded) == sorted(set(encoded))
    finally:
        leave.set()
        app.service.close()


def test_no_call_on_users_shows_or_deletes_it(serve, ask, url):
    app = serve(store=url)
    changed(ask, app, ADD, REMOVE)
    app.service.holder.store.append("someone", [Event("t01", 1)])
    users = ask(app, ("GET", "/v1/users?limit=1000")).json()["users"]
    assert "someone" in users
    assert not [user for user in users if "\0" in user or user in ("n1", "t01")]
    for user in users:
        changed(ask, app, ("DELETE", f"/v1/users/{user}"))
    store = open_store(url)
    assert set(store.item_changes()[1]) == {"n1", "n2", "t01"}
    store.close()
    assert told(ask, serve(store=url))[0][0] == 200


def test_a_store_that_is_away_changes_nothing(serve, ask, tmp_path, monkeypatch):
    import sqlite3

    app = serve(store=f"sqlite:{tmp_path / 'events.sqlite'}")
    store = app.service.holder.store

    def away(texts, last):
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_item_changes", away)
        response = ask(app, ADD)
    assert (response.status_code, response.json()["code"]) == (503, "store_unavailable")
    assert ask(app, ("GET", "/v1/items/n1")).status_code == 404
    changed(ask, app, ADD)


def test_changes_during_reloads_are_not_lost(serve, ask, url):
    app, stop = serve(store=url), threading.Event()

    def reload():
        while not stop.is_set():
            ask(app, ("POST", "/v1/reload"))

    thread = threading.Thread(target=reload)
    thread.start()
    try:
        for number in range(25):
            changed(ask, app, ("PUT", "/v1/items", {"items": [{"item_id": "t05", "colour": str(number)}]}))
            assert ask(app, ("GET", "/v1/items/t05")).json()["colour"] == str(number)
    finally:
        stop.set()
        thread.join()
