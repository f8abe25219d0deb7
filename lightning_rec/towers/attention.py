"""Attention over sets with padding: additive attention, which makes one vector of many, and multi-head self-attention.

Both leave out what is padding, and answer a row that holds nothing real with zeros, never with NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """A softmax over the last dimension in which padding has no part.

    Args:
        scores: ``(..., t)`` scores.
        mask: broadcastable to ``scores``, True where there is something; None: everywhere.

    Returns:
        ``(..., t)`` weights that sum to 1, or to 0 where nothing is real.
    """
    if mask is None:
        return scores.softmax(-1)
    # The lowest number, not minus infinity: a row of nothing but minus infinity would be NaN, and so its gradient.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


class AdditiveAttention(nn.Module):
    """Additive attention: the mean of vectors ``x``, weighted by the softmax of ``v · tanh(W x + b)``.

    Yang et al., "Hierarchical Attention Networks for Document Classification", NAACL 2016: the pooling of NAML, NRMS
    and LSTUR.

    Args:
        dim: width ``d`` of the vectors.
        hidden: width of ``W x``.
    """

    def __init__(self, dim: int, hidden: int = 200) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden)
        self.query = nn.Linear(hidden, 1, bias=False)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(..., t)`` weights of ``(..., t, d)`` vectors: they sum to 1, or to 0 where nothing is real."""
        return masked_softmax(self.query(torch.tanh(self.hidden(x))).squeeze(-1), mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools.

        Args:
            x: ``(..., t, d)`` vectors; those of padding are not looked at, but must be finite.
            mask: ``(..., t)`` True where there is a vector; None: everywhere.

        Returns:
            ``(..., d)`` pooled vectors; zeros where nothing is real.
        """
        return (self.weights(x, mask).unsqueeze(-2) @ x).squeeze(-2)


class MultiHeadSelfAttention(nn.Module):
    """Every vector becomes a mixture of all, as in NRMS: no positions, no residual, no projection behind the heads.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017; the form is that of Wu et al., "Neural News
    Recommendation with Multi-Head Self-Attention", EMNLP-IJCNLP 2019.

    Args:
        dim: width of the vectors that come in.
        heads: number of heads.
        head_dim: width of a head; None: ``dim / heads``. The vectors that come out are ``heads * head_dim`` wide.
    """

    def __init__(self, dim: int, heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads) or (head_dim is not None and head_dim < 1):
            raise ValueError(
                f"Self-attention of {heads} heads over vectors of width {dim} needs a width that is a multiple of "
                f"heads, but heads is {heads} and head_dim {head_dim}: choose heads among the divisors of {dim}."
            )
        self.heads = heads
        self.head_dim = head_dim or dim // heads
        self.width = heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * self.width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: ``(b, t, dim)`` vectors; those of padding are not looked at, but must be finite.
            mask: ``(b, t)`` True where there is a vector; None: everywhere.

        Returns:
            ``(b, t, heads * head_dim)`` vectors; zeros at padding.
        """
        return self.attend(self.qkv(x), mask)

    def attend(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same, where ``(b, t, 3 * width)`` queries, keys and values side by side are at hand already."""
        b, t, _ = qkv.shape
        if not t:
            return qkv.new_zeros(b, 0, self.width)
        q, k, v = qkv.view(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, self.width)
        # A row without anything attends to its padding rather than to nothing: no NaN, and it is made zero below.
        seen = mask | ~mask.any(-1, keepdim=True)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])
        return mixed.transpose(1, 2).reshape(b, t, self.width).masked_fill(~mask[..., None], 0.0)
