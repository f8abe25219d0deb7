"""Masked-token and next-token training of a language model on the texts of a data set."""

from __future__ import annotations

from typing import Any, Literal, cast

import peft
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lightning_rec.checkpoint import save_plain_hyperparameters
from lightning_rec.optim import Schedule
from lightning_rec.pretraining.masking import MaskVocabulary, mask_tokens, next_tokens, packed
from lightning_rec.pretraining.module import PretrainingModule, wants
from lightning_rec.pretraining.output import check_adapter, quiet_transformers
from lightning_rec.pretraining.texts import PretrainingTexts, TextBatch
from lightning_rec.towers.frozen_layers import FrozenBottom, upper_adapter
from lightning_rec.towers.language import BUNDLED, TextEncoder
from lightning_rec.towers.loading import LOADING, checkpoint_gradients
from lightning_rec.towers.tokens import TokenTable, tokenise

Task = Literal["masked", "next_token"]

_WHOLE = 1_000_000  # tokens: no text is cut


class LanguageModelling(PretrainingModule):
    """Trains a language model on the catalogue's and the users' own texts, by the task that it was made with.

    More of the same training, on text of the domain, helps the tasks of the domain (Gururangan et al., "Don't Stop
    Pretraining: Adapt Language Models to Domains and Tasks", ACL 2020). Encoders such as BERT find masked tokens
    (Devlin et al., "BERT", NAACL 2019; the masks are drawn anew in each step, as Liu et al., "RoBERTa", 2019, do),
    decoders such as GPT-2 find the next token. Use it with :class:`lightning_rec.pretraining.PretrainingTexts`.

    A head that the folder lacks is new (sentence models, such as the bundled MiniLM, have lost theirs); its decoder is
    tied to the word embeddings where the architecture has it so. The head is not written.

    Args:
        language_model: ``minilm``, a folder, or a name on the Hugging Face hub.
        objective: ``masked`` or ``next_token``; None: what the architecture was made with.
        max_tokens: longest text in tokens; what is longer loses its end, unless ``pack`` is on.
        pack: put the texts of a batch one after another and cut them into blocks of ``max_tokens``, so that no token is
            lost and next to none is padding.
        mask_share: share of the tokens that are to be found, at least one of each text.
        peft: the config of an adapter that can be merged, such as LoRA; None: the whole model is trained.
        frozen_layers: so many of the lowest layers, and the embeddings, are not trained.
        gradient_checkpointing: recompute activations in the backward pass: a third more time, far less memory.
        output: the folder to write; None: ``pretrained`` in the run's folder.
        lr: learning rate of the language model, or of its adapter.
        head_lr: learning rate of a new head.
        weight_decay: AdamW's decay of matrices; norms and biases are not decayed.
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.

    Raises:
        ValueError: an objective that the model was not made for, or an option out of its range.
    """

    def __init__(
        self,
        language_model: str = BUNDLED,
        objective: Task | None = None,
        max_tokens: int = 128,
        pack: bool = False,
        mask_share: float = 0.15,
        peft: peft.PeftConfig | None = None,
        frozen_layers: int = 0,
        gradient_checkpointing: bool = False,
        output: str | None = None,
        lr: float = 1e-4,
        head_lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Schedule = "linear",
    ) -> None:
        super().__init__(output, lr, head_lr, weight_decay, warmup_steps, schedule)
        save_plain_hyperparameters(self)
        if not 0 < mask_share < 1:
            raise ValueError(f"mask_share is {mask_share}; it is above 0 and below 1.")
        self.text = TextEncoder(language_model, max_tokens=max_tokens)  # its model is never loaded
        self.objective = self._task(objective)
        self.pack = pack
        self.mask_share = mask_share
        self.peft = peft
        self.frozen_layers = frozen_layers
        self.gradient_checkpointing = gradient_checkpointing
        self.model: Any = None
        self._bottom: FrozenBottom | None = None
        self._table: TokenTable | None = None
        if self.objective == "masked":
            self._vocabulary = MaskVocabulary.of(self.text.tokenizer, self._size)

    @property
    def _size(self) -> int:
        return int(self.text.config.get_text_config().vocab_size)

    def _task(self, wanted: Task | None) -> Task:
        kind = self.text.config.model_type
        fits: Task | None = None
        if not self.text.config.is_encoder_decoder:
            if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
                fits = "masked"
            elif kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                fits = "next_token"
        if fits is None:
            raise ValueError(
                f"{self.text.folder.name} (of type {kind}) was made neither with masked tokens nor with next tokens: "
                "use lightning_rec.pretraining.ContrastiveItems, or another language_model."
            )
        if wanted not in (None, fits):
            raise ValueError(
                f"objective is {wanted}, but {self.text.folder.name} (of type {kind}) was made for {fits}: leave "
                f"objective out, or name {'a decoder such as GPT-2' if fits == 'masked' else 'an encoder such as BERT'}"
                " as language_model."
            )
        return fits

    def check_data(self, datamodule: LightningDataModule) -> None:
        """Refuses all but texts."""
        wants(datamodule, PretrainingTexts, self)

    def build(self) -> None:
        """Loads the model with its head, and puts the adapter in.

        Raises:
            AdapterError: the adapter does not fit, or cannot be merged.
            ValueError: ``frozen_layers`` does not fit.
        """
        loader: Any = AutoModelForMaskedLM if self.objective == "masked" else AutoModelForCausalLM
        with LOADING, quiet_transformers():
            model, info = loader.from_pretrained(
                self.text.folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        prefix = model.base_model_prefix
        # a bare model's folder leaves the prefix out, and then so do these names
        self.head_is_new = any(not name.startswith(f"{prefix}.") for name in info["missing_keys"])
        if self.head_is_new:
            rank_zero_info(f"{self.text.folder.name} brings no head for {self.objective} training: it begins anew.")
        base = getattr(model, prefix)
        base.config.use_cache = False
        adapter = self.peft
        if adapter is not None:
            base.requires_grad_(False)
        if self.frozen_layers:
            self._bottom = FrozenBottom(base, self.frozen_layers)
            adapter = adapter and upper_adapter(adapter, self._bottom.name, self.frozen_layers)
        if self.gradient_checkpointing:
            checkpoint_gradients(model, inputs=adapter is not None and not self.frozen_layers)
        if adapter is not None:
            base = self.text._adapt(base, adapter)
            check_adapter(base, adapter)
            setattr(model, prefix, base)
        self.model, self._prefix = model, prefix
        self.train(self.training)

    @property
    def _base(self) -> Any:
        return getattr(self.model, self._prefix)

    def language_model(self) -> nn.Module:
        """The model without its head."""
        return cast(nn.Module, self._base)

    def language_parameters(self) -> list[nn.Parameter]:
        """All parameters of the model but those of a new head."""
        return list((self._base if self.head_is_new else self.model).parameters())

    def train(self, mode: bool = True) -> LanguageModelling:
        """Training or evaluation mode; frozen layers stay in evaluation mode."""
        super().train(mode)
        if self._bottom is not None and self.model is not None:
            self._bottom.train(self._base, mode)
        return self

    def prepare(self, texts: list[str]) -> None:
        """Tokenises the texts."""
        text = self.text
        table = tokenise(text.tokenizer, texts, _WHOLE, text.pad_id) if self.pack else text.tokenise(texts)
        self._table = table.to(self.device)

    def tokens(self, batch: TextBatch) -> tuple[Tensor, Tensor | None]:
        """``(k, l)`` tokens of a batch, and their mask or None."""
        assert self._table is not None
        if not self.pack:
            return self._table.padded(batch.rows)
        end = self.text.tokenizer.eos_token_id if self.objective == "next_token" else None
        return packed(self._table, batch.rows, self.text.max_tokens, end)

    def forward(self, ids: Tensor, mask: Tensor | None, asked: Tensor) -> Tensor:
        """Scores of the vocabulary where it is asked for: the head does not see the other tokens.

        Args:
            ids: ``(k, l)`` tokens.
            mask: ``(k, l)`` 1 for a token, 0 for padding, or None.
            asked: ``(k, l)`` True at ``n`` places.

        Returns:
            ``(n, v)`` float32 logits.
        """

        def keep(_: nn.Module, __: Any, output: Any) -> Any:
            output["last_hidden_state"] = output["last_hidden_state"][asked][None]
            return output

        handle = self._base.register_forward_hook(keep)
        try:
            return self.model(input_ids=ids, attention_mask=mask).logits[0].float()
        finally:
            handle.remove()

    def losses(self, batch: TextBatch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each token that is asked for, and whether it was found."""
        ids, mask = self.tokens(batch)
        if self.objective == "masked":
            hidden, asked = mask_tokens(ids, mask, self._vocabulary, self.mask_share, generator)
            logits, targets = self(hidden, mask, asked), ids[asked]
        else:
            asked, targets = next_tokens(ids, mask)
            logits = self(ids, mask, asked)
        right = logits.detach().gather(1, targets[:, None])
        return F.cross_entropy(logits, targets, reduction="none"), (logits.detach() >= right).sum(1) == 1

    def figures(self, loss: Tensor, hits: Tensor) -> dict[str, Tensor]:
        """``loss`` a token, ``perplexity``, and the share of tokens that were found (``accuracy``)."""
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": hits}
