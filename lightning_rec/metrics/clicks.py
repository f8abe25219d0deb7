"""How good predicted click probabilities are."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rec.metrics.fixed_point import parts, whole
from lightning_rec.metrics.impression_base import ImpressionMetric, ImpressionResult

#: A probability is kept this far from 0 and 1, so that one sure mistake does not make the log loss infinite.
_MARGIN = 1e-7
# Bins that are even in the logit of the prediction, from which bins of about equal numbers are put together.
_FINE = 2048
_SPAN = 14.0


class ClickMetrics(ImpressionMetric):
    """Log loss, calibration and normalised entropy of predicted click probabilities, over labelled candidates.

    - ``log_loss``: mean of ``-log`` of the probability of what happened, in nats.
    - ``normalised_entropy``: log loss divided by the entropy of the click rate: below 1 is better than predicting the
      click rate for everything (He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD
      2014). NaN where all or none was clicked.
    - ``calibration_error``: expected calibration error: the gap between mean prediction and click rate in each of
      ``bins`` bins of equal width, averaged by the number of candidates (Naeini et al., "Obtaining well calibrated
      probabilities using Bayesian binning", AAAI 2015).
    - ``adaptive_calibration_error``: the same over bins of about equal numbers of candidates (Nixon et al., "Measuring
      calibration in deep learning", CVPR workshops 2019). Where few are clicked, predictions are all small and share
      one bin of equal width, which this one takes apart.
    - ``click_rate`` and ``mean_prediction``, which should agree.
    - ``labelled``: number of candidates in the averages.

    Nothing is reported for a model that gives no probabilities.

    Args:
        bins: number of bins of the calibration errors.

    Raises:
        ValueError: when ``bins`` is below 1.
    """

    losses: Tensor
    predicted: Tensor
    numbers: Tensor

    def __init__(self, bins: int = 10) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins is {bins}; it must be at least 1.")
        self.bins = bins
        self.add_state("losses", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # bins of equal width, then fine ones
        self.add_state("predicted", torch.zeros(bins + _FINE, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("numbers", torch.zeros(bins + _FINE, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, result: ImpressionResult) -> None:
        """Adds a batch; reads ``probabilities``, ``labels`` and ``sizes``."""
        if result.probabilities is None:
            return
        real = torch.arange(result.labels.shape[1], device=result.labels.device) < result.sizes[:, None]
        counted = real & ~result.labels.isnan()
        clicked = result.labels[counted] == 1
        # A prediction that is no number is as wrong as can be.
        given = torch.where(result.probabilities[counted].isnan(), (~clicked).float(), result.probabilities[counted])
        given = given.float().clamp(0, 1)
        happened = torch.where(clicked, given, 1 - given).clamp(_MARGIN, 1 - _MARGIN)
        self.losses += whole(-happened.log()).sum()
        fine = (given.logit(_MARGIN) + _SPAN).mul(_FINE / (2 * _SPAN)).long().clamp(0, _FINE - 1)
        wide = (given * self.bins).long().clamp(max=self.bins - 1)
        numbers = torch.stack([torch.ones_like(clicked), clicked], 1).long()
        for at in (wide, fine + self.bins):
            self.predicted.index_add_(0, at, whole(given))
            self.numbers.index_add_(0, at, numbers)

    def compute(self) -> dict[str, Tensor]:
        """``{"log_loss": ..., "normalised_entropy": ..., ...}``; empty without probabilities."""
        numbers, predicted = self.numbers.cpu().double(), parts(self.predicted)
        gaps = predicted - numbers[:, 1]
        wide, fine = gaps[: self.bins], gaps[self.bins :]
        n, clicked = numbers[: self.bins].sum(0)
        if n == 0:
            return {}
        share = numbers[self.bins :, 0] / n
        group = ((share.cumsum(0) - share / 2) * self.bins).long().clamp(0, self.bins - 1)
        log_loss, rate = parts(self.losses) / n, clicked / n
        entropy = -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate))
        figures = {
            "log_loss": log_loss,
            "normalised_entropy": log_loss / entropy if entropy > 0 else torch.tensor(torch.nan),
            "calibration_error": wide.abs().sum() / n,
            "adaptive_calibration_error": wide.new_zeros(self.bins).index_add_(0, group, fine).abs().sum() / n,
            "click_rate": rate,
            "mean_prediction": predicted[: self.bins].sum() / n,
            "labelled": n,
        }
        return {name: value.float().to(self.numbers.device) for name, value in figures.items()}
