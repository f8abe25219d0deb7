"""Text and a learned vector an item: how both become one, and what pulls them together while they are trained."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch


def id_table(rows: int, dim: int, std: float) -> nn.Embedding:
    """``rows`` vectors drawn from a normal distribution, row 0 (padding) zero."""
    table = nn.Embedding(rows, dim, padding_idx=0)
    with torch.no_grad():
        table.weight.normal_(std=std)
        table.weight[0] = 0
    return table


class Alignment(nn.Module):
    """A contrastive loss between two views of the same items, over the items of the step.

    InfoNCE (van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018) in both
    directions, as CLIP has it (Radford et al., ICML 2021): the text vector of an item should be nearer to its own id
    vector than to those of the step's other items, and the other way round. Such a term aligns text and collaborative
    vectors in recommenders such as AlignRec (Liu et al., CIKM 2024).

    Args:
        weight: factor on the loss.
        temperature: divides the cosine.
        most: at most so many items a step, drawn at random, since time and memory grow with their square.

    Raises:
        ValueError: when an option is out of range.
    """

    def __init__(self, weight: float, temperature: float = 0.1, most: int = 1024) -> None:
        super().__init__()
        if not weight > 0:
            raise ValueError(f"alignment is {weight}; it must be positive, or 0 for no alignment loss.")
        if not temperature > 0:
            raise ValueError(f"alignment_temperature is {temperature}; it must be positive.")
        if most < 2:
            raise ValueError(f"The alignment loss needs at least 2 items a step, but most is {most}.")
        self.weight = weight
        self.temperature = temperature
        self.most = most
        self._kept: tuple[Tensor, Tensor] | None = None

    def keep(self, text: Tensor, ids: Tensor, usable: Tensor) -> None:
        """Keeps the step's vectors until :meth:`take`.

        Args:
            text: ``(n, d)`` text vectors.
            ids: ``(n, d)`` id vectors of the same items.
            usable: ``(n,)`` True where an item takes part: padding and items whose id is not trained do not.
        """
        chosen = usable.nonzero()[:, 0]
        if len(chosen) > self.most:
            chosen = chosen[torch.randperm(len(chosen), device=chosen.device)[: self.most]]
        # index_select has a fast backward pass on a CPU; indexing has not
        self._kept = text.index_select(0, chosen), ids.index_select(0, chosen)

    def take(self) -> Tensor | None:
        """The weighted loss of the vectors that were kept, which are let go; None where there are none."""
        if self._kept is None:
            return None
        (text, ids), self._kept = self._kept, None
        return self.weight * self(text, ids)

    def forward(self, text: Tensor, ids: Tensor) -> Tensor:
        """The loss, without its weight, of ``(n, d)`` text and id vectors; 0 for fewer than two items."""
        with torch.autocast(text.device.type, enabled=False):
            if len(text) < 2:
                return (text.float() * ids.float()).sum() * 0  # both stay in the graph
            one, other = F.normalize(text.float(), dim=-1), F.normalize(ids.float(), dim=-1)
            logits = one @ other.t() / self.temperature
            own = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2

    def __getstate__(self) -> dict[str, Any]:
        # What was kept belongs to a step, and its graph cannot be copied.
        return self.__dict__ | {"_kept": None}


class IdFusion(nn.Module):
    """What gives a tower of item texts a learned vector an item beside them: inherit from this first, then from it.

    An item without training interactions has no id part, since its id vector was never trained.

    Args:
        fusion: ``sum`` of both; ``concat``: a linear layer over both side by side; ``gate``: a learned mixture,
            feature by feature.
        id_init_std: standard deviation of the id vectors before training.
        id_dropout: share of the items whose id part is left out in a training step, so that text learns to stand
            alone, as it must for cold items.
        alignment: weight of a contrastive loss that pulls the text vector and the id vector of an item together, over
            the step's items that were trained on (InfoNCE, as in CLIP); it is added to the objective by
            :class:`~lightning_rec.TwoTower`. 0: none.
        alignment_temperature: divides the cosine in that loss.
        **options: those of the tower of item texts.
    """

    uses_ids = True
    dim: int
    table: nn.Embedding
    warm: Tensor
    mix: nn.Linear

    def __init__(
        self,
        fusion: Literal["sum", "concat", "gate"] = "sum",
        id_init_std: float = 0.02,
        id_dropout: float = 0.0,
        alignment: float = 0.0,
        alignment_temperature: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.alignment = Alignment(alignment, alignment_temperature) if alignment else None
        self.fusion = fusion
        self.id_init_std = id_init_std
        self.id_dropout = id_dropout

    def add_ids(self, catalogue: CatalogueView) -> None:
        """Creates one vector a row, and the fusion, for ``configure``."""
        self.table = id_table(catalogue.n_rows, self.dim, self.id_init_std)
        warm = torch.ones(catalogue.n_rows) if catalogue.counts is None else catalogue.counts.cpu() > 0
        # 1 where an item was trained on, part of the checkpoint: which items are cold is a fact of the training data.
        self.register_buffer("warm", warm.to(torch.float32)[:, None].clone())
        if self.fusion != "sum":
            self.mix = nn.Linear(2 * self.dim, self.dim)

    def with_ids(self, items: ItemBatch, text: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, d)`` fused vectors of ``(n, d)`` text vectors, and ``(n, 1)`` 1 where an id part is in them, else 0."""
        ids = self.table.weight if items.whole else self.table(items.rows)
        keep = self.warm if items.whole else self.warm[items.rows]
        if self.training and self.alignment is not None:
            self.alignment.keep(text, ids, (keep[:, 0] > 0) & (items.rows > 0))
        if self.training and self.id_dropout:
            keep = keep * (torch.rand_like(keep) >= self.id_dropout)
        return self._fuse(text, ids * keep), keep

    def without_ids(self, text: Tensor) -> Tensor:
        """``(n, d)`` vectors of items that have text alone."""
        return self._fuse(text, torch.zeros_like(text))

    def auxiliary_loss(self) -> Tensor | None:
        """The weighted alignment loss of the step's items."""
        return None if self.alignment is None else self.alignment.take()

    def _fuse(self, text: Tensor, ids: Tensor) -> Tensor:
        if self.fusion == "sum":
            return text + ids
        mixed = self.mix(torch.cat([text, ids], dim=-1))
        if self.fusion == "concat":
            return mixed
        gate = mixed.sigmoid()
        return gate * text + (1 - gate) * ids
