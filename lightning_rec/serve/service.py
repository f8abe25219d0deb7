"""The parts of the service, put together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import anyio

from lightning_rec.recommend.checks import is_plain
from lightning_rec.recommend.index import Index
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.types import Request
from lightning_rec.serve.batching import Batcher
from lightning_rec.serve.errors import ServiceError
from lightning_rec.serve.item_log import Make
from lightning_rec.serve.logs import LOG, Mask
from lightning_rec.serve.metrics import Metrics
from lightning_rec.serve.reload import Holder, Served
from lightning_rec.serve.settings import Settings

#: Seconds between looks for users that another replica was asked to forget.
_LOOK = 30.0
#: Seconds between looks for items that another replica changed.
LOOK_FOR_ITEMS = 2.0


class Service:
    """What answers calls: the recommender that serves, its batchers, the metrics.

    Args:
        recommender: the first recommender.
        index: an empty index for each later one.
        settings: the settings.
        mask: hides what the log must not tell.
        close_store: close the store at the end.
    """

    def __init__(
        self,
        recommender: Recommender,
        index: Callable[[], Index],
        settings: Settings,
        mask: Mask,
        close_store: bool = False,
    ) -> None:
        self.settings = settings
        self.mask = mask
        self.metrics = Metrics(settings.window, lambda: self.holder.served.recommender)
        self.holder = Holder(recommender, index, settings.verify, settings.warm_up, self.metrics.items_changed)
        self._close_store = close_store

        def batcher(name: str) -> Batcher:
            def current() -> tuple[Recommender, str]:
                served = self.holder.served  # looked at once: another may take over in between
                return served.recommender, served.name

            return Batcher(
                current,
                settings.max_batch,
                settings.batch_wait_ms / 1000,
                settings.max_waiting,
                self.metrics.batch.observe,
                name,
            )

        self._quick = batcher("recommend")
        self._chosen = batcher("recommend-chosen")
        self._words = batcher("recommend-text")
        #: Explanations and new items keep a language model busy: few at once, so that other calls find a free core.
        self.heavy = anyio.CapacityLimiter(2)
        self._asked = threading.Event()
        self.holder.start(self.metrics)

    @property
    def served(self) -> Served:
        """What serves at the moment."""
        return self.holder.served

    def batcher(self, requests: Sequence[Request]) -> Batcher:
        """The batcher for the requests of one call.

        Reading words takes longest, and filters, quotas, diversity and exploration longer than the best scores: each
        kind has its own batcher, and holds up none of a quicker kind.
        """
        if any(request.text for request in requests):
            return self._words
        return self._quick if all(map(is_plain, requests)) else self._chosen

    def reload(self) -> Served:
        """Lets the artefact that now lies in the folder take over; see :meth:`Holder.reload`."""
        return self.holder.reload(self.metrics)

    def reload_soon(self) -> None:
        """The same in the background, for a signal handler; the outcome is told by the log and by ``/readyz``.

        Asked for while an artefact is being loaded, it loads once more afterwards: the folder may have changed since.
        """
        self._asked.set()

        def quietly() -> None:
            while self._asked.is_set():
                try:
                    self.holder.reload(self.metrics, self._asked.clear)
                except ServiceError as error:
                    if error.code == "reload_running":
                        time.sleep(0.05)

        threading.Thread(target=quietly, name="reload").start()  # no daemon, for the reason given at the warm-up

    def forget(self, user: str) -> int:
        """Forgets a user for good; says how many events went."""
        self.holder.forgotten.add(user)
        return self.served.recommender.forget(user)

    def change_items(self, make: Make) -> tuple[Recommender, int]:
        """Changes items for good, on all replicas of the store.

        Args:
            make: the change, given the catalogue; it may be asked several times.

        Returns:
            The recommender that serves, and the generation of its catalogue.

        Raises:
            RequestError: the change does not fit. Then nothing is changed.
        """
        while True:
            served = self.served
            generation = served.items.change(make)
            if generation is not None:
                return served.recommender, generation

    async def watch(self) -> None:
        """Looks from time to time for users that other replicas forgot, and for items that they changed."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                self._again, _LOOK, lambda: self.holder.forgotten.apply(self.served.recommender), "whom to forget"
            )
            tasks.start_soon(self._again, LOOK_FOR_ITEMS, self.holder.follow, "which items were changed")

    @staticmethod
    async def _again(seconds: float, look: Callable[[], object], what: str) -> None:
        while True:
            await anyio.sleep(seconds)
            try:
                await anyio.to_thread.run_sync(look)
            except Exception:  # the store may be away for a while
                LOG.exception(f"The store could not be asked {what}.")

    def close(self) -> None:
        """Answers what waits and lets go of the store."""
        for batcher in (self._quick, self._chosen, self._words):
            batcher.close()
        if self._close_store:
            self.holder.store.close()
