"""The towers of an artefact, each built when it is first needed."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser
from safetensors import safe_open
from torch import Tensor, nn

from lightning_rec.checkpoint import own_names, written_names
from lightning_rec.data.batch import CatalogueView
from lightning_rec.recommend.manifest import ArtefactError, Manifest
from lightning_rec.towers import ItemTower, UserTower
from lightning_rec.towers.score import Score

TOWERS = "towers.safetensors"
#: Stands before the name of a folder of the artefact.
HERE = "artefact:"

_M = TypeVar("_M", bound=nn.Module)


class _ItemTowerNeededError(Exception):
    """A user tower asks for more of the item tower than the width of its vectors."""


class _WidthOnly:
    """Stands in for an item tower that is not built: it has a width and nothing else."""

    def __init__(self, dim: int) -> None:
        object.__setattr__(self, "_dim", dim)

    def __getattribute__(self, name: str) -> Any:
        # "__class__" too, which isinstance asks for
        if name != "dim":
            raise _ItemTowerNeededError(name)
        return object.__getattribute__(self, "_dim")


class LazyTowers:
    """Builds towers from a manifest and the weights beside it.

    Most user towers need to know of the item tower the width of its vectors only. Then the item tower, and with it the
    language model, is not built until a text is to be encoded.

    Args:
        folder: the artefact.
        manifest: its manifest.
        view: what towers may know of the catalogue; called when it is first needed.
        verify: called before the item tower is built, to check the files that it reads.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, view: Callable[[], CatalogueView], verify: Callable[[], None]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._view = view
        self._verify = verify
        self._lock = threading.RLock()
        self._item: ItemTower | None = None
        self._user: UserTower | None = None
        self.score = self._load(instantiate(Score, manifest.score, "score"), "score")  # type: ignore[type-abstract]

    def try_user(self) -> bool:
        """Builds the user tower if it can do without the item tower; says whether it is there."""
        with self._lock, torch.inference_mode(False):
            if self._user is None:
                tower = self._make(UserTower, "user_tower")  # type: ignore[type-abstract]
                try:
                    tower.configure(self._view(), _WidthOnly(self.manifest.dim))  # type: ignore[arg-type]
                except _ItemTowerNeededError:
                    return False
                self._user = self._finish_user(tower)
            return True

    @property
    def user(self) -> UserTower:
        """The user tower, in evaluation mode."""
        if self._user is None and not self.try_user():
            self._build_both()
        assert self._user is not None
        return self._user

    @property
    def item(self) -> ItemTower:
        """The item tower, in evaluation mode. Its language model is loaded here, or with the first text."""
        if self._item is None:
            self._build_both()
        assert self._item is not None
        return self._item

    def _build_both(self) -> None:
        with self._lock, torch.inference_mode(False):
            if self._item is None:
                self._verify()
                spec, models = self.manifest.item_tower, self.manifest.language_models
                self._item = build_item_tower(self.folder, spec, models, self._view())
            if self._user is None and not self.try_user():
                user = self._make(UserTower, "user_tower")  # type: ignore[type-abstract]
                user.configure(self._view(), self._item)
                self._user = self._finish_user(user)

    def _finish_user(self, tower: UserTower) -> UserTower:
        self._load(tower, "user_tower")
        tower.prepare(self._view())
        return tower.eval()

    def _make(self, kind: type[_M], name: str) -> _M:
        spec = located(getattr(self.manifest, name), self.folder, self.manifest.language_models)
        return instantiate(kind, spec, name.replace("_", " "))

    def _load(self, module: _M, name: str) -> _M:
        return load_weights(module, self.folder, name, getattr(self.manifest, name))


def build_item_tower(
    folder: Path, spec: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], view: CatalogueView
) -> Any:
    """The item tower that lies in a folder, in evaluation mode.

    Args:
        folder: the artefact, which need not be finished.
        spec: its ``class_path`` and ``init_args``.
        models: the language models in the folder, as the manifest names them.
        view: what it may know of the catalogue.
    """
    tower = instantiate(ItemTower, located(spec, folder, models), "item tower")  # type: ignore[type-abstract]
    tower.configure(view)
    encoder = getattr(tower, "encoder", None)
    if encoder is None:
        return load_weights(tower, folder, "item_tower", spec)
    # transformers and peft take seconds to import, and a tower without a language model does without them
    from lightning_rec.recommend.int8 import INT8, read_int8
    from lightning_rec.towers.language import TextEncoder

    if isinstance(encoder, TextEncoder) and (encoder.folder / INT8).is_file():
        # the only thing that is not as in training: where the model, loaded with the first text, comes from
        object.__setattr__(encoder, "_load", partial(read_int8, encoder.folder))
    return load_weights(tower, folder, "item_tower", spec)


def load_weights(module: _M, folder: Path, name: str, spec: Mapping[str, Any]) -> _M:
    """Puts the weights of a tower in; every key must be there and none too many.

    Raises:
        ArtefactError: the weights do not fit.
    """
    given = read_part(folder / TOWERS, name)
    wanted = written_names(module)
    odd = sorted(wanted ^ set(given))
    if odd:
        raise ArtefactError(
            f"{folder / TOWERS} does not fit the {name.replace('_', ' ')}, {spec['class_path']}: {odd[0]} is in one of "
            f"them only (of {len(odd)} such names). The class has changed since the export: install the version that "
            "was exported, or export the run again."
        )
    current = module.state_dict()
    module.load_state_dict({key: given.get(key, current[key]) for key in own_names(module)})
    return module.eval().requires_grad_(False)


def read_part(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one of the towers; nothing else of the file is read."""
    with safe_open(str(path), framework="pt") as file:
        return {key[len(name) + 1 :]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")}  # noqa: SIM118  # it is no dict


def located(spec: Mapping[str, Any], folder: Path, models: Mapping[str, Any]) -> dict[str, Any]:
    """A class and its arguments with the language models where they lie now.

    Raises:
        ArtefactError: a language model that the manifest does not list.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(part) for key, part in value.items()}
        if isinstance(value, list):
            return [walk(part) for part in value]
        if isinstance(value, str) and value.startswith(HERE):
            name = value.removeprefix(HERE)
            if name not in models:
                raise ArtefactError(f"The manifest in {folder} has no language model {name!r}: export the run again.")
            return str(folder / name)
        return value

    return walk(deepcopy(dict(spec)))


def instantiate(kind: type[_M], spec: Mapping[str, Any], what: str) -> _M:
    """Makes an object from its ``class_path`` and ``init_args``, as the command line does.

    Args:
        kind: what it must be a subclass of.
        spec: ``class_path`` and ``init_args``.
        what: its name in messages.

    Raises:
        ArtefactError: the class cannot be imported, or does not take the arguments.
    """
    class_path = str(spec.get("class_path", ""))
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArtefactError(
            f"The {what} is {class_path or 'not named'}, which cannot be imported ({error}). Install the package that "
            f"holds it, or put the folder of {module.partition('.')[0] or 'its module'} on PYTHONPATH: an artefact "
            "holds the weights of your own classes, not their code."
        ) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ArtefactError(f"The {what} is {class_path}, which is no {kind.__name__}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part", required=True)
    try:
        config = parser.parse_object({"part": dict(spec)})
    except Exception as error:
        raise ArtefactError(
            f"The {what}, {class_path}, does not take the arguments of the manifest ({error}). The class has changed "
            "since the export: install the version that was exported, or export the run again."
        ) from error
    return parser.instantiate(config)["part"]
