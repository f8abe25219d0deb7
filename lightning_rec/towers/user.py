"""User towers that read the history of item vectors: causal self-attention, and pooling as the simple baseline."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, UserBatch
from lightning_rec.towers.base import ItemTower, UserTower
from lightning_rec.towers.blocks import LigrBlock
from lightning_rec.towers.relative import AttentionBias
from lightning_rec.towers.sequence import Activation, CausalBlock, dropout


def history_vectors(users: UserBatch, items: Tensor) -> Tensor:
    """``(b, t, d)`` item vectors of the histories.

    Equal to ``items[users.history]``; the backward pass of an embedding is several times faster on a CPU than that of
    an index.
    """
    return F.embedding(users.history, items)


def _without_history_zero(users: UserBatch, interest: Tensor) -> Tensor:
    """Zero vectors for users without a single event: their scores tie, and nothing is claimed about them."""
    return interest.masked_fill((users.lengths == 0)[:, None, None], 0.0)


class SequenceUserTower(UserTower):
    """Causal self-attention over the history's item vectors: one interest vector after every event.

    SASRec (Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018), with the choices that later work
    made around it as options. Each step attends to itself and to what came before.

    Args:
        blocks: number of attention blocks.
        heads: attention heads of a block; must divide the width of the item tower.
        max_length: longest history in events, the size of the table of positions. The data module cuts histories to
            their newest ``max_history`` events; that must not be more than this.
        dropout: share of activations dropped in training, on the input and after both parts of a block.
        attention_dropout: share of attention weights dropped in training. Anything but 0 leaves the fused attention
            kernel on a CPU and costs time.
        feed_forward: width of the hidden layer of a block; None: the width of the item vectors, as in SASRec, or four
            times it in a LiGR block, as in eSASRec.
        activation: the non-linearity of a transformer block; a LiGR block has SwiGLU.
        norm: ``pre`` normalises before each part of a block and once at the end, ``post`` after each part.
        positions_from: ``end`` counts positions back from the newest event of a history (SASRec's left-padded
            layout), ``start`` from its oldest, ``none`` uses no positions.
        scale_items: multiply item vectors by the root of their width before positions are added, as SASRec does.
        input_norm: normalise the sum of item vector and position before the first block. Item vectors start small; so
            normalised they weigh as much as what the blocks add, and the interest stays near the newest items.
        block: ``transformer``, or ``ligr``: both parts of a block behind gates that read its input, and SwiGLU (LiGR,
            Borisyuk et al., 2025; eSASRec, arXiv:2508.06450); ``norm`` must be ``pre`` then.
        positions: ``absolute``: position vectors, see ``positions_from``; ``relative``: a learned number for each head
            and distance in events, added to the scores of attention (T5, Raffel et al., JMLR 2020); ``both``; or
            ``none``. A bias on the scores leaves the fast path of causal attention and costs time.
        relative_buckets: None: a relative position is a distance; else it is one of so many buckets of distances, those
            of T5.
        time_bias: add a learned number for each head and bucket of the time between two events to the scores of
            attention (TiSASRec, Li et al., WSDM 2020; buckets of log seconds as in HSTU, Zhai et al., ICML 2024). The
            gap ends at the event after which the interest is asked for; the time of the request is not used. The data
            must have times; where a request has none, nothing is added.
        time_buckets: number of buckets of time gaps.
    """

    def __init__(
        self,
        blocks: int = 2,
        heads: int = 2,
        max_length: int = 50,
        dropout: float = 0.2,
        attention_dropout: float = 0.0,
        feed_forward: int | None = None,
        activation: Activation = "gelu",
        norm: Literal["pre", "post"] = "pre",
        positions_from: Literal["end", "start", "none"] = "end",
        scale_items: bool = False,
        input_norm: bool = True,
        block: Literal["transformer", "ligr"] = "transformer",
        positions: Literal["absolute", "relative", "both", "none"] = "absolute",
        relative_buckets: int | None = None,
        time_bias: bool = False,
        time_buckets: int = 64,
    ) -> None:
        super().__init__()
        if blocks < 0 or heads < 1 or max_length < 1:
            raise ValueError(
                f"SequenceUserTower needs blocks >= 0, heads >= 1 and max_length >= 1, but got blocks={blocks}, "
                f"heads={heads}, max_length={max_length}."
            )
        if block == "ligr" and norm != "pre":
            raise ValueError(
                f"A LiGR block normalises before each part, but norm is {norm}: set model.user_tower.init_args.norm to "
                "pre, or block to transformer."
            )
        if positions == "both" and positions_from == "none":
            raise ValueError(
                "positions is both, but positions_from is none: set model.user_tower.init_args.positions_from to end "
                "or start, or positions to relative."
            )
        self.n_blocks = blocks
        self.heads = heads
        self.max_length = max_length
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.feed_forward = feed_forward
        self.activation: Activation = activation
        self.norm = norm
        self.positions_from = positions_from
        self.scale_items = scale_items
        self.input_norm = input_norm
        self.block = block
        self.absolute = positions in ("absolute", "both") and positions_from != "none"
        self.relative = positions in ("relative", "both")
        self.relative_buckets = relative_buckets
        self.time_bias = time_bias
        self.time_buckets = time_buckets

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates positions and blocks of the item tower's width."""
        super().configure(catalogue, item_tower)
        if self.dim % self.heads:
            raise ValueError(
                f"The item tower's dim ({self.dim}) is not divisible by the user tower's heads ({self.heads}): "
                "choose a dim that is a multiple of heads."
            )
        if self.absolute:
            self.positions = nn.Embedding(self.max_length, self.dim)
        self.first_norm = nn.LayerNorm(self.dim) if self.input_norm else nn.Identity()
        self.attention_bias: AttentionBias | None = None
        if self.relative or self.time_bias:
            self.attention_bias = AttentionBias(
                self.heads, self.max_length, self.relative, self.relative_buckets, self.time_bias, self.time_buckets
            )
        self.blocks = nn.ModuleList(self._block() for _ in range(self.n_blocks))
        self.last_norm = nn.LayerNorm(self.dim) if self.norm == "pre" else nn.Identity()
        self.apply(self._initialise)

    def _block(self) -> CausalBlock:
        if self.block == "ligr":
            return LigrBlock(
                dim=self.dim,
                heads=self.heads,
                feed_forward=self.feed_forward or 4 * self.dim,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
            )
        return CausalBlock(
            dim=self.dim,
            heads=self.heads,
            feed_forward=self.feed_forward or self.dim,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation=self.activation,
            norm_first=self.norm == "pre",
        )

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def _positions(self, users: UserBatch) -> Tensor:
        """``(b, t, d)`` or ``(1, t, d)`` position vectors."""
        t = users.history.shape[1]
        if self.positions_from == "start":
            return self.positions.weight[:t][None]
        steps = torch.arange(t, device=users.history.device)
        return self.positions((users.lengths[:, None] - 1 - steps).clamp_min(0))

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """Reads the histories.

        Args:
            users: ``b`` users with histories of ``t`` events, right-padded.
            items: ``(n, d)`` item vectors.

        Returns:
            ``(b, t, d)`` interest after every event; zero vectors for users without history.

        Raises:
            ValueError: when a history is longer than ``max_length``, or ``time_bias`` meets data without times.
        """
        t = users.history.shape[1]
        if t > self.max_length:
            raise ValueError(
                f"A history of {t} events is longer than the user tower's max_length of {self.max_length}: set "
                f"model.user_tower.init_args.max_length to at least {t}, or data.init_args.max_history to at most "
                f"{self.max_length}."
            )
        x = history_vectors(users, items)
        if self.scale_items:
            x = x * self.dim**0.5
        if self.absolute:
            x = x + self._positions(users)
        x = dropout(self.first_norm(x), self.dropout, self.training)
        bias = None if self.attention_bias is None else self.attention_bias(users)
        for block in self.blocks:
            x = block(x, bias)
        return _without_history_zero(users, self.last_norm(x))


class PooledUserTower(UserTower):
    """The history's item vectors pooled: the simple baseline beside self-attention.

    Every pooling is causal, so that it trains at every step as the sequence tower does:

    - ``mean``: the mean of the vectors up to each step. No parameters.
    - ``attention``: their weighted mean, the weights a softmax of one learned score an item.
    - ``fading``: their weighted mean, each weight ``exp(-fading)`` times that of the event after it. No parameters.
    - ``gru``: the states of a recurrent network (GRU4Rec, Hidasi et al., ICLR 2016).

    Args:
        pooling: how vectors become one.
        dropout: share of the inputs dropped in training.
        fading: how fast ``pooling: fading`` forgets; 0: not at all, which is the mean.

    Raises:
        ValueError: ``fading`` is below 0.
    """

    def __init__(
        self,
        pooling: Literal["mean", "attention", "fading", "gru"] = "mean",
        dropout: float = 0.0,
        fading: float = 1.0,
    ) -> None:
        super().__init__()
        if fading < 0:
            raise ValueError(f"fading is {fading}; it must be at least 0, or older events would weigh more.")
        self.pooling = pooling
        self.dropout = dropout
        self.fading = fading

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates what the pooling learns, if anything."""
        super().configure(catalogue, item_tower)
        if self.pooling == "attention":
            self.score = nn.Sequential(nn.Linear(self.dim, self.dim), nn.Tanh(), nn.Linear(self.dim, 1))
        elif self.pooling == "gru":
            self.gru = nn.GRU(self.dim, self.dim, batch_first=True)

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """See :class:`SequenceUserTower`: ``(b, t, d)``, zero vectors for users without history."""
        x = dropout(history_vectors(users, items), self.dropout, self.training)
        t = x.shape[1]
        if self.pooling == "mean":
            steps = torch.arange(1, t + 1, device=x.device, dtype=x.dtype)
            interest = x.cumsum(1) / steps[:, None]
        elif self.pooling == "attention":
            # Padding comes last, so the weights of a real step never hold any of it.
            scores = self.score(x).squeeze(-1)[:, None, :].expand(-1, t, -1)
            later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            interest = scores.masked_fill(later, float("-inf")).softmax(-1) @ x
        elif self.pooling == "fading":
            steps = torch.arange(t, device=x.device)
            age = (steps[:, None] - steps).to(x.dtype)
            interest = (-self.fading * age).masked_fill(age < 0, -torch.inf).softmax(-1) @ x
        else:
            interest = self.gru(x)[0]
        return _without_history_zero(users, interest)
