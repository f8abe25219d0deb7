"""A pretrained language model that turns texts into vectors: frozen, tuned whole, or tuned through a peft adapter."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from lightning_rec.towers.adapter_folder import load_adapter, merged_folder, read_adapter
from lightning_rec.towers.adapters import adapt
from lightning_rec.towers.frozen_layers import FrozenBottom, kept_states, upper_adapter
from lightning_rec.towers.loading import checkpoint_gradients, count_parameters, load_language_model
from lightning_rec.towers.model_folder import (
    BUNDLED,
    MODEL_FILES,
    TOKENIZER_FILES,
    find_language_model,
    with_sentence_files,
)
from lightning_rec.towers.pooling import Pooling, padded_right, pool
from lightning_rec.towers.positions import position_limit, position_options
from lightning_rec.towers.quantisation import Quantisation
from lightning_rec.towers.sentence_folder import sentence_settings
from lightning_rec.towers.shared_model import check_shared, shared_model, twin
from lightning_rec.towers.state_cache import CacheDtype
from lightning_rec.towers.text_cache import FORMAT_VERSION, VectorCache, hash_files, hash_texts
from lightning_rec.towers.tokens import TokenTable, length_batches, tokenise

Tune = Literal["frozen", "full", "adapter"]
Recompute = bool | Literal["passes"]

# A tokenizer without a limit says so with an enormous number.
_NO_LIMIT = 1_000_000
# Their old names, which exports import.
_MODEL_FILES, _TOKENIZER_FILES = MODEL_FILES, TOKENIZER_FILES

__all__ = ["BUNDLED", "Pooling", "Recompute", "TextEncoder", "Tune", "find_language_model", "pool"]


class TextEncoder(nn.Module):
    """A transformers model with pooling.

    Frozen, the model is no part of the module tree: it is loaded when the first text misses the disk cache, it is in
    no checkpoint and no optimizer, and stays in evaluation mode. Tuned, it is an ordinary submodule.

    Args:
        language_model: ``minilm``, a folder, or a name on the Hugging Face hub.
        pooling: ``mean``, ``cls`` or ``last``; None: what the files of a sentence-transformers folder state, with their
            normalisation and their length limit in place of ``max_tokens``; ``mean`` for any other model.
        max_tokens: longest text in tokens; never more than the model's own limit.
        tune: ``frozen``, ``full`` or ``adapter``; None: ``adapter`` with ``peft``, else ``frozen``.
        peft: the config of an adapter. LoRA, DoRA, rsLoRA, IA3, AdaLoRA, prefix tuning, prompt tuning, p-tuning and
            bottleneck adapters (Houlsby, Pfeiffer) are tested; peft refuses prefix tuning together with gradient
            checkpointing layer by layer.
        gradient_checkpointing: recompute activations in the backward pass: a third more time, far less memory. True
            recomputes layer by layer, and what lies between layers is kept; ``passes`` keeps nothing but the vectors of
            the texts and recomputes one pass of ``token_budget`` tokens after another, so that memory does not grow
            with the batch (gradient cache: Gao et al., "Scaling deep contrastive learning batch size under memory
            limited setup", RepL4NLP 2021). The gradient is the same.
        token_budget: most tokens of one pass through the model, padding included; None: 2,048 on a CPU, whose caches
            then hold what a layer makes, 16,384 elsewhere.
        cache_dir: folder of the disk cache; None: the environment's ``LIGHTNING_REC_CACHE``, else
            ``~/.cache/lightning_rec``.
        dtype: precision of a frozen model's weights: ``float32``, ``bfloat16`` or ``float16``.
        frozen_layers: so many of the lowest layers, and the embeddings, are not trained; their dropout is off, and
            what they make of a catalogue's tokens is kept on disk, so that a step runs only the layers above.
            Of no effect on a model that is frozen whole, which a tuned one is after its export.
        cache_dtype: precision in which hidden states lie on disk: ``float32``, or ``float16`` in half the room.
        quantisation: weights in 8 or 4 bits (``8bit``, ``4bit``), by bitsandbytes (the extra ``quantise``);
            ``none``: as they are. For frozen models and adapters. In 8 bits a text's vector varies by a few percent
            with the texts that are read beside it.
        adapter: a folder with an adapter that ``save_pretrained`` of peft wrote, here or elsewhere, in the place of
            ``peft``. It is trained on, or, with ``tune: frozen``, merged into the model once.
        shared: another encoder of the same ``language_model``, frozen or with an adapter, whose weights in memory this
            one's adapter takes too; see :mod:`lightning_rec.towers.shared_model`.
    """

    model: nn.Module | None
    plain_model: nn.Module | None

    def __init__(
        self,
        language_model: str = BUNDLED,
        pooling: Pooling | None = "mean",
        max_tokens: int = 128,
        tune: Tune | None = None,
        peft: peft.PeftConfig | None = None,
        gradient_checkpointing: Recompute = False,
        token_budget: int | None = None,
        cache_dir: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        frozen_layers: int = 0,
        cache_dtype: CacheDtype = "float32",
        quantisation: Quantisation = "none",
        adapter: str | None = None,
        shared: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        if adapter is not None:
            if peft is not None or tune == "full":
                raise ValueError(
                    f"adapter is {adapter}, which begins with an adapter that was trained before, but "
                    f"{'peft begins with a new one' if peft is not None else 'tune is full'}: give one of the two."
                )
            peft = None if tune == "frozen" else read_adapter(adapter)
        self.adapter = adapter
        self.tune: Tune = tune or ("adapter" if peft is not None else "frozen")
        if (self.tune == "adapter") != (peft is not None):
            raise ValueError(
                f"tune is {self.tune!r} and peft is {'given' if peft is not None else 'not given'}: an adapter needs a "
                "peft config, and a peft config needs tune 'adapter' (or null)."
            )
        if self.tune != "frozen" and dtype != "float32":
            raise ValueError(f"dtype {dtype!r} is for frozen models: for tuned ones set trainer.precision instead.")
        if self.tune == "full" and quantisation != "none":
            raise ValueError(f"quantisation {quantisation!r} is for frozen models and adapters: tune is 'full'.")
        if quantisation == "8bit" and frozen_layers:
            raise ValueError(
                "quantisation is '8bit', whose results vary with the texts that are read together, and frozen_layers "
                "keeps results for later steps: set frozen_layers to 0, or quantisation to 4bit."
            )
        self.folder = find_language_model(language_model)
        stated = sentence_settings(with_sentence_files(self.folder, language_model)) if pooling is None else None
        self.pooling: Pooling = pooling or (stated.pooling if stated else "mean")
        self.normalise = stated is not None and stated.normalise
        self._lower = stated is not None and stated.lower
        if stated:
            max_tokens = stated.max_tokens or _NO_LIMIT
        self.token_budget = token_budget
        self.cache_dir = cache_dir
        self.dtype = dtype
        self.frozen_layers, self.cache_dtype, self.quantisation = frozen_layers, cache_dtype, quantisation
        self._bottom: FrozenBottom | None = None
        self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        if adapter is not None and self.tune == "frozen":
            self.folder = merged_folder(adapter, self.folder, self.config, cache_dir, _MODEL_FILES)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self.width: int = self.config.get_text_config().hidden_size
        self.max_tokens = self._limit(max_tokens, getattr(peft, "num_virtual_tokens", None) or 0)
        self.pad_id = self._pad_id()
        self.peft = peft
        object.__setattr__(self, "plain_model", None)
        self._prompt_learning = False
        self._recompute_passes = gradient_checkpointing == "passes"
        if self.tune == "frozen":
            # Behind nn.Module's back: see the class docstring.
            object.__setattr__(self, "model", None)
        else:
            if shared is not None:
                check_shared(shared, peft, shared.peft)
            self.model = self._load() if shared is None else shared_model(shared)
            if peft is not None and quantisation == "none":  # before anything is put on it, for another tower
                object.__setattr__(self, "plain_model", twin(self.model))
            if frozen_layers:
                self._bottom = FrozenBottom(self.model, frozen_layers)
                peft = peft and upper_adapter(peft, self._bottom.name, frozen_layers)
            if gradient_checkpointing is True:
                checkpoint_gradients(self.model, inputs=peft is not None and not frozen_layers)
            if peft is not None:
                self.model = self._adapt(self.model, peft)
            if adapter is not None:
                load_adapter(self.model, adapter)

    def _limit(self, wanted: int, virtual: int) -> int:
        limit = wanted
        if self.tokenizer.model_max_length < _NO_LIMIT:
            limit = min(limit, self.tokenizer.model_max_length)
        positions = position_limit(self.config)
        # Prompts and prefixes of peft are virtual tokens in front of the text, and take positions too.
        return limit if positions is None else min(limit, positions - virtual)

    def _pad_id(self) -> int:
        for candidate in (self.tokenizer.pad_token_id, self.config.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None and candidate >= 0:
                return int(candidate)
        return 0

    def _load(self) -> nn.Module:
        return load_language_model(self.folder, self.config, self.dtype, self.quantisation, self.tune)

    def _adapt(self, model: nn.Module, config: peft.PeftConfig) -> nn.Module:
        config = copy.deepcopy(config)  # peft writes into it, and it belongs to the caller's hyperparameters
        config.task_type = config.task_type or "FEATURE_EXTRACTION"
        self._prompt_learning = config.is_prompt_learning
        return adapt(model, config, self.folder.name, self.max_tokens)

    @cached_property
    def frozen_parameters(self) -> int:
        """Number of parameters of a frozen language model, which are no parameters of this module; else 0."""
        return count_parameters(self.config) if self.tune == "frozen" else 0

    @property
    def fingerprint(self) -> str:
        """A hash of the bytes of the model's weights, config and tokenizer."""
        patterns = (*_MODEL_FILES, *_TOKENIZER_FILES)
        return hash_files({path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()})

    def tokenise(self, texts: Sequence[str]) -> TokenTable:
        """The tokens of texts, cut to ``max_tokens``."""
        texts = [text.lower() for text in texts] if self._lower else texts
        return tokenise(self.tokenizer, texts, self.max_tokens, self.pad_id)

    def train(self, mode: bool = True) -> TextEncoder:
        """Training or evaluation mode; frozen layers stay in evaluation mode."""
        super().train(mode)
        if self._bottom is not None and self.model is not None:
            self._bottom.train(self.model, mode)
        return self

    def running_model(self, device: torch.device) -> nn.Module:
        """The language model, on ``device``; a frozen one is loaded here when it is first needed."""
        if self.model is None:
            object.__setattr__(self, "model", self._load())
        assert self.model is not None
        return self.model.to(device) if self.tune == "frozen" and self.quantisation == "none" else self.model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        states: Tensor | None = None,
        layers: bool = False,
    ) -> Tensor:
        """One pass through the model.

        Args:
            input_ids: ``(k, l)`` tokens, padded on either side.
            attention_mask: ``(k, l)`` 1 for a token, 0 for padding; None when there is no padding.
            states: ``(k, l, h)`` what the frozen layers make of the tokens; None: they are run.
            layers: pool every layer's hidden states, embeddings first, instead of the last one's alone.

        Returns:
            ``(k, width)`` float32 vectors, or ``(k, layers + 1, width)``, which are not normalised.
        """
        model = self.running_model(input_ids.device)
        if self._prompt_learning:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            # behind virtual tokens peft gives a model no positions, which would count padding on the left
            input_ids, attention_mask = padded_right(input_ids, attention_mask)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= position_options(model, self.config, attention_mask)
        if layers:
            every = model(**inputs, output_hidden_states=True).hidden_states
            return torch.stack([pool(part, attention_mask, self.pooling) for part in every], 1)
        if states is not None and self._bottom is not None:
            with self._bottom.resumed(states):
                hidden = model(**inputs).last_hidden_state
        else:
            hidden = model(**inputs).last_hidden_state
        # Prompt tuning puts virtual tokens in front of the text's own.
        vectors = pool(hidden[:, -input_ids.shape[1] :], attention_mask, self.pooling)
        return F.normalize(vectors, dim=-1) if self.normalise else vectors

    def budget(self, device: torch.device) -> int:
        """Most tokens of one pass on a device."""
        return self.token_budget or (2048 if device.type == "cpu" else 16_384)

    def encode_table(
        self, table: TokenTable, rows: Tensor, progress: str | None = None, layers: bool = False
    ) -> Tensor:
        """Encodes rows of a token table, in small batches of like length; with gradients where they are enabled.

        Args:
            table: tokens, on the device of the model.
            rows: ``(k,)`` rows of the table.
            progress: what a progress bar says; None: no bar.
            layers: see :meth:`forward`.

        Returns:
            ``(k, width)`` float32 vectors in the order of ``rows``, or ``(k, layers + 1, width)``.
        """
        if not len(rows):
            return torch.zeros(0, *([self.n_states] if layers else []), self.width, device=rows.device)
        budget = self.budget(rows.device)
        batches = list(length_batches(table.lengths[rows], budget))
        vectors: list[Tensor] = []
        silent = progress is None or os.environ.get("LOCAL_RANK", "0") != "0"
        with tqdm(total=len(rows), desc=progress, unit="text", disable=silent, leave=False) as bar:
            for batch, part in zip(
                batches, self._passes(table, [rows[b.to(rows.device)] for b in batches], layers), strict=True
            ):
                vectors.append(part)
                bar.update(len(batch))
        places = torch.cat(batches).to(rows.device)
        order = torch.empty_like(rows)
        order[places] = torch.arange(len(rows), device=rows.device)
        return torch.cat(vectors)[order]

    def _passes(self, table: TokenTable, batches: list[Tensor], layers: bool) -> Iterator[Tensor]:
        """The vectors of one batch of rows after another."""
        threads = torch.get_num_threads()
        if self.tune != "frozen" or table.tokens.device.type != "cpu" or min(threads, len(batches)) < 2:
            again = self._recompute_passes and self.tune != "frozen" and torch.is_grad_enabled()
            for rows in batches:
                tokens = (*table.padded(rows), table.padded_states(rows), layers)
                yield checkpoint(self, *tokens, use_reentrant=False) if again else self(*tokens)
            return

        # A batch a core beats all cores on one batch: no core waits for another after every small operation.
        def encode(rows: Tensor) -> Tensor:
            if torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            with torch.inference_mode(False), torch.no_grad():  # both belong to the thread
                return self(*table.padded(rows), layers=layers)

        self.running_model(table.tokens.device)
        pool = ThreadPoolExecutor(threads)
        try:
            yield from pool.map(encode, batches)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    @torch.inference_mode(False)  # vectors made while validating may be kept, and trained on later
    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        device: torch.device | None = None,
        progress: str | None = None,
        layers: bool = False,
    ) -> Tensor:
        """Encodes texts without gradients and without the disk cache; equal texts are encoded once.

        Args:
            texts: ``n`` texts; an empty one is allowed.
            device: where to run; None: where the model is.
            progress: what a progress bar says; None: no bar.
            layers: see :meth:`forward`.

        Returns:
            ``(n, width)`` float32 vectors on ``device``, or ``(n, layers + 1, width)``.
        """
        device = device or self.device
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        table = self.tokenise(list(distinct)).to(device)
        training = self.training
        self.eval()
        try:
            # A frozen model's vectors do not depend on the precision of the step that happens to ask for them.
            with torch.autocast(device.type, enabled=self.tune != "frozen" and torch.is_autocast_enabled(device.type)):
                vectors = self.encode_table(table, torch.arange(len(distinct), device=device), progress, layers)
        finally:
            self.train(training)
        return vectors[torch.tensor([distinct[text] for text in texts], dtype=torch.long, device=device)]

    def encode_cached(self, texts: Sequence[str], device: torch.device | None = None) -> Tensor:
        """The vectors of a frozen model, from the disk cache where they are in it.

        Returns:
            ``(n, width)`` float32 vectors on the CPU.
        """
        if self.tune != "frozen":
            raise RuntimeError("Only the vectors of a frozen language model can be cached.")
        cache = VectorCache(self.cache_dir)
        key = self.cache_key(hash_texts(texts))
        vectors = cache.read(key, len(texts), self.width)
        if vectors is None:
            vectors = self.encode(texts, device, progress="Encoding texts").cpu()
            cache.write(key, vectors)
        return vectors

    def cache_key(self, *parts: str) -> str:
        """A hash of ``parts`` and of all of this encoder that vectors depend on."""
        settings = f"{FORMAT_VERSION}|{self.pooling}|{self.max_tokens}|{self.dtype}|{self.fingerprint}"
        if self.normalise or self._lower or self.quantisation != "none":
            settings += f"|{self.normalise}|{self._lower}|{self.quantisation}"
        return hashlib.sha256("|".join([settings, *parts]).encode()).hexdigest()

    def with_states(self, table: TokenTable) -> TokenTable:
        """The table with what the frozen layers make of its tokens, mapped from the disk; as it is without such."""
        return table if self._bottom is None or not len(table) else kept_states(self, self._bottom, table)

    @property
    def n_states(self) -> int:
        """Number of hidden states of a pass: the embeddings and one a layer."""
        return int(self.config.get_text_config().num_hidden_layers) + 1

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU while a frozen model is not loaded."""
        parameter = next(self.model.parameters(), None) if self.model is not None else None
        return parameter.device if parameter is not None else torch.device("cpu")
