"""Checkpoints that hold what was trained, and reload strictly.

A frozen language model is not written: it comes from its own files again. What is written are the trained parameters
(adapters, heads, id vectors), the buffers, the sizes that the towers need, and the state of the random numbers, so that
a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_rec.data.batch import CatalogueView

if TYPE_CHECKING:
    from lightning.pytorch.core.mixins import HyperparametersMixin

    from lightning_rec.tower_module import TowerModule

_PLAIN = (str, int, float, bool, type(None))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return type(value) in _PLAIN


def save_plain_hyperparameters(module: HyperparametersMixin) -> None:
    """Keeps the hyperparameters that are plain values; called from a constructor.

    Objects (towers given from Python) cannot lie in a safe checkpoint: they are given again to
    ``load_from_checkpoint``. From the command line every hyperparameter is plain.
    """
    frame = inspect.currentframe()
    with warnings.catch_warnings():
        # Lightning advises to leave out modules, which is what happens next
        warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
        module.save_hyperparameters(logger=False, frame=None if frame is None else frame.f_back)
    for name in [name for name, value in module.hparams.items() if not _is_plain(value)]:
        del module.hparams[name]


def own_names(module: nn.Module) -> set[str]:
    """Names of all that is kept of a module's state.

    Quantised layers of bitsandbytes add to it how their frozen weights are quantised, which cannot be read again.
    """
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    parts = module.named_modules(remove_duplicate=False)
    quantised = tuple(f"{name}." for name, part in parts if type(part).__module__.startswith("bitsandbytes"))
    return {name for name in module.state_dict() if name in own or not name.startswith(quantised)}


def written_names(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers that a checkpoint holds: all but frozen parameters."""
    frozen = {
        name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    }
    return own_names(module) - frozen


def on_save(module: TowerModule, checkpoint: dict[str, Any]) -> None:
    """Leaves what was trained in ``checkpoint`` and adds sizes and random state."""
    names = written_names(module)
    checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}
    checkpoint["catalogue"] = {
        "n_rows": module.n_rows,
        "n_users": module.n_users,
        "rating_range": None if module.rating_range is None else list(module.rating_range),
        "ids_digest": module.ids_digest,
        "users_digest": module.users_digest,
    }
    checkpoint["random_state"] = random_state(module.device)
    if pending := pending_gradients(module):
        checkpoint["pending_gradients"] = pending
    from lightning_rec.towers import adalora  # it loads peft, which most readers of checkpoints do without

    ranks = adalora.schedule_state(module)
    if ranks:
        checkpoint["adapter_ranks"] = ranks


def pending_gradients(module: TowerModule) -> dict[str, torch.Tensor]:
    """What has been accumulated since the last step of the optimizer, by parameter; empty right after a step.

    Devices accumulate apart from each other, and one of them writes the checkpoint: there it is left out, with a
    warning, and a resumed run steps once with fewer batches.
    """
    trainer = module._trainer
    if trainer is None or not trainer.fit_loop.epoch_loop._should_accumulate():
        return {}
    if module.world_size > 1:
        from lightning.pytorch.utilities import rank_zero_warn  # most readers of checkpoints do without Lightning

        rank_zero_warn(
            "This checkpoint was made between two steps of the optimizer (trainer.accumulate_grad_batches). What the "
            "devices have accumulated is not in it; to resume exactly, save at a multiple of accumulate_grad_batches."
        )
        return {}
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random numbers of the CPU, and of the device where that is a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Goes on with the random numbers of :func:`random_state`; a GPU's only where the run is on a GPU again."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def on_load(module: TowerModule, checkpoint: dict[str, Any], view: CatalogueView | None) -> None:
    """Builds the towers if need be, checks the keys and completes the state with what is frozen.

    Raises:
        RuntimeError: naming keys that are missing or foreign, or a catalogue that is not the checkpoint's.
    """
    sizes = checkpoint.get("catalogue")
    if sizes is None:
        raise RuntimeError(
            "This checkpoint was not written by lightning_rec: it does not say the size of its catalogue. "
            "Give a checkpoint of `lightning-rec fit`."
        )
    if not module.is_built:
        rating_range = sizes["rating_range"]
        module.build(
            CatalogueView(
                n_rows=sizes["n_rows"],
                n_users=sizes["n_users"],
                rating_range=None if rating_range is None else (rating_range[0], rating_range[1]),
                ids_digest=sizes["ids_digest"],
                users_digest=sizes["users_digest"],
            )
        )
    given: dict[str, Any] = checkpoint["state_dict"]
    if _other_catalogue(module, sizes, view):
        given = given | {"train_counts": module.train_counts}
    wanted = written_names(module)
    missing, foreign = sorted(wanted - set(given)), sorted(set(given) - wanted)
    if missing or foreign:
        raise RuntimeError(_mismatch(missing, foreign))
    current = module.state_dict()
    checkpoint["state_dict"] = {name: given.get(name, current[name]) for name in own_names(module)}
    from lightning_rec.towers import adalora

    adalora.restore_schedule(module, checkpoint.get("adapter_ranks", {}))
    gradients = checkpoint.get("pending_gradients", {})
    if "random_state" in checkpoint and (checkpoint.get("global_step", 0) > 0 or gradients):
        module.restored_random_state = checkpoint["random_state"]
        module.restored_gradients = gradients


def _other_catalogue(module: TowerModule, sizes: dict[str, Any], view: CatalogueView | None) -> bool:
    """True when text towers meet another catalogue than the one they were fitted on; id towers refuse."""
    if view is None:
        return False
    if module.user_tower.uses_ids and view.users_digest != sizes["users_digest"]:
        raise RuntimeError(
            f"The checkpoint knows {sizes['n_users'] - 1:,} users, but the data has {view.n_users - 1:,} users or "
            "other ids or another order of them. A user tower with a vector for each user fits its own users only: "
            "use the data it was fitted on, or a user tower that reads histories."
        )
    if view.n_rows == sizes["n_rows"] and view.ids_digest == sizes["ids_digest"]:
        return False
    if module.item_tower.uses_ids:
        raise RuntimeError(
            f"The checkpoint knows a catalogue of {sizes['n_rows'] - 1:,} items, but the data has {view.n_rows - 1:,} "
            "items or other ids or another order of them. An item tower with id vectors fits its own catalogue only: "
            "use the data it was fitted on, or a text item tower, which carries over."
        )
    return True


def _mismatch(missing: list[str], foreign: list[str]) -> str:
    lines = ["The checkpoint does not fit this model."]
    if missing:
        lines.append(f"The checkpoint lacks {_some(missing)}.")
    if foreign:
        lines.append(f"The model has no {_some(foreign)}.")
        near = difflib.get_close_matches(foreign[0], missing, n=1)
        if near:
            lines.append(f"{foreign[0]} may be called {near[0]} here.")
    lines.append("Use the config that the checkpoint was fitted with (config.yaml in its run folder).")
    return " ".join(lines)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
