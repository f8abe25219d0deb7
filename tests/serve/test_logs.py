"""The access log tells what happened, and not to whom."""

import json
import logging

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.serve.logs import JsonLines, Mask

KEY = "a-secret-key-of-the-shop"


@pytest.fixture
def lines(caplog):
    """The log as it would be written, line by line."""
    caplog.set_level(logging.INFO, "lightning_rec")
    formatter = JsonLines()
    return lambda: [formatter.format(record) for record in caplog.records]


def test_ids_and_texts_are_masked(serve, ask, lines):
    app = serve(keys=f"{KEY} read,events,admin")
    calls = [
        ("POST", "/v1/recommend", {"user": "jane.doe@example.org"}),
        ("POST", "/v1/recommend", {"text": "my private wish"}),
        ("POST", "/v1/recommend", {"user": "jane.doe@example.org", "where": {"private": "wish"}}),
        ("POST", "/v1/recommend", {"user": "jane.doe@example.org", "private": 1}),
        ("POST", "/v1/events", {"user": "jane.doe@example.org", "events": [{"item": "private"}]}),
        ("POST", "/v1/explain", {"user": "jane.doe@example.org", "item": "private"}),
        ("GET", "/v1/users/jane.doe@example.org"),
        ("DELETE", "/v1/users/jane.doe@example.org"),
        ("GET", "/v1/items/private?private=jane.doe"),
        ("GET", "/private/jane.doe"),
    ]
    ask(app, *calls, headers={"authorization": f"Bearer {KEY}"})
    found = lines()
    for line in found:
        assert not any(word in line for word in ("jane", "private", "wish", KEY)), line
    told = [json.loads(line) for line in found if '"call"' in line]
    assert len(told) == len(calls)
    users = {line["user"] for line in told if "user" in line}
    assert len(users) == 1  # the same user is the same mask
    assert [line["status"] for line in told] == [200, 200, 400, 422, 200, 404, 200, 200, 404, 404]
    assert told[2]["code"] == "unknown_field"
    assert told[6]["route"] == "/v1/users/{user_id:path}"
    assert told[0]["key"] == told[1]["key"] != KEY
    assert all(line["ms"] >= 0 and line["time"] for line in told)


def test_an_error_tells_the_code_and_not_the_value(serve, ask, lines, monkeypatch):
    app = serve()

    def broken(*args):
        raise KeyError("jane.doe")

    monkeypatch.setattr(app.service.served.recommender, "update", broken)
    ask(app, ("POST", "/v1/events", {"user": "jane.doe", "events": [{"item": "a"}]}))
    found = lines()
    assert "jane" not in "".join(found)
    error = json.loads(next(line for line in found if "exception" in line))
    assert error["exception"] == "KeyError"
    assert any("broken" in frame for frame in error["frames"])


def test_masks():
    assert Mask("a")("user") == Mask("a")("user") != Mask("b")("user")
    assert Mask()("user") != Mask()("user")
    assert Mask("a")("user") != Mask("a")("users")
    assert len(Mask("a")("\ud800")) == 12
