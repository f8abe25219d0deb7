"""TwoTower: how interactions are trained on, ranked and answered. It models nothing itself."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar, cast

import torch
from lightning import LightningDataModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_rec import checkpoint as saved
from lightning_rec.alive import alive_windows
from lightning_rec.data import ImpressionDataModule
from lightning_rec.data.batch import Batch, CatalogueView, UserBatch
from lightning_rec.gather import across_ranks, gather_candidates, history_columns, known_columns
from lightning_rec.metrics import BeyondAccuracy, RankingMetric, RankingMetrics, RankingResult, RatingMetrics
from lightning_rec.metrics.ranks import HistoryBonus, ScoreTable, rank_and_top, top_k
from lightning_rec.objectives import Objective, Repeats, Softmax
from lightning_rec.optim import Schedule
from lightning_rec.tower_module import Stage, TowerModule
from lightning_rec.towers import CandidateAwareUserTower, ItemTower, UserTower
from lightning_rec.towers.score import Score


class TwoTower(TowerModule):
    """A user tower and an item tower whose dot product ranks the catalogue.

    Args:
        item_tower: turns items into vectors.
        user_tower: turns histories into interest vectors.
        objective: what training minimises; softmax over the candidates when None.
        score: dot product when None, or ``lightning_rec.towers.score.Cosine`` with a temperature.
        metrics: ranking metrics of validation and test. None: HR, recall, precision, NDCG, MRR and MAP at 5, 10, 20
            and 50; HR and NDCG at 10 for warm and cold items and for thirds of popularity; coverage, novelty and Gini
            at 10.
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
        start_from: a checkpoint of another run, perhaps of another catalogue, whose towers this run begins with, also
            for ``test`` without a checkpoint: adapters, projections, blocks; vectors of ids begin anew where the ids
            are others.
        gather_negatives: on several devices, let each target compete with the candidates of all devices.
        top_k: number of items that ``predict`` recommends.
        chunk_size: catalogue rows that evaluation scores at a time; changes memory, never a figure.

    Example::

        TwoTower(IdItemTower(dim=64), SequenceUserTower(blocks=2), lr=1e-3)
    """

    #: The class that does for impressions what this one does for interactions.
    for_impressions: ClassVar[str] = "lightning_rec.ImpressionTwoTower"

    def __init__(
        self,
        item_tower: ItemTower,
        user_tower: UserTower,
        objective: Objective | None = None,
        score: Score | None = None,
        metrics: list[RankingMetric] | None = None,
        lr: float = 1e-3,
        language_lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        start_from: str | None = None,
        gather_negatives: bool = True,
        top_k: int = 10,
        chunk_size: int = 8192,
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
        if isinstance(user_tower, CandidateAwareUserTower):
            raise ValueError(
                f"{type(user_tower).__name__} looks at the candidates, so it cannot rank a whole catalogue: use it "
                "with lightning_rec.ImpressionTwoTower and a data module of impressions, or choose another user tower."
            )
        self.objective = objective if objective is not None else Softmax()
        self._check_repeats()
        chosen = default_metrics() if metrics is None else metrics
        # modules of this module, so that their sums lie on its device
        self.val_metrics, self.test_metrics = nn.ModuleList(deepcopy(chosen)), nn.ModuleList(deepcopy(chosen))
        self.val_ratings, self.test_ratings = RatingMetrics(), RatingMetrics()
        self.gather_negatives = gather_negatives
        self.top_k = top_k
        self.chunk_size = chunk_size

    def check_data(self, datamodule: LightningDataModule) -> None:
        """Refuses impressions, and variants of texts where the item tower does not read them.

        Raises:
            ValueError: naming the class or the option that goes with the data.
        """
        if isinstance(datamodule, ImpressionDataModule):
            raise ValueError(
                f"{type(datamodule).__name__} serves impressions, which lightning_rec.{type(self).__name__} cannot "
                f"read: set model.class_path to {self.for_impressions}, or data.class_path to a data module of "
                "interactions such as lightning_rec.NewsDataModule."
            )
        super().check_data(datamodule)

    def _check_repeats(self) -> None:
        if self.score.repeat is None:
            return
        name = type(self.objective).__name__
        if not self.objective.takes_repeats:
            raise ValueError(
                f"score.learn_repeats is on, but {name} cannot learn what a repeat adds: use "
                "lightning_rec.objectives.Softmax, or set score.learn_repeats to false."
            )
        if getattr(self.objective, "exclude_known", False):
            raise ValueError(
                f"score.learn_repeats is on, but {name} leaves known items out of the negatives, so that it would "
                "learn from repeats alone: set objective.exclude_known to false."
            )

    def configure_parts(self, view: CatalogueView) -> None:
        """Sizes objective and metrics."""
        self.objective.configure(
            n_items=view.n_rows - 1,
            rating_range=view.rating_range,
            rating_mean=view.rating_mean,
            dim=self.item_tower.dim,
        )
        for metric in self._metrics("val") + self._metrics("test"):
            metric.configure(view.n_rows, view.counts)

    # ------------------------------------------------------------------ training

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encodes a batch.

        Returns:
            ``(b, t, d)`` interest vectors and ``(n, d)`` vectors of the batch's item table, ready for a dot product.
        """
        assert batch.items is not None
        items = self.item_tower(batch.items)
        interest = self.user_tower(batch.users, items)
        return self.score.interest(interest), self.score.items(items)

    def loss(self, batch: Batch) -> Tensor:
        """The objective on a training batch: the mean over supervised steps, on all devices together."""
        assert batch.items is not None
        assert batch.targets is not None
        interest, items = self(batch)
        targets = batch.targets
        reach = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)  # the newest event known
        if interest.shape[1] == 1 and targets.shape[1] > 1:
            # one vector a history: it is supervised by what followed the whole history
            last = (batch.users.lengths - 1).clamp(min=0)[:, None]
            targets, reach = targets.gather(1, last), last
            ratings = None if batch.ratings is None else batch.ratings.gather(1, last)
        else:
            ratings = batch.ratings
        supervised = targets > 0
        if self.objective.needs_rating and ratings is not None:
            supervised = supervised & ~ratings.isnan()
        owner, step = supervised.nonzero(as_tuple=True)
        candidates = items[1 : batch.n_candidates + 1]
        rows = batch.items.rows[1 : batch.n_candidates + 1]
        target, log_q = targets[owner, step] - 1, batch.log_q
        whole = batch.items.whole
        world = self.world_size
        if world > 1 and self.gather_negatives and log_q is not None:  # without one, every device has all candidates
            candidates, rows, target, log_q = gather_candidates(self, candidates, rows, target, log_q, len(owner))
        more: dict[str, Any] = {}
        if self.score.repeat is not None:
            events = history_columns(batch.users.history, batch.items.rows, rows, self.n_rows, whole)[owner]
            later = torch.arange(events.shape[1], device=events.device) > reach[owner, step][:, None]
            more["repeats"] = Repeats(events.masked_fill(later, -1), self.score.repeat)
        loss = self.objective(
            interest[owner, step],
            candidates,
            target,
            **more,
            owner=owner,
            known=None if batch.known is None else known_columns(batch.known, rows, self.n_rows, whole),
            log_q=log_q,
            rating=None if ratings is None else ratings[owner, step].float(),
        )
        loss = loss if world == 1 else across_ranks(self, loss, len(owner))
        return self.with_auxiliary(loss)

    # ------------------------------------------------------------------ evaluation and prediction

    def _evaluate(self, batch: Batch, stage: Stage) -> None:
        assert batch.targets is not None
        metrics = self._metrics(stage)
        k = max((metric.k for metric in metrics), default=0)
        interest, catalogue, known = self.interests(batch)
        for rows, vectors, table, bonus in self._answer_paths(interest, catalogue, known, batch.users):
            seen = None if batch.seen is None else batch.seen[rows]
            targets = batch.targets[rows]
            alive = alive_windows(getattr(self._trainer, "datamodule", None), batch, rows)
            ranks, scores, recommended = rank_and_top(
                vectors, table, targets, seen, k, alive=alive, bonus=bonus, chunk_size=self.chunk_size
            )
            result = RankingResult(ranks, targets, recommended, scores, self.train_counts)
            for metric in metrics:
                metric.update(result)
        if self.objective.needs_rating and batch.ratings is not None:
            owner, step = (batch.targets > 0).nonzero(as_tuple=True)
            predicted = self.objective.predict_pairs(interest[owner], catalogue.items[batch.targets[owner, step]])
            self._ratings(stage).update(predicted, batch.ratings[owner, step].float())

    def _answer_paths(
        self, interest: Tensor, catalogue: ScoreTable, known: Tensor, users: UserBatch
    ) -> list[tuple[Tensor, Tensor, ScoreTable, HistoryBonus | None]]:
        """Users by the way they are answered: by the towers, and by popularity where the tower knows nothing."""
        bonus = self.history_bonus(users)
        if bool(known.all()):
            return [(torch.arange(len(known), device=known.device), interest, catalogue, bonus)]
        paths: list[tuple[Tensor, Tensor, ScoreTable, HistoryBonus | None]] = []
        if bool(known.any()):
            rows = known.nonzero()[:, 0]
            paths.append((rows, interest[rows], catalogue, None if bonus is None else bonus.of(rows)))
        rows = (~known).nonzero()[:, 0]
        ones = torch.ones(len(rows), 1, device=known.device)
        paths.append((rows, ones, ScoreTable(self.train_counts[:, None].float()), None))
        return paths

    def history_bonus(self, users: UserBatch) -> HistoryBonus | None:
        """What evaluation and prediction add to the scores of items in the users' histories of catalogue rows."""
        repeat = self.score.repeat
        return None if repeat is None else HistoryBonus(users.history, float(repeat))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Ranks the validation targets."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Ranks the test targets."""
        self._evaluate(batch, "test")

    def _metrics(self, stage: Stage) -> list[RankingMetric]:
        return cast(list[RankingMetric], list(self.val_metrics if stage == "val" else self.test_metrics))

    def _ratings(self, stage: Stage) -> RatingMetrics:
        return self.val_ratings if stage == "val" else self.test_ratings

    def metric_modules(self, stage: Stage) -> list[Any]:
        """Ranking metrics, and those of ratings where the objective predicts them."""
        return [*self._metrics(stage), *([self._ratings(stage)] if self.objective.needs_rating else [])]

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Recommends ``top_k`` items.

        Returns:
            ``index`` ``(b,)`` number of each user in the order asked for, ``rows`` ``(b, k)`` catalogue rows (0 where
            the user has nothing left), ``scores`` ``(b, k)``, ``fallback`` ``(b,)`` True where popularity answered.
        """
        assert batch.index is not None
        interest, catalogue, known = self.interests(batch)
        k = min(self.top_k, self.n_rows - 1)
        scores = torch.zeros(len(known), k, device=known.device)
        rows = torch.zeros(len(known), k, dtype=torch.int64, device=known.device)
        for users, vectors, table, bonus in self._answer_paths(interest, catalogue, known, batch.users):
            seen = None if batch.seen is None else batch.seen[users]
            alive = alive_windows(getattr(self._trainer, "datamodule", None), batch, users)
            found_scores, found = top_k(vectors, table, k, seen, alive=alive, bonus=bonus, chunk_size=self.chunk_size)
            scores[users, : found.shape[1]] = found_scores
            rows[users, : found.shape[1]] = found
        return {"index": batch.index, "rows": rows, "scores": scores, "fallback": ~known}


def default_metrics() -> list[RankingMetric]:
    """All ranking metrics at several cut-offs, two of them by slices, and what lies beyond accuracy."""
    return [
        RankingMetrics(ks=(5, 10, 20, 50)),
        RankingMetrics(ks=(10,), names=("hr", "ndcg"), slices=("warm", "cold", "head", "torso", "tail")),
        BeyondAccuracy(k=10),
    ]
