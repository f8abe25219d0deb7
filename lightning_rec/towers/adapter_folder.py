"""Adapters as folders that plain peft reads and writes, with the head of their tower beside them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_rec.towers.adapters import AdapterError, merged
from lightning_rec.towers.loading import load_language_model
from lightning_rec.towers.model_folder import SENTENCE_FILES, TOKENIZER_FILES
from lightning_rec.towers.text_cache import default_cache_dir, hash_files

#: What a tower adds to its language model: projection, norm and the statistics of features.
HEAD = "head.safetensors"
_HEAD_PARTS = ("projection.", "norm.", "whitening.", "feature_mean", "feature_scale", "measured")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(folder: str) -> peft.PeftConfig:
    """The config of an adapter that ``save_pretrained`` of peft wrote, ready to be trained on.

    Args:
        folder: a folder of this machine with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterError: a file is not there, or what it says is unknown.
    """
    place = Path(folder).expanduser()
    if not (place / CONFIG).is_file():
        raise AdapterError(
            f"adapter is {folder}, but there is no {place / CONFIG}: name a folder that save_pretrained of peft wrote. "
            "A run that began with an adapter needs that folder again, also to go on from a checkpoint."
        )
    if not (place / WEIGHTS).is_file():
        raise AdapterError(
            f"adapter is {folder}, but there is no {place / WEIGHTS}. Weights in other files may hold code, which is "
            "never run here: load them where you trust them, and save them with safe_serialization=True."
        )
    try:
        config = peft.PeftConfig.from_pretrained(str(place))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{place / CONFIG} is no adapter that this peft knows: {error}") from error
    config.inference_mode = False
    return config


@torch.no_grad()
def load_adapter(model: Any, folder: str) -> None:
    """Gives an adapter the weights of a folder, whole.

    Args:
        model: a ``peft.PeftModel`` with the folder's config.
        folder: see :func:`read_adapter`.

    Raises:
        AdapterError: a tensor is missing, too many or of another shape, the adapter was made for another kind of model,
            or it cannot be trained on.
    """
    place = Path(folder).expanduser()
    config = model.peft_config["default"]
    made_for = (getattr(config, "auto_mapping", None) or {}).get("base_model_class")
    own = type(model.get_base_model()).__name__
    if made_for is not None and made_for != own:
        raise AdapterError(f"The adapter {folder} was made for a {made_for}, but the language model is a {own}.")
    if config.peft_type == peft.PeftType.P_TUNING or getattr(config, "prefix_projection", False):
        raise AdapterError(
            f"The adapter {folder} holds the vectors that a network made, without the network: there is nothing to "
            "train on. Begin with a new one (peft), or with virtual tokens that have no such network."
        )
    given = load_file(place / WEIGHTS)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    said = [f"it lacks {name}" for name in sorted(set(wanted) - set(given))]
    said += [f"it has {name}, which the model has not" for name in sorted(set(given) - set(wanted))]
    said += [
        f"{name} is {tuple(given[name].shape)} there and {tuple(value.shape)} here"
        for name, value in sorted(wanted.items())
        if name in given and given[name].shape != value.shape
    ]
    if said:
        more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
        raise AdapterError(f"The adapter {folder} does not fit the language model: {'; '.join(said[:3])}{more}.")
    set_peft_model_state_dict(model, given)


def merged_folder(folder: str, base: Path, config: Any, cache_dir: str | None, patterns: Sequence[str]) -> Path:
    """A language model with an adapter merged into it, kept in the cache, for a tower that trains neither.

    Args:
        folder: the adapter, see :func:`read_adapter`.
        base: folder of the language model.
        config: of the language model.
        cache_dir: see :class:`~lightning_rec.towers.language.TextEncoder`.
        patterns: the files that the language model is made of.

    Raises:
        AdapterError: it does not fit, or cannot be merged.
    """
    adapter = read_adapter(folder)
    if config.is_encoder_decoder:
        raise AdapterError(
            f"adapter is {folder} and tune is frozen, but the language model has a decoder besides its encoder, and is "
            "not written anew: set tune to adapter."
        )
    place = Path(folder).expanduser()
    files = {path for pattern in patterns for path in base.glob(pattern) if path.is_file()}
    both = hash_files(files) + hash_files({place / CONFIG, place / WEIGHTS})
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    target = cache / "merged" / hashlib.sha256(both.encode()).hexdigest()[:24]
    if target.is_dir():
        return target
    model: Any = load_language_model(base, config, "float32", "none", "adapter")
    adapter.task_type = adapter.task_type or "FEATURE_EXTRACTION"
    model = peft.get_peft_model(model, adapter)
    load_adapter(model, folder)
    whole: Any = merged(model.eval())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        made = Path(work) / "model"
        whole.save_pretrained(made)
        for path in {path for pattern in (*TOKENIZER_FILES, *SENTENCE_FILES) for path in base.glob(pattern)}:
            if path.is_file() and not (made / path.relative_to(base)).exists():
                (made / path.relative_to(base)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, made / path.relative_to(base))
        try:
            os.replace(made, target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def as_spec(config: peft.PeftConfig) -> dict[str, Any]:
    """An adapter's config as YAML has it: class and options that differ from its defaults, without folders."""
    kind = type(config)
    usual = kind().to_dict()
    left_out = {"peft_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version", "revision"}
    options = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in left_out and value != usual.get(name)
    }
    home = "peft" if getattr(peft, kind.__name__, None) is kind else kind.__module__
    return {"class_path": f"{home}.{kind.__name__}", "init_args": options}


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Writes an adapter as ``peft.PeftModel.from_pretrained`` loads it.

    Args:
        model: a ``peft.PeftModel``.
        folder: where to write.
        base: the name of the language model that the folder states, rather than the place where it lay.
    """
    configs = list(model.peft_config.values())
    names = [config.base_model_name_or_path for config in configs]
    try:
        for config in configs:
            config.base_model_name_or_path = base
        # the vocabulary is the base's own; left to find that out, peft would ask the hub
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    finally:
        for config, name in zip(configs, names, strict=True):
            config.base_model_name_or_path = name
    (folder / "README.md").unlink(missing_ok=True)  # an empty form


def restore_head(tower: nn.Module, encoder: Any) -> None:
    """Gives a tower that goes on from an adapter the head that lies beside it, if one does."""
    folder = encoder.adapter
    if folder is not None and encoder.tune == "adapter" and (Path(folder).expanduser() / HEAD).is_file():
        load_head(tower, Path(folder).expanduser())


def head_names(tower: nn.Module) -> list[str]:
    """Names of what a text tower has beside its language model, vectors of ids left out."""
    return sorted(name for name in tower.state_dict() if name.startswith(_HEAD_PARTS))


def save_head(tower: nn.Module, folder: Path) -> None:
    """Writes a text tower's head as ``head.safetensors`` into a folder; nothing where it has none.

    Args:
        tower: a text item tower or a language user tower, built.
        folder: the adapter's folder.
    """
    state = tower.state_dict()
    names = head_names(tower)
    if names:
        save_file({name: state[name].detach().cpu().clone().contiguous() for name in names}, folder / HEAD)


@torch.no_grad()
def load_head(tower: nn.Module, folder: Path) -> None:
    """Restores what :func:`save_head` wrote, whole.

    Args:
        tower: a text item tower or a language user tower, built.
        folder: the adapter's folder.

    Raises:
        AdapterError: the file lacks a tensor, has one too many, or has one of another shape; nothing is restored then.
    """
    path = folder / HEAD
    given, state = load_file(path), tower.state_dict()
    wanted = head_names(tower)
    missing, foreign = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    odd = [name for name in wanted if name in given and given[name].shape != state[name].shape]
    said = []
    if missing:
        said.append(f"it lacks {', '.join(missing)}")
    if foreign:
        said.append(f"it has {', '.join(foreign)}, which the tower has not")
    said += [f"{name} is {tuple(given[name].shape)} there and {tuple(state[name].shape)} here" for name in odd]
    if said:
        raise AdapterError(
            f"{path} does not fit the tower: {'; '.join(said)}. Give the tower the dim, projection and features of the "
            "run that wrote it, or take the file away to begin with a new head."
        )
    for name in wanted:
        state[name].copy_(given[name])
