"""The settings of the service."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """How the service listens, whom it lets in, and where its limits are.

    Args:
        host: the address to listen on. One that other machines can reach needs keys.
        port: the port to listen on.
        keys: a file of API keys, one a line as ``KEY SCOPE,SCOPE`` with the scopes ``read``, ``events`` and ``admin``,
            readable by its owner only. None: the environment variable ``LIGHTNING_REC_KEYS``, with the same lines
            separated by line ends or semicolons; without either everybody on this machine may do everything.
        store: where histories live, and what calls changed of items: ``sqlite:FILE``, ``redis://HOST:PORT/DB``, or
            ``memory:`` (gone with the process). A FILE without a folder lies in the working directory. Services of one
            store share its users and its items: give each catalogue a store of its own. How many items of the store
            are added to, changed in or removed from the artefact is logged at the start.
        index: ``exact``, or ``hnsw`` or ``ivfpq`` (need the extra ``index``).
        now: for a demonstration over old data, where answers hold what was alive or age and clicks add to scores: the
            moment of every request, in seconds since 1970 or as an ISO date and time. None: the time of the request.
        verify: check every file of the artefact against its manifest when it is loaded.
        warm_up: load the language model in the background after the start, and before a new artefact takes over;
            False: with the first text.
        max_k: most items that one request may ask for.
        max_requests: most requests in one call of recommend.
        max_body: most bytes of the body of a call.
        body_timeout: seconds within which the body of a call must have come.
        max_batch: most requests that are answered with one matrix product.
        batch_wait_ms: milliseconds to wait for more requests before answering; 0: whatever waits is taken at once.
        max_waiting: most requests that may wait; further ones are told to come again.
        rate: calls a second that one key may make (a call of recommend counts as many as its requests); 0: no limit.
            Without keys there is no limit.
        burst: calls that a key may make at once.
        page: show the demo page at ``/``, and list users for it at ``GET /v1/users``.
        log_key: key of the hash by which users, items and texts are masked in the log; None: a new one each start,
            so that a user cannot be followed from one start to the next.
        window: number of newest answers over which coverage, fallback share and score drift are measured.
        shutdown_timeout: seconds that calls under way have left when the service is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keys: str | None = None
    store: str = "sqlite:lightning_rec_events.sqlite"
    index: Literal["exact", "hnsw", "ivfpq"] = "exact"
    now: int | str | None = None
    verify: bool = True
    warm_up: bool = True
    max_k: int = 200
    max_requests: int = 256
    max_body: int = 2_000_000
    body_timeout: float = 30.0
    max_batch: int = 64
    batch_wait_ms: float = 0.0
    max_waiting: int = 4096
    rate: float = 200.0
    burst: int = 400
    page: bool = True
    log_key: str | None = None
    window: int = 10_000
    shutdown_timeout: int = 30

    def __post_init__(self) -> None:
        least = {"max_k": 1, "max_requests": 1, "max_body": 1024, "max_batch": 1, "max_waiting": 1, "burst": 1}
        for name, smallest in (least | {"window": 2, "rate": 0, "batch_wait_ms": 0, "body_timeout": 0.001}).items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to at least {smallest}.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine, as seen from itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
