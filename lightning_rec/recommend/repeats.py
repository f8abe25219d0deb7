"""What a run learned about repeats, in answers: see ``lightning_rec.towers.score.Score``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rec.recommend.catalogue_state import CatalogueState
from lightning_rec.recommend.index import Index, highest
from lightning_rec.recommend.interests import Interest


def repeat_bonus(interest: Interest, rows: Tensor) -> Tensor | float:
    """``(n,)`` what is added to the scores of rows since they are in the history that the user tower read."""
    if not interest.repeat or interest.vector is None:
        return 0.0
    history = torch.tensor([row for row in interest.history if row > 0], dtype=torch.int64)
    return torch.isin(rows, history) * interest.repeat


def search(
    index: Index, interests: Sequence[Interest], k: int, excluded: Sequence[Tensor], state: CatalogueState
) -> tuple[Tensor, Tensor]:
    """The best items of users whom the towers know: :meth:`Index.search`, and what repeats add.

    The items of a history are left out of the search and scored beside it, so that a list is as exact as the index.

    Args:
        index: finds the largest dot products.
        interests: interests with vectors.
        k: how many.
        excluded: for each user the rows that must not come.
        state: the catalogue.
    """
    vectors = torch.stack([interest.vector for interest in interests if interest.vector is not None])
    if not any(interest.repeat for interest in interests):
        return index.search(vectors, k, excluded if any(len(rows) for rows in excluded) else None)
    again = [_again(interest, rows, state) for interest, rows in zip(interests, excluded, strict=True)]
    left_out = [torch.cat([rows, more]) for rows, more in zip(excluded, again, strict=True)]
    scores, rows = index.search(vectors, k, left_out if any(len(part) for part in left_out) else None)
    width = max((len(part) for part in again), default=0)
    if not width:
        return scores, rows
    more_rows = torch.zeros(len(interests), width, dtype=torch.int64)
    more = torch.full((len(interests), width), -torch.inf, dtype=scores.dtype)
    for place, part in enumerate(again):
        more_rows[place, : len(part)] = part
        more[place, : len(part)] = state.ready[part] @ vectors[place] + interests[place].repeat
    both, both_rows = torch.cat([scores, more], 1), torch.cat([rows, more_rows], 1)
    best, places = highest(both, min(k, both.shape[1]))
    return best, both_rows.gather(1, places).masked_fill(best == -torch.inf, 0)


def _again(interest: Interest, excluded: Tensor, state: CatalogueState) -> Tensor:
    """The rows of the history that may come, each once."""
    if not interest.repeat:
        return excluded[:0]
    rows = torch.tensor(sorted({row for row in interest.history if row > 0}), dtype=torch.int64)
    return rows[state.alive[rows] & ~torch.isin(rows, excluded)]
