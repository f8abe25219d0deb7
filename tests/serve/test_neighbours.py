"""One call does not spoil another: slow ones have threads of their own, and a store that is away fails its users only.

Beside that what the service says of items that are changed by calls, and HEAD for those who look whether it lives.
"""

import asyncio
import sqlite3
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.recommend import Answer, MemoryStore, Recommender, Request, RequestError
from lightning_rec.serve import batching
from lightning_rec.serve.batching import answer_all


def test_filtered_requests_hold_up_no_plain_one(serve, within, monkeypatch):
    app = serve()
    leave, begun = threading.Event(), threading.Event()
    original = Recommender._answer_one

    def slow(self, request, interest, state):
        begun.set()
        assert leave.wait(10)
        return original(self, request, interest, state)

    monkeypatch.setattr(Recommender, "_answer_one", slow)

    async def work(client):
        body = {"requests": [{"user": "u001", "where": {"categories": "tea"}}, {"user": "u001"}]}
        filtered = asyncio.create_task(client.post("/v1/recommend", json=body))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        plain = await asyncio.wait_for(client.post("/v1/recommend", json={"user": "u001"}), 5)
        assert not filtered.done()
        leave.set()
        return plain.json(), (await filtered).json()["answers"]

    plain, (chosen, beside) = within(app, work)
    # the last bits of a score depend on the size of the batch
    scores = [[item["score"] for item in answer["items"]] for answer in (beside, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert chosen["items"]


def test_each_kind_of_request_has_its_batcher(serve):
    service = serve().service
    plain = service.batcher([Request(user="u"), Request(history=["t01"], exclude=["t02"], half_life=3.0)])
    words = service.batcher([Request(text="lamp", diversity=0.5), Request(user="u")])
    chosen = {
        service.batcher([Request(user="u"), request])
        for request in (
            Request(where={"categories": "tea"}), Request(at_most={"categories": 1}), Request(diversity=0.1),
            Request(explore="ucb"), Request(candidates=["t01"]),
        )
    }  # fmt: skip
    assert len({plain, words} | chosen) == 3
    assert plain is service.batcher([Request()])


class Away(MemoryStore):
    """A store that has lost the users whose names begin with x."""

    failures = (sqlite3.Error,)
    seconds = 0.0

    def __init__(self):
        super().__init__()
        self.asked = []

    def read(self, user, newest):
        self.asked.append(user)
        if user.startswith("x"):
            time.sleep(self.seconds)
            raise sqlite3.OperationalError("database is locked")
        return super().read(user, newest)


@pytest.fixture
def away(made):
    return Recommender.load(made, store=Away())


def test_a_store_that_fails_for_one_fails_no_neighbour(away):
    requests = [Request(history=["t01"]), Request(user="x1"), Request(user="u001"), Request(k=0), Request()]
    first, second, third, fourth, fifth = answer_all(away, requests)
    assert isinstance(second, RequestError)
    assert (second.code, fourth.code) == ("store_unavailable", "bad_k")
    for outcome, request in ((first, requests[0]), (third, requests[2]), (fifth, requests[4])):
        assert isinstance(outcome, Answer)
        assert outcome == away.recommend(request)


def test_a_store_that_fails_while_a_request_is_checked(away, monkeypatch):
    original = away.check

    def check(request):
        if request.user:
            away.store.read(request.user, 1)
        original(request)

    monkeypatch.setattr(away, "check", check)
    lost, found = answer_all(away, [Request(user="x1", text="lamp"), Request(user="u001")])
    assert lost.code == "store_unavailable"
    assert isinstance(found, Answer)


def test_a_slow_store_is_not_waited_for_again_and_again(away, monkeypatch):
    monkeypatch.setattr(batching, "_PATIENCE", 0.03)
    away.store.seconds = 0.02
    requests = [Request(user=f"x{number}") for number in range(20)] + [Request(user="x", history=["t01"])]
    *lost, last = answer_all(away, requests)
    assert {outcome.code for outcome in lost} == {"store_unavailable"}
    assert isinstance(last, Answer)
    assert len(away.store.asked) < 8


def test_an_error_of_the_recommender_itself_is_still_a_crash(away, monkeypatch):
    def crash(*args):
        raise KeyError("crash")

    monkeypatch.setattr(away.interests, "read", crash)
    with pytest.raises(KeyError):
        answer_all(away, [Request(user="u001")])


def test_the_service_tells_it_of_one_and_of_several(serve, ask, away):
    app = serve(away)
    one = ask(app, ("POST", "/v1/recommend", {"user": "x1"}))
    assert (one.status_code, one.json()["code"], one.headers["retry-after"]) == (503, "store_unavailable", "1")
    several = ask(app, ("POST", "/v1/recommend", {"requests": [{"user": "x1"}, {"user": "u001"}]}))
    lost, found = several.json()["answers"]
    assert several.status_code == 200
    assert lost["error"] == one.json()
    assert found["items"]
    text = ask(app, ("GET", "/metrics")).text
    assert 'lightning_rec_refused_total{code="store_unavailable"} 2.0' in text


def test_typed_fields_over_http(serve, ask):
    app = serve()
    fields = {"adult": True, "price": 5, "size": 1.0, "sizes": [1.0, 2.5, False], "none": None, "code": "1.0"}
    assert ask(app, ("POST", "/v1/items", {"items": [{"item_id": "b1", "title": "lamp"} | fields]})).status_code == 200
    told = ask(app, ("GET", "/v1/items/b1")).json()
    assert {name: told.get(name) for name in fields} == {
        "adult": "true", "price": "5", "size": "1", "sizes": ["1", "2.5", "false"], "none": None, "code": "1.0",
    }  # fmt: skip
    for where, found in (
        ({"adult": True}, True), ({"adult": "true"}, True), ({"adult": False}, False), ({"price": 5.0}, True),
        ({"price": "5"}, True), ({"size": 1}, True), ({"size": 1.0}, True), ({"sizes": [7, 2.5]}, True),
        ({"sizes": False}, True), ({"code": "1.0"}, True), ({"code": "1"}, False),
    ):  # fmt: skip
        answer = ask(app, ("POST", "/v1/recommend", {"history": ["t01"], "where": where})).json()
        assert [item["id"] for item in answer["items"]] == ["b1"] * found, where


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_head_tells_what_get_tells_of_its_health(serve, ask, monkeypatch, path):
    app = serve(keys="read-rrrrrrrrrrrrrrrr read")
    get, head = ask(app, ("GET", path), ("HEAD", path))
    assert get.status_code == head.status_code == 200
    assert head.headers["content-type"] == get.headers["content-type"]
    assert "head" not in app.api.openapi()["paths"][path]

    def gone(*args):
        raise OSError("gone")

    monkeypatch.setattr(app.service.holder.store, "read", gone)
    assert ask(app, ("HEAD", "/readyz")).status_code == 503


def test_the_schema_tells_how_long_a_change_of_items_lasts(serve, ask):
    paths = ask(serve(), ("GET", "/openapi.json")).json()["paths"]
    changes = [paths["/v1/items"][method] for method in ("post", "put", "delete")]
    for told in [*changes, paths["/v1/items/{item_id}"]["delete"]]:
        for words in (
            "outlasts restarts and reloads",
            "other replicas of the store follow within 2 s",
            "until it is added again",
        ):
            assert words in told["description"]
