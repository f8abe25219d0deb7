"""How much one key may ask for, and how long a body may be."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from starlette.types import Message, Receive

from lightning_rec.serve.errors import ServiceError


class RateLimit:
    """A bucket of tokens for each key: a call takes one, and ``rate`` come back each second.

    Args:
        rate: tokens a second; 0: no limit.
        burst: tokens that a bucket holds.
        clock: seconds, never going back.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._buckets: dict[bytes, tuple[float, float]] = {}  # as many as there are keys

    def take(self, key: bytes, cost: int = 1, debt: bool = False) -> None:
        """Takes tokens.

        Args:
            key: whose bucket.
            cost: how many.
            debt: take them also where there are too few, so that later calls wait: for a call that is under way.

        Raises:
            ServiceError: 429, with the seconds after which there will be enough.
        """
        if not self.rate:
            return
        now = self._clock()
        tokens, seen = self._buckets.get(key, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - seen) * self.rate)
        if tokens >= cost or debt:
            self._buckets[key] = (tokens - cost, now)
            return
        self._buckets[key] = (tokens, now)
        wait = math.ceil((cost - tokens) / self.rate)
        raise ServiceError(
            429,
            "too_many_requests",
            f"This key may make {self.rate:g} calls a second.",
            f"Come again in {wait} s.",
            {"Retry-After": str(wait)},
        )


async def read_body(receive: Receive, length: str | None, limit: int, timeout: float) -> bytes:
    """Reads a body, and stops as soon as it is too long.

    Args:
        receive: where it comes from.
        length: the header ``Content-Length``.
        limit: most bytes.
        timeout: seconds within which it must have come.

    Raises:
        ServiceError: 413 when it is too long, 408 when it is too slow.
    """
    too_long = ServiceError(
        413, "body_too_long", f"A body has at most {limit:,} bytes.", "Send fewer requests, events or items a call."
    )
    if length is not None and length.isdecimal() and int(length[:20]) > limit:
        raise too_long
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ServiceError(400, "disconnected", "The client went away.")
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise too_long
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ServiceError(
            408, "body_too_slow", f"The body did not come within {timeout:g} s.", "Send it faster."
        ) from None


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read out once more."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
