"""The recommender that serves, and how another artefact takes its place."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_rec.recommend.artefact import ArtefactError
from lightning_rec.recommend.index import Index
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.store import HistoryStore
from lightning_rec.serve.errors import ServiceError
from lightning_rec.serve.forgotten import Forgotten
from lightning_rec.serve.item_log import ItemLog
from lightning_rec.serve.logs import LOG
from lightning_rec.serve.metrics import Metrics, Reference


@dataclass(frozen=True)
class Served:
    """What serves: taken once for a call, so that a call never mixes two of them.

    Attributes:
        recommender: the recommender.
        name: a digest of its artefact's manifest: the same for the same export, on every replica.
        items: brings it the changes of items that the store has.
    """

    recommender: Recommender
    name: str
    items: ItemLog


def name_of(recommender: Recommender) -> str:
    """The name of an artefact in answers, logs and metrics."""
    said = recommender.artefact.manifest.to_json()
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:12]


class Holder:
    """Holds the recommender that serves; loads a new one beside it and swaps.

    Args:
        recommender: the first one.
        index: an empty index for each new one.
        verify: check the files of a new artefact.
        warm_up: load its language model before it takes over.
        count: is told of changes of items, see :class:`~lightning_rec.serve.item_log.ItemLog`.
    """

    def __init__(
        self,
        recommender: Recommender,
        index: Callable[[], Index],
        verify: bool = True,
        warm_up: bool = True,
        count: Callable[[str, int], None] = lambda what, n: None,
    ) -> None:
        self._count = count
        self.folder: Path = recommender.artefact.folder
        self.store: HistoryStore = recommender.store
        self.served = self._serving(recommender)
        #: Set once the first recommender has the changes of items that the store had at the start.
        self.ready = threading.Event()
        self.forgotten = Forgotten(self.store)
        self.last_reload: dict[str, object] | None = None
        self._index = index
        self._verify = verify
        self._warm_up = warm_up
        self._loading = threading.Lock()

    def _serving(self, recommender: Recommender) -> Served:
        return Served(recommender, name_of(recommender), ItemLog(self.store, recommender, self._count))

    def prepare(self, recommender: Recommender) -> Reference | None:
        """Makes what a recommender makes lazily, and measures how its top scores are spread."""
        if recommender.state.context is None:  # else another index answers, which has nothing to prepare
            recommender.state.index.prepare()
        if self._warm_up and recommender.artefact.has_text_tower:
            recommender.artefact.encode_texts(["warm up"])
        return Reference.of(recommender)

    def start(self, metrics: Metrics) -> None:
        """Makes the first recommender ready, and forgets in it who asked for it.

        Changes of items that the store has are applied in the background, with the language model where they need it:
        until then the service answers, but says that it is not ready.
        """
        served = self.served
        self.forgotten.apply(served.recommender, everyone=True)
        created = served.recommender.artefact.manifest.created
        metrics.new_artefact(None, served.name, created)
        if not served.items.behind:
            self.ready.set()

        def background() -> None:
            try:
                self.follow()
            except Exception:  # the next look at the store tries again
                LOG.exception("The changes of items could not be applied.")
            try:
                reference = self.prepare(served.recommender)
            except Exception:  # it serves all the same; only the drift is not told
                LOG.exception("The warm-up failed.")
                return
            if self.served is served:
                metrics.reference = reference

        # no daemon: Python's end would cut torch off in the middle of a computation, which ends the process by abort()
        threading.Thread(target=background, name="warm-up").start()

    def follow(self) -> None:
        """Brings what serves the changes of items that other replicas made, or an earlier process."""
        self.served.items.follow()
        self.ready.set()

    def reload(self, metrics: Metrics, begun: Callable[[], None] = lambda: None) -> Served:
        """Loads the artefact that now lies in the folder, and lets it take over. Calls under way end on the old one.

        The store is kept, and with it what calls changed of items: the new artefact serves with these changes.

        Args:
            metrics: is told of the new artefact.
            begun: called before the folder is looked at, unless another reload is under way.

        Raises:
            ServiceError: it cannot be loaded, and the old one serves on; or another reload is under way.
        """
        if not self._loading.acquire(blocking=False):
            raise ServiceError(
                409, "reload_running", "An artefact is being loaded at this moment.", "Wait for it to take over."
            )
        try:
            started = time.time()
            begun()
            try:
                recommender = Recommender.load(
                    self.folder, self._index(), self.store, self._verify, self.served.recommender.now
                )
                self.forgotten.apply(recommender, everyone=True)
                new = self._serving(recommender)
                new.items.follow()
                reference = self.prepare(recommender)
                old = self.served
                with old.items.lock:  # no change is made of the old one alone
                    new.items.follow()
                    self.served = new
                    old.items.close()
            except Exception as error:
                metrics.reloads.labels("failed").inc()
                self.last_reload = {"done": False, "time": int(started), "artefact": self.served.name}
                # the log drops what an exception says, which may hold an id; an artefact's error names files only
                reason = {"reason": str(error)} if isinstance(error, ArtefactError) else {}
                LOG.exception("The new artefact could not be loaded; the old one serves on.", extra={"fields": reason})
                raise ServiceError(
                    409,
                    "reload_failed",
                    f"The new artefact could not be loaded, and the old one serves on: {error}",
                    "Export it again, then reload.",
                ) from error
            self.ready.set()
            metrics.new_artefact(reference, new.name, recommender.artefact.manifest.created)
            try:  # who was forgotten while the new one was loading
                self.forgotten.apply(recommender, everyone=True)
            except Exception:  # it serves already; the next look at the store will tell
                self.forgotten.look_again()
                LOG.exception("The store could not be asked whom to forget.")
            metrics.reloads.labels("done").inc()
            self.last_reload = {"done": True, "time": int(started), "artefact": new.name}
            LOG.info("A new artefact serves.", extra={"fields": {"artefact": new.name}})
            return new
        finally:
            self._loading.release()
