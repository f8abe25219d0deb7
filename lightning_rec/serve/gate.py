"""What every call passes on its way in and out: the key, the limits, the headers, the log, the metrics."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_rec.serve import errors
from lightning_rec.serve.auth import Key, Keys
from lightning_rec.serve.errors import ServiceError
from lightning_rec.serve.limits import RateLimit, read_body, replay
from lightning_rec.serve.logs import ACCESS, LOG, Mask
from lightning_rec.serve.metrics import Metrics
from lightning_rec.serve.settings import Settings

_HEADERS = {
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}
_REFUSED = b"\0refused"  # no key is so
_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")


class Gate:
    """The outermost layer of the service, around everything that answers.

    A route says what it needs by the attribute ``scope`` of its endpoint (see
    :func:`~lightning_rec.serve.routes.needs`); one that says nothing is opened by no key.

    Args:
        app: what answers.
        routes: the routes of the service.
        settings: the limits.
        keys: who may do what.
        metrics: what is counted.
        mask: hides what the log must not tell.
    """

    def __init__(
        self, app: ASGIApp, routes: Iterable[BaseRoute], settings: Settings, keys: Keys, metrics: Metrics, mask: Mask
    ) -> None:
        self.app = app
        self._routes = routes
        self._settings = settings
        self._keys = keys
        self._limit = RateLimit(settings.rate, settings.burst)
        self._metrics = metrics
        self._mask = mask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no web sockets here
        started = time.perf_counter()
        call = secrets.token_hex(8)
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                extra = [(name, value) for name, value in _HEADERS.items() if name not in given]
                message["headers"] = [*message["headers"], *extra, (b"x-request-id", call.encode())]
            await send(message)

        state = scope.setdefault("state", {})
        state["said"] = {}
        state["call"] = call
        template, endpoint = self._find(scope)
        key: Key | None = None
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            client = (scope.get("client") or (None,))[0]
            try:
                key = self._keys.admit(headers, getattr(endpoint, "scope", "nobody") if endpoint else None, client)
            except ServiceError as error:
                if error.status == 401:
                    self._limit.take(_REFUSED)  # one bucket for all who have no key: guessing must not come cheap
                raise
            if key is not None:
                self._limit.take(key.secret)
                secret = key.secret
                state["charge"] = lambda cost: self._limit.take(secret, cost, debt=True)
            body = await read_body(
                receive, headers.get("content-length"), self._settings.max_body, self._settings.body_timeout
            )
            if body and not _is_json(headers.get("content-type", "")):
                raise ServiceError(
                    415,
                    "no_json",
                    "The body is not said to be JSON.",
                    "Send the header Content-Type: application/json.",
                )
            await self.app(scope, replay(body, receive), sent)
        except ServiceError as error:
            state["code"] = error.code
            await self._refuse(errors.of_service(error), scope, receive, sent, status)
        except Exception:
            LOG.exception("A call failed.", extra={"fields": {"call": call, "route": template}})
            await self._refuse(errors.of_failure(call), scope, receive, sent, status)
        finally:
            self._tell(scope, call, template, status, time.perf_counter() - started, key)

    def _find(self, scope: Scope) -> tuple[str, Any]:
        """The path of the route as it was declared, and what answers there; for other paths ``other`` and None."""
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return getattr(route, "path", "other"), getattr(route, "endpoint", None)
        return "other", None

    @staticmethod
    async def _refuse(response: Response, scope: Scope, receive: Receive, send: Send, status: int) -> None:
        if not status:  # else a part of an answer is on its way, and the connection just ends
            await response(scope, receive, send)

    def _tell(self, scope: Scope, call: str, route: str, status: int, seconds: float, key: Key | None) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        fields = {
            "call": call,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 2),
            "key": None if key is None else self._mask(key.secret),
        }
        said = {
            name: self._mask(value) if isinstance(value, str | bytes) else value
            for name, value in scope["state"]["said"].items()
        }
        if "code" in scope["state"]:
            fields["code"] = scope["state"]["code"]
        ACCESS.info("call", extra={"fields": fields | said})


def _is_json(kind: str) -> bool:
    return kind.partition(";")[0].strip().lower() == "application/json"
