"""What goes into a recommender and what comes out: requests, answers, explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

AnswerPath = Literal["towers", "text", "popularity"]
Explore = Literal["none", "ucb", "thompson"]
IndexName = Literal["exact", "hnsw", "ivfpq"]
VectorType = Literal["float32", "float16", "int8"]
Words = Literal["none", "occlusion", "gradients"]


@dataclass(frozen=True)
class Event:
    """One thing that a user did.

    Attributes:
        item: raw item id. An id that the catalogue lacks is kept, and counts once it is added.
        time: seconds since 1970; None: now, or in the order given.
        id: what makes the event one and the same when it is sent twice; None: every event is new.
    """

    item: str
    time: int | None = None
    id: str | None = None


@dataclass
class Request:
    """One question. Who asks is told by ``user``, by ``history`` or by ``text``; the first that is given counts most.

    Attributes:
        user: raw user id: the history is what the recommender knows of that user.
        history: raw item ids, oldest first, in the place of the known history.
        times: time of each event of ``history`` in seconds since 1970, or None.
        text: what someone without a history likes, in plain words.
        k: number of items wanted, at least 1.
        filter_seen: leave out what the history holds; None: as the fitted run was tested. A run of impressions ranks
            ``candidates`` as they are, and leaves seen items out of answers from the whole catalogue.
        candidates: raw ids to choose from; None: the whole catalogue.
        exclude: raw ids that must not come.
        where: attributes that must match: a value or a list of allowed values for each field.
        at_most: at most so many items with the same value of a field, such as ``{"brand": 2}``.
        diversity: 0 ranks by score alone, 1 by difference alone (maximal marginal relevance).
        explore: ``ucb`` adds an upper confidence bound, ``thompson`` a random draw, over the last layer.
        exploration: how strongly; 0 is no exploration.
        half_life: seconds after which an event counts half; None: all events count as the user tower has it. Refused
            where the user tower has one vector for a whole history.
        seed: of a Thompson draw; None: a new draw each time.
    """

    user: str | None = None
    history: Sequence[str] | None = None
    times: Sequence[int] | None = None
    text: str | None = None
    k: int = 10
    filter_seen: bool | None = None
    candidates: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    diversity: float = 0.0
    explore: Explore = "none"
    exploration: float = 1.0
    half_life: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Recommended:
    """One item of an answer.

    Attributes:
        id: raw item id.
        score: the dot product of interest and item vector, and what age and recent clicks add where the run learned
            that (for ``popularity``, the number of training interactions); with exploration or diversity still the
            plain score.
        text: what a person reads for it: its title, else the beginning of its text.
    """

    id: str
    score: float
    text: str


@dataclass
class Answer:
    """The answer to one request; every request gets one, in order.

    Attributes:
        items: best first; may be fewer than ``k``, or none, when nothing else is left.
        path: what answered: ``towers`` (a history), ``text`` (words, through the item tower) or ``popularity``.
        generation: number of the catalogue that answered; it grows with every change of the items.
        unknown: ids of the request that the catalogue lacks.
    """

    items: list[Recommended]
    path: AnswerPath
    generation: int = 0
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reason:
    """How much one item of the history moved a score, with all of its events.

    Attributes:
        id: raw id of the item of the history.
        text: its title.
        effect: the score with the whole history minus the score without any event of this item: exact, may be negative.
        place: the place of its newest event in the history, 0 is the oldest event that the user tower read.
    """

    id: str
    text: str
    effect: float
    place: int


@dataclass(frozen=True)
class Word:
    """One word of a text and how much it moved a score (may be negative)."""

    text: str
    effect: float


@dataclass
class Explanation:
    """Why an item has its score.

    Attributes:
        item: raw id of the item.
        text: its title.
        score: its score for the user.
        reasons: items of the history, the strongest effect first.
        words: words of the item's text in their order, empty where no text tower is at hand or none was asked for.
        sentence: the same in plain words.
    """

    item: str
    text: str
    score: float
    reasons: list[Reason]
    words: list[Word] = field(default_factory=list)
    sentence: str = ""


class RequestError(ValueError):
    """A request that cannot be answered as it is.

    Attributes:
        code: a short name that programs may test, such as ``unknown_item``.
        remedy: what to do about it.
    """

    def __init__(self, message: str, code: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.code = code
        self.remedy = remedy
