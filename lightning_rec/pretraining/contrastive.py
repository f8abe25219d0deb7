"""Contrastive training of a language model on items that the same users touched."""

from __future__ import annotations

import peft
import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rec.checkpoint import save_plain_hyperparameters
from lightning_rec.optim import Schedule
from lightning_rec.pretraining.module import PretrainingModule, wants
from lightning_rec.pretraining.output import check_adapter
from lightning_rec.pretraining.pairs import PairBatch, PretrainingPairs
from lightning_rec.towers.language import BUNDLED, Pooling, Recompute, TextEncoder
from lightning_rec.towers.model_folder import with_sentence_files
from lightning_rec.towers.sentence_folder import sentence_settings
from lightning_rec.towers.tokens import TokenTable


class ContrastiveItems(PretrainingModule):
    """Brings the vectors of items together that stand near each other in users' histories, and others apart.

    Which items go together is found as item2vec does (Barkan and Koenigstein, "Item2Vec: Neural Item Embedding for
    Collaborative Filtering", MLSP 2016); their texts go through the language model and are told apart within the batch
    by cosine similarity over a temperature, as supervised SimCSE does with pairs of sentences (Gao et al., EMNLP 2021),
    in both directions. Unlike the pretraining of UniSRec (Hou et al., KDD 2022), which contrasts sequences with items
    over frozen texts, it trains the language model itself, and knows no sequences. Use it with
    :class:`lightning_rec.pretraining.PretrainingPairs`.

    An item of the batch that is known to go with the anchor, or has the same text, is no negative.

    Args:
        language_model: ``minilm``, a folder, or a name on the Hugging Face hub.
        pooling: ``mean``, ``cls`` or ``last``; None: what the files of a sentence-transformers folder state, with their
            length limit in place of ``max_tokens``; ``mean`` for any other model. Give it to the tower too.
        max_tokens: longest text in tokens.
        temperature: what cosine similarities are divided by.
        peft: the config of an adapter that can be merged, such as LoRA; None: the whole model is trained.
        frozen_layers: so many of the lowest layers, and the embeddings, are not trained; what they make of the texts is
            kept on disk, so that a step runs only the layers above.
        gradient_checkpointing: ``passes`` keeps the vectors alone and recomputes one pass after another, so that
            memory does not grow with the batch; True recomputes layer by layer.
        token_budget: most tokens of one pass, padding included; None: by the device.
        cache_dir: folder of the disk cache; None: the environment's ``LIGHTNING_REC_CACHE``.
        output: the folder to write; None: ``pretrained`` in the run's folder.
        lr: learning rate of the language model, or of its adapter.
        weight_decay: AdamW's decay of matrices; norms and biases are not decayed.
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    def __init__(
        self,
        language_model: str = BUNDLED,
        pooling: Pooling | None = "mean",
        max_tokens: int = 64,
        temperature: float = 0.05,
        peft: peft.PeftConfig | None = None,
        frozen_layers: int = 0,
        gradient_checkpointing: Recompute = False,
        token_budget: int | None = None,
        cache_dir: str | None = None,
        output: str | None = None,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Schedule = "linear",
    ) -> None:
        super().__init__(output, lr, lr, weight_decay, warmup_steps, schedule)
        save_plain_hyperparameters(self)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it is above 0.")
        self.name = language_model
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.peft = peft
        self.frozen_layers = frozen_layers
        self.gradient_checkpointing: Recompute = gradient_checkpointing
        self.token_budget = token_budget
        self.cache_dir = cache_dir
        self._table: TokenTable | None = None

    def check_data(self, datamodule: LightningDataModule) -> None:
        """Refuses all but pairs."""
        wants(datamodule, PretrainingPairs, self)

    def build(self) -> None:
        """Loads the model and puts the adapter in.

        Raises:
            AdapterError: the adapter does not fit, or cannot be merged.
            ValueError: ``frozen_layers`` does not fit.
        """
        self.text = TextEncoder(
            self.name,
            self.pooling,
            self.max_tokens,
            tune="full" if self.peft is None else "adapter",
            peft=self.peft,
            gradient_checkpointing=self.gradient_checkpointing,
            token_budget=self.token_budget,
            cache_dir=self.cache_dir,
            frozen_layers=self.frozen_layers,
        )
        if self.peft is not None:
            check_adapter(self.text.model, self.peft)
        self.train(self.training)

    def language_model(self) -> nn.Module:
        """The encoder, without pooling."""
        assert self.text.model is not None
        return self.text.model

    def language_parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.parameters())

    @property
    def keeps_sentence_files(self) -> bool:
        """True where the pooling that is trained is the one that the files state."""
        stated = sentence_settings(with_sentence_files(self.text.folder, self.name)) if self.pooling is None else None
        if self.pooling is not None and (self.text.folder / "modules.json").is_file():
            stated = sentence_settings(self.text.folder)
        return stated is not None and stated.pooling == self.text.pooling

    def prepare(self, texts: list[str]) -> None:
        """Tokenises the texts, and runs the frozen layers where the disk does not have what they make."""
        self._table = self.text.with_states(self.text.tokenise(texts).to(self.device))

    def forward(self, rows: Tensor) -> Tensor:
        """``(k, width)`` float32 vectors of length 1 of the texts in ``(k,)`` rows."""
        assert self._table is not None
        return F.normalize(self.text.encode_table(self._table, rows), dim=-1)

    def losses(self, batch: PairBatch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The loss of each pair in both directions, and whether the anchor finds its partner."""
        rows, places = torch.cat([batch.anchors, batch.partners]).unique(return_inverse=True)
        vectors = self(rows)  # each text once
        with torch.autocast(self.device.type, enabled=False):
            first, second = vectors[places].chunk(2)
            return contrast(first, second, batch.excluded, self.temperature)

    def figures(self, loss: Tensor, hits: Tensor) -> dict[str, Tensor]:
        """``loss`` a pair, and ``recall@1``: how often the partner comes before all others of the batch."""
        return {"loss": loss, "recall@1": hits}


def contrast(first: Tensor, second: Tensor, excluded: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """In-batch InfoNCE in both directions (van den Oord et al., 2018; both directions as Radford et al., ICML 2021).

    Args:
        first: ``(b, d)`` vectors of the anchors, of length 1.
        second: ``(b, d)`` vectors of their partners, of length 1.
        excluded: ``(b, b)`` True where the column's partner is no negative of the row's anchor; never on the diagonal.
        temperature: what similarities are divided by.

    Returns:
        ``(b,)`` the mean of both directions' cross-entropies, and ``(b,)`` True where the partner has the highest
        score of its row, alone.
    """
    logits = (first @ second.T / temperature).masked_fill(excluded, -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    forth, back = (F.cross_entropy(scores, own, reduction="none") for scores in (logits, logits.T))
    best = (logits.detach() >= logits.detach().diagonal()[:, None]).sum(1) == 1
    return (forth + back) / 2, best
