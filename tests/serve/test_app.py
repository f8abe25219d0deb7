"""The calls of the service, and what it says to bad ones."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")


def refused(response, status, code):
    """It is an error as errors are."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()
    assert set(error) == {"code", "message", "remedy"}
    assert error["code"] == code, error
    assert "Traceback" not in response.text
    return error["message"]


def test_answers_are_those_of_the_recommender(serve, ask):
    from lightning_rec.recommend import Request

    app = serve()
    recommender = app.service.served.recommender
    for body in (
        {"user": "u001", "k": 3},
        {"history": ["t01", "l02", "nowhere"], "k": 4, "exclude": ["t02"]},
        {"text": "green lamp", "k": 2},
        {"user": "nobody"},
        {"history": ["t01"], "where": {"categories": ["tea", "rope"]}, "diversity": 0.3},
    ):
        answer = ask(app, ("POST", "/v1/recommend", body)).json()
        wanted = recommender.recommend(Request(**body))
        assert [item["id"] for item in answer["items"]] == [item.id for item in wanted.items]
        assert [item["score"] for item in answer["items"]] == pytest.approx([item.score for item in wanted.items])
        assert (answer["path"], answer["unknown"], answer["generation"]) == (wanted.path, wanted.unknown, 1)


def test_several_requests_are_answered_in_order_and_a_bad_one_alone_has_an_error(serve, ask):
    app = serve()
    body = {"requests": [{"user": "u001", "k": 1}, {"where": {"colour": "red"}}, {"user": "u002", "k": 2}]}
    first, second, third = ask(app, ("POST", "/v1/recommend", body)).json()["answers"]
    assert (len(first["items"]), len(third["items"])) == (1, 2)
    assert second["error"]["code"] == "unknown_field"
    assert "colour" in second["error"]["message"]
    refused(ask(app, ("POST", "/v1/recommend", body["requests"][1])), 400, "unknown_field")


def test_an_event_moves_the_next_answer_and_is_one_when_sent_twice(serve, ask):
    app = serve()
    event = {"user": "new/user ☃", "events": [{"item": "t01", "id": "a"}, {"item": "l02", "time": 5, "id": "b"}]}
    question = ("POST", "/v1/recommend", {"user": "new/user ☃", "k": 30, "filter_seen": True})
    before, first, again, after = ask(
        app, question, ("POST", "/v1/events", event), ("POST", "/v1/events", event), question
    )
    assert before.json()["path"] == "popularity"
    assert first.json() == {"new": 2, "repeated": 0}
    assert again.json() == {"new": 0, "repeated": 2}
    assert after.json()["path"] == "towers"
    assert {item["id"] for item in before.json()["items"]} - {item["id"] for item in after.json()["items"]} == {
        "t01",
        "l02",
    }


def test_explanations(serve, ask):
    app = serve()
    found = ask(app, ("POST", "/v1/explain", {"history": ["t01", "l02"], "item": "t03", "words": "occlusion"})).json()
    assert {reason["id"] for reason in found["reasons"]} == {"t01", "l02"}
    assert found["words"]
    assert found["sentence"].startswith("“")
    refused(ask(app, ("POST", "/v1/explain", {"history": ["t01"], "item": "x"})), 404, "unknown_item")


def test_items_come_change_and_go(serve, ask):
    app = serve()
    id_ = "../a b/%2e?#\"'<i>☃"
    row = {"item_id": id_, "title": "Red lamp", "categories": ["lamp"], "price": 3.5}
    path = "/v1/items/..%2Fa%20b%2F%252e%3F%23%22'%3Ci%3E%E2%98%83"
    added, found = ask(app, ("POST", "/v1/items", {"items": [row]}), ("GET", path))
    assert added.json() == {"generation": 2, "items": 31}
    assert found.json() == {
        "item_id": id_,
        "text": "Red lamp",
        "title": "Red lamp",
        "categories": ["lamp"],
        "price": "3.5",
    }
    refused(ask(app, ("POST", "/v1/items", {"items": [row]})), 409, "item_exists")
    answer = ask(app, ("POST", "/v1/recommend", {"text": "red lamp", "k": 1, "candidates": [id_]})).json()
    assert [item["id"] for item in answer["items"]] == [id_]
    changed, found = ask(app, ("PUT", "/v1/items", {"items": [{"item_id": id_, "title": "Blue lamp"}]}), ("GET", path))
    assert (changed.json()["generation"], found.json()["text"], found.json()["price"]) == (3, "Blue lamp", "3.5")
    gone, found = ask(app, ("DELETE", "/v1/items", {"ids": [id_]}), ("GET", path))
    assert gone.json() == {"generation": 4, "items": 30}
    refused(found, 404, "unknown_item")


def test_a_user_gets_all_that_is_kept_and_is_forgotten(serve, ask, folder):
    from lightning_rec.recommend import MemoryStore, Recommender

    store = MemoryStore()
    app = serve(Recommender.load(folder, store=store))
    event = {"user": "u001", "events": [{"item": "t01", "time": 7, "id": "x"}]}
    _, found = ask(app, ("POST", "/v1/events", event), ("GET", "/v1/users/u001"))
    kept = found.json()
    assert kept["events"] == [{"item": "t01", "time": 7, "id": "x"}]
    assert len(kept["fitted"]["events"]) > 2
    assert set(kept["fitted"]) == {"events", "touched", "profile", "reviews"}
    gone, left, users, reloaded, after = ask(
        app,
        ("DELETE", "/v1/users/u001"),
        ("GET", "/v1/users/u001"),
        ("GET", "/v1/users?limit=100"),
        ("POST", "/v1/reload"),
        ("GET", "/v1/users/u001"),
    )
    assert gone.json() == {"forgotten": 1 + len(kept["fitted"]["events"])}
    nothing = {"user": "u001", "events": [], "fitted": {"events": [], "touched": [], "profile": {}, "reviews": []}}
    assert left.json() == nothing
    assert "u001" not in users.json()["users"]
    assert users.json()["users"][0] == "u002"
    assert reloaded.status_code == 200
    assert after.json() == nothing  # the artefact still holds this user, and the service must not
    # nor after a restart, which knows of it from the store alone
    assert ask(serve(Recommender.load(folder, store=store)), ("GET", "/v1/users/u001")).json() == nothing
    assert "u001" not in json.dumps([store.export(user) for user in store.users(10)], default=str)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"k": 0}, "k: "),
        ({"k": 201}, "k is 201, and this service takes 200 at most."),
        ({"k": 10**30}, "k: "),
        ({"k": "5"}, "k: "),
        ({"k": True}, "k: "),
        ({"user": ""}, "user: "),
        ({"user": 7}, "user: "),
        ({"user": "a\0b"}, "NUL"),
        ({"user": "x" * 513}, "user: "),
        ({"text": "x" * 4001}, "text: "),
        ({"history": ["a"] * 1001}, "history: "),
        ({"history": ["a"], "times": [1, 2]}, "times has one time for each event"),
        ({"history": ["a"], "times": [1.5]}, "times.0: "),
        ({"histroy": []}, "There is no field 'histroy'."),
        ({"requests": []}, "requests: "),
        ({"requests": [{"k": 1}] * 257}, "requests is 257"),
        ({"requests": [{"k": 1}, {"kk": 1}]}, "There is no field 'requests.1.kk'."),
        ({"requests": [{}], "k": 3}, "There is no field 'k'."),
        ({"diversity": 2}, "diversity: "),
        ({"where": {"title": {"a": 1}}}, "where.title"),
        ({"explore": "hard"}, "explore: "),
        ([], "body: "),
        ("text", "body: "),
        (None, "body: "),
    ],
)
def test_bodies_that_do_not_fit(serve, ask, body, message):
    content = json.dumps(body).encode()
    assert message in refused(ask(serve(), ("POST", "/v1/recommend", content)), 422, "invalid")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b'{"half_life": NaN}',
        b'{"diversity": -Infinity}',
        b"[" * 100_000,
        b'{"k": ' + b"1" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_json(serve, ask, content):
    refused(ask(serve(), ("POST", "/v1/recommend", content)), 400, "bad_json")


def test_numbers_too_large_are_no_infinity(serve, ask):
    app = serve()
    refused(ask(app, ("POST", "/v1/recommend", b'{"half_life": 1e999}')), 422, "invalid")
    refused(ask(app, ("POST", "/v1/items", b'{"items": [{"item_id": "a", "price": 1e999}]}')), 422, "invalid")
    refused(
        ask(app, ("POST", "/v1/events", b'{"user": "a", "events": [{"item": "t01", "time": 1e20}]}')), 422, "invalid"
    )
    refused(ask(app, ("POST", "/v1/recommend", b'{"user": "\\ud800"}')), 422, "invalid")


def test_a_score_that_is_no_number_never_leaves(serve, ask, monkeypatch):
    from lightning_rec.recommend import Answer, Recommended

    app = serve()
    recommender = app.service.served.recommender
    monkeypatch.setattr(
        recommender, "recommend", lambda requests: [Answer([Recommended("a", float("nan"), "")], "towers")]
    )
    assert "failed" in refused(ask(app, ("POST", "/v1/recommend", {"k": 1})), 500, "internal")


def test_a_body_that_is_too_long_is_not_read_to_its_end(serve, within):
    app = serve(max_body=10_000)
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 1000
            yield b" " * 1000

    async def work(client):
        stopped = await client.post("/v1/recommend", content=endless(), headers={"content-type": "application/json"})
        declared = await client.post("/v1/recommend", content=b" " * 20_000)
        return stopped, declared

    stopped, declared = within(app, work)
    refused(stopped, 413, "body_too_long")
    refused(declared, 413, "body_too_long")
    assert read <= 12_000


def test_a_body_that_does_not_come(serve, within):
    async def slow():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async def work(client):
        return await client.post("/v1/recommend", content=slow())

    refused(within(serve(body_timeout=0.05), work), 408, "body_too_slow")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/items/..%2F..%2Fetc%2Fpasswd",
        "/v1/items/%2e%2e%2f%2e%2e%2fmanifest.json",
        "/v1/items/....//....//etc/passwd",
        "/v1/items/C:%5Cwindows",
        "/v1/items/__class__",
        "/v1/items/%FF%FE",
        "/v1/items/%00",
        "/v1/items/t01%00",
        "/v1/items/" + "a" * 600,
        "/v1/items/",
        "/page/..%2Fapp.py",
        "/page/%2e%2e/routes.py",
        "//v1/users/u001",
        "/page/",
        "/v1",
    ],
)
def test_path_tricks_lead_nowhere(serve, ask, path):
    response = ask(serve(), ("GET", path))
    assert response.status_code in (404, 422), response.text
    refused(response, response.status_code, response.json()["code"])


def test_other_methods_and_addresses(serve, ask):
    app = serve()
    refused(ask(app, ("GET", "/v1/recommend")), 405, "method_not_allowed")
    refused(ask(app, ("PATCH", "/v1/items")), 405, "method_not_allowed")
    refused(ask(app, ("GET", "/redoc")), 404, "not_found")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_a_body_must_be_said_to_be_json(serve, within, kind):
    async def work(client):
        return await client.post("/v1/recommend", content=b'{"k": 1}', headers={"content-type": kind})

    refused(within(serve(), work), 415, "no_json")


def test_what_breaks_is_told_without_a_traceback(serve, ask, monkeypatch, caplog):
    app = serve()
    recommender = app.service.served.recommender

    def broken(*args):
        raise KeyError("u-secret")

    monkeypatch.setattr(recommender, "item", broken)
    monkeypatch.setattr(recommender, "recommend", broken)
    item, answer, alive = ask(app, ("GET", "/v1/items/t01"), ("POST", "/v1/recommend", {}), ("GET", "/healthz"))
    for response in (item, answer):
        refused(response, 500, "internal")
        assert "secret" not in response.text
        assert response.json()["remedy"].endswith(f"{response.headers['x-request-id']}.")
    assert alive.json()["alive"] is True


def test_every_answer_forbids_what_is_outside(serve, ask):
    for response in ask(serve(), ("GET", "/"), ("GET", "/docs"), ("GET", "/healthz"), ("GET", "/nowhere")):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


def test_the_schema_tells_the_limits_of_the_settings(serve, ask):
    told = ask(serve(max_k=7, max_requests=3), ("GET", "/openapi.json")).json()["components"]["schemas"]
    assert told["RecommendOne"]["properties"]["k"]["maximum"] == 7
    assert told["RecommendMany"]["properties"]["requests"]["maxItems"] == 3


def test_without_the_page_users_are_not_listed(serve, ask):
    page, users, docs = ask(serve(page=False), ("GET", "/"), ("GET", "/v1/users?limit=3"), ("GET", "/docs"))
    refused(page, 404, "not_found")
    assert users.status_code in (404, 405)
    assert docs.status_code == 200


def test_readiness_needs_the_store(serve, ask, monkeypatch):
    app = serve()
    assert ask(app, ("GET", "/readyz")).json()["ready"] is True

    def away(*args):
        raise OSError("gone")

    monkeypatch.setattr(app.service.holder.store, "read", away)
    refused(ask(app, ("GET", "/readyz")), 503, "store_unavailable")
