"""One vector a text from one vector a token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "cls", "last"]


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One vector a text from one vector a token.

    Args:
        hidden: ``(k, l, h)`` the model's last hidden states.
        mask: ``(k, l)`` 1 for a token, 0 for padding on either side; None when there is no padding.
        pooling: ``mean`` over the tokens, their first (``cls``) or their ``last``.

    Returns:
        ``(k, h)`` float32 vectors.
    """
    if pooling == "mean":
        if mask is None:
            return hidden.float().mean(1)
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
    if mask is None:
        return hidden[:, 0 if pooling == "cls" else -1].float()
    steps = torch.arange(mask.shape[1], device=mask.device)
    place = mask.argmax(1) if pooling == "cls" else (steps * mask).argmax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), place].float()


def padded_right(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(k, l)`` tokens and their mask with the padding that was on the left behind the tokens."""
    length = mask.shape[1]
    if not length:
        return tokens, mask
    places = (torch.arange(length, device=mask.device) + mask.argmax(1, keepdim=True)) % length
    return tokens.gather(1, places), mask.gather(1, places)
