"""One language model under the adapters of two towers: its weights lie in memory once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import peft
from torch import nn

from lightning_rec.towers.adapters import AdapterError

if TYPE_CHECKING:
    from lightning_rec.towers.language import TextEncoder

# first values of LoRA that leave the weights below it as they are
_HARMLESS = (True, False, None, "gaussian", "orthogonal")


def twin(model: nn.Module) -> nn.Module:
    """A second model over the same parameters.

    Modules, their modes, hooks and buffers are its own; its parameters are the very objects of the first. So an adapter
    that is put on one is unknown to the other, and neither a pass nor a recomputation of it needs to say whose turn
    it is.
    """
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def check_shared(owner: TextEncoder, *configs: peft.PeftConfig | None) -> None:
    """Refuses adapters that would change the weights which both towers read.

    Args:
        owner: the item tower's encoder.
        configs: the adapters of both towers; None: none.

    Raises:
        AdapterError: naming the option.
    """
    if owner.tune == "full":
        raise AdapterError(
            "language_model is shared and an adapter is given, but the item tower trains the language model whole "
            "(tune: full), and the adapter would lie on weights that move: set the item tower's tune to frozen, give "
            "it an adapter of its own, or name a language_model for the user tower."
        )
    if owner.quantisation != "none" or owner.dtype != "float32":
        raise AdapterError(
            f"language_model is shared and an adapter is given, but the item tower's model is of quantisation "
            f"{owner.quantisation} and dtype {owner.dtype}: an adapter beside it needs none and float32, or the user "
            "tower a language_model of its own."
        )
    for config in configs:
        first: Any = getattr(config, "init_lora_weights", None)
        if not any(first is value or first == value for value in _HARMLESS):
            raise AdapterError(
                f"init_lora_weights is {first!r}, which changes the weights below the adapter, but both towers share "
                "them: set it to true, or name a language_model for the user tower."
            )
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise AdapterError(
                f"bias is {bias!r}, which trains biases of the language model, but both towers share them: set it to "
                "none, or name a language_model for the user tower."
            )


def shared_model(owner: TextEncoder) -> nn.Module:
    """The language model of another encoder, without that one's adapter, over the same weights.

    Args:
        owner: the item tower's encoder. A frozen one loads its model here, which stays as it is.

    Returns:
        A transformers model in training mode that no adapter is on yet.
    """
    plain = owner.plain_model if owner.plain_model is not None else owner.running_model(owner.device)
    return twin(plain).train()
