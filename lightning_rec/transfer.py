"""Another run's towers as the beginning of a run: text towers carry over whole, vectors of ids do not."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_rec.checkpoint import written_names
from lightning_rec.towers.vocabulary import NamedVectors

if TYPE_CHECKING:
    from lightning_rec.tower_module import TowerModule

_PARTS = ("item_tower", "user_tower", "score", "age", "popularity")
_NOTHING = torch.zeros(())


def start_from(module: TowerModule, path: str) -> list[str]:
    """Copies the weights of a fitted run into the towers of one that begins.

    What belongs to a catalogue or to users (a vector a row) is copied only where the other run had the same ones;
    otherwise it begins anew. Of tables with a name a vector, such as categories and entities of news, those names are
    copied that both runs have. Everything else of both towers and of the score is copied: adapters or a tuned language
    model, projections and the statistics of their features, blocks, positions (Hou et al., "Towards universal sequence
    representation learning for recommender systems", KDD 2022, carry a sequence model over domains in this way).

    Args:
        module: built, not fitted.
        path: a checkpoint that ``lightning-rec fit`` wrote.

    Returns:
        Names of what begins anew.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: no checkpoint of ours; weights of another shape; or nothing that could be copied.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"start_from names {path}, which is no file: name a checkpoint of `lightning-rec fit`.")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    sizes, given = checkpoint.get("catalogue"), checkpoint.get("state_dict", {})
    if sizes is None:
        raise RuntimeError(f"{path} was not written by lightning_rec: name a checkpoint of `lightning-rec fit`.")
    state = module.state_dict()
    wanted = sorted(name for name in written_names(module) if name.split(".", 1)[0] in _PARTS)
    own = {
        name
        for digest, rows in (("ids_digest", "n_rows"), ("users_digest", "n_users"))
        if sizes[digest] != getattr(module, digest)
        for name in wanted
        if state[name].shape[:1] == (getattr(module, rows),) and given.get(name, _NOTHING).shape[:1] == (sizes[rows],)
    }
    tables = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, NamedVectors) and f"{name}.letters" in given and f"{name}.vectors" in given
    }
    by_name = {f"{name}.{kind}" for name in tables for kind in ("letters", "vectors")}
    found = [name for name in wanted if name not in own and name not in by_name and name in given]
    for name in found:
        if state[name].shape != given[name].shape:
            raise RuntimeError(
                f"{name} has the shape {tuple(given[name].shape)} in {path} and {tuple(state[name].shape)} here: "
                "give the towers the widths and options of the run to start from (config.yaml in its folder)."
            )
    for name, table in tables.items():
        if given[f"{name}.vectors"].shape[1:] != table.vectors.shape[1:]:
            raise RuntimeError(
                f"{name} has vectors of {given[f'{name}.vectors'].shape[1]} numbers in {path} and of {table.width} "
                "here: give the towers the widths and options of the run to start from (config.yaml in its folder)."
            )
    if not found and not tables:
        near = difflib.get_close_matches(wanted[0], given, n=1) if wanted else []
        raise RuntimeError(
            f"{path} holds nothing that these towers have, except vectors of its own ids"
            + (f"; {near[0]} there may be called {wanted[0]} here" if near else "")
            + ". Start from a run with the same text and user towers."
        )
    with torch.no_grad():
        for name in found:
            state[name].copy_(given[name])
    for name, table in tables.items():
        shared = table.take(given[f"{name}.letters"], given[f"{name}.vectors"])
        rank_zero_info(f"{shared:,} of the {len(table):,} names of {name} are known to {path}.")
    found += [name for name in wanted if name in by_name]
    left = [name for name in wanted if name not in found]
    rank_zero_info(
        f"Started from {path}: {len(found):,} of {len(wanted):,} tensors of the towers were copied."
        + (f" These begin anew: {', '.join(left[:5])}{' …' if len(left) > 5 else ''}." if left else "")
    )
    return left
