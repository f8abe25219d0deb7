"""Views of an article other than its text, and how the values of the item table's fields are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.towers.attention import AdditiveAttention
from lightning_rec.towers.tokens import TokenTable
from lightning_rec.towers.vocabulary import NamedVectors


class NameView(nn.Module):
    """Names, such as the categories or the entities of an article, as one vector.

    Args:
        table: the vectors of the names.
        dim: width of what is returned.
        pooling: how the vectors of several names become one.
        hidden: width of the additive attention.
        most: names beyond so many are left out.
        dropout: share of the features dropped in training.
    """

    def __init__(
        self,
        table: NamedVectors,
        dim: int,
        pooling: Literal["mean", "attention"],
        hidden: int,
        most: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.table = table
        self.most = most
        self.dropout = dropout
        self.pool = AdditiveAttention(table.width, hidden) if pooling == "attention" else None
        self.projection = nn.Linear(table.width, dim)

    def read(self, values: Sequence[Any]) -> TokenTable:
        """The rows of names; a name that is not in the table is left out."""
        known = self.table.rows
        rows, offsets = [], [0]
        for value in values:
            found = [known[name] for name in names_of(value) if name in known]
            rows += found[: self.most] or [0]
            offsets.append(len(rows))
        return TokenTable(torch.tensor(rows, dtype=torch.int32), torch.tensor(offsets), 0)

    def forward(self, names: TokenTable, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(k, dim)`` vectors, and ``(k,)`` True where an article has a name."""
        ids, _ = names.padded(rows)
        mask = ids > 0
        x = self.table(ids)
        x = self.pool(x, mask) if self.pool is not None else x.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return self.projection(F.dropout(x, self.dropout, self.training)), mask.any(1)


def text_of(value: Any) -> str:
    """A field's value as text."""
    if isinstance(value, str):
        return value.strip()
    return " ".join(part.strip() for part in value if part) if value else ""


def names_of(value: Any) -> list[str]:
    """A field's value as names, each once."""
    parts = [value] if isinstance(value, str) else value or ()
    return list(dict.fromkeys(name for name in (part.strip() for part in parts if part) if name))


def ragged(table: TokenTable) -> list[tuple[int, ...]]:
    """The rows of each text of a table."""
    rows, offsets = table.tokens.tolist(), table.offsets.tolist()
    return [tuple(rows[start:end]) for start, end in pairwise(offsets)]
