"""A lean causal self-attention block, the part of the sequence user tower that is pure torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "relu", "silu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class CausalBlock(nn.Module):
    """Self-attention that looks back only, then a feed-forward network, both residual.

    ``nn.MultiheadAttention`` is not used: it spends three matrix products on what one does, and with padding masks
    it leaves the fast kernels. Right-padded histories need no mask, since padding comes after everything real.

    Args:
        dim: width ``d``.
        heads: number of attention heads; must divide ``dim``.
        feed_forward: width of the hidden layer.
        dropout: share of the outputs of both parts that is dropped in training.
        attention_dropout: share of the attention weights that is dropped. Not 0 leaves the fused kernel on a CPU.
        activation: the non-linearity of the feed-forward network.
        norm_first: normalise before each part (stabler) or after each sum.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        feed_forward: int,
        dropout: float,
        attention_dropout: float,
        activation: Activation,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.activation = _ACTIVATIONS[activation]
        self.norm_first = norm_first
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, feed_forward)
        self.contract = nn.Linear(feed_forward, dim)

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.attention_dropout if self.training else 0.0
        if bias is None:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=rate)
        return dropout(self.out(mixed.transpose(1, 2).reshape(b, t, d)), self.dropout, self.training)

    def _feed(self, x: Tensor) -> Tensor:
        return dropout(self.contract(self.activation(self.expand(x))), self.dropout, self.training)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x: ``(b, t, d)`` vectors.
            bias: ``(b or 1, heads, t, t)`` what is added to the scores of attention, minus infinity for later steps;
                None: nothing, with the fast path for causal attention.

        Returns:
            ``(b, t, d)`` vectors: step ``i`` depends on steps ``0 .. i``.
        """
        if self.norm_first:
            x = x + self._attend(self.attention_norm(x), bias)
            return x + self._feed(self.feed_forward_norm(x))
        x = self.attention_norm(x + self._attend(x, bias))
        return self.feed_forward_norm(x + self._feed(x))


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """``F.dropout``, several times faster on a CPU.

    Torch draws one number of its generator for every element, which takes longer than the matrix products around it.
    Here one 64-bit draw serves four elements, so that ``rate`` is rounded to a multiple of 1/65536. The draws come from
    torch's global generator, as usual.
    """
    if not training or rate == 0.0:
        return x
    cut = round(rate * 65536)
    if x.device.type != "cpu" or not 0 < cut < 65536:
        return F.dropout(x, rate, True)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    shorts = draws.view(torch.int16)[: x.numel()].view(x.shape)
    keep = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(shorts, cut - 32768, out=keep)
    return x * keep.mul_(65536 / (65536 - cut))
