"""Keys, scopes, the rate limit, and the sites that may call."""

import os
import re

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.serve.auth import Keys, parse
from lightning_rec.serve.errors import ServiceError
from lightning_rec.serve.limits import RateLimit
from lightning_rec.serve.settings import Settings

READ, EVENTS, ADMIN = "read-" + "r" * 16, "event-" + "e" * 16, "admin-" + "a" * 16
KEYS = f"{READ} read\n{EVENTS} events\n{ADMIN} admin"
CALLS = [
    ("read", "POST", "/v1/recommend", {"k": 1}),
    ("read", "POST", "/v1/explain", {"history": ["t01"], "item": "t02"}),
    ("read", "GET", "/v1/items/t01", None),
    ("read", "GET", "/v1/users?limit=2", None),
    ("read", "GET", "/metrics", None),
    ("events", "POST", "/v1/events", {"user": "a", "events": [{"item": "t01"}]}),
    ("admin", "POST", "/v1/items", {"items": [{"item_id": "n", "title": "new"}]}),
    ("admin", "PUT", "/v1/items", {"items": [{"item_id": "n", "title": "newer"}]}),
    ("admin", "DELETE", "/v1/items", {"ids": ["n"]}),
    ("admin", "POST", "/v1/items", {"items": [{"item_id": "t01n", "title": "new"}]}),
    ("admin", "DELETE", "/v1/items/t01n", None),
    ("admin", "GET", "/v1/users/u001", None),
    ("admin", "DELETE", "/v1/users/u001", None),
    ("admin", "POST", "/v1/reload", None),
]


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_every_call_needs_its_scope(serve, ask):
    app = serve(keys=KEYS)
    for scope, method, path, body in CALLS:
        call = (method, path) if body is None else (method, path, body)
        assert ask(app, call).json()["code"] == "no_key", call
        for wrong in ("x" * 21, READ[:-1], READ + "r", "ключ", ""):
            response = ask(app, call, headers={"x-api-key": wrong.encode()})
            assert response.status_code == 401, call
            assert response.headers["www-authenticate"] == "Bearer"
        for name, key in (("read", READ), ("events", EVENTS), ("admin", ADMIN)):
            if name != scope:
                response = ask(app, call, headers=bearer(key))
                assert (response.status_code, response.json()["code"]) == (403, "wrong_scope"), call
        keys = {"read": READ, "events": EVENTS, "admin": ADMIN}
        assert ask(app, call, headers=bearer(keys[scope])).status_code == 200, call
    covered = {(method, re.sub("/(t01n?|u001)$", "/{}", path.partition("?")[0])) for _, method, path, _ in CALLS}
    declared = {
        (method.upper(), path.replace("{item_id}", "{}").replace("{user_id}", "{}"))
        for path, methods in app.api.openapi()["paths"].items()
        for method in methods
    }
    assert declared - covered == {("GET", "/healthz"), ("GET", "/readyz")}


def test_some_calls_need_no_key(serve, ask):
    app = serve(keys=KEYS)
    for path in ("/healthz", "/readyz", "/", "/page/app.js", "/page/style.css", "/docs", "/openapi.json"):
        assert ask(app, ("GET", path)).status_code == 200, path
    assert ask(app, ("GET", "/nowhere")).status_code == 404


def test_a_bad_body_is_not_looked_at_without_a_key(serve, ask):
    assert ask(serve(keys=KEYS), ("POST", "/v1/recommend", b"{")).status_code == 401


def test_an_endpoint_that_says_nothing_is_opened_by_no_key(serve, ask):
    app = serve(keys=f"{READ} read,events,admin")

    @app.api.get("/forgotten")
    async def forgotten():
        return {}

    assert ask(app, ("GET", "/forgotten"), headers=bearer(READ)).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example:8080"},
        {"host": ""},
        {"host": "[::1"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9999"},
    ],
)
def test_without_keys_other_sites_are_refused(serve, ask, headers):
    response = ask(serve(), ("POST", "/v1/reload"), headers=headers)
    assert (response.status_code, response.json()["code"]) == (403, "foreign_site")


def test_without_keys_this_machine_is_answered(serve, ask):
    app = serve()
    for headers in (
        {"host": "127.0.0.1:8080"},
        {"host": "[::1]:1"},
        {"host": "localhost", "origin": "http://localhost"},
    ):
        assert ask(app, ("GET", "/v1/items/t01"), headers=headers).status_code == 200


def test_a_file_of_keys(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_REC_KEYS", raising=False)
    file = tmp_path / "keys"
    file.write_text(f"# for the shop\n\n{READ} read,events\n")
    for mode in (0o640, 0o604, 0o660):
        os.chmod(file, mode)
        with pytest.raises(ValueError, match=f"can be read by others .*chmod 600 {file}"):
            Keys.load(Settings(keys=str(file)))
    os.chmod(file, 0o600)
    found = Keys.load(Settings(keys=str(file), host="0.0.0.0")).find(READ)
    assert found is not None
    assert found.scopes == {"read", "events"}
    file.write_text("# none yet\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys.load(Settings(keys=str(file)))
    with pytest.raises(ValueError, match="cannot be read"):
        Keys.load(Settings(keys=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (READ, "write a key, a space"),
        (f"{READ} read write", "write a key, a space"),
        (f"{READ} write", "no scope 'write'"),
        (f"{READ} read,", "no scope ''"),
        ("short read", "at least 16 characters"),
    ],
)
def test_lines_that_are_no_key(line, message):
    with pytest.raises(ValueError, match=f"keys, line 2: .*{message}") as caught:
        parse(["", line], "keys")
    assert READ not in str(caught.value)
    with pytest.raises(ValueError, match="came before"):
        parse([f"{READ} read", f"{READ} admin"], "keys")


def test_it_listens_no_wider_without_a_key(monkeypatch):
    monkeypatch.delenv("LIGHTNING_REC_KEYS", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "shop.example", ""):
        with pytest.raises(ValueError, match="there is no key"):
            Keys.load(Settings(host=host))
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert not Keys.load(Settings(host=host))
    monkeypatch.setenv("LIGHTNING_REC_KEYS", f"{READ} read; {ADMIN} admin")
    assert Keys.load(Settings(host="0.0.0.0")).find(ADMIN)


def test_every_key_is_compared_in_constant_time(monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    keys = Keys(parse(KEYS.splitlines(), "keys"))
    assert keys.find(READ)
    assert len(compared) == 3


def test_the_rate_of_a_key():
    now = 0.0
    limit = RateLimit(rate=2.0, burst=3, clock=lambda: now)
    for _ in range(3):
        limit.take(b"a")
    with pytest.raises(ServiceError) as caught:
        limit.take(b"a")
    assert caught.value.headers == {"Retry-After": "1"}
    limit.take(b"b")  # another key has a bucket of its own
    now = 0.5
    limit.take(b"a")
    limit.take(b"a", cost=9, debt=True)
    now = 4.5  # 8 came back, 9 were owed
    with pytest.raises(ServiceError):
        limit.take(b"a")
    now = 100.0
    for _ in range(3):
        limit.take(b"a")
    with pytest.raises(ServiceError):
        limit.take(b"a")


def test_too_many_calls_are_told_when_to_come_again(serve, ask):
    app = serve(keys=KEYS, rate=0.5, burst=4)
    body = {"requests": [{"k": 1}] * 4}
    first, second = ask(app, *[("POST", "/v1/recommend", body)] * 2, headers=bearer(READ))
    assert first.status_code == 200  # and it counts four times
    assert (second.status_code, second.json()["code"]) == (429, "too_many_requests")
    assert int(second.headers["retry-after"]) >= 1
    assert ask(app, ("POST", "/v1/reload"), headers=bearer(ADMIN)).status_code == 200


@pytest.mark.parametrize(("name", "value"), [("max_k", 0), ("rate", -1), ("window", 1), ("batch_wait_ms", -1)])
def test_settings_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Settings(**{name: value})
