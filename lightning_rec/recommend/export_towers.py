"""Writing towers and their language models into an artefact."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_rec.checkpoint import written_names
from lightning_rec.recommend.fitted import Fitted
from lightning_rec.recommend.lazy_towers import HERE, TOWERS
from lightning_rec.towers import LanguageUserTower, NewsItemTower, TextIdItemTower, TextItemTower, Tower

# what a folder of a language model is made of; nothing else of it is read or copied
from lightning_rec.towers.adapter_folder import as_spec, save_adapter, save_head
from lightning_rec.towers.adapters import AdapterError, merged
from lightning_rec.towers.language import _MODEL_FILES, _TOKENIZER_FILES, TextEncoder
from lightning_rec.towers.language_user import settings_of
from lightning_rec.towers.model_folder import BUNDLED, SENTENCE_FILES

USER_ADAPTER = "user_adapter"
_SERVING = {"cache_dir": None, "gradient_checkpointing": False}
_TEXT_TOWERS = (TextItemTower, TextIdItemTower, LanguageUserTower)


@dataclass
class WrittenTowers:
    """What was written.

    Attributes:
        specs: ``class_path`` and ``init_args`` of ``item_tower``, ``user_tower`` and ``score``.
        parts: the parts of the manifest: language models and adapters.
    """

    specs: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_towers(fitted: Fitted, folder: Path, merge: bool) -> WrittenTowers:
    """Writes the weights of both towers and of the score, and the language models.

    A frozen language model is copied. One with an adapter is copied too; the adapter lies in the towers' file, and
    as a Hugging Face folder beside it. With ``merge``, and for one tuned whole, what was tuned is in the copy, and the
    tower is written as one with a frozen language model, which is loaded when it is first needed. A news tower stays as
    it is: what was tuned lies in the towers' file, and so do its vocabularies and the vectors of their names.

    Args:
        fitted: the run.
        folder: where to write.
        merge: merge adapters into the language models.

    Raises:
        ValueError: ``merge`` without an adapter, or with one that cannot be merged.
    """
    written = WrittenTowers()
    state: dict[str, Tensor] = {}
    for name in ("item_tower", "user_tower", "score"):
        module = getattr(fitted.module, name)
        names, current = written_names(module), module.state_dict()
        state |= {f"{name}.{key}": current[key] for key in names}
        written.specs[name] = copy.deepcopy(fitted.spec(name))
    sources: dict[str, str] = {}  # a frozen folder -> its part
    adapters = 0
    item_model = str(written.specs["item_tower"]["init_args"].get("language_model") or BUNDLED)
    for name in ("item_tower", "user_tower"):
        for prefix, spec, tower in _nested(written.specs[name], getattr(fitted.module, name), name):
            args = spec["init_args"]
            # what belongs to this machine, or to training
            args |= {key: value for key, value in _SERVING.items() if key in args}
            if isinstance(tower, NewsItemTower):
                _forget_files(tower, args)
            holder = tower.text if isinstance(tower, NewsItemTower) and tower.text_fields else tower
            encoder = holder._modules.get("encoder")  # one that is shared is not among its modules
            if not isinstance(encoder, TextEncoder):
                continue
            adapters += encoder.tune == "adapter"
            if (
                args.get("adapter") is not None
            ):  # what it began with is in the weights, and its folder is this machine's
                args["adapter"] = None
                if encoder.peft is not None:
                    args["peft"] = as_spec(encoder.peft)
            shares = isinstance(tower, LanguageUserTower) and tower.shared  # an adapter on the item tower's model
            if shares and not merge:
                _write_adapter(tower, encoder, folder / USER_ADAPTER, _public(item_model))
                written.parts[USER_ADAPTER] = {"kind": "adapter", "of": "language_model"}
                continue
            if shares:  # two models from here on
                args |= settings_of(cast(TextItemTower, fitted.module.item_tower))
            source = str(encoder.folder.resolve())
            plain = encoder.tune == "frozen" or (encoder.tune == "adapter" and not merge)
            if plain and source in sources:
                part = sources[source]
            else:
                part = _free("language_model" if name == "item_tower" else "user_language_model", written.parts)
                tuned = _write_model(encoder, folder / part, type(tower) in _TEXT_TOWERS, merge)
                written.parts[part] = {
                    "kind": "language_model",
                    "lazy": True,
                    "name": _public(str(args.get("language_model") or encoder.folder)),
                    "tune": encoder.tune,
                    "merged": tuned,
                }
                if plain:
                    sources[source] = part
                if tuned:
                    _freeze(state, prefix, args, encoder.width, item=isinstance(tower, TextItemTower))
            if encoder.tune == "adapter":
                at = _free("adapter" if name == "item_tower" else USER_ADAPTER, written.parts)
                _write_adapter(tower, encoder, folder / at, _public(str(args.get("language_model") or "")))
                written.parts[at] = {"kind": "adapter", "of": part}
            args["language_model"] = HERE + part
    if merge and not adapters:
        raise ValueError("merge is for runs with an adapter (model.item_tower.init_args.peft), and this run has none.")
    save_file({key: value.detach().cpu().clone().contiguous() for key, value in state.items()}, folder / TOWERS)
    return written


def _nested(spec: dict[str, Any], module: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any], nn.Module]]:
    """A tower and the towers inside it, each with its arguments and the prefix of its weights."""
    spec["init_args"] = dict(spec.get("init_args") or {})
    yield prefix, spec, module
    for name, value in spec["init_args"].items():
        part = getattr(module, name, None)
        if isinstance(value, dict) and "class_path" in value and isinstance(part, Tower):
            yield from _nested(value, part, f"{prefix}.{name}")


def _free(name: str, taken: dict[str, Any]) -> str:
    number, found = 2, name
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found


def _public(name: str) -> str:
    """A language model's name without the folders of this machine."""
    return Path(name).name if Path(name).expanduser().is_dir() else name


def _write_model(encoder: TextEncoder, folder: Path, known: bool, merge: bool) -> bool:
    """Writes the language model; says whether what was tuned is in it."""
    folder.mkdir()
    tuned = known and (encoder.tune == "full" or (encoder.tune == "adapter" and merge))
    halved = encoder.config.is_encoder_decoder  # the encoder alone is not a model that transformers finds by itself
    if merge and encoder.tune == "adapter" and (halved or not known):
        raise ValueError(
            "This adapter cannot be merged into its language model: leave merge out. The adapter is exported beside it."
        )
    tuned = tuned and not halved
    if merge and encoder.tune == "adapter" and encoder.quantisation != "none":
        raise ValueError(
            f"This adapter was trained beside weights in {encoder.quantisation}, and merged into whole ones it would "
            "say something else: leave merge out. The adapter is exported beside the model."
        )
    for pattern in (*_MODEL_FILES, *_TOKENIZER_FILES, *SENTENCE_FILES):
        for path in encoder.folder.glob(pattern):
            if path.is_file() and not (tuned and ".safetensors" in path.name):
                place = folder / path.relative_to(encoder.folder)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)
    if tuned:
        model: Any = copy.deepcopy(encoder.model)
        if encoder.tune == "adapter":
            try:
                model = merged(model)
            except AdapterError as error:
                raise AdapterError(f"{error} Leave merge out: the adapter is exported beside the model.") from error
        state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=state)
    return tuned


def _freeze(state: dict[str, Tensor], prefix: str, args: dict[str, Any], width: int, item: bool) -> None:
    """Makes the arguments and weights of a tuned tower those of a frozen one that computes the same."""
    for key in [key for key in state if key.startswith(f"{prefix}.encoder.")]:
        del state[key]
    args |= {"tune": "frozen", "peft": None}
    if "quantisation" in args:
        args["quantisation"] = "none"  # what was tuned is written in full precision
    if item:
        args["features"] = "raw"
        state[f"{prefix}.feature_mean"] = torch.zeros(width)
        state[f"{prefix}.feature_scale"] = torch.ones(width)
        state[f"{prefix}.measured"] = torch.ones((), dtype=torch.bool)


def _write_adapter(tower: nn.Module, encoder: TextEncoder, folder: Path, base: str) -> None:
    """Writes the adapter as a folder that ``peft.PeftModel.from_pretrained`` loads, with the tower's head in it."""
    save_adapter(encoder.model, folder, base)
    if not isinstance(tower, NewsItemTower):  # whose views have no use for a head of one text
        save_head(tower, folder)


def _forget_files(tower: NewsItemTower, args: dict[str, Any]) -> None:
    """Leaves the files of ready-made vectors out of a news tower's arguments: the vectors are among its weights."""
    if args.get("entity_vectors") is not None:
        args |= {"entity_vectors": None, "tune_entities": True}  # vectors that are not tuned come from a file
    words = args.get("words")
    if words is not None and words.get("vectors") is not None:
        args["words"] = words | {"vectors": None, "tune": True}
    if (words is not None or not tower.text_fields) and "language_model" in args:
        args["language_model"] = BUNDLED  # which plays no part
