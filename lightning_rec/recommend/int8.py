"""Language models in whole numbers of eight bits: how they are stored, and the linear layers that compute with them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

#: Holds the weights in the place of ``model.safetensors``. Its matrices are int8, each beside a scale for each row.
INT8 = "int8.safetensors"
_SCALE = ".int8_scale"
_LEVELS = 127
_TINY = torch.finfo(torch.float32).tiny


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, whose input is quantised as it comes (dynamic quantisation).

    Each row of the weight has its own scale, and so has each input vector: what one text becomes does not depend on
    those that are encoded with it. The product is one of whole numbers, by torch's quantised kernels. Where torch has
    none for this processor, and where a gradient is wanted (for explanations), it is an ordinary product with the same
    weights.

    Args:
        weight: ``(out, in)`` int8.
        scales: ``(out,)`` float32, one a row.
        bias: ``(out,)`` float32, or None.
    """

    levels: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("levels", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self._packed = _pack(weight, scales)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        if self._packed is None or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.levels * self.scales[:, None], self.bias)
        rows = x.reshape(-1, x.shape[-1])
        n = len(rows)
        largest = rows.abs().amax(1, keepdim=True).clamp_min(_TINY)
        # torch takes one scale of the whole input: one more row makes that the same always, from -1 to 1
        scaled = rows.new_zeros(n + 1, rows.shape[1])
        torch.div(rows, largest, out=scaled[:n])
        scaled[n, 0], scaled[n, 1] = 1.0, -1.0
        # seven bits of the input: with eight, the sums of two products overflow on processors without VNNI
        product = torch.ops.quantized.linear_dynamic(scaled, self._packed, True)[:n] * largest
        if self.bias is not None:
            product += self.bias
        return product.view(*x.shape[:-1], -1)


def _pack(weight: Tensor, scales: Tensor) -> Any:
    """The weights as torch's quantised kernels want them, or None where there are none."""
    if torch.backends.quantized.engine == "none" or weight.shape[1] < 2 or not hasattr(torch, "quantize_per_channel"):
        return None
    safe = scales.double().clamp_min(_TINY)
    exact = (weight.double() * safe[:, None]).float()  # falls on the same levels again
    with warnings.catch_warnings():
        # tensors with a quantised dtype are to leave torch one day; then the ordinary product above answers
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        levels = torch.quantize_per_channel(exact, safe, torch.zeros(len(safe), dtype=torch.int64), 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(levels, None)


def write_int8(model: nn.Module, folder: Path) -> None:
    """Writes the weights of a language model as int8: all matrices, embeddings among them; vectors stay float32."""
    stored: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if value.dim() != 2 or not value.is_floating_point():
            stored[key] = value.detach().cpu().clone().contiguous()
            continue
        # the rows of a matrix are its outputs, but GPT-2 stores some the other way round
        outputs = value.float().t() if isinstance(_owner(model, key), Conv1D) else value.float()
        scales = outputs.abs().amax(1) / _LEVELS
        levels = (outputs / scales.clamp_min(_TINY)[:, None]).round()
        stored[key] = levels.clamp(-_LEVELS, _LEVELS).to(torch.int8).contiguous()
        stored[key + _SCALE] = scales.contiguous()
    save_file(stored, folder / INT8, metadata={"format": "pt", "lightning_rec": json.dumps({"int8": 1})})


def read_int8(folder: Path) -> nn.Module:
    """The language model of a folder with an :data:`INT8` file, its linear layers quantised, in evaluation mode.

    Nothing is unpickled, and no float copy of the linear layers is kept.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    from lightning_rec.towers.loading import LOADING  # it loads peft, which most that is here does without

    with LOADING:
        model: Any = AutoModel.from_config(config, trust_remote_code=False).float()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    model.config.use_cache = False
    with safe_open(str(folder / INT8), framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
    names = set(model.state_dict())
    odd = names ^ {key for key in stored if not key.endswith(_SCALE)}
    if odd:
        raise ValueError(
            f"{folder / INT8} does not fit its config.json: {min(odd)} is in one of them only. Export the run again."
        )
    state: dict[str, Tensor] = {}
    replaced: set[str] = set()
    for key, value in stored.items():
        if key.endswith(_SCALE):
            continue
        scales = stored.get(key + _SCALE)
        owner = _owner(model, key)
        if scales is None:
            state[key] = value
        elif isinstance(owner, nn.Linear | Conv1D):
            bias = stored.get(key.removesuffix("weight") + "bias")
            name = key.rpartition(".")[0]
            model.set_submodule(name, Int8Linear(value, scales, bias))
            replaced.add(name)
        else:
            state[key] = value * scales[:, None]
    state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in replaced}
    model.load_state_dict(state, strict=False)
    return model.requires_grad_(False).eval()


def _owner(model: nn.Module, key: str) -> nn.Module:
    return model.get_submodule(key.rpartition(".")[0])
