"""User towers of news recommendation: self-attention and pooling, long- and short-term, candidate-aware."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, UserBatch
from lightning_rec.towers.attention import AdditiveAttention, MultiHeadSelfAttention, masked_softmax
from lightning_rec.towers.base import CandidateAwareUserTower, ItemTower, UserTower
from lightning_rec.towers.sequence import dropout
from lightning_rec.towers.user import history_vectors


class NRMSUserTower(UserTower):
    """The articles that a user read, related to each other by self-attention and pooled by additive attention.

    NRMS (Wu et al., "Neural News Recommendation with Multi-Head Self-Attention", EMNLP-IJCNLP 2019). The order of the
    history does not matter, and there is one interest vector for the whole of it.

    Args:
        heads: attention heads; must divide the width of the item tower.
        hidden: width of the additive attention.
        dropout: share of the features dropped in training, before and after self-attention.
        residual: add the item vectors to what self-attention makes of them, which is not in the paper: the interest
            then starts near the mean of the history, and fewer clicks suffice to learn from.
    """

    def __init__(self, heads: int = 8, hidden: int = 200, dropout: float = 0.2, residual: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.hidden = hidden
        self.dropout = dropout
        self.residual = residual

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates both attentions, of the item tower's width."""
        super().configure(catalogue, item_tower)
        if self.heads < 1 or self.dim % self.heads:
            raise ValueError(
                f"The item tower's dim ({self.dim}) is not divisible by the user tower's heads ({self.heads}): "
                "choose a dim that is a multiple of heads."
            )
        self.mix = MultiHeadSelfAttention(self.dim, self.heads)
        self.pool = AdditiveAttention(self.dim, self.hidden)

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """Reads the histories.

        Args:
            users: ``b`` users with histories of ``t`` events.
            items: ``(n, d)`` item vectors.

        Returns:
            ``(b, 1, d)`` interest from the whole history; zero vectors for users without history.
        """
        mask = users.mask
        x = history_vectors(users, items)
        mixed = self.mix(dropout(x, self.dropout, self.training), mask)
        if self.residual:
            mixed = mixed + x
        return self.pool(dropout(mixed, self.dropout, self.training), mask)[:, None]


class LSTURUserTower(UserTower):
    """What a user is drawn to in the long run, a vector by user id, and at the moment, a recurrent network.

    LSTUR (An et al., "Neural News Recommendation with Long- and Short-term User Representations", ACL 2019). There is
    an interest vector after every event of the history. The long-term vector is zero for an unknown user, and starts at
    zero, so that a user who never occurs in training is like an unknown one. A user whose vector was trained is
    answered without a history as well.

    Args:
        mode: ``ini``: the long-term vector is the first state of the recurrent network; ``con``: it stands beside the
            network's state, and a linear layer brings both to the width of the item vectors.
        id_dropout: probability that a user's long-term vector is left out in a training step, so that the history
            learns to stand alone.
        dropout: share of the item vectors' features dropped in training.
    """

    uses_ids = True

    def __init__(self, mode: Literal["ini", "con"] = "ini", id_dropout: float = 0.5, dropout: float = 0.2) -> None:
        super().__init__()
        if not 0 <= id_dropout <= 1:
            raise ValueError(f"id_dropout is a probability, but is {id_dropout}: choose it between 0 and 1.")
        self.mode = mode
        self.id_dropout = id_dropout
        self.dropout = dropout

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates one long-term vector a user and the recurrent network."""
        super().configure(catalogue, item_tower)
        self.long = nn.Embedding(catalogue.n_users, self.dim, padding_idx=0)
        nn.init.zeros_(self.long.weight)
        self.gru = nn.GRU(self.dim, self.dim, batch_first=True)
        if self.mode == "con":
            # No bias: it would say something of users of whom nothing is known.
            self.join = nn.Linear(2 * self.dim, self.dim, bias=False)

    def knows(self, users: UserBatch) -> Tensor:
        """``(b,)`` True for users with a history or a long-term vector that was trained."""
        return (users.lengths > 0) | self.long.weight[users.users].any(-1)

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """Reads the histories.

        Args:
            users: ``b`` users with histories of ``t`` events, oldest first, and their rows.
            items: ``(n, d)`` item vectors.

        Returns:
            ``(b, t, d)`` interest after every event, ``(b, 1, d)`` when no user has one; without a history that of
            the long-term vector alone, and a zero vector where there is none either.
        """
        long = self.long(users.users)
        if self.training and self.id_dropout:
            long = long * (torch.rand(len(users), 1, device=long.device) >= self.id_dropout)
        x = dropout(history_vectors(users, items), self.dropout, self.training)
        if not x.shape[1]:
            x = x.new_zeros(len(users), 1, self.dim)
        first = long.to(x.dtype) if self.mode == "ini" else torch.zeros_like(long, dtype=x.dtype)
        # Padding comes last, so no state of a real event holds any of it.
        states = self.gru(x, first[None].contiguous())[0]
        without = (users.lengths == 0)[:, None, None]
        states = torch.where(without, first[:, None].to(states.dtype), states)
        if self.mode == "con":
            states = self.join(torch.cat([states, long[:, None].expand_as(states).to(states.dtype)], -1))
        return states


class CandidateAttentionUserTower(CandidateAwareUserTower):
    """The history as it looks from a candidate: what is like the candidate weighs more.

    - ``din``: a small network scores every pair of event and candidate, from both vectors and their product; the
      scores weigh the events as they are, without a softmax, so that a long history of like events says more (Zhou et
      al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018).
    - ``dkn``: a small network scores every pair from both vectors; the weights are a softmax over the history (Wang et
      al., "DKN: Deep Knowledge-Aware Network for News Recommendation", WWW 2018).
    - ``dot``: the softmax of their dot product, with a matrix between them: one matrix to learn.

    The order of the history does not matter. It works with impressions only, whose candidates are known.

    Args:
        kind: how the weight of an event is found.
        hidden: width of the hidden layer of ``din`` and ``dkn``.
        dropout: share of the history's features dropped in training.
    """

    def __init__(self, kind: Literal["din", "dkn", "dot"] = "din", hidden: int = 36, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, but is {hidden}.")
        self.kind = kind
        self.hidden = hidden
        self.dropout = dropout

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Creates what finds the weights."""
        super().configure(catalogue, item_tower)
        if self.kind == "dot":
            self.between = nn.Linear(self.dim, self.dim, bias=False)
            nn.init.eye_(self.between.weight)
            return
        self.of_event = nn.Linear(self.dim, self.hidden)
        self.of_candidate = nn.Linear(self.dim, self.hidden, bias=False)
        if self.kind == "din":
            self.of_product = nn.Linear(self.dim, self.hidden, bias=False)
        self.activation = nn.PReLU() if self.kind == "din" else nn.ReLU()
        # A softmax does not see a bias.
        self.score = nn.Linear(self.hidden, 1, bias=self.kind == "din")

    def weights(self, x: Tensor, candidates: Tensor, mask: Tensor) -> Tensor:
        """``(b, c, t)`` weights of ``(b, t, d)`` events for ``(b, c, d)`` candidates, 0 at padding."""
        if self.kind == "dot":
            scores = self.between(candidates) @ x.transpose(1, 2) / self.dim**0.5
            return masked_softmax(scores, mask[:, None])
        # The first layer over a pair is a sum of layers over its parts: no (b, c, t, 3 d) tensor is made.
        pairs = self.of_event(x)[:, None] + self.of_candidate(candidates)[:, :, None]
        if self.kind == "din":
            weighed = candidates[:, :, None] * self.of_product.weight
            product = weighed.flatten(1, 2) @ x.transpose(1, 2)
            pairs = pairs + product.unflatten(1, weighed.shape[1:3]).transpose(2, 3)
        scores = self.score(self.activation(pairs)).squeeze(-1)
        return masked_softmax(scores, mask[:, None]) if self.kind == "dkn" else scores.masked_fill(~mask[:, None], 0.0)

    def attend(self, users: UserBatch, items: Tensor, candidates: Tensor) -> Tensor:
        """The interest in each candidate.

        Args:
            users: ``b`` users with histories of ``t`` events.
            items: ``(n, d)`` item vectors.
            candidates: ``(b, c, d)`` vectors of each user's candidates.

        Returns:
            ``(b, c, d)`` interest vectors; zero vectors for users without history.
        """
        x = dropout(history_vectors(users, items), self.dropout, self.training)
        return self.weights(x, candidates, users.mask) @ x
