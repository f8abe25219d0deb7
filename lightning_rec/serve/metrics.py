"""What Prometheus reads: traffic, and whether the answers are still those that the artefact gave when it was made."""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.stored_users import StoredUsers
from lightning_rec.recommend.types import Answer, Request

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SAMPLE = 256
_BINS = 10
#: Answers below which a drift is not told: of a few, any distribution looks drifted.
LEAST = 100


@dataclass(frozen=True)
class Reference:
    """How top scores are spread when the artefact answers who it knows.

    Attributes:
        edges: scores between the bins, ascending; the deciles of the sample.
        shares: share of the sample in each bin, ``len(edges) + 1`` of them.
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def of_scores(cls, scores: Sequence[float]) -> Reference:
        """The spread of a sample."""
        ordered = sorted(scores)
        edges = sorted({ordered[len(ordered) * part // _BINS] for part in range(1, _BINS)}) if ordered else []
        counts = [0] * (len(edges) + 1)
        for score in ordered:
            counts[bisect_right(edges, score)] += 1
        return cls(tuple(edges), tuple(count / max(len(ordered), 1) for count in counts))

    @classmethod
    def of(cls, recommender: Recommender) -> Reference:
        """The top scores of users of the artefact; where it has none, of histories of one item each.

        Users are asked for as the service asks for them, by id and with times, but by what the artefact knows of them
        alone: the store may be away, and what happened since is what the drift is to tell.
        """
        state = recommender.state
        users, filter_seen = recommender.artefact.users, recommender.artefact.manifest.filter_seen
        requests = [] if users is None else [_fitted(users, user, filter_seen) for user in users.sample(_SAMPLE)]
        if not requests:
            rows = state.alive.nonzero()[:, 0]
            step = max(1, len(rows) // _SAMPLE)
            requests = [Request(history=[state.ids[row]], k=1) for row in rows[::step][:_SAMPLE].tolist()]
        answers = recommender.recommend(requests)
        return cls.of_scores([answer.items[0].score for answer in answers if answer.path == "towers" and answer.items])


def _fitted(users: StoredUsers, user: str, filter_seen: bool) -> Request:
    """The request of a user of whom the store knows nothing."""
    events = users.history(user, 10**9)
    return Request(
        user=user,
        history=[event.item for event in events],
        times=None if users.times is None else [event.time or 0 for event in events],
        # what was touched without being liked counts as seen, which a request with a history of its own cannot know
        exclude=users.touched(user) if filter_seen else (),
        k=1,
    )


class Window:
    """Which items, paths and top scores the newest answers had: between ``size`` and half of it, older ones go.

    Args:
        size: number of answers.
    """

    def __init__(self, size: int) -> None:
        self._half = max(1, size // 2)
        self._parts = [_Part(), _Part()]

    def clear(self) -> None:
        """Begins anew, for another artefact."""
        self._parts = [_Part(), _Part()]

    def add(self, answer: Answer, top: float | None) -> None:
        """Counts an answer; ``top`` is its top score where that can be compared with the reference."""
        newest = self._parts[1]
        if newest.answers >= self._half:
            newest = _Part()
            self._parts = [self._parts[1], newest]
        newest.answers += 1
        newest.fallbacks += answer.path == "popularity"
        newest.shown.update(item.id for item in answer.items)
        if top is not None:
            newest.tops.append(top)

    @property
    def shown(self) -> set[str]:
        """Ids of the items that were shown."""
        return self._parts[0].shown | self._parts[1].shown

    @property
    def fallback_share(self) -> float:
        """Share of the answers by popularity."""
        answers = sum(part.answers for part in self._parts)
        return sum(part.fallbacks for part in self._parts) / answers if answers else 0.0

    @property
    def tops(self) -> list[float]:
        """Top scores that can be compared with a reference."""
        return [*self._parts[0].tops, *self._parts[1].tops]


def drift(tops: Sequence[float], reference: Reference | None) -> tuple[float, float]:
    """The population stability index and the Kolmogorov-Smirnov distance of top scores from a reference.

    Both are 0 before there are :data:`LEAST` scores. An index above 0.25 is commonly called a large shift.
    """
    if reference is None or len(tops) < LEAST or not any(reference.shares):
        return 0.0, 0.0
    counts = [0] * len(reference.shares)
    for top in tops:
        counts[bisect_right(reference.edges, top)] += 1
    index = distance = cumulated = 0.0
    for count, share in zip(counts, reference.shares, strict=True):
        now, then = max(count / len(tops), 1e-4), max(share, 1e-4)
        index += (now - then) * math.log(now / then)
        cumulated += count / len(tops) - share
        distance = max(distance, abs(cumulated))
    return index, distance


class _Part:
    def __init__(self) -> None:
        self.answers = 0
        self.fallbacks = 0
        self.shown: set[str] = set()
        self.tops: list[float] = []


class Metrics:
    """The metrics of one service; each has a registry of its own.

    Args:
        window: number of newest answers that the shares are told of.
        current: the recommender that serves at the moment.
    """

    def __init__(self, window: int, current: Callable[[], Recommender]) -> None:
        self._current = current
        self._lock = threading.Lock()
        self.window = Window(window)
        self.reference: Reference | None = None
        self.registry = CollectorRegistry()
        name = "lightning_rec_"
        self.requests = Counter(
            name + "requests", "Calls, by route and status.", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            name + "request_seconds", "Time to answer a call.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.batch = Histogram(
            name + "batch_size", "Requests answered together.", buckets=_SIZES, registry=self.registry
        )
        self.answers = Counter(name + "answers", "Answers, by what gave them.", ["path"], registry=self.registry)
        self.refused = Counter(
            name + "refused", "Requests that could not be answered.", ["code"], registry=self.registry
        )
        self.events = Counter(name + "events", "Events taken, new or sent again.", ["kind"], registry=self.registry)
        self.reloads = Counter(name + "reloads", "Changes of the artefact.", ["result"], registry=self.registry)
        self.item_changes = Counter(
            name + "item_changes",
            "Items changed by calls, by other replicas, or in vain.",
            ["kind"],
            registry=self.registry,
        )
        self.artefact = Info(name + "artefact", "The artefact that serves.", registry=self.registry)
        for path in ("towers", "text", "popularity"):
            self.answers.labels(path)
        for result in ("done", "failed"):
            self.reloads.labels(result)
        for kind in ("made", "followed", "refused"):
            self.item_changes.labels(kind)
        for what, told, value in (
            ("items", "Items that can be recommended.", lambda: self._current().n_items),
            ("generation", "Number of the catalogue.", lambda: self._current().generation),
            ("fallback_share", "Share of the newest answers by popularity.", self.fallback_share),
            ("catalogue_coverage", "Share of the catalogue that the newest answers showed.", self.coverage),
            ("score_drift_psi", "Population stability index of top scores.", lambda: self.drift()[0]),
            ("score_drift_ks", "Kolmogorov-Smirnov distance of top scores.", lambda: self.drift()[1]),
            ("score_drift_answers", "Answers that the drift is told of.", lambda: len(self._tops())),
        ):
            Gauge(name + what, told, registry=self.registry).set_function(value)

    def answered(self, request: Request, answer: Answer) -> None:
        """Counts an answer."""
        self.answers.labels(answer.path).inc()
        compared = answer.path == "towers" and answer.items and request.candidates is None and not request.where
        with self._lock:
            self.window.add(answer, answer.items[0].score if compared else None)

    def items_changed(self, kind: str, items: int) -> None:
        """Counts items that were changed; see :class:`~lightning_rec.serve.item_log.ItemLog` for the kinds."""
        self.item_changes.labels(kind).inc(items)

    def new_artefact(self, reference: Reference | None, name: str, created: str) -> None:
        """What was counted of the old artefact says nothing of the new one."""
        with self._lock:
            self.reference = reference
            self.window.clear()
        self.artefact.info({"name": name, "created": created})

    def fallback_share(self) -> float:
        """Share of the newest answers by popularity."""
        with self._lock:
            return self.window.fallback_share

    def coverage(self) -> float:
        """Share of the living items among the newest answers."""
        with self._lock:
            shown = self.window.shown
        state = self._current().state
        rows = torch.tensor([state.rows[id_] for id_ in shown if id_ in state.rows], dtype=torch.int64)
        return int(state.alive[rows].sum()) / max(state.n_items, 1)

    def drift(self) -> tuple[float, float]:
        """See :func:`drift`."""
        return drift(self._tops(), self.reference)

    def _tops(self) -> list[float]:
        with self._lock:  # held for a copy only: answers wait for it
            return self.window.tops

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        with torch.inference_mode():
            return generate_latest(self.registry)
