"""ImpressionTwoTower: two towers trained and measured on what was shown, clicked and not clicked."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar, cast

import torch
from lightning import LightningDataModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_rec import checkpoint as saved
from lightning_rec.data import RecDataModule
from lightning_rec.data.batch import Batch, CatalogueView
from lightning_rec.gather import across_ranks, known_columns
from lightning_rec.in_batch import at_clicks, unborn_at
from lightning_rec.metrics import (
    ClickMetrics,
    ImpressionMetric,
    ImpressionRanking,
    ImpressionResult,
    ImpressionTop,
)
from lightning_rec.metrics.ranks import exact_operand
from lightning_rec.objectives import Calibration, ImpressionObjective, ImpressionSoftmax
from lightning_rec.objectives.base import full_precision
from lightning_rec.optim import Schedule
from lightning_rec.tower_module import Stage, TowerModule, last_step
from lightning_rec.towers import CandidateAwareUserTower, ItemTower, UserTower
from lightning_rec.towers.age import AgeBias, PopularityBias
from lightning_rec.towers.score import Score

#: Numbers that evaluation multiplies at a time: 256 MB in float64.
PAIRS = 2**25


class ImpressionTwoTower(TowerModule):
    """A user tower and an item tower that score the candidates of impressions.

    The score of a candidate is the dot product of its vector with the interest at the end of the history (with the
    interest in this candidate, for a :class:`~lightning_rec.towers.CandidateAwareUserTower`), and what its age and
    its recent clicks add. A user of whom the tower knows nothing is answered by the popularity of the candidates in
    training.

    Args:
        item_tower: turns items into vectors.
        user_tower: turns histories into interest vectors.
        objective: what training minimises; a softmax over each click and the non-clicks of its impression when None.
        score: dot product when None, or ``lightning_rec.towers.score.Cosine`` with a temperature.
        metrics: metrics of validation and test. None: AUC, MRR and NDCG by impression; log loss, calibration error and
            normalised entropy of clicks; categories and popularity at the top of the list.
        in_batch_negatives: let the items that others clicked in the same step be negatives too, except for a user to
            whom they were shown as candidates, who is known to have read or clicked them, or who asked before they
            were published (or first shown, where that is unknown). Each device uses the clicks of its own step only.
        age: what the age of a candidate at the request adds to its score; None: nothing.
        popularity: what the clicks of a candidate before the request add to its score; None: nothing.
        calibrate: fit a calibration of click probabilities on the scores of each validation of a fit, which ``test``
            and ``validate`` apply. The figures of clicks in a fit are those of the objective itself, and a softmax has
            none.
        lr: learning rate of all but the language models.
        language_lr: learning rate of pretrained language models and their adapters.
        weight_decay: AdamW's decay of matrices; norms and biases are not decayed.
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.
        optimizer: any torch optimizer in the place of AdamW, such as ``{class_path: transformers.Adafactor, init_args:
            {lr: 0.001, relative_step: false}}``; its own settings then replace ``lr`` and ``weight_decay``.
        lr_scheduler: any torch scheduler in the place of ``warmup_steps`` and ``schedule``; it steps once an epoch, or
            once a step where it counts steps (``OneCycleLR``, ``CyclicLR``). One that waits for a figure is
            ``{class_path: lightning.pytorch.cli.ReduceLROnPlateau, init_args: {monitor: val/ndcg@10, mode: max}}``.
        start_from: a checkpoint of another run whose towers this run begins with; see ``lightning_rec.TwoTower``.

    Example::

        ImpressionTwoTower(NewsItemTower("minilm"), NRMSUserTower(), age=AgeBias())
    """

    answers_impressions: ClassVar[bool] = True
    headline: ClassVar[str] = "auc"
    #: The class that does for interactions what this one does for impressions.
    for_interactions: ClassVar[str] = "lightning_rec.TwoTower"

    def __init__(
        self,
        item_tower: ItemTower,
        user_tower: UserTower,
        objective: ImpressionObjective | None = None,
        score: Score | None = None,
        metrics: list[ImpressionMetric] | None = None,
        in_batch_negatives: bool = False,
        age: AgeBias | None = None,
        popularity: PopularityBias | None = None,
        calibrate: bool = True,
        lr: float = 1e-3,
        language_lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        start_from: str | None = None,
    ) -> None:
        super().__init__(
            item_tower,
            user_tower,
            score,
            lr=lr,
            language_lr=language_lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            start_from=start_from,
        )
        saved.save_plain_hyperparameters(self)
        if self.score.repeat is not None:
            raise ValueError(
                "score.learn_repeats is for lightning_rec.TwoTower, which ranks a whole catalogue: set it to false."
            )
        self.objective = objective if objective is not None else ImpressionSoftmax()
        chosen = default_impression_metrics() if metrics is None else metrics
        self.val_metrics, self.test_metrics = nn.ModuleList(deepcopy(chosen)), nn.ModuleList(deepcopy(chosen))
        self.val_fallback, self.test_fallback = PopularityShare(), PopularityShare()
        self.in_batch_negatives = in_batch_negatives
        self.age = age
        self.popularity = popularity
        self.calibrate = calibrate
        self.calibration = Calibration()

    # ------------------------------------------------------------------ building

    def check_data(self, datamodule: LightningDataModule) -> None:
        """Refuses plain interactions, and variants of texts where the item tower does not read them.

        Raises:
            ValueError: naming the class or the option that goes with the data.
        """
        if isinstance(datamodule, RecDataModule):
            raise ValueError(
                f"{type(datamodule).__name__} serves interactions, and {type(self).__name__} needs impressions: set "
                "data.class_path to a data module of impressions such as lightning_rec.ImpressionDataModule, or "
                f"model.class_path to {self.for_interactions}."
            )
        super().check_data(datamodule)

    def configure_parts(self, view: CatalogueView) -> None:
        """Sizes the metrics."""
        for metric in self._metrics("val") + self._metrics("test"):
            metric.configure(view.n_rows, view.counts, view.groups)

    # ------------------------------------------------------------------ training

    def forward(self, batch: Batch) -> Tensor:
        """``(b, c)`` scores of the candidates of a training batch; any value at padding."""
        return self._training_scores(batch, None)[0]

    def _training_scores(self, batch: Batch, others: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores of the candidates ``(b, c)``, and of every user with ``(e,)`` other items of the table ``(b, e)``."""
        assert batch.items is not None
        assert batch.impressions is not None
        shown = batch.impressions
        items = self.item_tower(batch.items)
        ready = self.score.items(items)
        extra = None
        if isinstance(self.user_tower, CandidateAwareUserTower):
            places, width = shown.candidates, shown.candidates.shape[1]
            if others is not None:
                places = torch.cat([places, others.expand(len(places), -1)], 1)
            interest = self.score.interest(self.user_tower.attend(batch.users, items, items[places]))
            scores = dots(interest, ready[places])
            scores, extra = scores[:, :width], scores[:, width:]
        else:
            interest = self.score.interest(last_step(self.user_tower(batch.users, items), batch))
            scores = dots(interest[:, None], ready[shown.candidates])
            if others is not None:
                with torch.autocast(self.device.type, enabled=False):
                    left, right = full_precision(interest, ready[others])
                    extra = left @ right.T
        return scores + self._context(shown.ages, shown.popularity, scores), None if others is None else extra

    def _context(self, ages: Tensor | None, popularity: Tensor | None, like: Tensor) -> Tensor:
        """What age and clicks add to scores; without times all of them are unknown."""
        added = torch.zeros((), device=like.device, dtype=like.dtype)
        for bias, quantity in ((self.age, ages), (self.popularity, popularity)):
            if bias is not None:
                added = added + bias(torch.full_like(like, torch.nan) if quantity is None else quantity)
        return added

    def loss(self, batch: Batch) -> Tensor:
        """The objective on a training batch: the mean over its units, on all devices together."""
        assert batch.impressions is not None
        shown = batch.impressions
        assert shown.labels is not None
        others = shown.candidates[shown.labels == 1].unique() if self.in_batch_negatives else None
        scores, extra = self._training_scores(batch, others)
        if extra is not None and others is not None:
            ages = at_clicks(batch, others, shown.ages, "amin")
            extra = extra + self._context(ages, at_clicks(batch, others, shown.popularity, "amax"), extra)
            if batch.log_q is not None:
                # Centred: the rare ones among them count for more, but all of them together are no whole catalogue
                # that would drown the impression's own non-clicks.
                log_q = batch.log_q[others - 1]
                extra = extra - (log_q - log_q.mean())
            out = self._own(batch)[:, others]
            if (unborn := unborn_at(batch, others)) is not None:
                out = out | unborn
            extra = extra.masked_fill(out, -torch.inf)
        loss = self.objective(
            scores,
            shown.labels,
            weights=shown.weights,
            positions=shown.positions,
            propensities=shown.propensities,
            extra=extra,
        )
        if self.world_size == 1:
            return self.with_auxiliary(loss)
        units = float(self.objective.units(shown.labels, shown.weights, extra))
        return self.with_auxiliary(across_ranks(self, loss, units))

    def _own(self, batch: Batch) -> Tensor:
        """``(b, n)`` True at places of the table that hold a user's own candidates, history and known clicks."""
        assert batch.items is not None
        assert batch.impressions is not None
        places = [batch.impressions.candidates, batch.users.history]
        if batch.known is not None:
            places.append(known_columns(batch.known, batch.items.rows, self.n_rows, False).clamp(min=0))
        own = torch.zeros(len(batch.users), len(batch.items), dtype=torch.bool, device=self.device)
        return own.scatter_(1, torch.cat(places, 1), True)

    # ------------------------------------------------------------------ evaluation and prediction

    def probabilities(self, scores: Tensor) -> Tensor | None:
        """The probability of a click that each score stands for, any shape; None when nothing tells it.

        While a run is fitted it is what the objective says, since the calibration is that of an earlier state.
        """
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if self.calibrate and self.calibration.fitted and not fitting:
            return self.calibration(scores)
        return self.objective.probability(scores)

    def candidate_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores what was shown, against the catalogue that is encoded once until ``forget_catalogue``.

        Two candidates with the same vector get the same score to the last bit, so that no tie is broken by rounding.

        Args:
            batch: of evaluation or prediction, whose candidates are catalogue rows.

        Returns:
            ``(b, c)`` float32 scores, any value at padding, and ``(b,)`` True where the tower knows the user.
        """
        assert batch.impressions is not None
        shown = batch.impressions
        rows = shown.candidates
        if isinstance(self.user_tower, CandidateAwareUserTower):
            table = self.score_table()
            vectors = self.catalogue()
            interest = self.score.interest(self.user_tower.attend(batch.users, vectors, vectors[rows])).float()
            known = self.user_tower.knows(batch.users)
        else:
            interest, table, known = self.interests(batch)
            interest = interest[:, None]
        exact = exact_operand(interest.flatten(0, 1)).view(interest.shape)
        size = max(1, PAIRS // max(1, rows.shape[1] * interest.shape[2]))  # impressions at a time
        parts = [
            (left * table.exact[right]).sum(-1) for left, right in zip(exact.split(size), rows.split(size), strict=True)
        ]
        scores = torch.cat(parts).float() if parts else rows.new_zeros(rows.shape, dtype=torch.float32)
        return scores + self._context(shown.ages, shown.popularity, scores), known

    def _answer(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the model, scores to rank by, and who is answered by popularity."""
        assert batch.impressions is not None
        scores, known = self.candidate_scores(batch)
        counts = self.train_counts[batch.impressions.candidates].float()
        return scores, torch.where(known[:, None], scores, counts), ~known

    def _evaluate(self, batch: Batch, stage: Stage) -> None:
        assert batch.impressions is not None
        shown = batch.impressions
        if shown.labels is None:
            raise ValueError("These impressions have no labels, so there is nothing to measure: use predict.")
        scores, ranked, fallback = self._answer(batch)
        view = self._view
        groups = None if view is None or view.groups is None else view.groups.to(self.device)
        result = ImpressionResult(
            scores=ranked,
            labels=shown.labels,
            sizes=shown.sizes,
            rows=shown.candidates,
            probabilities=self.probabilities(scores),
            counts=self.train_counts,
            groups=groups,
        )
        for metric in self.metric_modules(stage)[1:]:
            metric.update(result)
        (self.val_fallback if stage == "val" else self.test_fallback).update(fallback)
        if stage == "val" and self._calibrates:
            self.calibration.update(scores, shown.labels)

    @property
    def _calibrates(self) -> bool:
        return self.calibrate and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking

    def on_validation_epoch_start(self) -> None:
        """Forgets the catalogue and the scores of the last validation."""
        super().on_validation_epoch_start()
        self.calibration.reset()

    def on_validation_epoch_end(self) -> None:
        """Fits the calibration, before the checkpoint is written, and logs the metrics."""
        if self._calibrates:
            self.calibration.fit()
        super().on_validation_epoch_end()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores the impressions of the validation."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores the impressions of the test."""
        self._evaluate(batch, "test")

    def _metrics(self, stage: Stage) -> list[ImpressionMetric]:
        return cast(list[ImpressionMetric], list(self.val_metrics if stage == "val" else self.test_metrics))

    def metric_modules(self, stage: Stage) -> list[Any]:
        """The share of impressions answered by popularity, then the metrics of impressions."""
        return [self.val_fallback if stage == "val" else self.test_fallback, *self._metrics(stage)]

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Scores the candidates of each impression.

        Returns:
            ``index`` ``(b,)`` number of each impression in the order of the files, ``rows`` ``(b, c)`` catalogue rows
            of the candidates as they were shown, ``scores`` ``(b, c)``, ``sizes`` ``(b,)`` number of real candidates,
            ``fallback`` ``(b,)`` True where popularity answered.
        """
        assert batch.index is not None
        assert batch.impressions is not None
        _, ranked, fallback = self._answer(batch)
        shown = batch.impressions
        return {
            "index": batch.index,
            "rows": shown.candidates,
            "scores": ranked,
            "sizes": shown.sizes,
            "fallback": fallback,
        }


class PopularityShare(Metric):
    """The share of impressions that popularity answered, since the tower knew nothing of the user."""

    full_state_update = False
    answered: Tensor
    impressions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("answered", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("impressions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, fallback: Tensor) -> None:
        """Adds a batch: ``(b,)`` True where popularity answered."""
        self.answered += fallback.sum()
        self.impressions += len(fallback)

    def compute(self) -> dict[str, Tensor]:
        """``popularity_share``, 0 without impressions."""
        return {"popularity_share": self.answered / self.impressions.clamp(min=1)}


def dots(left: Tensor, right: Tensor) -> Tensor:
    """``(b, c)`` dot products of ``(b, c or 1, d)`` and ``(b, c, d)``, in float32 whatever the precision of the run."""
    left, right = full_precision(left, right)
    return (left * right).sum(-1)


def default_impression_metrics() -> list[ImpressionMetric]:
    """AUC, MRR and NDCG; the quality of click probabilities; what stands at the top of the list."""
    return [ImpressionRanking(), ClickMetrics(), ImpressionTop()]
