"""Scores of impressions as files: tables with raw ids, and the submission format of MIND."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

COLUMNS = {
    "impression_id": pa.string(),
    "user_id": pa.string(),
    "rank": pa.int32(),
    "item_id": pa.string(),
    "score": pa.float32(),
    "source": pa.string(),
}


def without_padding(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of ``predict_step``, on the CPU, with its candidates one after the other instead of padded.

    Args:
        outputs: ``index`` ``(b,)``, ``sizes`` ``(b,)``, ``rows`` ``(b, c)``, ``scores`` ``(b, c)``, ``fallback``
            ``(b,)``.

    Returns:
        The same with ``rows`` and ``scores`` of ``(sum of sizes,)``.
    """
    found = {name: value.cpu() for name, value in outputs.items()}
    real = torch.arange(found["rows"].shape[1]) < found["sizes"][:, None]
    return found | {"rows": found["rows"][real], "scores": found["scores"][real]}


class Ranked:
    """Scored impressions in the order of the files.

    Args:
        found: what :func:`without_padding` returns, of any number of batches joined in any order.

    Attributes:
        index: ``(n,)`` number of each impression.
        owner: ``(m,)`` which of the ``n`` impressions each candidate belongs to.
        rows: ``(m,)`` catalogue rows of the candidates, as they were shown.
        scores: ``(m,)``.
        ranks: ``(m,)`` rank within the impression, 1 the best; of equal scores the first shown is the better.
        fallback: ``(n,)`` True where popularity answered.
        sizes: ``(n,)`` number of candidates.
    """

    def __init__(self, found: dict[str, Tensor]) -> None:
        index, sizes = (found[name].numpy().astype(np.int64) for name in ("index", "sizes"))
        order = np.argsort(index, kind="stable")
        ends = np.cumsum(sizes)
        self.index, self.sizes = index[order], sizes[order]
        self.fallback = found["fallback"].numpy()[order]
        self.owner = np.repeat(np.arange(len(order)), self.sizes)
        self.starts = np.cumsum(self.sizes) - self.sizes
        place = np.arange(len(self.owner)) - self.starts[self.owner] + (ends - sizes)[order][self.owner]
        self.rows, self.scores = found["rows"].numpy()[place], found["scores"].numpy()[place]
        best = np.lexsort((np.arange(len(place)), -self.scores, self.owner))
        self.ranks: NDArray[np.int64] = np.empty(len(place), dtype=np.int64)
        self.ranks[best] = np.arange(len(place)) - self.starts[self.owner] + 1


def impression_table(
    found: dict[str, Tensor], impressions: Sequence[str], users: Sequence[str], item_ids: Sequence[str]
) -> pa.Table:
    """Scored candidates as a table with raw ids: the impressions in order, the best candidate of each first.

    Args:
        found: see :class:`Ranked`; empty when nothing was asked.
        impressions: raw id of each impression, in the order of the files.
        users: raw id of the user of each impression.
        item_ids: raw id of each catalogue row.
    """
    if not found:
        return pa.table({name: pa.array([], kind) for name, kind in COLUMNS.items()}, schema=pa.schema(COLUMNS))
    ranked = Ranked(found)
    best = np.lexsort((ranked.ranks, ranked.owner))
    owner = ranked.owner[best]
    numbers = pa.array(ranked.index[owner])
    return pa.table(
        {
            "impression_id": pa.array(impressions, pa.string()).take(numbers),
            "user_id": pa.array(users, pa.string()).take(numbers),
            "rank": pa.array(ranked.ranks[best].astype(np.int32)),
            "item_id": pa.array(item_ids, pa.string()).take(pa.array(ranked.rows[best])),
            "score": pa.array(ranked.scores[best].astype(np.float32)),
            "source": pa.array(["towers", "popularity"]).take(pa.array(ranked.fallback[owner].astype(np.int64))),
        }
    )


def submission(found: dict[str, Tensor], impressions: Sequence[str]) -> Iterable[str]:
    """Lines of MIND's ``prediction.txt``: impression id, and the rank of each candidate in the order of the file.

    Args:
        found: see :class:`Ranked`; empty when nothing was asked.
        impressions: raw id of each impression, in the order of the files.
    """
    if not found:
        return
    ranked = Ranked(found)
    for number, first, size in zip(ranked.index, ranked.starts, ranked.sizes, strict=True):
        yield f"{impressions[number]} [{','.join(map(str, ranked.ranks[first : first + size]))}]\n"


def write_submission(lines: Iterable[str], path: Path) -> None:
    """Writes ``prediction.txt`` in one piece: to a temporary file beside ``path``, which then takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    temporary.replace(path)
