"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

Schedule = Literal["constant", "cosine", "linear"]


def parameter_groups(
    module: nn.Module,
    language: Iterable[nn.Parameter],
    lr: float | None,
    language_lr: float,
    weight_decay: float | None,
) -> list[dict[str, Any]]:
    """Groups of trainable parameters: language model or not, with weight decay or not.

    Biases, norms and other parameters of one dimension or none are not decayed (Loshchilov and Hutter, ICLR 2019, and
    the practice since BERT).

    Args:
        module: the whole model.
        language: parameters of pretrained language models, which get ``language_lr``.
        lr: learning rate of all others; None leaves it to the optimizer's own setting.
        language_lr: learning rate of the language models.
        weight_decay: decay of matrices; None leaves it to the optimizer's own setting.

    Returns:
        Groups for a torch optimizer; empty groups are left out.
    """
    of_language = {id(parameter) for parameter in language}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in of_language, parameter.ndim > 1), []).append(parameter)
    result = []
    for (is_language, decayed), parameters in sorted(groups.items(), key=lambda item: item[0]):
        name = f"{'language' if is_language else 'towers'}{'' if decayed else '_no_decay'}"
        group: dict[str, Any] = {"name": name, "params": parameters}
        if is_language or lr is not None:
            group["lr"] = language_lr if is_language else lr
        if not decayed or weight_decay is not None:
            group["weight_decay"] = weight_decay if decayed else 0.0
        result.append(group)
    return result


def fused(module: LightningModule) -> bool:
    """Whether AdamW steps in one kernel: on a CPU it takes half the time of the default.

    Lightning lets no fused optimizer clip gradients in mixed precision, so there it is the default one.
    """
    trainer = module._trainer
    mixed = trainer is not None and isinstance(trainer.precision_plugin, MixedPrecision)
    return module.device.type == "cpu" and not (mixed and trainer is not None and trainer.gradient_clip_val)


def warm_up(schedule: Schedule, warmup_steps: int, total_steps: float) -> Callable[[int], float]:
    """The factor on the learning rate at each step: linear warm-up, then ``constant``, ``cosine`` or ``linear`` to 0.

    Raises:
        ValueError: when a decaying schedule does not know its end.
    """
    if schedule != "constant" and not math.isfinite(total_steps):
        raise ValueError(f"schedule: {schedule} needs an end: set trainer.max_epochs or trainer.max_steps.")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done

    return factor


def scheduler(optimizer: Optimizer, schedule: Schedule, warmup_steps: int, total_steps: float) -> LambdaLR:
    """The learning-rate scheduler of :func:`warm_up`."""
    return LambdaLR(optimizer, warm_up(schedule, warmup_steps, total_steps))


def named_scheduler(made: Any) -> dict[str, Any]:
    """How Lightning is to step a scheduler that was named: once an epoch, or once a step where it counts steps.

    Raises:
        ValueError: it waits for a figure, and does not say for which.
    """
    if isinstance(made, OneCycleLR | CyclicLR):
        return {"scheduler": made, "interval": "step"}
    if isinstance(made, ReduceLROnPlateau):
        if not hasattr(made, "monitor"):
            raise ValueError(
                "torch.optim.lr_scheduler.ReduceLROnPlateau does not say which figure it waits for: set lr_scheduler "
                "to {class_path: lightning.pytorch.cli.ReduceLROnPlateau, init_args: {monitor: val/ndcg@10, mode: "
                "max}}."
            )
        return {"scheduler": made, "monitor": made.monitor}
    return {"scheduler": made}


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group: learning rate, decay and so on."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def keep_settings(
    optimizers: Iterable[Optimizer], schedulers: Iterable[LRSchedulerConfig], configured: list[dict[str, Any]]
) -> None:
    """Puts the settings of the config back, after a checkpoint has brought its own along.

    Moments, step counts and the place in the schedule stay those of the checkpoint.

    Args:
        optimizers: the optimizer of the run.
        schedulers: its scheduler.
        configured: what :func:`settings` said before the checkpoint was loaded.
    """
    for optimizer in optimizers:
        for group, wanted in zip(optimizer.param_groups, configured, strict=True):
            base = group.get("initial_lr", group["lr"])
            group.update({name: value for name, value in wanted.items() if name not in ("lr", "initial_lr")})
            if wanted["lr"] is not None and base:
                group["lr"] = group["lr"] * (wanted["lr"] / base)
            if "initial_lr" in group:
                group["initial_lr"] = wanted["lr"]
    for entry in schedulers:
        if hasattr(entry.scheduler, "base_lrs"):
            entry.scheduler.base_lrs = [wanted["lr"] for wanted in configured]
