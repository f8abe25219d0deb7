"""The recommender: questions in, answers out, from an exported artefact."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from lightning_rec.recommend.ann import interests_of_users
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.catalogue_state import CatalogueState, build_index
from lightning_rec.recommend.checks import check_request, is_plain
from lightning_rec.recommend.index import Index, highest
from lightning_rec.recommend.interests import Interest, InterestReader
from lightning_rec.recommend.live_catalogue import LiveCatalogue
from lightning_rec.recommend.repeats import repeat_bonus, search
from lightning_rec.recommend.rerank import Quota, diversify, matching, select
from lightning_rec.recommend.store import HistoryStore, MemoryStore
from lightning_rec.recommend.types import Answer, Event, Explanation, Recommended, Request


class Recommender(LiveCatalogue):
    """Answers requests from an artefact that ``lightning-rec export`` wrote.

    Every method may be called from several threads: a reader works on one state of the catalogue from beginning to end.

    Args:
        artefact: the opened folder.
        index: an empty index of the kind that is wanted; None: exact.
        store: where histories live; None: in memory. The users of the artefact are known whatever the store.
        now: the moment of every request, in seconds since 1970; None: the current time. It says something where
            candidates are limited to what is alive (``max_age``), and where the age or the recent clicks of an item
            add to its score.

    Example::

        recommender = Recommender.load("artefact")
        answer = recommender.recommend(Request(history=["B00A", "B00B"], k=5))
        print([item.text for item in answer.items])
    """

    def __init__(
        self,
        artefact: Artefact,
        index: Index | None = None,
        store: HistoryStore | None = None,
        now: int | None = None,
    ) -> None:
        super().__init__(artefact, now)
        self.store = store if store is not None else MemoryStore()
        self.interests = InterestReader(artefact, self.store)
        if index is not None and not index.exact and artefact.context is not None:
            warnings.warn(
                "The moment of a request adds to the scores of this artefact (model.age, model.popularity), which an "
                "approximate index does not know: the exact index answers.",
                stacklevel=2,
            )
        elif index is not None:
            index = index.measured_on(lambda: interests_of_users(artefact, self.interests, self._state))
            self._state = replace(self._state, index=build_index(index, self._state.ready, self._state.alive))
        if artefact.lives is not None:
            artefact.lives.check(self._state.alive, self.moment(now), artefact.folder)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        index: Index | None = None,
        store: HistoryStore | None = None,
        verify: bool = True,
        now: int | None = None,
    ) -> Recommender:
        """Opens an artefact.

        Args:
            folder: what ``lightning-rec export`` wrote.
            index: see the class.
            store: see the class.
            verify: check every file against the manifest's digests.
            now: see the class.

        Raises:
            ArtefactError: a file is missing, foreign or altered; it is named.
        """
        return cls(Artefact.read(folder, verify=verify), index, store, now)

    # ------------------------------------------------------------------ users

    def update(self, user: str, events: Sequence[Event]) -> int:
        """Adds events to a user's history; the next answer is made of them.

        Returns:
            How many were new: an event with an id that the user already has is the same event.
        """
        return self.store.append(user, events)

    def history(self, user: str, newest: int = 1000) -> list[Event]:
        """What is known of a user, oldest first: of the artefact and the store, see :class:`InterestReader`."""
        return self.interests.histories([user], newest)[0]

    def forget(self, user: str) -> int:
        """Forgets a user, also what the artefact says, until the process ends; says how many events went.

        The artefact's file is not changed: export again without the user to be rid of it for good.
        """
        kept = len(self.interests.exported(user, 10**9))
        if self.artefact.users is not None:
            self.artefact.users.forget(user)
        return self.store.delete(user) + kept

    def users(self, limit: int) -> list[str]:
        """Up to ``limit`` users with a history."""
        users = list(dict.fromkeys(self.store.users(limit)))
        if self.artefact.users is not None and len(users) < limit:
            users = list(dict.fromkeys([*users, *self.artefact.users.sample(limit)]))
        return users[:limit]

    # ------------------------------------------------------------------ answers

    @overload
    def recommend(self, requests: Request, now: int | None = None) -> Answer: ...
    @overload
    def recommend(self, requests: Sequence[Request], now: int | None = None) -> list[Answer]: ...
    def recommend(self, requests: Request | Sequence[Request], now: int | None = None) -> Answer | list[Answer]:
        """Answers one request, or many with one matrix product; every request gets an answer, in order.

        Args:
            requests: one, or many.
            now: the moment of the requests, see the class; None: as there.

        Raises:
            RequestError: an option that does not fit. With many requests none is answered then: check each with
                :meth:`check` beforehand.
        """
        if isinstance(requests, Request):
            return self._answer([requests], now)[0]
        return self._answer(list(requests), now) if len(requests) else []

    def check(self, request: Request) -> None:
        """Refuses a request that cannot be answered.

        Raises:
            RequestError: naming the option and the remedy.
        """
        self._check(request, self._state)

    def _check(self, request: Request, state: CatalogueState) -> None:
        check_request(request, state.attributes)
        self.interests.check(request, state)

    @torch.inference_mode()
    def _answer(self, requests: list[Request], now: int | None) -> list[Answer]:
        state = self._state.at(self.moment(now))  # one catalogue for the whole batch
        for request in requests:
            self._check(request, state)
        interests = self.interests.read(requests, state)
        answers: list[Answer | None] = [None] * len(requests)
        for path in ("towers", "popularity"):
            plain = [
                place
                for place, interest in enumerate(interests)
                if is_plain(requests[place]) and (interest.path == "popularity") == (path == "popularity")
            ]
            if plain:
                self._answer_plain(requests, interests, plain, path == "popularity", state, answers)
        for place, request in enumerate(requests):
            if answers[place] is None:
                answers[place] = self._answer_one(request, interests[place], state)
        return [answer for answer in answers if answer is not None]

    def _answer_plain(
        self,
        requests: list[Request],
        interests: list[Interest],
        places: list[int],
        popular: bool,
        state: CatalogueState,
        answers: list[Answer | None],
    ) -> None:
        k = max(requests[place].k for place in places)
        excluded = [self._excluded(requests[place], interests[place], state) for place in places]
        if popular:
            ones = torch.ones(len(places), 1, dtype=torch.float64)
            scores, rows = state.popularity.search(ones, k, excluded)
        else:
            scores, rows = search(state.index, [interests[place] for place in places], k, excluded, state)
        for place, score, row in zip(places, scores.tolist(), rows.tolist(), strict=True):
            answers[place] = self._said(requests[place], interests[place], state, score, row)

    def _answer_one(self, request: Request, interest: Interest, state: CatalogueState) -> Answer:
        """An answer with filters, quotas, diversity or exploration: exact, over all items that are allowed."""
        allowed = state.alive.clone()
        if request.candidates is not None:
            chosen = torch.zeros_like(allowed)
            rows, unknown = state.living(request.candidates)
            chosen[torch.tensor(rows, dtype=torch.int64)] = True
            allowed &= chosen
            interest = replace(interest, unknown=[*interest.unknown, *unknown])
        if request.where:
            allowed &= matching(request.where, state.attributes, len(state))
        allowed[self._excluded(request, interest, state)] = False
        places = allowed.nonzero()[:, 0]
        if not len(places):
            return Answer([], interest.path, state.generation, interest.unknown)
        plain = self._scores(interest, state, places)
        wanted = plain if interest.vector is None else self._explored(request, interest, plain, state, places)
        quota = Quota(request.at_most, state.attributes)
        pool = len(places) if request.at_most else min(len(places), request.k)
        if request.diversity:
            pool = min(len(places), max(100, 10 * request.k))
        while True:
            best, order = highest(wanted[None], pool)
            rows = places[order[0]].tolist()
            if request.diversity:
                vectors = state.ready[places[order[0]]]
                chosen_places = diversify(best[0].float(), vectors, rows, quota, request.k, request.diversity)
            else:
                chosen_places = select(rows, quota, request.k)
            if len(chosen_places) == request.k or pool == len(places):
                break
            pool, quota = min(len(places), 4 * pool), Quota(request.at_most, state.attributes)
        taken = order[0][torch.tensor(chosen_places, dtype=torch.int64)]
        return self._said(request, interest, state, plain[taken].tolist(), places[taken].tolist())

    @staticmethod
    def _scores(interest: Interest, state: CatalogueState, rows: Tensor) -> Tensor:
        if interest.vector is None:
            return state.popularity.vectors[rows, 0]
        return state.scores(interest.vector, rows) + repeat_bonus(interest, rows)

    @staticmethod
    def _explored(request: Request, interest: Interest, plain: Tensor, state: CatalogueState, rows: Tensor) -> Tensor:
        if request.explore == "ucb":
            return plain + request.exploration * state.last_layer.deviation[rows]
        if request.explore == "thompson" and interest.vector is not None:
            drawn = state.last_layer.draw(interest.vector, request.exploration, request.seed)
            return state.scores(drawn, rows) + repeat_bonus(interest, rows)
        return plain

    def _excluded(self, request: Request, interest: Interest, state: CatalogueState) -> Tensor:
        filter_seen = self.artefact.filters_seen(request.candidates is not None)
        if request.filter_seen is not None:
            filter_seen = request.filter_seen
        rows = list(interest.seen) if filter_seen else []
        rows.extend(state.rows[id_] for id_ in request.exclude if id_ in state.rows)
        return torch.tensor(rows, dtype=torch.int64)

    @staticmethod
    def _said(
        request: Request, interest: Interest, state: CatalogueState, scores: list[float], rows: list[int]
    ) -> Answer:
        whole = interest.path == "popularity"
        items = [
            Recommended(state.ids[row], float(int(score)) if whole else score, state.display[row])
            for score, row in zip(scores[: request.k], rows[: request.k], strict=True)
            if row
        ]
        return Answer(items, interest.path, state.generation, interest.unknown)

    # ------------------------------------------------------------------ one item

    @torch.inference_mode()
    def score(self, request: Request, item_ids: Sequence[str]) -> Tensor:
        """``(len,)`` plain scores of items for a request: float32 dot products (and what the moment adds to them), or
        training counts for popularity.

        Raises:
            RequestError: an unknown item, or a request that does not fit.
        """
        state = self._state.at(self.moment())
        self._check(request, state)
        rows = torch.tensor([state.row(id_) for id_ in item_ids], dtype=torch.int64)
        return self._scores(self.interests.read([request], state)[0], state, rows).float()

    def explain(
        self, request: Request, item: str, words: Literal["none", "occlusion", "gradients"] = "none"
    ) -> Explanation:
        """Why an item has its score; see :mod:`lightning_rec.recommend.explain`.

        Args:
            request: who asks.
            item: raw id of the item.
            words: how words of the item's text are weighed, if at all.

        Raises:
            RequestError: an unknown item, or words without a text tower.
        """
        from lightning_rec.recommend.explain import explain

        return explain(self, request, item, words=words)
