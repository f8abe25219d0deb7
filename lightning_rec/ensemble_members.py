"""The members of an ensemble: fitted runs opened again, and their towers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_rec import checkpoint as saved
from lightning_rec.data.batch import Batch, CatalogueView, ItemBatch, UserBatch
from lightning_rec.run_files import checkpoint_config, load_checkpoint
from lightning_rec.tower_module import TowerModule, last_step
from lightning_rec.towers import ItemTower, UserTower

Normalise = Literal["z_score", "min_max", "none"]
Run = TypeVar("Run", bound=TowerModule)

#: Below this share of what it could be, a variance is rounding: all scores are equal.
NOTHING = 1e-13
#: Options of the data module that say what the towers read.
_READ = (
    "template",
    "cleaning",
    "user_template",
    "user_titles",
    "min_rating",
    "repeats",
    "popularity_half_life",
    "popularity_from",
)


def checked_weights(checkpoints: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """The weight of each run of an ensemble.

    Raises:
        ValueError: no runs, or weights that do not fit.
    """
    if not checkpoints:
        raise ValueError("An ensemble needs the checkpoint of at least one fitted run in checkpoints.")
    if weights is not None and (len(weights) != len(checkpoints) or min(weights) < 0 or not sum(weights) > 0):
        raise ValueError(
            f"weights names one weight of at least 0 for each of the {len(checkpoints)} checkpoints, and not all "
            f"of them 0; it is {list(weights)}."
        )
    return [1.0] * len(checkpoints) if weights is None else list(weights)


def newest(users: UserBatch, window: int | None) -> UserBatch:
    """The same users with the newest ``window`` events of their histories only; None keeps all."""
    width = users.history.shape[1]
    if window is None or width <= window:
        return users
    lengths = users.lengths.clamp(max=window)
    steps = torch.arange(window, device=lengths.device)
    places = ((users.lengths - lengths)[:, None] + steps).clamp(max=width - 1)
    outside = steps >= lengths[:, None]
    times = None if users.times is None else users.times.gather(1, places).masked_fill(outside, 0)
    return replace(users, history=users.history.gather(1, places).masked_fill(outside, 0), lengths=lengths, times=times)


class MemberItems(ItemTower):
    """The item vectors of all members side by side."""

    reads_variants = True  # nothing is trained, so that there are none

    def __init__(self) -> None:
        super().__init__()
        self.members: Sequence[TowerModule] = ()

    def configure(self, catalogue: CatalogueView) -> None:
        """Sums the members' widths."""
        self.dim = sum(member.item_tower.dim for member in self.members)

    def prepare(self, catalogue: CatalogueView) -> None:
        """Attaches the data to the towers of all members."""
        for member in self.members:
            member.item_tower.prepare(catalogue)
            member.user_tower.prepare(catalogue)

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, d)`` item vectors, as each member's tower returns them."""
        return torch.cat([member.item_tower(items).float() for member in self.members], 1)


class MemberUsers(UserTower):
    """The interest vectors of all members side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.members: Sequence[TowerModule] = ()
        self.windows: Sequence[int | None] = ()

    def knows(self, users: UserBatch) -> Tensor:
        """``(b,)`` True where any member knows the user."""
        return torch.stack([member.user_tower.knows(users) for member in self.members]).any(0)

    def forward(self, users: UserBatch, items: Tensor) -> Tensor:
        """``(b, 1, d)`` interest at the end of the history, as each member's tower returns it."""
        parts = []
        vectors = items.split([member.item_tower.dim for member in self.members], 1)
        for member, window, part in zip(self.members, self.windows, vectors, strict=True):
            own = newest(users, window)
            parts.append(last_step(member.user_tower(own, part), Batch(own)).float())
        return torch.cat(parts, 1)[:, None]


class AnswersTogether(TowerModule):
    """What ensembles have in common: they are not trained, and open their runs when the data is there.

    Attributes:
        member_kind: what a run is.
        checkpoints: files of ``lightning-rec fit``.
        members: the models of the runs.
        windows: how many events of a history each was fitted with; None: all.
    """

    member_kind: ClassVar[type[TowerModule]]
    checkpoints: list[str]
    members: nn.ModuleList
    windows: list[int | None]

    def setup(self, stage: str) -> None:
        """Refuses to be trained.

        Raises:
            ValueError: the command is ``fit``.
        """
        super().setup(stage)
        if stage == "fit":
            raise ValueError(
                "An ensemble has nothing to train: fit its runs one by one, then use validate, test or predict with it."
            )

    def build(self, view: CatalogueView) -> None:
        """Opens the runs.

        Raises:
            FileNotFoundError: naming a checkpoint that does not exist.
            ValueError: naming a run that does not fit the data, or cannot be opened.
        """
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        members, self.windows = open_members(self.member_kind, self.checkpoints, view, getattr(data, "hparams", {}))
        self.members.extend(members)
        users = cast(MemberUsers, self.user_tower)
        cast(MemberItems, self.item_tower).members = users.members = members
        users.windows = self.windows
        super().build(view)


def open_members(
    kind: type[Run], checkpoints: Sequence[str], view: CatalogueView, given: Mapping[str, Any]
) -> tuple[list[Run], list[int | None]]:
    """Opens the runs of an ensemble.

    Args:
        kind: what a run is.
        checkpoints: files of ``lightning-rec fit``.
        view: the data that they are to answer for.
        given: the options of the data module of that data.

    Returns:
        The models, in evaluation mode, and how many events of a history each was fitted with; None: all.

    Raises:
        FileNotFoundError: naming a checkpoint that does not exist.
        ValueError: naming a run that does not fit the data, or cannot be opened.
    """
    members, windows = [], []
    for number, path in enumerate(checkpoints, start=1):
        name = f"Member {number} of the ensemble, {path},"
        member, options = open_member(kind, Path(path), view, name)
        members.append(member)
        windows.append(options.get("max_history"))
        _compare(options, given, name)
    return members, windows


def _compare(fitted: Mapping[str, Any], given: Mapping[str, Any], name: str) -> None:
    """Warns where a run was fitted to other texts or histories than the data gives now."""
    other = [option for option in _READ if option in fitted and option in given and fitted[option] != given[option]]
    if other:
        told = ", ".join(f"{option} {fitted[option]!r} (here {given[option]!r})" for option in other)
        rank_zero_warn(f"{name} was fitted with {told}: it now reads what the ensemble's data module gives.")
    longest, here = fitted.get("max_history"), given.get("max_history")
    if longest is not None and here is not None and longest > here:
        rank_zero_warn(
            f"{name} was fitted with max_history {longest}, but the ensemble's data gives {here}: set "
            f"data.max_history to {longest}, and every member still reads its own number of events."
        )


def open_member(kind: type[Run], path: Path, view: CatalogueView, name: str) -> tuple[Run, dict[str, Any]]:
    """Builds the model of a run and loads its weights strictly.

    Args:
        kind: what the run is.
        path: a checkpoint of ``lightning-rec fit``.
        view: the data that it is to answer for.
        name: how messages name it.

    Returns:
        The model, in evaluation mode, and the options of the data module that it was fitted with.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name} is no file: give checkpoints that `lightning-rec fit` wrote.")
    loaded = load_checkpoint(path)
    model = checkpoint_config(path).get("model")
    if "catalogue" not in loaded or not isinstance(model, dict) or "class_path" not in model:
        raise ValueError(
            f"{name} cannot be built again: give a checkpoint of `lightning-rec fit`, in its run folder with the "
            "config.yaml that names its model class."
        )
    _same_data(loaded["catalogue"], view, name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "model", required=True)
    try:
        member = parser.instantiate(parser.parse_object({"model": model}))["model"]
    except Exception as error:
        raise ValueError(
            f"{name} is a {model['class_path']}, which cannot be built as a lightning_rec.{kind.__name__}: {error}"
        ) from error
    member.build(view)
    try:
        saved.on_load(member, loaded, view)
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit: {error}") from error
    member.load_state_dict(loaded["state_dict"])
    member.restored_random_state, member.restored_gradients = None, {}
    member.val_metrics, member.test_metrics = nn.ModuleList(), nn.ModuleList()
    return member.requires_grad_(False).eval(), dict(loaded.get("datamodule_hyper_parameters", {}))


def _same_data(sizes: dict[str, Any], view: CatalogueView, name: str) -> None:
    for what, digest, number, here in (
        ("items", "ids_digest", sizes["n_rows"], view.n_rows),
        ("users", "users_digest", sizes["n_users"], view.n_users),
    ):
        if sizes[digest] != getattr(view, digest):
            raise ValueError(
                f"{name} was fitted on other {what}: it knows {number - 1:,}, the data has {here - 1:,}, with other "
                "ids or in another order. The members of an ensemble share one catalogue and the same users: use the "
                "data module options that they were fitted with."
            )
