"""Texts as ragged arrays of tokens, and batches of them that hold next to no padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rec.towers.state_cache import rows_of

_CHUNK = 2048


@dataclass
class TokenTable:
    """The tokens of ``n`` texts, one after another: no padding is stored.

    Attributes:
        tokens: ``(total,)`` int32 token ids.
        offsets: ``(n + 1,)`` int64: text ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``, never empty.
        pad_id: the token that fills a batch up.
        states: ``(total, h)`` what the frozen layers of a language model make of each token, perhaps mapped from the
            disk; None: not known.
    """

    tokens: Tensor
    offsets: Tensor
    pad_id: int
    states: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """``(n,)`` number of tokens of each text."""
        return self.offsets.diff()

    def to(self, device: torch.device) -> TokenTable:
        """The same table on another device."""
        return TokenTable(self.tokens.to(device), self.offsets.to(device), self.pad_id, self.states)

    def with_states(self, states: np.ndarray[Any, Any]) -> TokenTable:
        """The same table with states of its tokens."""
        return TokenTable(self.tokens, self.offsets, self.pad_id, states)

    def digest(self) -> str:
        """A hash of the tokens and of where texts begin."""
        parts = (self.tokens, self.offsets)
        return hashlib.sha256(b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts)).hexdigest()

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of ``(k,)`` rows lie.

        Returns:
            ``(k, l)`` int64 places in ``tokens``, and a ``(k, l)`` mask, False where a text has ended.
        """
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        steps = torch.arange(int(lengths.max()), device=rows.device)
        return (starts[:, None] + steps).clamp_max(self.tokens.shape[0] - 1), steps < lengths[:, None]

    def padded_states(self, rows: Tensor) -> Tensor | None:
        """``(k, l, h)`` float32 states of the batch that :meth:`padded` makes, or None where there are none."""
        return None if self.states is None else rows_of(self.states, self.places(rows)[0])

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The texts of ``(k,)`` rows as a right-padded batch.

        Returns:
            ``(k, l)`` int64 token ids, and the ``(k, l)`` int64 attention mask, or None when all have one length: a
            model without a mask takes a faster way through attention.
        """
        places, mask = self.places(rows)
        ids = self.tokens[places].long().masked_fill(~mask, self.pad_id)
        return ids, None if bool(mask.all()) else mask.long()


def tokenise(tokenizer: Any, texts: Sequence[str], max_tokens: int, pad_id: int) -> TokenTable:
    """Tokenises texts, each cut to ``max_tokens``, special tokens included. An empty text is a token too."""
    pieces: list[np.ndarray] = []
    lengths = np.zeros(len(texts) + 1, dtype=np.int64)
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        encoded = tokenizer(
            chunk, truncation=True, max_length=max_tokens, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        for index, ids in enumerate(encoded, start=start + 1):
            # A decoder's tokenizer makes nothing of an empty text, and a model cannot read a row of nothing.
            ids = ids or [pad_id]
            lengths[index] = len(ids)
            pieces.append(np.asarray(ids, dtype=np.int32))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    return TokenTable(torch.from_numpy(tokens), torch.from_numpy(lengths.cumsum()), pad_id)


def length_batches(lengths: Tensor, budget: int) -> Iterator[Tensor]:
    """Positions in batches of like length, longest first, of at most ``budget`` tokens with padding.

    Longest first shows at once whether memory suffices, and makes a progress bar's estimate pessimistic.

    Args:
        lengths: ``(n,)`` lengths.
        budget: most tokens of a batch; one text longer than that is a batch of its own.

    Yields:
        ``(k,)`` int64 positions, on the CPU; together a permutation of ``0 .. n - 1``.
    """
    lengths = lengths.cpu()
    order = torch.argsort(lengths, descending=True, stable=True)
    ordered = lengths[order].tolist()
    start = 0
    while start < len(ordered):
        size = max(1, budget // max(1, ordered[start]))
        yield order[start : start + size]
        start += size
