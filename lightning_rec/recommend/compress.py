"""Smaller and faster language models in an artefact: fewer layers, weights of eight bits; and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.recommend.export_towers import WrittenTowers
from lightning_rec.recommend.fitted import Fitted
from lightning_rec.recommend.int8 import INT8, write_int8
from lightning_rec.recommend.lazy_towers import TOWERS, build_item_tower
from lightning_rec.recommend.refit import Target, refit, target_of
from lightning_rec.towers import LanguageUserTower, TextIdItemTower, TextItemTower

_SPEED_TEXTS = 256
_WEIGHTS = "*.safetensors*"
_ITEM_TOWER = "item_tower"


def compress(
    fitted: Fitted,
    folder: Path,
    towers: WrittenTowers,
    raw: Tensor,
    keep_layers: int | None = None,
    quantise: bool = False,
    progress: bool = True,
) -> Tensor:
    """Makes the language model of the item tower in an unfinished artefact smaller, and encodes the catalogue anew.

    Old and new items and free text live in one space, since the same compressed model encodes them all. What reads the
    features of a pruned model, the projection, was trained on those of the whole model: its first linear map is fitted
    anew, by ridge regression, so that item vectors come as near to those before as they can. Where an item has an id
    vector that is added to its text, that vector takes up the rest, and only new items and those that were never
    trained on notice a change. Of each step the size, the speed and the test NDCG@10 before and after are printed, and
    noted in the manifest.

    Args:
        fitted: the run.
        folder: holds the written towers.
        towers: what was written; it is changed.
        raw: ``(n_rows, d)`` the item vectors of the whole model.
        keep_layers: so many layers of the language model, counted from the input, are kept; None, or as many as it
            has: all.
        quantise: store its weights as int8 and compute with them (dynamic quantisation).
        progress: show progress bars.

    Returns:
        ``(n_rows, d)`` item vectors of the compressed model.

    Raises:
        ValueError: the run has no language model that could be compressed, or fewer layers than ``keep_layers``.
    """
    part = _part(fitted, towers)
    view = fitted.data.view
    steps: list[tuple[str, Callable[[nn.Module, Path], dict[str, Any]], Target | None]] = []
    if keep_layers is not None and _prunes(fitted, keep_layers):
        tower = cast(TextItemTower, fitted.module.item_tower)  # _part has looked
        whole = target_of(tower, view)
        steps.append((f"The first {keep_layers} layers", lambda model, path: _prune(model, path, keep_layers), whole))
    if quantise:
        steps.append(("Weights of 8 bits", _quantise, None))
    if not steps:
        return raw
    place = folder / part
    before = {"bytes": _size(place), **_speed(folder, towers, view), **_ndcg(fitted, raw)}
    noted = []
    for what, step, target in steps:
        model = build_item_tower(folder, towers.specs["item_tower"], towers.parts, view).encoder.running_model(
            torch.device("cpu")
        )
        towers.parts[part] |= step(model, place)
        raw, fit = _encode(folder, towers, view, raw, progress, target)
        after = {"bytes": _size(place), **_speed(folder, towers, view), **_ndcg(fitted, raw)}
        rank_zero_info(_sentence(what, before, after, fit))
        noted.append({"step": what, "before": before, "after": after} | ({"refit": fit} if fit else {}))
        before = after
    towers.parts[part]["compression"] = noted
    return raw


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The layers of a language model: the one list of modules that is as long as its config says.

    Returns:
        Its name in the model, and the list.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    config: Any = model.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    # a list inside another's layers is a part of a layer
    lists = [(name, part) for name, part in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} shows {len(lists)} lists of {count} layers where one is needed: its layers "
            "cannot be pruned. Leave keep_layers out."
        )
    return lists[0]


def _part(fitted: Fitted, towers: WrittenTowers) -> str:
    """The folder of the language model, if it can be compressed."""
    module = fitted.module
    if not isinstance(module.item_tower, TextItemTower):
        raise ValueError(
            f"keep_layers and quantise make a language model smaller, but {type(module.item_tower).__name__} is no "
            "TextItemTower: leave them out."
        )
    if any(isinstance(tower, LanguageUserTower) for tower in module.user_tower.modules()):
        raise ValueError(
            "keep_layers and quantise are for runs whose language model reads items only, and LanguageUserTower reads "
            "users with one: leave them out."
        )
    if towers.specs["item_tower"]["init_args"].get("tune") == "adapter" or (
        module.item_tower.encoder.tune == "adapter" and not towers.parts["language_model"]["merged"]
    ):
        raise ValueError(
            "The adapter lies beside its language model, which cannot be compressed alone: merge it (--merge true), or "
            "leave keep_layers and quantise out."
        )
    if module.item_tower.encoder.config.is_encoder_decoder:
        raise ValueError(
            "keep_layers and quantise do not know models of an encoder and a decoder, such as T5: leave them out."
        )
    return "language_model"


def _prunes(fitted: Fitted, keep: int) -> bool:
    """Whether so many layers are fewer than all."""
    config: Any = cast(TextItemTower, fitted.module.item_tower).encoder.config
    total = getattr(config.get_text_config(), "num_hidden_layers", None)
    if total is not None and not 1 <= keep <= total:
        raise ValueError(
            f"keep_layers is {keep}, but the language model has {total} layers: keep 1 to {total} of them."
        )
    return keep != total


def _prune(model: Any, place: Path, keep: int) -> dict[str, Any]:
    name, layers = layers_of(model)
    total = len(layers)
    model.set_submodule(name, nn.ModuleList(list(layers)[:keep]))
    config = model.config.get_text_config()
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total and key in ("layer_types", "attention_layers"):
            setattr(config, key, value[:keep])
    config.num_hidden_layers = keep
    _drop_weights(place)
    model.save_pretrained(place)
    return {"layers": keep, "of_layers": total}


def _quantise(model: Any, place: Path) -> dict[str, Any]:
    _drop_weights(place)
    write_int8(model, place)
    return {"weights": "int8"}


def _drop_weights(place: Path) -> None:
    for path in place.glob(_WEIGHTS):
        path.unlink()


@torch.no_grad()
def _encode(
    folder: Path, towers: WrittenTowers, view: CatalogueView, before: Tensor, progress: bool, target: Target | None
) -> tuple[Tensor, dict[str, float]]:
    """The catalogue by the written tower, which is changed with it.

    Features are standardised by what the new model makes of the catalogue, and with a target they are whitened by it
    too, where they were, and the projection is fitted anew.

    Returns:
        ``(n_rows, d)`` item vectors, and what there is to say of the fit.
    """
    spec = towers.specs["item_tower"]
    tower = build_item_tower(folder, spec, towers.parts, view)
    features = tower.encoder.encode(view.texts, progress="Encoding items" if progress else None)
    # whitened directions may turn when they are measured again, which only a new fit follows
    if target is not None or tower.features == "standardise":
        tower.measure(features[1:])
    tower.vectors = tower._shape(features)
    fit = {} if target is None else refit(tower, tower.vectors, target, spec["init_args"])
    raw = _catalogue(tower, view)
    if isinstance(tower, TextIdItemTower) and tower.fusion == "sum":
        tower.table.weight += (before - raw) * tower.warm
        raw = _catalogue(tower, view)
    state = load_file(folder / TOWERS)
    for name, value in tower.state_dict(prefix=f"{_ITEM_TOWER}.").items():
        if name in state or name.startswith(f"{_ITEM_TOWER}.projection."):
            state[name] = value.clone().contiguous()
    save_file(state, folder / TOWERS)
    return raw, fit


def _catalogue(tower: TextItemTower, view: CatalogueView) -> Tensor:
    raw = tower(ItemBatch(torch.arange(view.n_rows), whole=True)).float().clone()
    raw[0] = 0
    return raw


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.glob(_WEIGHTS))


def _speed(folder: Path, towers: WrittenTowers, view: CatalogueView) -> dict[str, float]:
    """Texts a second, the model being loaded."""
    encoder = build_item_tower(folder, towers.specs["item_tower"], towers.parts, view).encoder
    step = max(1, (view.n_rows - 1) // _SPEED_TEXTS)
    texts = list(dict.fromkeys(view.texts[1::step]))[:_SPEED_TEXTS]
    encoder.encode(texts[:8])
    best = min(_timed(lambda: encoder.encode(texts)) for _ in range(2))
    return {"texts_per_second": round(len(texts) / best, 1)}


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _ndcg(fitted: Fitted, raw: Tensor) -> dict[str, float | None]:
    return {"ndcg@10": fitted.test_ndcg(raw)}


def _sentence(what: str, before: dict[str, Any], after: dict[str, Any], fit: dict[str, float]) -> str:
    sizes = [value["bytes"] / 2**20 for value in (before, after)]
    speeds = [value["texts_per_second"] for value in (before, after)]
    losses = [value["ndcg@10"] for value in (before, after)]
    tested = (
        "the loss is unknown, since no user has a test target."
        if None in losses
        else f"test NDCG@10 {losses[1]:.4f}, before {losses[0]:.4f} ({losses[1] - losses[0]:+.4f})."
    )
    return (
        f"{what}: the language model takes {sizes[1]:,.1f} MiB, before {sizes[0]:,.1f}; it encodes {speeds[1]:,.0f} "
        f"texts a second, before {speeds[0]:,.0f}; {tested}"
        + (f" Vectors of new texts keep {max(fit['explained'], 0.0):.0%} of their variance." if fit else "")
    )


__all__ = ["INT8", "compress", "layers_of"]
