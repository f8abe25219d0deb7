"""Concurrent calls are joined, so that one matrix product answers all that wait."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_rec.recommend.artefact import ArtefactError
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.types import Answer, Request, RequestError
from lightning_rec.serve.errors import STORE_UNAVAILABLE, ServiceError, replaced, store_away
from lightning_rec.serve.logs import LOG

#: Seconds of a batch that may be lost in waiting for a store that fails; the rest of the batch is not kept from others.
_PATIENCE = 1.0

Outcome = Answer | RequestError


@dataclass(eq=False)
class _Group:
    """The requests of one call; one recommender answers them all."""

    requests: Sequence[Request]
    future: asyncio.Future[tuple[str, list[Outcome]]]
    loop: asyncio.AbstractEventLoop


class Batcher:
    """A thread that takes what waits whenever it is free, and answers it together.

    While one batch is answered the next one gathers: under load batches grow, and a lone request waits for nobody.

    Args:
        current: the recommender that serves at the moment, and the name of its artefact.
        max_batch: most requests of a batch; a longer call is a batch of its own.
        wait: seconds to wait for more before answering.
        max_waiting: most requests that may wait.
        observe: is told the size of every batch.
        name: of the thread.
    """

    def __init__(
        self,
        current: Callable[[], tuple[Recommender, str]],
        max_batch: int = 64,
        wait: float = 0.0,
        max_waiting: int = 4096,
        observe: Callable[[int], None] = lambda size: None,
        name: str = "recommend",
    ) -> None:
        self._current = current
        self._max_batch = max_batch
        self._wait = wait
        self._max_waiting = max_waiting
        self._observe = observe
        self._groups: deque[_Group] = deque()
        self._size = 0
        self._ready = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a daemon that Python's end cuts off within torch takes the process with it

    async def recommend(self, requests: Sequence[Request]) -> tuple[str, list[Outcome]]:
        """Answers the requests of one call.

        Returns:
            The name of the artefact, and an answer or the error of each request, in order.

        Raises:
            ServiceError: 503 when too many wait already.
        """
        loop = asyncio.get_running_loop()
        group = _Group(requests, loop.create_future(), loop)
        with self._ready:
            if self._closed or (self._size and self._size + len(requests) > self._max_waiting):
                raise ServiceError(
                    503, "overloaded", "Too many requests wait.", "Come again in 1 s.", {"Retry-After": "1"}
                )
            self._groups.append(group)
            self._size += len(requests)
            self._ready.notify()
        return await group.future

    def close(self) -> None:
        """Answers what waits, and ends the thread."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join(timeout=30)
        atexit.unregister(self.close)

    def _run(self) -> None:
        while groups := self._take():
            results: list[tuple[_Group, tuple[str, list[Outcome]] | BaseException]] = []
            try:
                recommender, name = self._current()
                outcomes = iter(answer_all(recommender, [request for group in groups for request in group.requests]))
                for group in groups:
                    results.append((group, (name, [next(outcomes) for _ in group.requests])))
            except Exception as error:  # the thread must live on, whatever happens; each call is told
                LOG.exception("A batch failed.")
                results = [(group, error) for group in groups]
            for loop in {group.loop for group in groups}:
                mine = [(group, result) for group, result in results if group.loop is loop]
                try:
                    loop.call_soon_threadsafe(_deliver, mine)
                except RuntimeError:  # the loop was closed meanwhile: nobody is left to be told
                    continue

    def _take(self) -> list[_Group]:
        """The groups of the next batch; none when the batcher is closed and nothing waits."""
        while True:
            with self._ready:
                while not self._groups and not self._closed:
                    self._ready.wait()
                until = time.monotonic() + self._wait
                while self._size < self._max_batch and (left := until - time.monotonic()) > 0 and not self._closed:
                    self._ready.wait(left)
                if not self._groups:
                    return []
                taken = [self._pop()]
                size = len(taken[0].requests)
                while self._groups and size + len(self._groups[0].requests) <= self._max_batch:
                    taken.append(self._pop())
                    size += len(taken[-1].requests)
            taken = [group for group in taken if not group.future.cancelled()]  # whose client went away
            if taken:
                self._observe(sum(len(group.requests) for group in taken))
                return taken

    def _pop(self) -> _Group:
        group = self._groups.popleft()
        self._size -= len(group.requests)
        return group


def answer_all(recommender: Recommender, requests: Sequence[Request]) -> list[Outcome]:
    """An answer or an error for each request: a bad one does not disturb the others.

    Args:
        recommender: what answers; one call of it for all requests that are good.
        requests: in order.
    """
    failures = recommender.store.failures
    outcomes: list[Outcome | None] = [None] * len(requests)
    good = []
    for place, request in enumerate(requests):
        try:
            recommender.check(request)
            good.append(place)
        except RequestError as error:
            outcomes[place] = error
        except failures:  # a check may have to look at a history
            LOG.error("The store of histories failed.")
            outcomes[place] = store_away()
    told: tuple[type[Exception], ...] = (RequestError, ArtefactError, *failures)
    try:
        found = recommender.recommend([requests[place] for place in good]) if good else []
    except told as error:
        if isinstance(error, failures):
            LOG.exception("The store of histories failed; the requests are answered one by one.")
        # what only shows on the way, such as words where no tower reads text, or a store that is away
        waited = 0.0  # for a store that then failed
        for place in good:
            request, started = requests[place], time.monotonic()
            if waited > _PATIENCE and request.user and request.history is None:
                outcomes[place] = store_away()
                continue
            outcome = outcomes[place] = _answer_one(recommender, request, failures)
            if isinstance(outcome, RequestError) and outcome.code == STORE_UNAVAILABLE:
                waited += time.monotonic() - started
    else:
        for place, answer in zip(good, found, strict=True):
            outcomes[place] = answer
    return [outcome for outcome in outcomes if outcome is not None]


def _answer_one(recommender: Recommender, request: Request, failures: tuple[type[Exception], ...]) -> Outcome:
    try:
        return recommender.recommend(request)
    except RequestError as error:
        return error
    except ArtefactError as error:
        LOG.warning(str(error))
        return replaced()
    except failures:
        LOG.error("The store of histories failed.")
        return store_away()


def _deliver(results: Sequence[tuple[_Group, tuple[str, list[Outcome]] | BaseException]]) -> None:
    for group, result in results:
        if group.future.done():
            continue
        if isinstance(result, BaseException):
            group.future.set_exception(result)
        else:
            group.future.set_result(result)
