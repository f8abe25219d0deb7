"""Does an ONNX file answer as torch does? Checked when it is written, on made up inputs and on those of the run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Largest difference from torch that is let pass, absolute, for vectors whose largest feature is 1 or less; relative to
#: the largest feature for others.
TOLERANCE = 1e-4
#: Where torch itself is that far from what it computes in float64, so many times its distance is let pass too,
#: up to the second number: what rounding does to torch it does to every other runtime.
_ROUNDINGS, _COARSE = 8, 1e-2

Inputs = tuple[Tensor, Tensor]


class OnnxError(RuntimeError):
    """A tower that could not be written as ONNX, or answers otherwise than torch does."""


class Checked(NamedTuple):
    """What a check found.

    Attributes:
        difference: the largest from torch.
        allowed: the largest that was let pass: :data:`TOLERANCE`, or more where rounding alone does more.
    """

    difference: float
    allowed: float


def session(path: Path) -> Any:
    """A file, opened by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def compare(model: nn.Module, path: Path, names: tuple[str, str], inputs: Iterable[Inputs]) -> Checked:
    """Runs a file and the model that it was made of on the same inputs.

    Args:
        model: of two inputs, in evaluation mode.
        path: the file.
        names: of its inputs.
        inputs: of several shapes.

    Raises:
        OnnxError: they differ; the message says by how much, and for which input.
    """
    opened, worst, allowed = session(path), 0.0, TOLERANCE
    for pair in inputs:
        wanted = model(*pair)
        feed = {name: value.contiguous().numpy() for name, value in zip(names, pair, strict=True)}
        found = torch.from_numpy(opened.run(None, feed)[0])
        if found.shape != wanted.shape:
            raise OnnxError(f"it gives the shape {tuple(found.shape)}, and torch {tuple(wanted.shape)}")
        difference = _distance(found, wanted)
        if difference > allowed:  # a number that is none is refused below
            # A model whose features hardly vary, and are standardised, makes much of the last digit of every number.
            rounding = _distance(wanted, _in_float64(model, pair))
            allowed = max(allowed, min(_ROUNDINGS * rounding, _COARSE))
        if not difference <= allowed:
            raise OnnxError(
                f"it differs from torch by {difference:.2g} (allowed: {allowed:.2g}) for an input of shape "
                f"{tuple(pair[0].shape)}"
            )
        worst = max(worst, difference)
    return Checked(worst, allowed)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))


def _in_float64(model: nn.Module, inputs: Inputs) -> Tensor:
    exact = copy.deepcopy(model).double()
    return exact(*(value.double() if value.is_floating_point() else value for value in inputs))
