"""Finding what earlier runs left: the best or last checkpoint, and the config it was fitted with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml


def resolve_checkpoint(wanted: str, root: str | None) -> Path:
    """The checkpoint file that is meant.

    Args:
        wanted: a file, or ``best`` or ``last`` of the newest run below ``root``.
        root: ``trainer.default_root_dir``; None is the working directory.

    Raises:
        FileNotFoundError: naming where it was looked for.
    """
    if wanted not in ("best", "last"):
        path = Path(wanted)
        if not path.is_file():
            raise FileNotFoundError(f"ckpt_path names {wanted}, which is no file. Give a checkpoint, or best or last.")
        return path
    folder = Path(root or ".")
    found = sorted(folder.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"There is no last.ckpt below {folder.resolve()}, so ckpt_path: {wanted} means nothing. Run fit first, set "
            "trainer.default_root_dir to the folder it used, or give a file."
        )
    if wanted == "last":
        return found[-1]
    callbacks = load_checkpoint(found[-1]).get("callbacks", {})
    for name, state in callbacks.items():
        if "Checkpoint" in name and state.get("best_model_path"):
            # by name, since the folder may have been moved
            best = found[-1].with_name(Path(state["best_model_path"]).name)
            if best.is_file():
                return best
    raise FileNotFoundError(
        f"{found[-1]} names no best checkpoint that still exists: it was removed, or nothing was ever validated (no "
        "user or impression to validate, or trainer.limit_val_batches: 0). Use ckpt_path: last, or give a file."
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without executing anything in it, on a CPU wherever it was saved."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def checkpoint_config(path: Path) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint: its ``config.yaml``, else what the checkpoint itself says."""
    saved = path.resolve().parent.parent / "config.yaml"
    if saved.is_file():
        config = yaml.safe_load(saved.read_text(encoding="utf-8"))
        config.pop("ckpt_path", None)
        return config
    checkpoint = load_checkpoint(path)
    config = {}
    for name, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        values = dict(checkpoint.get(key, {}))
        values.pop("_instantiator", None)
        class_path = values.pop("_class_path", None)
        if class_path is not None:
            config[name] = {"class_path": class_path, "init_args": values}
    return config
