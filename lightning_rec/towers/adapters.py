"""Adapters on language models: checked against the model, and named, with the model's layers, where they do not fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_rec.towers import bottleneck  # noqa: F401  # registers bottleneck adapters with peft


class AdapterError(ValueError):
    """An adapter does not fit its language model."""


def linear_names(model: nn.Module) -> list[str]:
    """The distinct names of a model's linear layers, as ``target_modules`` takes them.

    A name that layers of different parents share, such as ``dense``, comes with its parent: ``output.dense``.
    """
    parents: dict[str, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name:
            parts = [part for part in name.split(".") if not part.isdigit()]
            parents[parts[-1]].add(".".join(parts[-2:]))
    return sorted(name for last, full in parents.items() for name in ({last} if len(full) == 1 else full))


def adapt(model: nn.Module, config: peft.PeftConfig, model_name: str, max_tokens: int) -> nn.Module:
    """Puts an adapter on a model.

    Args:
        model: a transformers model; it is changed in place.
        config: the adapter, which peft completes in place.
        model_name: the model's name in messages.
        max_tokens: length limit of the texts beside the virtual tokens.

    Returns:
        The ``peft.PeftModel``.

    Raises:
        AdapterError: naming the adapter, the model, the reason, and the model's layers.
    """
    kind = type(config).__name__
    names = linear_names(model)
    model_type = getattr(model.config, "model_type", "unknown")

    def misfit(reason: object) -> AdapterError:
        lines = [f"The adapter {kind} does not fit the language model {model_name} (of type {model_type}): {reason}"]
        if not config.is_prompt_learning:
            lines.append(f"Its linear layers are called {', '.join(names)}: name some of them as target_modules.")
        return AdapterError(" ".join(lines))

    wanted = getattr(config, "target_modules", None)
    if isinstance(wanted, list | set | tuple):
        modules = [name for name, _ in model.named_modules()]
        absent = [w for w in sorted(wanted) if not any(name == w or name.endswith(f".{w}") for name in modules)]
        if absent:
            raise misfit(f"it has no module called {', '.join(absent)}.")
    if config.is_prompt_learning and max_tokens < 1:
        virtual = getattr(config, "num_virtual_tokens", None)
        raise misfit(f"its positions leave no room for a text beside {virtual} virtual tokens.")
    try:
        adapted = peft.get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise misfit(f"{str(error).rstrip('.')}.") from error
    if config.is_prompt_learning:
        reason = _no_effect(adapted, next(model.parameters()).device)
        if reason is not None:
            raise misfit(reason)
    return adapted


@torch.enable_grad()
def _no_effect(model: Any, device: torch.device) -> str | None:
    """Why virtual tokens do nothing; None where they do. One pass over a text of two tokens tells.

    Models follow peft's use of their cache or they do not: some ignore a prefix without a word.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    try:
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, -2:]
        weights = torch.linspace(-1, 1, hidden.shape[-1], device=device)  # a plain sum of normed features is constant
        found = torch.autograd.grad((hidden.float() * weights).sum(), parameters, allow_unused=True)
    except Exception as error:  # whatever a foreign model raises here, this is the reason
        return f"a pass through it fails ({type(error).__name__}: {error})."
    finally:
        model.train(training)
    if all(gradient is None for gradient in found):
        return "it does not look at the virtual tokens (its attention takes no keys and values from outside)."
    return None


@contextmanager
def of_tower(tower: str) -> Iterator[None]:
    """Names the tower in an :class:`AdapterError` that is raised inside."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{tower}: {error}") from error


def merged(model: Any) -> nn.Module:
    """The language model with its adapter merged into it, equal to the two together.

    Args:
        model: a ``peft.PeftModel``, which is changed and must not be used afterwards: give a copy to keep it.

    Raises:
        AdapterError: this kind of adapter cannot be merged.
    """
    config = model.peft_config[model.active_adapter]
    if config.is_prompt_learning:
        raise AdapterError(
            f"An adapter of {type(config).__name__} cannot be merged into its language model, since it is virtual "
            "tokens and no change of weights: keep it beside the model."
        )
    if len(model.peft_config) > 1:
        raise AdapterError("A language model with an adapter for each tower cannot be merged: it is two models then.")
    try:
        return model.merge_and_unload()
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise AdapterError(f"This adapter, {type(config).__name__}, cannot be merged ({error}).") from error
