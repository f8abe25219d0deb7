"""Tables of vectors with a name each (words, categories, entities), whose names travel in the checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_rec.towers.vector_files import read_vectors


class NamedVectors(nn.Module):
    """One vector a name. Row 0 is for what has no name here: it is zero and stays so.

    A table is as large as the data has names. One that is made without data is empty, and takes names and size from the
    checkpoint that is loaded; so does one that was made of other data, since the checkpoint's vectors are the trained
    ones.

    Args:
        names: distinct names, in the order of the rows from 1.
        vectors: ``(len(names) + 1, width)`` their first vectors, row 0 zero.
        tuned: train the vectors. Those that are not trained are part of the checkpoint as well.
    """

    vectors: Tensor
    letters: Tensor

    def __init__(self, names: Sequence[str], vectors: Tensor, tuned: bool = True) -> None:
        super().__init__()
        if tuned:
            self.vectors = nn.Parameter(vectors)
        else:
            # A buffer, for a checkpoint leaves frozen parameters out.
            self.register_buffer("vectors", vectors)
        # Text as bytes, since a checkpoint and an export hold tensors.
        self.register_buffer("letters", _pack(names))
        self._rows: dict[str, int] | None = None

    @property
    def width(self) -> int:
        """Width of a vector."""
        return self.vectors.shape[1]

    @property
    def rows(self) -> dict[str, int]:
        """Name -> row."""
        if self._rows is None:
            self._rows = {name: row for row, name in enumerate(_unpack(self.letters), start=1)}
        return self._rows

    def __len__(self) -> int:
        return self.vectors.shape[0] - 1

    def forward(self, rows: Tensor) -> Tensor:
        """``(..., width)`` vectors of ``(...)`` rows."""
        return F.embedding(rows, self.vectors, padding_idx=0)

    @torch.no_grad()
    def take(self, letters: Tensor, vectors: Tensor) -> int:
        """Takes the vectors of names that another table has too, and keeps its own names.

        Args:
            letters: the other table's names.
            vectors: its vectors, of the same width.

        Returns:
            The number of names that both have.
        """
        shared = [(own, row) for row, name in enumerate(_unpack(letters), 1) if (own := self.rows.get(name))]
        if shared:
            own, other = torch.tensor(shared).T
            self.vectors[own.to(self.vectors.device)] = vectors[other].to(self.vectors)
        return len(shared)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        letters, vectors = state.get(f"{prefix}letters"), state.get(f"{prefix}vectors")
        if letters is not None and letters.shape != self.letters.shape:
            self.letters = torch.zeros_like(letters, device=self.letters.device)
        if vectors is not None and vectors.ndim == 2 and vectors.shape[0] != self.vectors.shape[0]:
            # A vector of another width is left to torch, which refuses it.
            resized = self.vectors.new_zeros(vectors.shape[0], self.width)
            self.vectors = nn.Parameter(resized) if isinstance(self.vectors, nn.Parameter) else resized
        self._rows = None
        super()._load_from_state_dict(state, prefix, *others)


def _pack(names: Sequence[str]) -> Tensor:
    """Names as bytes: a zero byte ends each."""
    if any("\0" in name for name in names):
        raise ValueError("A name in a vocabulary must not hold a zero byte: clean the field of the item table.")
    text = "".join(f"{name}\0" for name in names).encode("utf-8", "surrogatepass")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)


def _unpack(letters: Tensor) -> list[str]:
    return bytes(letters.cpu().numpy()).decode("utf-8", "surrogatepass").split("\0")[:-1]


def frequent(counts: Counter[str], min_count: int = 1, most: int | None = None) -> list[str]:
    """Names by how frequent they are, then by spelling: the order does not depend on that of the data."""
    kept = [name for name, count in counts.items() if count >= min_count]
    return sorted(kept, key=lambda name: (-counts[name], name))[:most]


def named_vectors(
    counts: Counter[str],
    width: int,
    *,
    std: float,
    min_count: int = 1,
    most: int | None = None,
    files: Sequence[str] | None = None,
    tuned: bool = True,
    what: str = "names",
    option: str = "dim",
    lower: bool = False,
    unit: bool = False,
) -> NamedVectors:
    """A table for what the data holds.

    Args:
        counts: how frequent each name is; empty without data, and then no file is looked at.
        width: width of a vector.
        std: standard deviation of vectors that no file gives; with 0, what was never trained says nothing.
        min_count: names that are less frequent are left out.
        most: so many names at most, the most frequent ones.
        files: ready-made vectors, see :func:`read_vectors`; the first file that has a name counts.
        tuned: train the vectors. Frozen, names that the file does not have are left out.
        what: what the names are, for the report.
        option: the option that sets the width, for errors.
        lower: a lower-case name may stand in the file in capitals.
        unit: bring the numbers of the file to a root mean square of 1.
    """
    names = frequent(counts, min_count, most)
    found: dict[str, NDArray[np.float32]] = {}
    if files and names:
        for file in files:
            found = read_vectors(file, names, width, option, lower) | found
        _report(what, names, found, counts, files)
        if not tuned:
            names = [name for name in names if name in found]
    vectors = torch.empty(len(names) + 1, width).normal_(std=std)
    vectors[0] = 0
    given = [row for row, name in enumerate(names, start=1) if name in found]
    if given:
        ready = torch.from_numpy(np.stack([found[names[row - 1]] for row in given]))
        scale = ready.square().mean().sqrt().clamp_min(1e-6) if unit else 1.0
        vectors[given] = ready / scale
    return NamedVectors(names, vectors, tuned)


def _report(what: str, names: Sequence[str], found: Iterable[str], counts: Counter[str], files: Sequence[str]) -> None:
    held = set(found)
    share = 100 * len(held) / len(names)
    mass = 100 * sum(counts[name] for name in held) / sum(counts[name] for name in names)
    rank_zero_info(
        f"{' and '.join(files)} {'has' if len(files) == 1 else 'have'} {len(held):,} of the {len(names):,} {what} of "
        f"the catalogue ({share:.1f} %), which are "
        f"{mass:.1f} % of their occurrences."
    )
