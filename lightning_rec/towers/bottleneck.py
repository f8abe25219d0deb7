"""Bottleneck adapters, which peft lacks: a small network after a sublayer of every block of a language model.

They are registered with peft when this module is imported, so that ``get_peft_model``, ``save_pretrained`` and
``PeftModel.from_pretrained`` know them wherever ``lightning_rec`` was imported before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

BOTTLENECK = "BOTTLENECK"
#: The last linear layer of attention and of feed-forward in one block, as patterns of their whole names: families of
#: models that share names share a line.
_SUBLAYERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "ernie"),
        r".*\.attention\.output\.dense",
        r".*\.\d+\.output\.dense",
    ),
    (("mpnet",), r".*\.attention\.attn\.o", r".*\.\d+\.output\.dense"),
    (("distilbert",), r".*\.attention\.out_lin", r".*\.ffn\.lin2"),
    (("albert",), r".*\.attention\.dense", r".*\.ffn_output"),
    (("modernbert",), r".*\.attn\.Wo", r".*\.mlp\.Wo"),
    (("gpt2", "gpt_bigcode"), r".*\.attn\.c_proj", r".*\.mlp\.c_proj"),
    (("gpt_neox",), r".*\.attention\.dense", r".*\.mlp\.dense_4h_to_h"),
    (("opt", "bart"), r".*\.self_attn\.out_proj", r".*\.fc2"),
    (("t5", "mt5"), r".*\.SelfAttention\.o", r".*\.DenseReluDense\.wo"),
    # Llama, Qwen, Mistral, Gemma, Phi-3 and their kin
    ((), r".*\.self_attn\.o_proj", r".*\.mlp\.down_proj"),
)
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass
class BottleneckConfig(peft.PeftConfig):
    """A bottleneck adapter: ``h + up(activation(down(h)))`` on the output ``h`` of a sublayer.

    ``houlsby`` puts one after attention and one after feed-forward of every block (Houlsby et al., "Parameter-Efficient
    Transfer Learning for NLP", ICML 2019); ``pfeiffer`` one after feed-forward only (Pfeiffer et al., "AdapterFusion",
    EACL 2021), which has half the parameters. Both act on the sublayer's last linear layer, before the block's own skip
    connection and norm; AdapterFusion's second pass through that norm is left out. They cannot be merged into
    the model, since the activation stands between their matrices.

    Args:
        placement: ``houlsby`` or ``pfeiffer``.
        width: width of the bottleneck; None: the width of the layer divided by ``reduction_factor``.
        reduction_factor: how many times narrower than the layer the bottleneck is, where ``width`` is None.
        activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.
        residual: add the sublayer's output itself. Without it a fresh adapter is not the identity.
        init_std: standard deviation of the first values of the up-projection; 0: a fresh adapter changes nothing.
        dropout: share of the bottleneck's features dropped in training.
        target_modules: the layers by hand, as in ``peft.LoraConfig``; then ``placement`` is not looked at.
        exclude_modules: layers to leave out.
        modules_to_save: other modules to train whole and to save beside the adapter.
    """

    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    width: int | None = None
    reduction_factor: int = 16
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    residual: bool = True
    init_std: float = 0.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: naming the option.
        """
        super().__post_init__()
        # peft's enumeration cannot grow; its members are strings, and its tables are read by string
        self.peft_type = BOTTLENECK
        if self.placement not in ("houlsby", "pfeiffer"):
            raise ValueError(f"placement is {self.placement!r}: a bottleneck adapter is placed houlsby or pfeiffer.")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}: choose one of {', '.join(_ACTIVATIONS)}.")
        if (self.width is not None and self.width < 1) or self.reduction_factor < 1:
            raise ValueError(
                f"width is {self.width} and reduction_factor is {self.reduction_factor}: both must be at least 1."
            )


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer followed by bottleneck adapters.

    Args:
        base_layer: the layer, with ``d`` output features.
        adapter_name: name of the first adapter.
        config: its config.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_config",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_config: dict[str, BottleneckConfig] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Adds an adapter."""
        layer: Any = self.get_base_layer()
        weight = layer.weight
        # Conv1D of GPT-2 keeps its weight as (in, out); one in 4 bits is packed, so its shape says nothing
        features = int(layer.out_features if isinstance(layer, nn.Linear) else weight.shape[1])
        width = config.width or max(1, features // config.reduction_factor)
        down, up = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.zeros_(down.bias)
        if config.residual:
            nn.init.normal_(up.weight, std=config.init_std)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = down.to(weight.device)
        self.bottleneck_up[adapter_name] = up.to(weight.device)
        self.bottleneck_config[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., d)`` the layer's output after the active adapters."""
        h = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return h
        for name in self.active_adapters:
            if name not in self.bottleneck_down:
                continue
            config, down = self.bottleneck_config[name], self.bottleneck_down[name]
            inner = h.to(down.weight.dtype) if not torch.is_autocast_enabled(h.device.type) else h
            inner = _ACTIVATIONS[config.activation]()(down(inner))
            inner = nn.functional.dropout(inner, config.dropout, self.training)
            out = self.bottleneck_up[name](inner).to(h.dtype)
            h = h + out if config.residual else out
        return h

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses."""
        raise NotImplementedError(_NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters; made by ``peft.get_peft_model``."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            attention, feed_forward = sublayers(self.model, str(model_config.get("model_type")))
            both = peft_config.placement == "houlsby"
            peft_config.target_modules = f"({attention})|({feed_forward})" if both else feed_forward
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        weight = getattr(target, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(target, nn.Embedding):
            raise ValueError(
                f"A bottleneck adapter follows a linear layer, but {current_key} is a {type(target).__name__}."
            )
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(_NO_MERGE)


_NO_MERGE = (
    "A bottleneck adapter cannot be merged into its language model, since a non-linear function stands between its "
    "matrices: keep it beside the model."
)


def sublayers(model: nn.Module, model_type: str) -> tuple[str, str]:
    """Patterns for the last linear layer of attention and of feed-forward.

    Raises:
        ValueError: the names of the model's layers are of no known family.
    """
    names = [name for name, _ in model.named_modules()]
    # the family by its name first, then any whose names are there
    for _, attention, feed_forward in sorted(_SUBLAYERS, key=lambda line: model_type not in line[0]):
        # peft adds another adapter to layers that it has replaced, whose own names stay
        if all(any(re.fullmatch(pattern, name) for name in names) for pattern in (attention, feed_forward)):
            return attention, feed_forward
    raise ValueError(
        f"Where a bottleneck adapter goes in a model of type {model_type!r} is not known: name the last linear layers "
        "of its attention and feed-forward as target_modules."
    )


def register() -> None:
    """Makes peft know bottleneck adapters; does nothing the second time."""
    tables: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, BottleneckConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, BottleneckModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, BottleneckModel.prefix),
    )
    for table, entry in tables:
        table.setdefault(BOTTLENECK, entry)


register()
