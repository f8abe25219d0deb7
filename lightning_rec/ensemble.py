"""Several fitted runs that answer together, still as one dot product.

The normalised scores of a user are an affine function of that user's scores, so the mean of several runs' normalised
scores is a dot product again: of the runs' interest vectors, each scaled for the user, side by side, with the runs'
item vectors side by side, and one more feature for a constant. A z-score needs no pass over the catalogue: the mean and
the deviation of a user's scores follow from the mean and the covariance of the item vectors.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_rec.data.batch import Batch, UserBatch
from lightning_rec.ensemble_members import (
    NOTHING,
    AnswersTogether,
    MemberItems,
    MemberUsers,
    Normalise,
    checked_weights,
)
from lightning_rec.metrics import RankingMetric
from lightning_rec.metrics.ranks import HistoryBonus, ScoreTable
from lightning_rec.module import TwoTower


class Ensemble(AnswersTogether, TwoTower):
    """Fitted runs that rank the catalogue by the mean of their normalised scores.

    The runs may have different towers, widths and lengths of history, but share one catalogue and the same users. There
    is nothing to train: use it with ``validate``, ``test`` and ``predict``, with the data of the runs. Each run reads
    as many events of a history as it was fitted with, or fewer where the data gives fewer. For a user whom a run does
    not know, the others answer; whom none knows is answered by popularity. What repeats add to a run's scores
    (``score.learn_repeats``) counts, for all items of the history that the data gives. Runs over impressions answer
    together in ``lightning_rec.ImpressionEnsemble``.

    Args:
        checkpoints: files that ``lightning-rec fit`` wrote, in their run folders.
        normalise: what is done to the scores of each run before their mean is taken, over the catalogue of each user:
            ``z_score``: mean 0 and deviation 1; ``min_max``: from 0 to 1; ``none``: nothing. Equal scores become 0.
        weights: weight of each run, at least 0; None: all the same.
        metrics: ranking metrics of validation and test; as for ``lightning_rec.TwoTower`` when None.
        top_k: number of items that ``predict`` recommends.
        chunk_size: catalogue rows that are scored at a time; changes memory, never a figure.

    Raises:
        ValueError: no runs, weights that do not fit, or runs that do not fit the data.

    Example::

        model:
          class_path: lightning_rec.Ensemble
          init_args:
            checkpoints: [runs/a/checkpoints/last.ckpt, runs/b/checkpoints/last.ckpt]
    """

    member_kind = TwoTower
    for_impressions: ClassVar[str] = "lightning_rec.ImpressionEnsemble"

    def __init__(
        self,
        checkpoints: list[str],
        normalise: Normalise = "z_score",
        weights: list[float] | None = None,
        metrics: list[RankingMetric] | None = None,
        top_k: int = 10,
        chunk_size: int = 8192,
    ) -> None:
        super().__init__(MemberItems(), MemberUsers(), metrics=metrics, top_k=top_k, chunk_size=chunk_size)
        self.weights = checked_weights(checkpoints, weights)
        self.checkpoints = [str(path) for path in checkpoints]
        self.normalise = normalise
        self.members = nn.ModuleList()
        self.windows: list[int | None] = []
        self._moments: list[_Moments] = []
        self._bonus: HistoryBonus | None = None

    # ------------------------------------------------------------------ building

    def _prepare(self) -> None:
        super()._prepare()
        self.members.to(self.device)

    # ------------------------------------------------------------------ scores

    def forget_catalogue(self) -> None:
        """Drops the encoded catalogue and what was worked out from it."""
        super().forget_catalogue()
        self._moments = []

    def score_table(self) -> ScoreTable:
        """The runs' item vectors side by side, each run's centred and brought to unit scale, and a feature of ones."""
        if self._table is None:
            raw = self.catalogue()
            parts, self._moments = [], []
            for member, columns in zip(self.members, self._columns(), strict=True):
                vectors = _exact(cast(TwoTower, member).score.items(raw[:, columns]).float())
                real = vectors[1:]
                middle = real.mean(0) if len(real) else vectors[0]
                scale = float((real - middle).square().mean().sqrt()) if len(real) else 0.0
                scale = scale if scale > 0 else 1.0
                part = ((vectors - middle) / scale).float()
                part[0] = 0
                parts.append(part)
                self._moments.append(_Moments.of(part, middle, scale, self.chunk_size))
            ones = torch.ones(len(raw), 1, device=parts[0].device)
            ones[0] = 0
            self._table = ScoreTable(torch.cat([*parts, ones], 1).to(raw.device))
        return self._table

    def _columns(self) -> list[slice]:
        widths = [cast(TwoTower, member).item_tower.dim for member in self.members]
        ends = torch.tensor(widths).cumsum(0).tolist()
        return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]

    def interests(self, batch: Batch) -> tuple[Tensor, ScoreTable, Tensor]:
        """Encodes users by every run.

        Returns:
            ``(b, d + 1)`` the runs' interest vectors, each so scaled that its scores are normalised and weighted, and a
            constant; the catalogue; and ``(b,)`` True where any run knows the user.
        """
        table = self.score_table()
        users = batch.users
        raw = self.user_tower(users, self.catalogue())[:, 0]
        knows = torch.stack([cast(TwoTower, member).user_tower.knows(users) for member in self.members], 1)
        weights = knows * torch.tensor(self.weights, device=knows.device)
        shares = _exact(weights / weights.sum(1, keepdim=True).clamp_min(1e-12))
        parts: list[Tensor] = []
        constant, added, repeats = torch.zeros_like(shares[:, 0]), torch.zeros_like(shares[:, 0]), False
        for number, (columns, moments) in enumerate(zip(self._columns(), self._moments, strict=True)):
            member = cast(TwoTower, self.members[number])
            interest = _exact(member.score.interest(raw[:, columns]).float()) * moments.scale
            repeat = None if member.score.repeat is None else float(member.score.repeat)
            repeats = repeats or repeat is not None
            offset, size = self._normaliser(interest, table.items[:, columns], moments, users, repeat or 0.0)
            share = torch.where(size > 0, shares[:, number] / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)
            parts.append(share[:, None] * interest)
            constant += share * offset
            added += share * (repeat or 0.0)
        self._bonus = HistoryBonus(users.history, added[:, None].to(users.history.device)) if repeats else None
        vectors = torch.cat([*parts, constant[:, None]], 1).float().to(users.history.device)
        return vectors, table, weights.sum(1) > 0

    def _normaliser(
        self, interest: Tensor, items: Tensor, moments: _Moments, users: UserBatch, repeat: float
    ) -> tuple[Tensor, Tensor]:
        """``(b,)`` what is added to each user's scores by one run, and by what they are divided then; 0 if all equal.

        Args:
            interest: ``(b, d)`` float64.
            items: ``(n, d)`` centred item vectors.
            moments: of the item vectors.
            users: whose interest it is.
            repeat: what the run adds to the scores of items in the history.
        """
        mean = interest @ moments.mean
        if self.normalise == "none":
            return interest @ moments.middle / moments.scale, torch.ones_like(mean)
        if self.normalise == "min_max":
            lowest, highest = _range(interest, items, users.history, repeat, self.chunk_size)
            size = highest - lowest
            largest = torch.maximum(highest.abs(), lowest.abs())
            return -lowest, torch.where(size > NOTHING**0.5 * largest, size, 0.0)
        variance = torch.einsum("bi,ij,bj->b", interest, moments.covariance, interest)
        possible = interest.square().sum(1) * moments.covariance.diagonal().sum()
        if repeat:
            rows, share = _distinct(users.history).to(items.device), float(max(len(items) - 1, 1))
            here = torch.einsum("bd,btd->bt", interest, _exact(items[rows]))
            number = (rows > 0).sum(1) / share
            inside = (here * (rows > 0)).sum(1) / share - mean * number
            variance = variance + 2 * repeat * inside + repeat**2 * number * (1 - number)
            possible = possible + repeat**2 * number
            mean = mean + repeat * number
        return -mean, torch.where(variance > NOTHING * possible, variance, 0.0).clamp_min(0).sqrt()

    def history_bonus(self, users: UserBatch) -> HistoryBonus | None:
        """What the runs together add to the scores of items in the histories of the users last encoded."""
        return self._bonus


class _Moments(NamedTuple):
    """What is known of the item vectors of a run, without padding; all float64.

    Attributes:
        middle: ``(d,)`` mean of the vectors as the run makes them.
        scale: by which the centred vectors were divided.
        mean: ``(d,)`` mean of the centred and scaled vectors: what rounding has left of it.
        covariance: ``(d, d)`` of the centred and scaled vectors.
    """

    middle: Tensor
    scale: float
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, vectors: Tensor, middle: Tensor, scale: float, chunk_size: int) -> _Moments:
        width, count = vectors.shape[1], max(len(vectors) - 1, 1)
        total, second = middle.new_zeros(width), middle.new_zeros(width, width)
        for part in vectors[1:].split(max(chunk_size, 1)):
            exact = _exact(part)
            total += exact.sum(0)
            second += exact.T @ exact
        mean = total / count
        return cls(middle, scale, mean, second / count - torch.outer(mean, mean))


def _exact(values: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _distinct(history: Tensor) -> Tensor:
    """``(b, t)`` the same rows, each once, the rest 0."""
    ordered = history.sort(1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated, 0)


def _range(interest: Tensor, items: Tensor, history: Tensor, repeat: float, chunk_size: int) -> tuple[Tensor, Tensor]:
    """``(b,)`` lowest and highest score of each user over the catalogue, walked over in chunks."""
    lowest = torch.full_like(interest[:, 0], torch.inf)
    highest = -lowest
    history = history.to(interest.device)
    for start in range(1, len(items), max(chunk_size, 1)):
        part = _exact(items[start : start + max(chunk_size, 1)])
        scores = torch.cat([interest @ part.T, interest.new_zeros(len(interest), 1)], 1)
        if repeat:
            width = len(part)
            columns = torch.where((history < start) | (history >= start + width), width, history - start)
            # a row that stands there twice writes the same number twice
            scores.scatter_(1, columns, scores.gather(1, columns) + repeat)
        lowest = torch.minimum(lowest, scores[:, :-1].amin(1))
        highest = torch.maximum(highest, scores[:, :-1].amax(1))
    return lowest, highest
