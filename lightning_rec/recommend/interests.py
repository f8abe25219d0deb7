"""Who asks: from a request to an interest vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_rec.data.batch import UserBatch
from lightning_rec.data.text import TITLE_FIELDS
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.catalogue_state import CatalogueState
from lightning_rec.recommend.store import HistoryStore
from lightning_rec.recommend.threads import one_thread
from lightning_rec.recommend.types import AnswerPath, Event, Request, RequestError

#: Newest events of a user that are read for the user tower; what was seen are all events.
READ_EVENTS = 1000
#: Steps of histories up to which one thread is faster than several.
_FEW_STEPS = 512


@dataclass
class Interest:
    """Who asks, made ready for the product.

    Attributes:
        path: what answers.
        vector: ``(d,)`` interest vector; None for popularity.
        seen: rows of the whole history, also of what the user tower no longer reads; each may come more than once.
        history: rows that the user tower reads, oldest first; a negative number stands for the
            request's own text, and 0 for an item that the catalogue lacks, where the run read such (see
            :attr:`Artefact.unknown`).
        titled: rows whose titles the user's text names, oldest first, 0 as in ``history``; empty where no tower reads
            it.
        unknown: ids of the history that the catalogue lacks.
        repeat: what is added to the score of an item of ``history``, as the run learned it; 0: nothing.
    """

    path: AnswerPath
    vector: Tensor | None
    seen: list[int] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    titled: list[int] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    repeat: float = 0.0


class InterestReader:
    """Reads histories and words, and turns them into interest vectors with one pass through the user tower.

    Args:
        artefact: the towers, and the users of the fitted data.
        store: what happened since.
    """

    def __init__(self, artefact: Artefact, store: HistoryStore) -> None:
        self.artefact = artefact
        self.store = store
        repeat = artefact.score.repeat
        self._repeat = 0.0 if repeat is None else float(repeat)
        self._titles = artefact.manifest.user_titles if artefact.reads_user_text else 0
        #: So many of the newest known events can move an interest: by their vectors, or by the titles in a user's text.
        self.reach = max(artefact.manifest.max_history, self._titles)
        #: The end of a log that does not tell when the events of its histories were; None: it does, or has no times.
        self._until: int | None = (artefact.manifest.parts.get("users") or {}).get("until")
        #: So many events of a user are read for the user tower.
        self.newest = max(self.reach, READ_EVENTS)

    @property
    def reads_unknown(self) -> bool:
        """Whether an event whose item the catalogue lacks is an event like others, as it was in the run."""
        return self.artefact.unknown is not None

    @property
    def reads_text(self) -> bool:
        """Whether a tower reads what someone says."""
        return self.artefact.has_text_tower or self.artefact.reads_user_text

    @cached_property
    def _fades(self) -> bool:
        """Whether the user tower tells the interest after each event, so that older ones can fade.

        A try says it: a tower may also repeat one vector at every step, or read one event only.
        """
        longest = self.artefact.manifest.max_history
        rows = min(8, longest, len(self.artefact.ids) - 1)
        if rows < 2:
            return longest > 1  # of a single event nothing can fade, and a single item cannot be tried
        history = torch.linspace(1, len(self.artefact.ids) - 1, rows).long()[None]
        texts = ["a"] if self.artefact.reads_user_text else None
        with torch.inference_mode():
            users = UserBatch(history, torch.tensor([rows]), torch.tensor([0]), torch.zeros_like(history), texts)
            steps = self.artefact.interests(users)[0]
        return len(steps) > 1 and not bool((steps == steps[0]).all())

    def check(self, request: Request, state: CatalogueState) -> None:
        """Refuses what the towers of this artefact cannot answer.

        Args:
            request: the request.
            state: the catalogue.

        Raises:
            RequestError: a half-life, or words, that no tower can use.
        """
        if request.half_life is not None and not self._fades:
            raise RequestError(
                f"The user tower, {self.artefact.manifest.user_tower['class_path']}, has one interest vector for a "
                "whole history, in which no event can count half.",
                "no_half_life",
                "Leave half_life out, or export a run with a user tower that has a vector after every event, such as "
                "lightning_rec.towers.SequenceUserTower.",
            )
        if request.text and not self.reads_text:
            ids = request.history
            if ids is None:
                ids = [event.item for event in self.histories([request.user], self.newest)[0]] if request.user else []
            if not any(id_ in state.rows for id_ in ids):  # else the history answers
                self.artefact.encode_texts([request.text])  # raises

    def exported(self, user: str, newest: int) -> list[Event]:
        """The history of the fitted data."""
        users = self.artefact.users
        return [] if users is None else users.history(user, newest)

    def histories(self, users: Sequence[str], newest: int) -> list[list[Event]]:
        """The ``newest`` events of each user, oldest first: those of the fitted data and those of the store.

        A stored event whose item and time the fitted data has too is the same event: the run was fitted to the events
        of the store. Where the fitted data has no times, its events come first, and after them those of the store that
        are not known to be among them.
        """
        if newest < 1:
            return [[] for _ in users]
        return [events[-newest:] for events, _ in self._known(users, max(newest, self.newest))]

    def _known(self, users: Sequence[str], newest: int) -> list[tuple[list[Event], bool]]:
        """The ``newest`` fitted and stored events of each user as one; and whether the store may have older ones."""
        stored = self.store.read_many(users, newest)
        return [
            (_merged(self.exported(user, newest), events, self._until), len(events) >= newest)
            for user, events in zip(users, stored, strict=True)
        ]

    def _seen_before(self, user: str, events: Sequence[Event], older: bool, state: CatalogueState) -> list[int]:
        """Rows of what a user did before the newest events, and of what was merely touched."""
        ids = {event.item for event in events[: -self.newest]}
        if older:
            ids |= self.store.items(user)
        users = self.artefact.users
        if users is not None:
            if len(events) >= self.newest and (row := users.row(user)):  # else all fitted ones are among the events
                fitted = users.rows[users.indptr[row - 1] : users.indptr[row]].tolist()
                ids.update(self.artefact.ids[item] for item in set(fitted))
            ids.update(users.touched(user))
        return [state.rows[id_] for id_ in ids if id_ in state.rows]

    def read(self, requests: Sequence[Request], state: CatalogueState) -> list[Interest]:
        """The interest of each request: one pass through the user tower for all of them.

        Args:
            requests: checked requests.
            state: the catalogue.
        """
        asked = [place for place, request in enumerate(requests) if request.history is None and request.user]
        read = self._known([str(requests[place].user) for place in asked], self.newest) if asked else []
        known = dict(zip(asked, read, strict=True))
        found: list[Interest] = []
        times: list[list[int] | None] = []
        for place, request in enumerate(requests):
            whole, older = known.get(place, (None, False))
            events = None if whole is None else whole[-self.newest :]
            ids = list(request.history) if request.history is not None else [event.item for event in events or []]
            stamps = [event.time or 0 for event in events] if events is not None else request.times
            rows = [state.rows.get(id_, 0) for id_ in ids]
            kept = [number for number, row in enumerate(rows) if row or self.reads_unknown]
            touched = [rows[number] for number in kept]
            history = touched[-self.artefact.manifest.max_history :]
            # as in training: the newest events, whether or not the tower's history reaches back so far
            titled = touched[-self._titles :] if self._titles > 0 else []
            stamped = None if stamps is None else [stamps[number] for number in kept][len(kept) - len(history) :]
            unknown = [id_ for id_, row in zip(ids, rows, strict=True) if not row]
            seen = [row for row in touched if row]
            if whole is not None:
                seen += self._seen_before(str(request.user), whole, older, state)
            found.append(Interest("towers", None, seen, history, titled, unknown, self._repeat))
            times.append(stamped)
        self._encode(requests, found, times, state)
        return found

    def _encode(
        self,
        requests: Sequence[Request],
        found: list[Interest],
        times: list[list[int] | None],
        state: CatalogueState,
    ) -> None:
        """Fills in the interest vectors; those that the towers cannot tell become popularity."""
        raw = state.raw
        texts = [
            (self.artefact.clean(request.text) or None) if request.text and not any(interest.history) else None
            for request, interest in zip(requests, found, strict=True)
        ]
        spoken = [place for place, text in enumerate(texts) if text]
        position: dict[int, int] | None = None  # of a row in a table of the rows in use; None: the whole catalogue
        own = [] if self.artefact.reads_user_text else spoken
        lacking = any(not row for interest in found for row in interest.history)
        if own or lacking:
            used = sorted({row for interest in found for row in interest.history if row})
            position = {row: number for number, row in enumerate(used, start=1)}
            parts = [raw[:1], raw[torch.tensor(used, dtype=torch.int64)]]
            if own:  # what someone says is read as an item would be, and is then the whole history
                parts.append(self.artefact.encode_texts([str(texts[place]) for place in own]).to(raw.dtype))
            for number, place in enumerate(own, start=len(used) + 1):
                found[place].history = [-number]
                times[place] = None
            if lacking and self.artefact.unknown is not None:
                position[0] = len(used) + len(own) + 1
                parts.append(self.artefact.unknown[None].to(raw.dtype))
            raw = torch.cat(parts)
        users = self._batch(requests, found, times, texts, state, position)
        known = self.artefact.knows(users)
        known &= (users.lengths > 0) | torch.tensor([bool(text) for text in users.texts or texts]) | self._has_id(users)
        with one_thread(users.history.numel() <= _FEW_STEPS and not self.artefact.reads_user_text):
            vectors = self.artefact.interests(users, raw)
        for place, request in enumerate(requests):
            interest = found[place]
            length = max(int(users.lengths[place]), 1)
            steps = vectors[place, :length] if vectors.shape[1] > 1 else vectors[place]
            vector = _decayed(steps, times[place], request.half_life)
            if not bool(known[place]) or not bool(torch.isfinite(vector).all()):
                found[place] = replace(interest, path="popularity", history=[])
                continue
            interest.vector = vector
            interest.path = "text" if place in spoken else "towers"

    def _has_id(self, users: UserBatch) -> Tensor:
        return users.users > 0

    def _batch(
        self,
        requests: Sequence[Request],
        found: list[Interest],
        times: list[list[int] | None],
        texts: list[str | None],
        state: CatalogueState,
        position: dict[int, int] | None,
    ) -> UserBatch:
        lengths = torch.tensor([len(interest.history) for interest in found])
        width = max(int(lengths.max()) if len(found) else 0, 1)
        history = torch.zeros(len(found), width, dtype=torch.int64)
        stamps = torch.zeros(len(found), width, dtype=torch.int64)
        for place, interest in enumerate(found):
            length = len(interest.history)
            rows = interest.history
            if position is not None:
                rows = [-row if row < 0 else position[row] for row in rows]
            history[place, :length] = torch.tensor(rows, dtype=torch.int64)
            moments = times[place]
            if moments is not None:
                stamps[place, :length] = torch.tensor(moments, dtype=torch.int64)
        stored = self.artefact.users
        numbers = [0 if stored is None or not request.user else stored.tower_row(request.user) for request in requests]
        user_texts = None
        if self.artefact.reads_user_text:
            user_texts = [
                text or self.artefact.user_text([self._title(state, row) for row in interest.titled], request.user)
                for text, interest, request in zip(texts, found, requests, strict=True)
            ]
        return UserBatch(history=history, lengths=lengths, users=torch.tensor(numbers), times=stamps, texts=user_texts)

    def _title(self, state: CatalogueState, row: int) -> str:
        # from what the state knows at this moment, so that items that were added or changed are named as they are now
        fields = {name: state.attributes[name][row] for name in TITLE_FIELDS if name in state.attributes}
        return self.artefact.item_title(fields, state.texts[row])


def _merged(fitted: list[Event], stored: list[Event], until: int | None) -> list[Event]:
    """One history, oldest first, each event once where that can be told.

    Where both have times, an event of both is one, and fitted events come first of those at the same time. Where fitted
    ones have none, a stored event is taken to be in the log if its item is there and the log ends no earlier.
    """
    both = [*fitted, *stored]
    if not fitted or not stored or any(event.time is None for event in stored):
        return both
    if any(event.time is None for event in fitted):
        known = {event.item for event in fitted} if until is not None else set()
        return [*fitted, *(event for event in stored if event.item not in known or (event.time or 0) > (until or 0))]
    same = {(event.item, event.time) for event in fitted}
    fresh = [event for event in stored if (event.item, event.time) not in same]
    return sorted([*fitted, *fresh], key=lambda event: event.time or 0)


def _decayed(steps: Tensor, times: Sequence[int] | None, half_life: float | None) -> Tensor:
    """One interest vector from those after each event: the newest, or their mean with older events fading."""
    if half_life is None or times is None or len(steps) != len(times):
        return steps[-1]
    # in double precision, where the shortest half-life is more than 0: the newest event has the weight 1
    ages = torch.tensor([times[-1] - time for time in times], dtype=torch.float64).clamp_min(0)
    weights = torch.exp2(-ages / half_life)
    return (weights / weights.sum()).to(steps.dtype) @ steps
