"""What the moment of a request adds to scores: how old an item is then, and how often it was clicked just before.

Runs of impressions may learn both (``model.age`` and ``model.popularity``). An artefact of such a run holds what they
learned, when each item was published or first shown, and the clicks of the log, so that a score is that of ``predict``
at the same moment. Of clicks after the export it knows nothing: another export does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from lightning_rec.data.impression_signals import Popularity, hours_since
from lightning_rec.recommend.index import Index, highest, mask
from lightning_rec.recommend.lazy_towers import instantiate
from lightning_rec.recommend.manifest import ArtefactError
from lightning_rec.towers.age import AgeBias, PopularityBias

#: The part of the manifest, and its file in the artefact.
CONTEXT, CONTEXT_FILE = "context", "context.safetensors"
_ELEMENTS = 2**25  # scores held at once: 128 MiB


@dataclass(frozen=True, eq=False)
class ScoreContext:
    """What is added to the scores of all rows at a moment.

    Attributes:
        age: what an age adds, or None.
        popularity: what recent clicks add, or None.
        born: ``(n,)`` float64 seconds since 1970 of the publication or the first showing; infinity where unknown.
        clicks: the clicks that are counted; None where the log has no times: ages and clicks are unknown then.
    """

    age: AgeBias | None
    popularity: PopularityBias | None
    born: NDArray[np.float64]
    clicks: Popularity | None

    @classmethod
    def read(cls, folder: Path, part: Mapping[str, Any]) -> ScoreContext:
        """Of an artefact.

        Args:
            folder: the artefact.
            part: what the manifest says of it.

        Raises:
            ArtefactError: a class that cannot be imported, or weights that do not fit it.
        """
        tensors = load_file(folder / CONTEXT_FILE)
        age = _bias(AgeBias, part["age"], tensors, "age")
        popularity = _bias(PopularityBias, part["popularity"], tensors, "popularity")
        clicks = None
        if part["timed"]:
            rows, times = tensors["click_rows"].numpy(), tensors["click_times"].numpy()
            clicks = Popularity(rows, times, float(part["half_life"]))
        return cls(age, popularity, tensors["born"].numpy(), clicks)

    @torch.inference_mode()
    def at(self, moment: int) -> Tensor:
        """``(n,)`` float32: what is added to the scores of requests at a moment, in seconds since 1970."""
        n = len(self.born)
        added = torch.zeros(n)
        unknown = np.full(n, np.nan, dtype=np.float32)
        if self.age is not None:
            ages = unknown if self.clicks is None else hours_since(self.born, moment)
            added += self.age(torch.from_numpy(ages))
        if self.popularity is not None:
            rows = np.arange(n)
            counts = unknown if self.clicks is None else self.clicks(rows, np.full(n, moment, dtype=np.int64))
            added += self.popularity(torch.from_numpy(counts))
        return added

    def with_born(self, moments: Mapping[int, int | None], n: int, first: ScoreContext) -> ScoreContext:
        """With other births; items that came later have no clicks.

        Args:
            moments: row -> seconds since 1970, None for what the row had at first.
            n: how many rows there are now.
            first: the context at first.
        """
        born = np.concatenate([self.born, np.full(n - len(self.born), np.inf)])
        for row, moment in moments.items():
            born[row] = first.born[row] if moment is None else moment
        return replace(self, born=born)


def _bias(kind: type[Any], spec: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], name: str) -> Any:
    if spec is None:
        return None
    bias = instantiate(kind, spec, f"{name} of the model")
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    try:
        bias.load_state_dict(state)
    except RuntimeError as error:
        raise ArtefactError(
            f"{CONTEXT_FILE} does not fit the {name} of the model, {spec['class_path']} ({error}). Export the run "
            "again."
        ) from error
    return bias.eval().requires_grad_(False)


class ContextIndex(Index):
    """One matrix product and what a moment adds to each item: nothing is missed.

    Of equal scores the lower row comes first.

    Args:
        vectors: ``(n, d)`` item vectors, row 0 padding.
        added: ``(n,)`` what is added to the scores of each row.
        dead: ``(n,)`` True where a row must never come, or None.
    """

    def __init__(self, vectors: Tensor, added: Tensor, dead: Tensor | None = None) -> None:
        self.vectors = vectors
        self.added = added
        self._offsets = added if dead is None else added.masked_fill(dead, -torch.inf)

    def build(self, vectors: Tensor, dead: Tensor | None = None) -> ContextIndex:
        """See :class:`Index`. The vectors are those of the same rows."""
        return ContextIndex(vectors, self.added, dead)

    @torch.inference_mode()
    def search(self, interest: Tensor, k: int, excluded: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Index`."""
        n = len(self.vectors)
        k = min(k, n - 1)
        size = max(1, _ELEMENTS // max(n, 1))
        scores, rows = [interest.new_zeros(0, k)], [torch.zeros(0, k, dtype=torch.int64)]
        for start in range(0, len(interest), size):
            some = torch.addmm(self._offsets, interest[start : start + size], self.vectors.t())
            mask(some, None if excluded is None else excluded[start : start + size])
            best, columns = highest(some, k)
            scores.append(best)
            rows.append(columns)
        return torch.cat(scores), torch.cat(rows)
