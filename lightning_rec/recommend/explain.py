"""Why an item has its score: which items of the history moved it, and which words.

The effect of an item of the history is the score with the whole history minus the score without that item. Nothing is
estimated: the user tower reads every shortened history (leave-one-out, as in Tintarev and Masthoff's survey,
Recommender Systems Handbook, 2015, on explanations that name items of the user's own).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lightning_rec.recommend.catalogue_state import CatalogueState
from lightning_rec.recommend.interests import READ_EVENTS, Interest
from lightning_rec.recommend.repeats import repeat_bonus
from lightning_rec.recommend.sentences import Sentences
from lightning_rec.recommend.types import Explanation, Reason, Request, Word, Words

if TYPE_CHECKING:
    from lightning_rec.recommend.recommender import Recommender


@torch.inference_mode()
def explain(
    recommender: Recommender,
    request: Request,
    item: str,
    words: Words = "none",
    sentences: Sentences | None = None,
) -> Explanation:
    """Why an item has its score for who asks.

    Args:
        recommender: what answers.
        request: who asks; how many and which items are wanted plays no part.
        item: raw id of the item.
        words: weigh the words of the item's text by leaving each out (``occlusion``), or by integrated ``gradients``
            (needs the extra ``explain``).
        sentences: how it is said; None: in plain English.

    Returns:
        The score, a reason for each of the items of the history that the user tower read (strongest effect first,
        whatever its sign), words in their order, and a sentence.

    Raises:
        RequestError: an unknown item, a request that does not fit, or words without a text tower.
    """
    state = recommender.state
    row = state.row(item)
    recommender.check(request)
    interest = recommender.interests.read([request], state)[0]
    score = _score(interest, state, row)
    reasons = [] if interest.path != "towers" else _reasons(recommender, request, state, row, score)
    weighed: list[Word] = []
    if words != "none" and interest.vector is not None:
        from lightning_rec.recommend.words import weigh_words

        weighed = weigh_words(recommender.artefact, state.texts[row], interest.vector, words)
    sentence = (sentences or Sentences()).say(state.display[row], interest.path, reasons, int(state.counts[row]))
    return Explanation(item, state.display[row], score, reasons, weighed, sentence)


def _score(interest: Interest, state: CatalogueState, row: int) -> float:
    if interest.vector is None:
        return float(state.counts[row])
    return float(state.ready[row] @ interest.vector + repeat_bonus(interest, torch.tensor(row)))


def _reasons(recommender: Recommender, request: Request, state: CatalogueState, row: int, score: float) -> list[Reason]:
    """The effect of every event that the user tower read."""
    ids, times = history_of(recommender, request)
    known = [place for place, id_ in enumerate(ids) if id_ in state.rows]
    places = known[-recommender.artefact.manifest.max_history :]
    shortened = [
        replace(
            request,
            history=[*ids[:place], *ids[place + 1 :]],
            times=None if times is None else [*times[:place], *times[place + 1 :]],
        )
        for place in places
    ]
    found = recommender.interests.read(shortened, state)
    reasons = []
    for number, (place, interest) in enumerate(zip(places, found, strict=True)):
        # without its only event a user is unknown to the towers, and the dot product with nothing is nothing
        without = 0.0 if interest.vector is None else _score(interest, state, row)
        title = state.display[state.rows[ids[place]]]
        reasons.append(Reason(ids[place], title, score - without, number))
    return sorted(reasons, key=lambda reason: -abs(reason.effect))


def history_of(recommender: Recommender, request: Request) -> tuple[list[str], list[int] | None]:
    """The raw ids and times of the history that a request is answered from, oldest first."""
    if request.history is not None:
        return list(request.history), None if request.times is None else list(request.times)
    if not request.user:
        return [], None
    newest = max(recommender.artefact.manifest.max_history, READ_EVENTS)
    events = recommender.interests.histories([request.user], newest)[0]
    return [event.item for event in events], [event.time or 0 for event in events]
