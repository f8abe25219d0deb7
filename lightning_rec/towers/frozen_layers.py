"""Training only the top layers of a language model: what the frozen ones below make of a text never changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_rec.towers.state_cache import StateCache, as_stored
from lightning_rec.towers.tokens import TokenTable, length_batches

if TYPE_CHECKING:
    from lightning_rec.towers.language import TextEncoder

# Relative positions are made by, or shared with, the layers below: the top does not stand alone.
_ENTANGLED = ("t5", "mt5", "umt5", "deberta", "deberta-v2")


class _ReachedError(Exception):
    """Ends a pass above the frozen layers."""


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a transformers model's layers, bottom first.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(part) for part in module}) == 1
    ]
    depth = min((name.count(".") for name, _ in found), default=0)
    found = [(name, module) for name, module in found if name.count(".") == depth]
    if len(found) != 1:
        raise ValueError(
            f"The layers of {type(model).__name__} were not found ({len(found)} lists of {count} modules): "
            "frozen_layers works for models whose layers lie in one list, such as BERT and GPT-2; set it to 0."
        )
    return found[0]


class FrozenBottom:
    """The embeddings and the lowest layers of a language model: never trained, and in evaluation mode always.

    Args:
        model: the language model, before an adapter is put in.
        count: how many layers are frozen, at least 1 and fewer than there are.

    Raises:
        ValueError: ``count`` does not fit, or the model's top layers do not stand alone.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        config: Any = model.config
        if config.model_type in _ENTANGLED:
            raise ValueError(
                f"frozen_layers does not work for {config.model_type}, whose layers share relative positions made at "
                "the bottom: set it to 0."
            )
        self.name, layers = layer_list(model)
        if not 0 < count < len(layers):
            raise ValueError(
                f"frozen_layers is {count}, but this language model has {len(layers)} layers: between 0 and "
                f"{len(layers) - 1} of them can be frozen; to freeze them all set tune to frozen."
            )
        self.count = count
        self.bottom = list(layers)[:count]
        self.top = list(layers)[count:]
        self._tuple = False
        inside = {id(parameter) for layer in self.top for parameter in layer.parameters()}
        seen_top = False
        for parameter in model.parameters():  # in the order of the pass: what follows the layers is the top's too
            seen_top = seen_top or id(parameter) in inside
            if not seen_top:
                parameter.requires_grad_(False)

    def train(self, model: nn.Module, mode: bool) -> None:
        """Puts the top in training mode; dropout below it stays off, or its output could not be kept."""
        model.eval()
        model.training = mode
        for layer in self.top:
            layer.train(mode)

    def states(self, model: nn.Module, **inputs: Any) -> Tensor:
        """``(k, l, h)`` what the frozen layers make of tokens; the layers above are not run."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._tuple = isinstance(output, tuple)
            kept.append(output[0] if self._tuple else output)
            raise _ReachedError

        handle = self.bottom[-1].register_forward_hook(keep)
        try:
            model(**inputs)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return kept[0]

    @contextmanager
    def resumed(self, states: Tensor) -> Iterator[None]:
        """Within it a pass of the model starts from ``(k, l, h)`` states, and the frozen layers do nothing."""

        def give(*_: Any, **__: Any) -> Any:
            return (states,) if self._tuple else states

        for layer in self.bottom:
            layer.forward = give
        try:
            yield
        finally:
            for layer in self.bottom:
                del layer.forward


def upper_adapter(config: peft.PeftConfig, name: str, count: int) -> peft.PeftConfig:
    """A copy of an adapter's config that leaves the lowest layers alone.

    Args:
        config: the config.
        name: name of the list of layers in the model.
        count: how many layers stay as they are.

    Raises:
        ValueError: the method cannot be kept to the upper layers.
    """
    given: Any = copy.deepcopy(config)
    if config.is_prompt_learning or not hasattr(given, "exclude_modules"):
        reason = (
            "its virtual tokens enter at the bottom"
            if config.is_prompt_learning
            else "its config has no exclude_modules"
        )
        raise ValueError(
            f"frozen_layers does not work with {type(config).__name__}: {reason}. Choose an adapter that lies inside "
            "layers, such as LoraConfig, or set frozen_layers to 0."
        )
    if given.exclude_modules:
        raise ValueError("frozen_layers sets the adapter's exclude_modules itself: give one of the two only.")
    numbers = "|".join(str(number) for number in range(count))
    # all that lies in no upper layer: the lowest layers, and embeddings
    given.exclude_modules = rf"{re.escape(name)}\.({numbers})\..*|(?!{re.escape(name)}\.).*embed.*|wte|wpe"
    return given


@torch.inference_mode(False)
@torch.no_grad()
def kept_states(encoder: TextEncoder, bottom: FrozenBottom, table: TokenTable) -> TokenTable:
    """A table with what the frozen layers make of its tokens, from the disk cache where it is there.

    Raises:
        RuntimeError: the upper layers make something else of cached states than of the whole pass.
    """
    device = table.tokens.device
    model, training = encoder.running_model(device), encoder.training

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = table.padded(rows)
        with torch.autocast(device.type, enabled=False):
            states = bottom.states(model, input_ids=ids, attention_mask=mask)
        places, there = table.places(rows)
        return places[there], states[there]

    def fill(array: np.ndarray[Any, Any]) -> None:
        for batch in tqdm(
            list(length_batches(table.lengths, encoder.budget(device))), desc="Frozen layers", leave=False
        ):
            places, states = run(batch.to(device))
            array[places.cpu().numpy()] = as_stored(states, encoder.cache_dtype).cpu().numpy()

    shape = (table.tokens.shape[0], encoder.width)
    key = encoder.cache_key("layer", str(bottom.count), encoder.cache_dtype, table.digest())
    encoder.eval()
    try:
        first = table.lengths.argmax()[None]
        run(first)  # shows in which form layers hand on their states
        kept = table.with_states(StateCache(encoder.cache_dir).get(key, shape, encoder.cache_dtype, fill))
        whole, resumed = encoder.encode_table(table, first), encoder.encode_table(kept, first)
    finally:
        encoder.train(training)
    if not torch.allclose(whole, resumed, rtol=0, atol=0.02 * float(whole.abs().max())):
        raise RuntimeError(
            f"The upper layers of {encoder.config.model_type} do not go on from cached states: set frozen_layers to 0."
        )
    return kept
