"""A user tower that reads what users say and what is known of them: reviews, profile, the titles they touched last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, UserBatch
from lightning_rec.towers.adapter_folder import restore_head
from lightning_rec.towers.base import ItemTower, UserTower
from lightning_rec.towers.item import TextItemTower
from lightning_rec.towers.language import Pooling, Recompute, TextEncoder, Tune
from lightning_rec.towers.quantisation import Quantisation
from lightning_rec.towers.side import SideItemTower

SHARED = "shared"


def settings_of(item_tower: TextItemTower | SideItemTower) -> dict[str, Any]:
    """What a user tower's encoder takes over from the item tower whose model it shares."""
    return {name: item_tower.encoder_options[name] for name in ("language_model", "pooling", "max_tokens")}


class LanguageUserTower(UserTower):
    """The user's text through a language model of its own or the item tower's: one interest vector a user.

    Args:
        language_model: ``shared`` takes the item tower's language model, tuned or frozen as it is there, or, with
            ``peft``, under an adapter of this tower: the model's weights are in memory once, and each tower reads
            through its own adapter, or the item tower through none where it is frozen. Else ``minilm``, a folder or a
            hub name, as in :class:`TextItemTower`.
        pooling: how a model of its own pools tokens; None: what the files of a sentence-transformers folder state;
            with ``shared`` it is the item tower's.
        max_tokens: length of a user's text in tokens for a model of its own; with ``shared`` it is the item tower's.
        tune: ``frozen``, ``full`` or ``adapter`` for a model of its own; None: ``adapter`` with ``peft``, else
            ``frozen``.
        peft: an adapter, any config class of peft, or a bottleneck adapter; of another kind than the item tower's
            if you like.
        projection: to the width of the item vectors: ``linear`` or ``mlp``.
        dropout: share of the language model's features dropped in training.
        gradient_checkpointing: recompute the language model's activations in the backward pass, to save memory: true,
            layer by layer, or ``passes``, pass by pass, so that memory does not grow with the batch.
        token_budget: most tokens, with padding, of one pass through the language model; None: 2,048 on a CPU,
            16,384 elsewhere. Fewer need less memory.
        frozen_layers: with ``tune: full`` or an adapter, so many of the lowest layers are left as they are, without
            dropout, and no backward pass goes through them. Users' texts change with their histories, so that nothing
            of them is kept on disk.
        quantisation: weights of a frozen or adapted model of its own in 8 or 4 bits (``8bit``, ``4bit``), by
            the extra ``quantise``.
        adapter: a folder with an adapter that was trained before, in the place of ``peft``; see
            :class:`TextItemTower`.
        remembered: a frozen model reads a text once: the vectors of so many texts, the most recently used, are kept in
            memory (1.5 kB each for MiniLM). An epoch of more distinct texts reads all of them anew.
    """

    def __init__(
        self,
        language_model: str = SHARED,
        pooling: Pooling | None = "mean",
        max_tokens: int = 256,
        tune: Tune | None = None,
        peft: peft.PeftConfig | None = None,
        projection: Literal["linear", "mlp"] = "linear",
        dropout: float = 0.0,
        gradient_checkpointing: Recompute = False,
        token_budget: int | None = None,
        frozen_layers: int = 0,
        quantisation: Quantisation = "none",
        adapter: str | None = None,
        remembered: int = 50_000,
    ) -> None:
        super().__init__()
        if remembered < 0:
            raise ValueError(f"remembered is a number of texts, at least 0, but is {remembered}.")
        self.shared = language_model == SHARED
        if self.shared and (
            quantisation != "none" or (peft is None and adapter is None and (tune is not None or frozen_layers))
        ):
            raise ValueError(
                "A shared language model is tuned as the item tower says: give tune, frozen_layers and quantisation "
                "there, or give the user tower a peft config of its own, or a language_model of its own."
            )
        self.encoder_options: dict[str, Any] = {
            "language_model": language_model,
            "pooling": pooling,
            "max_tokens": max_tokens,
            "tune": tune,
            "peft": peft,
            "gradient_checkpointing": gradient_checkpointing,
            "token_budget": token_budget,
            "frozen_layers": frozen_layers,
            "quantisation": quantisation,
            "adapter": adapter,
        }
        self.projection_kind = projection
        self.dropout = dropout
        self.remembered = remembered
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def configure(self, catalogue: CatalogueView, item_tower: ItemTower) -> None:
        """Finds or shares the language model, and creates the projection."""
        super().configure(catalogue, item_tower)
        if not self.shared:
            self.encoder = TextEncoder(**self.encoder_options)
        elif isinstance(item_tower, TextItemTower | SideItemTower):
            if self.encoder_options["peft"] is None and self.encoder_options["adapter"] is None:
                # Not registered: the item tower owns it, and a checkpoint holds it once.
                object.__setattr__(self, "encoder", item_tower.encoder)
            else:
                self.encoder = TextEncoder(**self.encoder_options | settings_of(item_tower), shared=item_tower.encoder)
        else:
            raise ValueError(
                f"The user tower shares the item tower's language model, but {type(item_tower).__name__} has none: "
                "choose TextItemTower, TextIdItemTower or SideItemTower, or name the user tower's own language_model."
            )
        width = self.encoder.width
        # Features of a language model vary in scale from model to model: bring them to one.
        self.norm = nn.LayerNorm(width)
        self.projection: nn.Module = nn.Linear(width, self.dim)
        if self.projection_kind == "mlp":
            self.projection = nn.Sequential(nn.Linear(width, width), nn.GELU(), self.projection)
        restore_head(self, self.encoder)

    def _features(self, texts: Sequence[str], device: torch.device) -> Tensor:
        if self.encoder.tune != "frozen":
            distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
            table = self.encoder.tokenise(list(distinct)).to(device)
            vectors = self.encoder.encode_table(table, torch.arange(len(distinct), device=device))
            return vectors[torch.tensor([distinct[text] for text in texts], device=device)]
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        found = dict(zip(missing, self.encoder.encode(missing, device).cpu(), strict=True)) if missing else {}
        features = torch.stack([found[text] if text in found else self._known[text] for text in texts])
        with torch.inference_mode(False):  # kept for training steps too
            self._known.update((text, vector.clone()) for text, vector in found.items())
        for text in texts:
            self._known.move_to_end(text)
        while len(self._known) > self.remembered:
            self._known.popitem(last=False)
        return features.to(device)

    def knows(self, users: UserBatch) -> Tensor:
        """``(b,)`` True for users of whom a text tells something; a history of items without any text tells nothing."""
        if users.texts is None:
            return super().knows(users)
        return torch.tensor([bool(text.strip()) for text in users.texts], dtype=torch.bool, device=users.lengths.device)

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """Reads the users' texts.

        Args:
            users: ``b`` users with ``texts``; histories are not looked at.
            items: ``(n, d)`` item vectors, not looked at.

        Returns:
            ``(b, 1, d)`` interest vectors.

        Raises:
            ValueError: when the data module made no user texts.
        """
        if users.texts is None:
            raise ValueError(
                "The language user tower reads users' texts, but the data module made none: set its option "
                "user_template (data.init_args.user_template) to what a user's text is made of."
            )
        features = self.norm(self._features(users.texts, items.device))
        return self.projection(F.dropout(features, self.dropout, self.training))[:, None]

    def language_parameters(self) -> Iterable[nn.Parameter]:
        """What is trained of a language model of its own, or of its own adapter on a shared one."""
        if "encoder" not in self._modules:
            return ()
        return (parameter for parameter in self.encoder.parameters() if parameter.requires_grad)
