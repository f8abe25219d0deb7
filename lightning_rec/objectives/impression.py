"""Objectives of impressions: a softmax over each click and what was not clicked beside it, and click probabilities."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rec.objectives.base import full_precision
from lightning_rec.objectives.examination import Examination, Examined, examined
from lightning_rec.objectives.impression_base import ImpressionObjective


class ImpressionSoftmax(ImpressionObjective):
    """Each click should be the most likely of itself and the non-clicks of its impression.

    Cross-entropy of a softmax over one click and its negatives (Wu et al., "NPA: neural news recommendation with
    personalized attention", KDD 2019), never over the other clicks of the impression. Extra negatives from other
    impressions join those of the own one. A click without any negative counts for nothing. Non-clicks that were drawn
    evenly from more enter as they are: that leaves what is learned the same, while raising them by how many they stand
    for would not (McFadden, "Modelling the choice of residential location", 1978).

    With an examination, or with propensities in the data, a click counts ``1 / θ`` times, θ being the probability that
    its place was looked at (Joachims et al., "Unbiased learning-to-rank with biased feedback", WSDM 2017). A learned
    examination follows the dual learning algorithm (Ai et al., "Unbiased learning to rank with unbiased propensity
    estimation", SIGIR 2018): beside the click model a softmax over *places* learns where clicks fall, each click
    weighted by the inverse of its relevance as the click model sees it, so that each of the two models takes out of
    the clicks what the other explains. Relevance is relative to the mean of the click and its non-clicks, since the
    first place, which the paper takes, is not in every training row. Impressions with many clicks leave a small bias,
    since places that are looked at more supply fewer non-clicks.

    Args:
        label_smoothing: share of a click's probability that is spread evenly over it and its negatives.
        examination: position bias, given or learned; None corrects by the propensities of the data, if there are any.
        self_normalised: divide by the sum of the inverse-propensity weights and not by the number of clicks: less
            variance, some bias (Swaminathan and Joachims, "The self-normalized estimator for counterfactual
            learning", NeurIPS 2015).

    Raises:
        ValueError: when ``label_smoothing`` is outside ``[0, 1)``.

    Example::

        ImpressionSoftmax(examination=Examination(positions=20))
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        examination: Examination | None = None,
        self_normalised: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1.")
        self.label_smoothing = label_smoothing
        self.examination = examination
        self.self_normalised = self_normalised

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        propensities: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`ImpressionObjective.forward`; the mean is over clicks that have a negative.

        Raises:
            ValueError: when the examination needs places and the data have none.
        """
        with torch.autocast(scores.device.type, enabled=False):
            (scores,) = full_precision(scores)
            extra = None if extra is None else full_precision(extra)[0]
            look = examined(self.examination, positions, propensities, scores)
            labels = _weighted(labels, weights)
            rest = labels == 0
            row, column = _counted(labels, rest, extra).nonzero(as_tuple=True)
            if not len(row):
                return _nothing(self, scores, extra)
            against = _against(scores, rest, extra)
            losses = _cross_entropy(scores[row, column], against, row, self.label_smoothing)
            unit = torch.ones_like(losses) if weights is None else weights.to(scores.dtype)[row, column]
            if look is None:
                return (unit * losses).sum() / unit.sum()
            inverse = unit * look.inverse[row, column]
            loss = (inverse * losses).sum() / (inverse if self.self_normalised else unit).sum()
            if self.examination is not None and self.examination.learn:
                assert positions is not None
                loss = loss + _place_loss(scores.detach(), labels, look, positions)
            return loss

    def units(self, labels: Tensor, weights: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        """Scalar: the clicks that have a negative; ``extra`` as in :meth:`forward` counts those it serves too."""
        labels = _weighted(labels, weights)
        counted = _counted(labels, labels == 0, extra)
        return counted.sum().float() if weights is None else weights.float()[counted].sum()

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"label_smoothing={self.label_smoothing}, self_normalised={self.self_normalised}"


class ClickBCE(ImpressionObjective):
    """The sigmoid of a score should be the probability of a click: binary cross-entropy over labelled candidates.

    With an examination, or with propensities in the data, it should be the probability of a click *on a candidate that
    is looked at*:

    - ``correction: model``: ``P(click) = θ · σ(score)``, the position-based model (Richardson et al., "Predicting
      clicks", WWW 2007; Craswell et al., WSDM 2008). A learned θ maximises the same likelihood.
    - ``correction: ipw``: θ is known, a click counts as ``1 / θ`` clicks and ``1 - 1 / θ`` non-clicks, clipped, which
      estimates without bias the cross-entropy that full attention would give (Saito et al., "Unbiased recommender
      learning from missing-not-at-random implicit feedback", WSDM 2020).

    Args:
        examination: position bias, given or learned; None corrects by the propensities of the data, if there are any.
        positive_weight: how many times a click counts. Probabilities are corrected for it (exactly so without an
            examination).
        extra_weight: how many non-clicked candidates the extra negatives of an impression stand for together.
        correction: how an examination is used, ``model`` or ``ipw``.

    Raises:
        ValueError: for a weight out of range, an unknown correction, or ``ipw`` with a learned examination.

    Example::

        ClickBCE(examination=Examination(propensities=[1.0, 0.6, 0.4]), correction="ipw")
    """

    def __init__(
        self,
        examination: Examination | None = None,
        positive_weight: float = 1.0,
        extra_weight: float = 1.0,
        correction: Literal["model", "ipw"] = "model",
    ) -> None:
        super().__init__()
        if not positive_weight > 0 or not extra_weight >= 0:
            raise ValueError(
                f"positive_weight is {positive_weight} and extra_weight {extra_weight}; the first must be above 0, the "
                "second at least 0."
            )
        if correction not in ("model", "ipw"):
            raise ValueError(f"correction is {correction!r}; it is `model` or `ipw`.")
        if correction == "ipw" and examination is not None and examination.learn:
            raise ValueError(
                "ClickBCE cannot learn an examination by `correction: ipw`. Set `correction: model`, give "
                "`propensities`, or use ImpressionSoftmax."
            )
        self.examination = examination
        self.positive_weight = positive_weight
        self.extra_weight = extra_weight
        self.correction = correction

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        propensities: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`ImpressionObjective.forward`; the mean is over labelled candidates, by weight.

        Raises:
            ValueError: when the examination needs places and the data have none.
        """
        with torch.autocast(scores.device.type, enabled=False):
            (scores,) = full_precision(scores)
            extra = None if extra is None else full_precision(extra)[0]
            look = examined(self.examination, positions, propensities, scores)
            labelled = ~labels.isnan()
            share = labelled.to(scores.dtype) if weights is None else weights.to(scores.dtype).masked_fill(~labelled, 0)
            units = share.sum()
            if not units > 0:
                return _nothing(self, scores, extra)
            # Padding may hold anything, and no gradient passes through what replaces it.
            kept = scores.masked_fill(~labelled, 0)
            clicked = labels.nan_to_num(0).to(scores.dtype)
            of_click, of_rest = self._losses(kept, look)
            losses = self.positive_weight * clicked * of_click + (1 - clicked) * of_rest
            total = (share * losses).sum()
            if extra is not None and self.extra_weight > 0:
                total = total + self.extra_weight * _mean_extra(extra, labelled.any(1))
            elif extra is not None:
                total = total + _nothing(None, extra)
            return total / units

    def _losses(self, scores: Tensor, look: Examined | None) -> tuple[Tensor, Tensor]:
        """Losses ``(b, c)`` of being clicked and of not being clicked."""
        of_click, of_rest = F.softplus(-scores), F.softplus(scores)
        if look is None:
            return of_click, of_rest
        if self.correction == "ipw":
            return look.inverse * of_click + (1 - look.inverse) * of_rest, of_rest
        # 1 - θσ(s) = (1 + (1 - θ)eˢ) / (1 + eˢ)
        return of_click - look.log_seen, of_rest - F.softplus(scores + look.log_missed)

    def units(self, labels: Tensor, weights: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        """Scalar: the labelled candidates, by weight; ``extra`` changes nothing."""
        labelled = ~labels.isnan()
        return labelled.sum().float() if weights is None else weights.float()[labelled].sum()

    def probability(self, scores: Tensor) -> Tensor:
        """The probability of a click on a candidate that is looked at; any shape, float32 at least."""
        (scores,) = full_precision(scores)
        return torch.sigmoid(scores - math.log(self.positive_weight))

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return (
            f"positive_weight={self.positive_weight}, extra_weight={self.extra_weight}, correction={self.correction!r}"
        )


def _weighted(labels: Tensor, weights: Tensor | None) -> Tensor:
    """Labels, NaN too where a candidate stands for none."""
    return labels if weights is None else labels.masked_fill(weights <= 0, torch.nan)


def _counted(labels: Tensor, rest: Tensor, extra: Tensor | None) -> Tensor:
    """``(b, c)`` True at clicks that have a negative."""
    negative = rest.any(1)
    if extra is not None:
        negative = negative | (extra > -torch.inf).any(1)
    return (labels == 1) & negative[:, None]


def _against(logits: Tensor, rest: Tensor, extra: Tensor | None = None) -> Tensor:
    """``(b, c + e)`` logits of the negatives of each impression, ``-inf`` at everything else."""
    logits = logits.masked_fill(~rest, -torch.inf)
    return logits if extra is None else torch.cat([logits, extra], 1)


def _log_sum(against: Tensor) -> Tensor:
    """``(b,)`` log of the sum of exponentials, 0 (and no gradient) for rows without negatives."""
    empty = (against == -torch.inf).all(1, keepdim=True)
    return torch.where(empty[:, 0], 0.0, against.masked_fill(empty, 0).logsumexp(1))


def _cross_entropy(own: Tensor, against: Tensor, row: Tensor, smoothing: float = 0.0) -> Tensor:
    """``(n,)`` losses of clicks with logits ``own`` ``(n,)`` against the negatives of their rows of ``against``."""
    mass = torch.logaddexp(own, _log_sum(against)[row])
    if not smoothing:
        return mass - own
    valid = against > -torch.inf
    mean = (own + against.masked_fill(~valid, 0).sum(1)[row]) / (1 + valid.sum(1)[row])
    return mass - (1 - smoothing) * own - smoothing * mean


def _place_loss(scores: Tensor, labels: Tensor, look: Examined, positions: Tensor) -> Tensor:
    """What a learned examination minimises: a softmax over places, clicks weighted by their inverse relevance."""
    placed = positions > 0
    rest = (labels == 0) & placed
    row, column = (_counted(labels, rest, None) & placed).nonzero(as_tuple=True)
    if not len(row):
        return look.log_seen.sum() * 0
    # Of e^score: the mean over the click and its non-clicks, divided by the click's own.
    own = scores[row, column]
    mean = torch.logaddexp(own, _log_sum(_against(scores, rest))[row]) - torch.log1p(rest.sum(1)[row].to(own.dtype))
    inverse = (mean - own).clamp(max=math.log(look.clip)).exp()
    return (inverse * _cross_entropy(look.log_seen[row, column], _against(look.log_seen, rest), row)).mean()


def _mean_extra(extra: Tensor, used: Tensor) -> Tensor:
    """Scalar: the loss of the extra negatives, averaged within each impression and added over ``used`` ones."""
    valid = (extra > -torch.inf) & used[:, None]
    losses = F.softplus(extra.masked_fill(~valid, 0)) * valid
    return (losses.sum(1) / valid.sum(1).clamp(min=1)).sum()


def _nothing(objective: ImpressionObjective | None, *tensors: Tensor | None) -> Tensor:
    """The loss of nothing: 0 with a graph, so that every parameter still gets its (zero) gradient."""
    own = [] if objective is None else list(objective.parameters())
    parts = [full_precision(x)[0] for x in (*tensors, *own) if x is not None]
    # A NaN or an infinity times 0 is NaN, and must not become the loss of nothing.
    return sum(((x * 0).nan_to_num(0.0, 0.0, 0.0).sum() for x in parts), start=parts[0].new_zeros(()))
