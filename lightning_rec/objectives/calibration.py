"""Scores into probabilities: Platt scaling from binned sums, and the correction for sampled non-clicks."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torchmetrics import Metric

# Scores are counted in bins that are even in asinh(score / FINEST): as narrow as 5e-5 around 0 and half a percent of
# the score far from it. With the mean score of each bin kept, what the bins lose is of second order.
_BINS = 8192
_FINEST = 1e-2
_HIGHEST = 1e6
_SPAN = math.asinh(_HIGHEST / _FINEST)
# Weights and places within a bin are added as whole numbers of 2^-20, so that batches and processes can be added in any
# order to the same sum.
_UNIT = 2.0**20


class Calibration(nn.Module):
    """Platt scaling: the probability of a click is ``σ(a · score + b)``, with ``a >= 0``.

    ``a`` and ``b`` minimise the log loss on validation scores by Newton's method, towards targets that are not quite 0
    and 1 (Platt, "Probabilistic outputs for support vector machines", 1999; Lin, Lin and Weng, "A note on Platt's
    probabilistic outputs for support vector machines", Machine Learning 2007), so that they stay finite when clicks and
    non-clicks are separable. The order of scores is never turned round: where that would fit better, ``a`` is 0.

    The state is a fixed grid of score bins, which does not grow and is added over processes. A validation goes::

        calibration.reset()
        calibration.update(scores, labels)   # each batch
        calibration.fit()                    # on every process, since it gathers the sums
        calibration(scores)                  # probabilities

    Attributes:
        scale: ``a``; 1 before a fit.
        offset: ``b``; 0 before a fit.
    """

    scale: Tensor
    offset: Tensor
    is_fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sums = _ScoreSums()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool))

    @property
    def fitted(self) -> bool:
        """True once :meth:`fit` has found ``a`` and ``b``, here or before the checkpoint was written."""
        return bool(self.is_fitted)

    def reset(self) -> None:
        """Forgets the scores, not what was fitted on them."""
        self.sums.reset()

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Adds scores.

        Args:
            scores: any shape; NaN is left out.
            labels: of the same shape: 1 clicked, 0 not clicked, NaN unlabelled (left out).
            weights: of the same shape: how many candidates each stands for; None: each for itself.
        """
        self.sums.update(scores, labels, weights)

    def fit(self) -> bool:
        """Fits ``a`` and ``b`` to the scores so far, on all processes together.

        Returns:
            False, with everything as it was, when there are no clicks or no non-clicks to fit on.
        """
        points, weights = self.sums.compute()
        clicks, rest = weights[:, 1].sum().item(), weights[:, 0].sum().item()
        if not clicks > 0 or not rest > 0:
            return False
        targets = torch.tensor([1 / (rest + 2), (clicks + 1) / (clicks + 2)], dtype=torch.float64).expand_as(points)
        used = weights > 0
        scale, offset = _newton(points[used], targets[used], weights[used])
        self.scale.fill_(scale)
        self.offset.fill_(offset)
        self.is_fitted.fill_(True)
        return True

    def forward(self, scores: Tensor) -> Tensor:
        """Probabilities of a click, shaped like ``scores``, in float32 at least."""
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return torch.sigmoid(self.scale.to(dtype) * scores.to(dtype) + self.offset.to(dtype))


def undo_sampling(probability: Tensor, rate: float) -> Tensor:
    """The probability of a click among all candidates, from one learned where only a share of non-clicks was kept.

    He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014, section 6.3. Not needed where
    the drawn non-clicks are weighted by how many they stand for.

    Args:
        probability: any shape, as predicted after training on the drawn data.
        rate: share of the non-clicks that were kept, in (0, 1].

    Returns:
        ``p / (p + (1 - p) / rate)``.

    Raises:
        ValueError: when ``rate`` is out of range.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; it is the share of non-clicks that were kept, above 0 and at most 1.")
    return probability / (probability + (1 - probability) / rate)


class _ScoreSums(Metric):
    """Weights and scores of clicks and non-clicks in a fixed grid of score bins."""

    full_state_update = False
    is_differentiable = False

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # by bin, label (0 not clicked, 1 clicked) and quantity (weight, weight × place within the bin)
        self.add_state("sums", torch.zeros(_BINS, 2, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        scores, labels = scores.detach().flatten().float(), labels.flatten()
        kept = ~(scores.isnan() | labels.isnan())
        scores = scores[kept].clamp(-_HIGHEST, _HIGHEST)
        weight = torch.ones_like(scores) if weights is None else weights.detach().flatten().float()[kept]
        at = (torch.asinh(scores / _FINEST) + _SPAN).mul(_BINS / (2 * _SPAN)).long().clamp(0, _BINS - 1)
        centre, width = (x.to(scores).index_select(0, at) for x in _grid())
        units = torch.stack([weight, weight * (scores - centre) / width], 1).mul(_UNIT).round().long()
        flat = at * 2 + (labels[kept] == 1).long()
        self.sums.view(-1, 2).index_add_(0, flat, units)

    def compute(self) -> tuple[Tensor, Tensor]:
        """``(bins, 2)`` mean score and weight of the non-clicks and clicks of each bin, float64 on the processor."""
        sums = self.sums.cpu().double() / _UNIT
        centre, width = _grid()
        weight = sums[..., 0]
        return centre[:, None] + width[:, None] * sums[..., 1] / weight.clamp(min=1 / _UNIT), weight


@cache
def _grid() -> tuple[Tensor, Tensor]:
    """``(bins,)`` centre and width of each bin, float64."""
    edges = torch.linspace(-_SPAN, _SPAN, _BINS + 1, dtype=torch.float64).sinh() * _FINEST
    return (edges[1:] + edges[:-1]) / 2, edges[1:] - edges[:-1]


def _newton(points: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, float]:
    """``a >= 0`` and ``b`` that minimise the weighted log loss of ``σ(a · points + b)`` towards ``targets``."""
    total = weights.sum()
    mean = (weights * points).sum() / total
    spread = ((weights * (points - mean).square()).sum() / total).sqrt()
    rate = (weights * targets).sum() / total
    flat = (0.0, torch.logit(rate).item())
    if not spread > 0:
        return flat
    x = torch.stack([(points - mean) / spread, torch.ones_like(points)], 1)

    def loss(theta: Tensor) -> Tensor:
        z = x @ theta
        return (weights * (nn.functional.softplus(z) - targets * z)).sum() / total

    theta = torch.tensor(flat, dtype=torch.float64)
    value = loss(theta)
    for _ in range(100):
        p = torch.sigmoid(x @ theta)
        gradient = x.T @ (weights * (p - targets)) / total
        if gradient.abs().max() < 1e-12:
            break
        curvature = (x * (weights * p * (1 - p))[:, None]).T @ x / total
        step = torch.linalg.solve(curvature + 1e-12 * torch.eye(2, dtype=torch.float64), gradient)
        size = 1.0
        while loss(theta - size * step) > value and size > 1e-10:
            size /= 2
        theta = theta - size * step
        before, value = value, loss(theta)
        if before - value < 1e-16:
            break
    if not theta[0] > 0:
        return flat
    scale = theta[0] / spread
    return scale.item(), (theta[1] - scale * mean).item()
