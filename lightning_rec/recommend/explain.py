"""Why an item has its score: which items of the history moved it, and which words.

The effect of an item of the history is the score with the whole history minus the score without that item, that is
without any of its events. Nothing is estimated: the user tower reads every shortened history (leave-one-out, as in
Tintarev and Masthoff's survey, Recommender Systems Handbook, 2015, on explanations that name items of the user's own).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lightning_rec.recommend.catalogue_state import CatalogueState
from lightning_rec.recommend.interests import Interest
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
        The score, one reason for each item of the history that the user tower read, however often it occurs
        (strongest effect first, whatever its sign), words in their order, and a sentence.

    Raises:
        RequestError: an unknown item, a request that does not fit, or words without a text tower.
    """
    state = recommender.state.at(recommender.moment())
    row = state.row(item)
    recommender.check(request)
    interest = recommender.interests.read([request], state)[0]
    score = _score(interest, state, row)
    reasons = [] if interest.path != "towers" else _reasons(recommender, request, state, row, score)
    weighed: list[Word] = []
    if words != "none" and interest.vector is not None:
        from lightning_rec.recommend.words import weigh_fields, weigh_words

        if words == "occlusion" and recommender.artefact.field_reading is not None:
            fields = {name: column[row] for name, column in state.attributes.items()}
            weighed = weigh_fields(recommender.artefact, fields, interest.vector)
        else:
            weighed = weigh_words(recommender.artefact, state.texts[row], interest.vector, words)
    path = "profile" if interest.path == "towers" and not interest.history else interest.path
    sentence = (sentences or Sentences()).say(state.display[row], path, reasons, int(state.counts[row]))
    return Explanation(item, state.display[row], score, reasons, weighed, sentence)


def _score(interest: Interest, state: CatalogueState, row: int) -> float:
    if interest.vector is None:
        return float(state.counts[row])
    place = torch.tensor(row)
    return float(state.scores(interest.vector, place) + repeat_bonus(interest, place))


def _reasons(recommender: Recommender, request: Request, state: CatalogueState, row: int, score: float) -> list[Reason]:
    """The effect of every item that the user tower read, with all of its events."""
    ids, times = history_of(recommender, request)
    # what the catalogue lacks has its place in the history where the run read it, but no name to be told by
    read = ids if recommender.interests.reads_unknown else [id_ for id_ in ids if id_ in state.rows]
    places = enumerate(read[-recommender.interests.reach :])
    newest = {id_: place for place, id_ in places if id_ in state.rows}
    # a tower that reads no text has nothing to say where the last event is left out
    text = request.text if recommender.interests.reads_text else None
    shortened = []
    for id_ in newest:
        rest = [place for place, other in enumerate(ids) if other != id_]
        moments = None if times is None else [times[place] for place in rest]
        shortened.append(replace(request, history=[ids[place] for place in rest], times=moments, text=text))
    if not shortened:  # someone known by a profile or a vector alone
        return []
    found = recommender.interests.read(shortened, state)
    reasons = []
    for (id_, place), interest in zip(newest.items(), found, strict=True):
        # without its only item a user is unknown to the towers, and the dot product with nothing is nothing
        nothing = 0.0 if state.added is None else float(state.added[row])
        without = nothing if interest.vector is None else _score(interest, state, row)
        reasons.append(Reason(id_, state.display[state.rows[id_]], score - without, place))
    return sorted(reasons, key=lambda reason: -abs(reason.effect))


def history_of(recommender: Recommender, request: Request) -> tuple[list[str], list[int] | None]:
    """The raw ids and times of the history that a request is answered from, oldest first."""
    if request.history is not None:
        return list(request.history), None if request.times is None else list(request.times)
    if not request.user:
        return [], None
    events = recommender.interests.histories([request.user], recommender.interests.newest)[0]
    return [event.item for event in events], [event.time or 0 for event in events]
