"""Several fitted runs of impressions that answer together: the mean of their normalised scores of what was shown."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.data.batch import Batch
from lightning_rec.ensemble_members import (
    NOTHING,
    AnswersTogether,
    MemberItems,
    MemberUsers,
    Normalise,
    checked_weights,
    newest,
)
from lightning_rec.impression import ImpressionTwoTower
from lightning_rec.metrics import ImpressionMetric


class ImpressionEnsemble(AnswersTogether, ImpressionTwoTower):
    """Fitted runs that rank the candidates of an impression by the mean of their normalised scores.

    The runs may have different towers, candidate-aware ones among them, biases, objectives and lengths of history, but
    share one catalogue and the same users. There is nothing to train: use it with ``validate``, ``test`` and
    ``predict``, with the data of the runs. Each run reads as many events of a history as it was fitted with, or fewer
    where the data gives fewer. For a user whom a run does not know, the others answer; whom none knows is answered by
    the popularity of the candidates in training.

    The probability of a click is the mean of the probabilities of the runs, by their weights, where each run gives one
    (by its calibration or its objective); else there is none, and no figures of clicks. The mean of calibrated
    probabilities errs to the side of caution (Ranjan and Gneiting, "Combining probability forecasts", 2010), and the
    order of the candidates is that of the scores, not of the probabilities.

    Args:
        checkpoints: files that ``lightning-rec fit`` wrote, in their run folders.
        normalise: what is done to the scores of each run before their mean is taken, over the candidates of each
            impression: ``z_score``: mean 0 and deviation 1; ``min_max``: from 0 to 1; ``none``: nothing. Equal scores,
            and that of an only candidate, become 0 by the first two. A candidate that was shown twice counts twice.
        weights: weight of each run, at least 0; None: all the same.
        metrics: metrics of validation and test; as for ``lightning_rec.ImpressionTwoTower`` when None.

    Raises:
        ValueError: no runs, weights that do not fit, or runs that do not fit the data.

    Example::

        model:
          class_path: lightning_rec.ImpressionEnsemble
          init_args:
            checkpoints: [runs/a/checkpoints/last.ckpt, runs/b/checkpoints/last.ckpt]
    """

    member_kind = ImpressionTwoTower
    for_interactions: ClassVar[str] = "lightning_rec.Ensemble"

    def __init__(
        self,
        checkpoints: list[str],
        normalise: Normalise = "z_score",
        weights: list[float] | None = None,
        metrics: list[ImpressionMetric] | None = None,
    ) -> None:
        super().__init__(MemberItems(), MemberUsers(), metrics=metrics, calibrate=False)
        self.weights = checked_weights(checkpoints, weights)
        self.checkpoints = [str(path) for path in checkpoints]
        self.normalise: Normalise = normalise
        self.members = nn.ModuleList()
        self.windows: list[int | None] = []
        self._probabilities: Tensor | None = None

    # ------------------------------------------------------------------ building

    def _prepare(self) -> None:
        super()._prepare()
        for member in self.members:
            member.to(self.device)  # each by itself: a LightningModule keeps its device, and asks for it

    # ------------------------------------------------------------------ scores

    def forget_catalogue(self) -> None:
        """Drops the catalogues that the runs have encoded."""
        super().forget_catalogue()
        for member in self.members:
            cast(ImpressionTwoTower, member).forget_catalogue()

    def candidate_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores what was shown by every run.

        Two candidates that score the same in every run score the same to the last bit, whatever shares their batch.

        Returns:
            ``(b, c)`` float64 means of normalised scores, 0 at padding, and ``(b,)`` True where any run knows the user.
        """
        assert batch.impressions is not None
        mask = batch.impressions.mask
        parts: list[Tensor] = []
        knows: list[Tensor] = []
        chances: list[Tensor | None] = []
        weights = [weight for weight in self.weights if weight]
        for member, window, weight in zip(self.members, self.windows, self.weights, strict=True):
            if not weight:
                continue
            run = cast(ImpressionTwoTower, member)
            scores, known = run.candidate_scores(replace(batch, users=newest(batch.users, window)))
            parts.append(normalised(scores, mask, self.normalise))
            knows.append(known)
            chances.append(run.probabilities(scores))
        known = torch.stack(knows, 1)
        plain = torch.tensor(weights, dtype=torch.float64, device=known.device)
        # whom none knows: the probabilities are those that each run has for such users
        used = torch.where(known.any(1, keepdim=True), known * plain, plain)
        shares = (used / used.sum(1, keepdim=True)).unsqueeze(2).unbind(1)
        self._probabilities = None
        given = [chance for chance in chances if chance is not None]
        if len(given) == len(chances):
            self._probabilities = _mean(given, shares).float()
        return _mean(parts, shares), known.any(1)

    def probabilities(self, scores: Tensor) -> Tensor | None:
        """The mean of the runs' probabilities of the candidates that were scored last; None where a run has none."""
        return self._probabilities


def _mean(parts: list[Tensor], shares: tuple[Tensor, ...]) -> Tensor:
    """``(b, c)`` mean by ``(b, 1)`` shares; what has no share may be no number."""
    found = torch.zeros_like(parts[0], dtype=torch.float64)
    for part, share in zip(parts, shares, strict=True):
        found = found + torch.where(share > 0, share * part, 0.0)
    return found


def normalised(scores: Tensor, mask: Tensor, how: Normalise) -> Tensor:
    """The scores of one run, made comparable with those of another.

    Args:
        scores: ``(b, c)`` scores of the candidates, any value at padding.
        mask: ``(b, c)`` True where there is a candidate.
        how: see :class:`ImpressionEnsemble`.

    Returns:
        ``(b, c)`` float64, 0 at padding and where all candidates of an impression score the same, or differ by no more
        than float32 rounds. Float64 keeps every difference of float32 scores, so that one run alone ranks as it does.
    """
    exact = scores.double().masked_fill(~mask, 0.0)
    if how == "none":
        return exact
    low = exact.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = exact.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    if how == "min_max":
        middle, size = low, high - low
    else:
        number = mask.sum(1, keepdim=True).clamp_min(1)
        middle = _total(exact) / number
        size = (_total((exact - middle).masked_fill(~mask, 0.0).square()) / number).sqrt()
    differ = high - low > NOTHING**0.5 * torch.maximum(high.abs(), low.abs())
    return torch.where(differ & mask, (exact - middle) / size, 0.0)


def _total(values: Tensor) -> Tensor:
    """``(b, 1)`` sums of ``(b, c)`` values, to which zeros behind them add not even rounding.

    Halves are added until one column is left. The first half is as wide as a power of two, so that of a wider matrix of
    the same values only zeros are added first.
    """
    while (width := values.shape[1]) > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        values = values[:, :half] + F.pad(values[:, half:], (0, 2 * half - width))
    return values
