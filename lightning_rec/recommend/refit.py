"""The projection behind a changed language model, fitted anew so that item vectors stay where they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.towers import TextItemTower
from lightning_rec.towers.mixture import MixtureOfExperts

#: Texts that the map is fitted on, at most; more change nothing that can be seen.
_TEXTS = 20_000
_CHUNK = 1024  # items that a tuned language model encodes at once
#: Strengths that are tried, as shares of the features' mean variance.
_STRENGTHS = torch.logspace(2, -6, 25, dtype=torch.float64)


@dataclass(frozen=True)
class Target:
    """What the first linear map behind the language model made of texts.

    Attributes:
        rows: ``(m,)`` catalogue rows, one for each distinct text.
        outputs: ``(m, d)`` float64; where there is no such map, the features themselves.
    """

    rows: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Ridge:
    """An affine map.

    Attributes:
        weight: ``(out, in)`` float64.
        bias: ``(out,)`` float64.
        strength: of the ridge, as a share of the features' mean variance.
        explained: the share of the variance of the outputs that is explained of texts left out, at most 1.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    explained: float


@torch.no_grad()
def target_of(tower: TextItemTower, view: CatalogueView) -> Target:
    """What a fitted tower makes of the catalogue's texts before its first non-linear step.

    Args:
        tower: prepared, in evaluation mode.
        view: its catalogue.
    """
    first: dict[str, int] = {}
    for row in range(1, view.n_rows):
        first.setdefault(view.texts[row], row)
    rows = torch.tensor(list(first.values()), dtype=torch.int64)
    if len(rows) > _TEXTS:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_TEXTS]]
    features = torch.cat([tower._features(ItemBatch(part)) for part in rows.split(_CHUNK)])
    layer = _first_layer(tower.projection)
    return Target(rows, (features if layer is None else layer(features)).double())


def ridge(features: Tensor, outputs: Tensor) -> Ridge:
    """Ridge regression in closed form, its strength chosen by the squared error of each row when it is left out.

    The error of a row left out needs no second fit: it is the residual divided by one minus the row's leverage (Golub,
    Heath and Wahba, "Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter", Technometrics
    1979).

    Args:
        features: ``(n, w)``.
        outputs: ``(n, d)``.
    """
    x, y = features.double(), outputs.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    n = len(x)
    variances, axes = torch.linalg.eigh(x.t() @ x / n)
    variances = variances.clamp_min(0)
    rotated = x @ axes
    common = rotated.t() @ y / n
    unit = float(variances.mean()) or 1.0
    best: tuple[float, float, Tensor] | None = None
    for strength in _STRENGTHS.tolist():  # strongest first: of equal ones it is kept
        shrink = 1 / (variances + strength * unit)
        map_ = shrink[:, None] * common
        leverage = (rotated.square() @ shrink + 1) / n
        left_out = (y - rotated @ map_) / (1 - leverage).clamp_min(1e-9)[:, None]
        error = float(left_out.square().sum())
        if best is None or error < best[0]:
            best = error, strength, map_
    assert best is not None
    error, strength, map_ = best
    weight = (axes @ map_).t()
    total = float(y.square().sum())
    return Ridge(weight, y_mean - weight @ x_mean, strength, 1 - error / total if total else 1.0)


@torch.no_grad()
def refit(tower: TextItemTower, shaped: Tensor, target: Target, arguments: dict[str, Any]) -> dict[str, float]:
    """Fits the first linear map of a tower's projection anew, from the features that it has now to what it gave.

    A tower without a projection gets a linear one.

    Args:
        tower: it is changed.
        shaped: ``(n_rows, w)`` features of the catalogue as the projection reads them.
        target: what the projection gave before.
        arguments: the tower's ``init_args``; changed where it had no projection.

    Returns:
        What the manifest says of it.
    """
    found = ridge(shaped[target.rows], target.outputs)
    said = {"strength": found.strength, "explained": round(found.explained, 4)}
    if isinstance(tower.projection, MixtureOfExperts):
        _fold(found, tower.projection)
        return said
    layer = _first_layer(tower.projection)
    if layer is None:
        layer = tower.projection = nn.Linear(shaped.shape[1], target.outputs.shape[1])
        tower.projection_kind = arguments["projection"] = "linear"
        arguments["dim"] = tower.dim
    layer.weight.copy_(found.weight)
    layer.bias.copy_(found.bias)
    return said


def _fold(found: Ridge, mixture: MixtureOfExperts) -> None:
    """Puts a map of features in front of a mixture into its matrices.

    The gate has no bias, so what the map adds is left out there; it is nearly nothing for features with mean 0.
    """
    weight = found.weight
    mixture.shift.copy_((mixture.shift.double() - found.bias) @ torch.linalg.pinv(weight, rtol=1e-6).t())
    mixture.weight.copy_(mixture.weight.double() @ weight)
    mixture.gate.copy_(weight.t() @ mixture.gate.double())


def _first_layer(projection: nn.Module) -> nn.Linear | None:
    """The linear map that reads the language model's features; None where there is none."""
    return next((part for part in projection.modules() if isinstance(part, nn.Linear)), None)
