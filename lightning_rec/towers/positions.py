"""Positions of tokens: how many a language model has, and which a padded text takes."""

from __future__ import annotations

import inspect
from typing import Any

import peft
import torch
from torch import Tensor, nn

# Models that count positions from their padding token's id + 1; "roberta" in the name says so too.
_OFFSET = {"camembert", "mpnet", "longformer", "xmod", "ibert", "data2vec-text"}


def position_offset(config: Any) -> int:
    """The position of the first token: 0, or the padding token's id + 1 in RoBERTa and its kin."""
    kin = "roberta" in config.model_type or config.model_type in _OFFSET
    return (config.pad_token_id or 0) + 1 if kin else 0


def position_limit(config: Any) -> int | None:
    """The most tokens that a language model has positions for; None: it states no limit (T5 counts distances)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions - position_offset(config) if positions and positions > 0 else None


def position_options(model: nn.Module, config: Any, mask: Tensor | None) -> dict[str, Tensor]:
    """What a pass must be told so that positions count tokens, not places; nothing unless padding is on the left.

    Args:
        model: the language model, or peft's wrapper around it.
        config: its config.
        mask: ``(k, l)`` 1 for a token, 0 for padding.
    """
    if mask is None or bool(mask[:, 0].all()):
        return {}
    base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return {}  # it knows distances between places only, and those do not change
    counted = (mask.cumsum(1) - 1).clamp_min(0) + position_offset(config)
    if position_offset(config):
        counted = torch.where(mask.bool(), counted, counted.new_tensor(config.pad_token_id or 0))
    return {"position_ids": counted}
