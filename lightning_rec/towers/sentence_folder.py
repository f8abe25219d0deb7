"""What the files of a sentence-transformers folder state: pooling, normalisation, length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_rec.towers.pooling import Pooling

_POOLINGS: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
# the names of older releases of the library
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True)
class SentenceSettings:
    """How a sentence-transformers folder makes a vector.

    Attributes:
        pooling: how tokens are pooled.
        normalise: whether vectors get length 1.
        max_tokens: where texts are cut; None: not stated.
        lower: whether texts are put in lower case first.
    """

    pooling: Pooling
    normalise: bool
    max_tokens: int | None
    lower: bool


def sentence_settings(folder: Path) -> SentenceSettings | None:
    """Reads ``modules.json`` and what it names.

    Returns:
        The settings, or None where the folder is not one of sentence-transformers.

    Raises:
        ValueError: the folder asks for something that this framework does not do.
    """
    index = folder / "modules.json"
    if not index.is_file():
        return None
    modules = [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in _json(index)]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ValueError(
            f"{index} lists the modules {', '.join(kinds)}; what can be followed is Transformer, Pooling and perhaps "
            "Normalize. Name a pooling (mean, cls or last) to read the language model alone."
        )
    prompt = _json(folder / "config_sentence_transformers.json").get("default_prompt_name")
    if prompt is not None:
        raise ValueError(
            f"{folder} puts its prompt {prompt!r} before every text: write the prompt into the template of the texts, "
            "and name a pooling (mean, cls or last)."
        )
    path = folder / modules[1][1] / "config.json"
    config = _json(path)
    if not config:
        raise ValueError(f"{index} names the pooling {path}, which is not there: name a pooling (mean, cls or last).")
    stated = config.get("pooling_mode", [name for flag, name in _FLAGS.items() if config.get(flag)])
    names = [stated] if isinstance(stated, str) else list(stated)
    if len(names) != 1 or names[0] not in _POOLINGS:
        raise ValueError(
            f"{path} states the pooling {' + '.join(names) or 'none'}; known are {', '.join(_POOLINGS)}. Name a "
            "pooling (mean, cls or last) instead."
        )
    transformer: dict[str, Any] = {}
    for path in sorted(folder.glob("sentence_*_config.json")):
        transformer |= _json(path)
    length = transformer.get("max_seq_length")
    return SentenceSettings(
        _POOLINGS[names[0]],
        "Normalize" in kinds,
        None if length is None else int(length),
        bool(transformer.get("do_lower_case")),
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
