"""The rank schedule of AdaLoRA, which peft leaves to the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

#: Stands for a number of steps that only the trainer knows.
RUN_LENGTH = 1_000_000_000


@dataclass
class AdaLoraConfig(peft.AdaLoraConfig):
    """AdaLoRA (Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023).

    As ``peft.AdaLoraConfig``, but ``total_step`` may be left out: it is then the length of the run.

    Args:
        total_step: optimizer steps of the whole run; None: as many as the trainer will make.
    """

    total_step: int | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.total_step is None:
            self.total_step = RUN_LENGTH
        super().__post_init__()


def _models(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every model with AdaLoRA inside a module, by name."""
    for name, part in module.named_modules():
        if isinstance(part, peft.AdaLoraModel) and hasattr(part, "rankallocator"):
            yield name, part


def has_schedule(module: nn.Module) -> bool:
    """True where a language model inside has AdaLoRA."""
    return any(True for _ in _models(module))


def start_schedule(module: nn.Module, total_steps: float) -> None:
    """Tells the schedules how long the run is.

    Args:
        module: any module with language models inside.
        total_steps: optimizer steps of the run.

    Raises:
        ValueError: the run has no end, or is too short for the schedule.
    """
    for _, model in _models(module):
        config = model.peft_config[model.trainable_adapter_name]
        if config.target_r >= config.init_r:
            raise ValueError(
                f"AdaLoRA lowers ranks from init_r to target_r, but init_r is {config.init_r} and target_r is "
                f"{config.target_r}: raise init_r or lower target_r."
            )
        if config.total_step != RUN_LENGTH and not getattr(model, "follows_run", False):
            continue
        if not math.isfinite(total_steps):
            raise ValueError(
                "AdaLoRA needs to know how many steps the run has: set trainer.max_epochs or trainer.max_steps, or "
                "total_step in the adapter's config."
            )
        if config.tinit >= total_steps - config.tfinal:
            raise ValueError(
                f"AdaLoRA has no steps to lower its ranks in: the run has {total_steps:.0f} steps, of which tinit "
                f"takes the first {config.tinit} and tfinal the last {config.tfinal}. Lower them, or train longer."
            )
        config.total_step, model.follows_run = int(total_steps), True


def advance(module: nn.Module, step: int) -> None:
    """Sets the ranks after an optimizer step, while its gradients are still there.

    Args:
        module: any module with language models inside.
        step: number of optimizer steps made, this one included.
    """
    for _, model in _models(module):
        for name, parameter in model.model.named_parameters():
            # a tower that had nothing to encode in this step; peft takes a gradient for granted
            if parameter.grad is None and "lora_" in name and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        model.update_and_allocate(step)


def orthogonality(module: nn.Module) -> Tensor | None:
    """The paper's penalty that keeps AdaLoRA's factors orthogonal, times its weight; None without AdaLoRA."""
    total: Tensor | None = None
    for _, model in _models(module):
        config = model.peft_config[model.trainable_adapter_name]
        parts = []
        for name, p in model.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                square = p @ p.T if "lora_A" in name else p.T @ p
                parts.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=p.device)))
        if parts and config.orth_reg_weight:
            penalty = config.orth_reg_weight * torch.stack(parts).mean()
            total = penalty if total is None else total + penalty
    return total


def schedule_state(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint must hold so that a resumed run sets the same ranks; empty without AdaLoRA."""
    state = {}
    for name, model in _models(module):
        config, allocator = model.peft_config[model.trainable_adapter_name], model.rankallocator
        state[name] = {
            "total_step": config.total_step,
            "rank_pattern": config.rank_pattern,
            **{key: dict(getattr(allocator, key)) for key in ("ipt", "exp_avg_ipt", "exp_avg_unc")},
        }
    return state


def restore_schedule(module: nn.Module, state: dict[str, Any]) -> None:
    """Goes on from :func:`schedule_state`."""
    for name, model in _models(module):
        if name not in state:
            continue
        config, allocator = model.peft_config[model.trainable_adapter_name], model.rankallocator
        config.rank_pattern = state[name]["rank_pattern"]
        if config.total_step == RUN_LENGTH:
            # for an export; a resumed run sets its own length when it starts
            config.total_step, model.follows_run = state[name]["total_step"], True
        places = dict(model.model.named_parameters())
        for key in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            setattr(allocator, key, {n: value.to(places[n].device) for n, value in state[name][key].items()})
