"""LiGR blocks, beside the attention block of ``sequence.py``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.towers.sequence import CausalBlock, dropout


class LigrBlock(CausalBlock):
    """Self-attention that looks back only and a SwiGLU feed-forward network, each behind a gate that reads the input.

    LiGR (Borisyuk et al., "From Features to Transformers: Redefining Ranking for Scalable Impact", 2025,
    arXiv:2502.03417), the block of eSASRec (arXiv:2508.06450). Either part ``F`` works as
    ``x + F(norm(x)) * sigmoid(W x + b)``: a block can close itself, feature by feature. The feed-forward network is
    ``W_2 (silu(W_1 x) * W_3 x)`` (Shazeer, "GLU Variants Improve Transformer", 2020).

    Args:
        dim: width ``d``.
        heads: number of attention heads; must divide ``dim``.
        feed_forward: width of the hidden layer.
        dropout: share of the outputs of both parts, and of the hidden layer, that is dropped in training.
        attention_dropout: share of the attention weights that is dropped.
    """

    def __init__(self, dim: int, heads: int, feed_forward: int, dropout: float, attention_dropout: float) -> None:
        super().__init__(dim, heads, feed_forward, dropout, attention_dropout, activation="silu", norm_first=True)
        self.multiply = nn.Linear(dim, feed_forward)
        self.attention_gate = nn.Linear(dim, dim)
        self.feed_forward_gate = nn.Linear(dim, dim)

    def _feed(self, x: Tensor) -> Tensor:
        hidden = dropout(F.silu(self.expand(x)) * self.multiply(x), self.dropout, self.training)
        return dropout(self.contract(hidden), self.dropout, self.training)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(b, t, d)`` to ``(b, t, d)``: see :class:`CausalBlock`."""
        x = x + self._attend(self.attention_norm(x), bias) * self.attention_gate(x).sigmoid()
        return x + self._feed(self.feed_forward_norm(x)) * self.feed_forward_gate(x).sigmoid()
