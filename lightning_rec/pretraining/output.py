"""What pretraining leaves: a plain Hugging Face folder that a tower names as its language model."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.utils import logging as transformers_logging

from lightning_rec.recommend.publish import new_folder
from lightning_rec.run_files import checkpoint_config, load_checkpoint
from lightning_rec.towers.adapters import AdapterError, merged
from lightning_rec.towers.loading import LOADING
from lightning_rec.towers.model_folder import SENTENCE_FILES, TOKENIZER_FILES

if TYPE_CHECKING:
    from lightning_rec.pretraining.module import PretrainingModule

#: Says where a folder comes from, and that it may be replaced.
MARK = "pretraining.json"


def best_checkpoint(trainer: Trainer) -> Path | None:
    """The checkpoint with the best monitored figure, or None where nothing is monitored or kept."""
    callback = trainer.checkpoint_callback
    path = getattr(callback, "best_model_path", "") if getattr(callback, "monitor", None) else ""
    return Path(path) if path and Path(path).is_file() else None


def check_folder(folder: Path) -> None:
    """Refuses a place that holds something else, which would be replaced.

    Raises:
        ValueError: naming it.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / MARK).is_file() or not any(folder.iterdir()))):
        raise ValueError(
            f"{folder} exists and was not written by pretraining: name a new folder as model.output, or move away "
            "what is there."
        )


def check_adapter(model: Any, config: peft.PeftConfig) -> None:
    """Refuses, before training, an adapter that could not be merged at its end.

    Raises:
        AdapterError: naming the adapter and the remedy.
    """
    try:
        merged(copy.deepcopy(model))
    except AdapterError as error:
        raise AdapterError(
            f"Pretraining writes one plain language model, into which {type(config).__name__} cannot go: {error} "
            "Choose an adapter that can be merged, such as peft.LoraConfig, or leave peft out."
        ) from error


def without_adapter(model: nn.Module) -> nn.Module:
    """The model itself, or a copy with its adapter merged."""
    return merged(copy.deepcopy(model)) if isinstance(model, peft.PeftModel) else model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers does not tell that a head or a pooler is new or not wanted, which is as it should be."""
    level, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if progress:
            transformers_logging.enable_progress_bar()


@contextmanager
def weights_of(module: nn.Module, checkpoint: Path | None) -> Iterator[None]:
    """Within it the module has the weights of a checkpoint; None: its own."""
    if checkpoint is None:
        yield
        return
    own, given = module.state_dict(), load_checkpoint(checkpoint)["state_dict"]
    kept = {name: own[name].clone() for name in given}
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                own[name].copy_(value)


def whole_model(folder: Path) -> Any:
    """The model of a folder as ``AutoModel`` loads it, without a pooler that the folder does not have."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # a folder that holds T5's encoder alone would be given a decoder of random weights
    halved = "t5" in config.model_type and not config.is_encoder_decoder
    with LOADING, quiet_transformers():
        model, info = (AutoModelForTextEncoding if halved else AutoModel).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    if any(name.startswith("pooler.") for name in info["missing_keys"]):
        model.pooler = None
    return model


def write_language_model(module: PretrainingModule, folder: Path, checkpoint: Path | None, protocol: str) -> None:
    """Writes the language model of a module, whole or not at all; what pretraining left there before is replaced.

    The folder holds the weights without any head as safetensors, the config, the tokenizer, and what a
    sentence-transformers folder states of pooling where that still holds. A pooler is the base's own, or absent.

    Args:
        module: built.
        folder: the place.
        checkpoint: the checkpoint whose weights the module has; None: those of the last step.
        protocol: what was measured on.

    Raises:
        ValueError: the place holds something else.
    """
    base = module.text.folder
    whole = whole_model(base)
    part = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    found = part.load_state_dict(without_adapter(module.language_model()).state_dict(), strict=False)
    odd = [*found.unexpected_keys, *(name for name in found.missing_keys if not name.startswith("pooler."))]
    if odd:
        raise RuntimeError(f"{type(whole).__name__} and the trained model differ in {', '.join(odd[:5])}.")
    facts = {
        "module": type(module).__name__,
        "language_model": base.name,
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "validation": protocol,
    }
    patterns = (*TOKENIZER_FILES, *(SENTENCE_FILES if module.keeps_sentence_files else ()))
    with new_folder(folder.absolute(), check_folder) as place:
        whole.save_pretrained(place)
        for path in sorted({path for pattern in patterns for path in base.glob(pattern) if path.is_file()}):
            target = place / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        (place / MARK).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    of = "the last step" if checkpoint is None else checkpoint.name
    rank_zero_info(f"The language model of {of} was written to {folder}: name the folder as a tower's language_model.")


def export_language_model(checkpoint: Path, output: str) -> None:
    """Writes the language model of a checkpoint, such as that of a run that was stopped.

    Args:
        checkpoint: of a pretraining run; its data is not needed.
        output: the folder to write.

    Raises:
        ValueError: the place holds something else.
    """
    from lightning_rec.pretraining.module import PretrainingModule

    check_folder(Path(output))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    module = parser.instantiate(parser.parse_object({"model": checkpoint_config(checkpoint)["model"]}))["model"]
    assert isinstance(module, PretrainingModule)
    loaded = load_checkpoint(checkpoint)
    module.on_load_checkpoint(loaded)
    module.load_state_dict(loaded["state_dict"])
    write_language_model(module, Path(output), checkpoint, "")
