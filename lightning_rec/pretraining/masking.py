"""What a language model is asked for: masked tokens, or the next one. Pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rec.towers.tokens import TokenTable


@dataclass(frozen=True)
class MaskVocabulary:
    """The tokens that masking may touch and write.

    Attributes:
        special: ``(v,)`` True for special tokens, which are never masked, never drawn and never asked for.
        words: ``(w,)`` int64 ids of all others.
        mask_id: the mask token.
    """

    special: Tensor
    words: Tensor
    mask_id: int

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> MaskVocabulary:
        """Reads a tokenizer.

        Args:
            tokenizer: of transformers.
            size: rows of the model's table of tokens.

        Raises:
            ValueError: it has no mask token that the model knows.
        """
        if tokenizer.mask_token_id is None or tokenizer.mask_token_id >= size:
            raise ValueError(
                "objective: masked needs a mask token with a row in the model's table, and this tokenizer has none: "
                "name another language_model, or use lightning_rec.pretraining.ContrastiveItems."
            )
        special = torch.zeros(size, dtype=torch.bool)
        special[[token for token in set(tokenizer.all_special_ids) if token < size]] = True
        words = torch.arange(min(len(tokenizer), size))
        return cls(special, words[~special[: len(words)]], int(tokenizer.mask_token_id))


def mask_tokens(
    ids: Tensor,
    mask: Tensor | None,
    vocabulary: MaskVocabulary,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses tokens to be found, and hides them as BERT does (Devlin et al., NAACL 2019).

    Of each text ``share`` of the tokens are chosen, rounded, at least one. Of these 80 % become the mask token, 10 %
    another token drawn from the whole vocabulary, and 10 % stay as they are. Special tokens and padding are left alone;
    a text that is nothing else has nothing to be found.

    Args:
        ids: ``(k, l)`` tokens.
        mask: ``(k, l)`` 1 for a token, 0 for padding; None when there is no padding.
        vocabulary: what may be touched.
        share: share of the tokens.
        generator: a generator on the CPU; None: torch's own.

    Returns:
        ``(k, l)`` tokens for the model to read, and ``(k, l)`` True where one is to be found.
    """
    device = ids.device
    words = vocabulary.words
    order = torch.rand(ids.shape, generator=generator).to(device)
    fate = torch.rand(ids.shape, generator=generator).to(device)
    other = words[torch.randint(len(words), ids.shape, generator=generator)].to(device)
    free = ~vocabulary.special.to(device)[ids]
    if mask is not None:
        free &= mask.bool()
    count = free.sum(1)
    wanted = torch.minimum((count * share).round().clamp_min(1), count)
    rank = order.masked_fill(~free, 2.0).argsort(1).argsort(1)
    chosen = rank < wanted[:, None]
    hidden = ids.masked_fill(chosen & (fate < 0.8), vocabulary.mask_id)
    return torch.where(chosen & (fate >= 0.9), other, hidden), chosen


def next_tokens(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token is to be found from those before it; padding is neither asked for nor asked.

    Args:
        ids: ``(k, l)`` tokens.
        mask: ``(k, l)`` 1 for a token, 0 for padding; None when there is no padding.

    Returns:
        ``(k, l)`` True at the places that say what comes next, and the ``(n,)`` tokens that do, in their order.
    """
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    asked = F.pad(there[:, :-1] & there[:, 1:], (0, 1))
    return asked, ids[:, 1:][asked[:, :-1]]


def packed(table: TokenTable, rows: Tensor, length: int, end: int | None) -> tuple[Tensor, Tensor | None]:
    """The texts of ``(b,)`` rows one after another, cut into blocks: no token is lost, and next to none is padding.

    Args:
        table: tokens of whole texts.
        rows: which, in which order.
        length: tokens of a block.
        end: a token that is put behind each text; None: nothing.

    Returns:
        ``(k, length)`` int64 tokens and the ``(k, length)`` mask, None when the last block is full. A single block is
        as long as it must be.
    """
    offsets = table.offsets
    pieces = [table.tokens[offsets[row] : offsets[row + 1]].long() for row in rows.tolist()]
    if end is not None:
        pieces = [F.pad(piece, (0, 1), value=end) for piece in pieces]
    flat = torch.cat(pieces)
    length = min(length, len(flat))
    missing = -len(flat) % length
    ids = F.pad(flat, (0, missing), value=table.pad_id).view(-1, length)
    if not missing:
        return ids, None
    mask = torch.ones_like(ids)
    mask[-1, length - missing :] = 0
    return ids, mask
