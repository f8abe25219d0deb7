"""TwoTower: the steps of training, evaluation and prediction. It models nothing itself."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_rec import checkpoint as saved
from lightning_rec.data.batch import Batch, CatalogueView, ItemBatch
from lightning_rec.gather import across_ranks, gather_candidates, known_columns
from lightning_rec.metrics import BeyondAccuracy, RankingMetric, RankingMetrics, RankingResult, RatingMetrics
from lightning_rec.metrics.ranks import ScoreTable, rank_and_top, top_k
from lightning_rec.objectives import Objective, Softmax
from lightning_rec.optim import Schedule, keep_settings, parameter_groups, scheduler, settings
from lightning_rec.towers import ItemTower, UserTower, parameter_summary
from lightning_rec.towers.score import Dot, Score

Stage = Literal["val", "test"]


class TwoTower(LightningModule):
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
        lr_scheduler: any torch scheduler in the place of ``warmup_steps`` and ``schedule``; steps once an epoch.
        gather_negatives: on several devices, let each target compete with the candidates of all devices.
        top_k: number of items that ``predict`` recommends.
        chunk_size: catalogue rows that evaluation scores at a time; changes memory, never a figure.

    Example::

        TwoTower(IdItemTower(dim=64), SequenceUserTower(blocks=2), lr=1e-3)
    """

    train_counts: Tensor

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
        gather_negatives: bool = True,
        top_k: int = 10,
        chunk_size: int = 8192,
    ) -> None:
        super().__init__()
        saved.save_plain_hyperparameters(self)
        self.item_tower = item_tower
        self.user_tower = user_tower
        self.objective = objective if objective is not None else Softmax()
        self.score = score if score is not None else Dot()
        chosen = default_metrics() if metrics is None else metrics
        # modules of this module, so that their sums lie on its device
        self.val_metrics, self.test_metrics = nn.ModuleList(deepcopy(chosen)), nn.ModuleList(deepcopy(chosen))
        self.val_ratings, self.test_ratings = RatingMetrics(), RatingMetrics()
        self.lr = lr
        self.language_lr = language_lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.gather_negatives = gather_negatives
        self.top_k = top_k
        self.chunk_size = chunk_size
        self._losses: list[Tensor] = []
        self._settings: list[dict[str, Any]] = []
        self._prepared: str | None = None
        self.restored_random_state: dict[str, Tensor] | None = None
        self.is_built = False  # True once the towers have their parameters
        self._catalogue: Tensor | None = None
        self._table: ScoreTable | None = None

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Builds the towers once, sized by the data; a checkpoint without data brings its own sizes later."""
        view = self._view
        if view is not None and not self.is_built:
            self.build(view)

    @property
    def _view(self) -> CatalogueView | None:
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        return getattr(datamodule, "view", None)

    def build(self, view: CatalogueView) -> None:
        """Creates the parameters of both towers.

        Args:
            view: sizes of the catalogue, and its texts where they are at hand.
        """
        self.n_rows, self.n_users, self.rating_range = view.n_rows, view.n_users, view.rating_range
        self.item_tower.configure(view)
        self.user_tower.configure(view, self.item_tower)
        self.objective.configure(n_items=view.n_rows - 1, rating_range=view.rating_range)
        for metric in self._metrics("val") + self._metrics("test"):
            metric.configure(view.n_rows, view.counts)
        counts = torch.zeros(view.n_rows, dtype=torch.int64) if view.counts is None else view.counts
        self.register_buffer("train_counts", counts.clone())
        self.ids_digest, self.users_digest = view.ids_digest, view.users_digest
        self.is_built = True

    def _prepare(self) -> None:
        """Attaches the data set to the towers: once for each catalogue."""
        view = self._view
        if view is None or self._prepared == view.digest:
            return
        for tower in (self.item_tower, self.user_tower):
            tower.prepare(view)
            tower.to(self.device)
        self._prepared = view.digest
        if self.trainer.training:
            counts = parameter_summary(self)
            share = 100 * counts["trainable"] / max(counts["total"], 1)
            rank_zero_info(f"Trainable parameters: {counts['trainable']:,} of {counts['total']:,} ({share:.1f} %).")

    def on_fit_start(self) -> None:
        """Encodes or tokenises the catalogue's text where a tower needs it."""
        self._prepare()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_start(self) -> None:
        """A resumed run goes on with the batches that it has not seen, and with the settings of its own config."""
        # Lightning tells a loader its place where it makes it, but a schedule that counts steps made it before.
        self.trainer.fit_loop._load_combined_loader_states()
        if self.trainer.ckpt_path is not None:
            keep_settings(self.trainer.optimizers, self.trainer.lr_scheduler_configs, self._settings)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A resumed run goes on with the random numbers of the checkpoint."""
        if self.restored_random_state is not None:
            saved.set_random_state(self.restored_random_state, self.device)
            self.restored_random_state = None

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
        if interest.shape[1] == 1 and targets.shape[1] > 1:
            # one vector a history: it is supervised by what followed the whole history
            last = (batch.users.lengths - 1).clamp(min=0)[:, None]
            targets = targets.gather(1, last)
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
        world = self.trainer.world_size if self._trainer is not None else 1
        if world > 1 and self.gather_negatives and not whole:
            candidates, rows, target, log_q = gather_candidates(self, candidates, rows, target, log_q, len(owner))
        loss = self.objective(
            interest[owner, step],
            candidates,
            target,
            owner=owner,
            known=None if batch.known is None else known_columns(batch.known, rows, self.n_rows, whole),
            log_q=log_q,
            rating=None if ratings is None else ratings[owner, step].float(),
        )
        return loss if world == 1 else across_ranks(self, loss, len(owner))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One step; a non-finite loss stops the run.

        Raises:
            FloatingPointError: naming the step, when the loss is not finite.
        """
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return None  # a baseline that only counts, such as popularity
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch}, batch "
                f"{batch_idx}). Lower lr or language_lr, set trainer.gradient_clip_val, or set trainer.precision to "
                "32-true or bf16-mixed."
            )
        self._losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the loss of the step once, as the mean of its accumulated batches."""
        if self._losses:
            loss = torch.stack(self._losses).mean()
            self._losses.clear()
            self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)

    def configure_optimizers(self) -> Any:
        """AdamW, or the optimizer and scheduler that were named."""
        language = [*self.item_tower.language_parameters(), *self.user_tower.language_parameters()]
        named = self.optimizer is not None
        groups = parameter_groups(
            self, language, None if named else self.lr, self.language_lr, None if named else self.weight_decay
        )
        if not groups:
            return None
        if self.optimizer is not None:
            optimizer = self.optimizer(groups)
        else:
            fused = self.device.type == "cpu"  # half the time of a step of the default on a CPU
            optimizer = AdamW(groups, lr=self.lr, fused=fused)
        self._settings = settings(optimizer)
        if self.lr_scheduler is not None:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer)}}
        total = float("inf") if self.schedule == "constant" else self.trainer.estimated_stepping_batches
        schedule = scheduler(optimizer, self.schedule, self.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------ evaluation and prediction

    def encode_catalogue(self) -> Tensor:
        """``(n_rows, d)`` vectors of the whole catalogue; row 0 is padding."""
        return self.item_tower(ItemBatch(torch.arange(self.n_rows, device=self.device), whole=True))

    def on_validation_epoch_start(self) -> None:
        """Encodes the catalogue once for all users."""
        self.forget_catalogue()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def interests(self, batch: Batch) -> tuple[Tensor, ScoreTable, Tensor]:
        """Encodes users against the whole catalogue, which is encoded once until ``forget_catalogue``.

        Returns:
            ``(b, d)`` interest vectors at the end of the history and the catalogue of ``(n_rows, d)`` item vectors,
            ready for a dot product, and ``(b,)`` True where the tower knows the user.
        """
        if self._catalogue is None or self._table is None:
            self._catalogue = self.encode_catalogue()
            self._table = ScoreTable(self.score.items(self._catalogue).float())
        interest = self.user_tower(batch.users, self._catalogue)
        if interest.shape[1] > 1:
            last = (batch.users.lengths - 1).clamp(min=0)
            interest = interest[torch.arange(len(interest), device=interest.device), last]
        else:
            interest = interest[:, 0]
        return self.score.interest(interest).float(), self._table, self.user_tower.knows(batch.users)

    def _evaluate(self, batch: Batch, stage: Stage) -> None:
        assert batch.targets is not None
        metrics = self._metrics(stage)
        k = max((metric.k for metric in metrics), default=0)
        interest, catalogue, known = self.interests(batch)
        for rows, vectors, table in self._answer_paths(interest, catalogue, known):
            seen = None if batch.seen is None else batch.seen[rows]
            targets = batch.targets[rows]
            ranks, scores, recommended = rank_and_top(vectors, table, targets, seen, k, chunk_size=self.chunk_size)
            result = RankingResult(ranks, targets, recommended, scores, self.train_counts)
            for metric in metrics:
                metric.update(result)
        if self.objective.needs_rating and batch.ratings is not None:
            owner, step = (batch.targets > 0).nonzero(as_tuple=True)
            dot = (interest[owner] * catalogue.items[batch.targets[owner, step]]).sum(-1)
            self._ratings(stage).update(self.objective.predict(dot), batch.ratings[owner, step].float())

    def _answer_paths(
        self, interest: Tensor, catalogue: ScoreTable, known: Tensor
    ) -> list[tuple[Tensor, Tensor, ScoreTable]]:
        """Users by the way they are answered: by the towers, and by popularity where the tower knows nothing."""
        if bool(known.all()):
            return [(torch.arange(len(known), device=known.device), interest, catalogue)]
        paths = []
        if bool(known.any()):
            rows = known.nonzero()[:, 0]
            paths.append((rows, interest[rows], catalogue))
        rows = (~known).nonzero()[:, 0]
        ones = torch.ones(len(rows), 1, device=known.device)
        paths.append((rows, ones, ScoreTable(self.train_counts[:, None].float())))
        return paths

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

    def _log_metrics(self, stage: Stage) -> None:
        found: dict[str, Any] = {}
        modules: list[Any] = self._metrics(stage)
        if self.objective.needs_rating:
            modules.append(self._ratings(stage))
        for metric in modules:
            value = metric.compute()  # sums of all devices, so each value is the same everywhere
            found |= value if isinstance(value, dict) else {type(metric).__name__.lower(): value}
            metric.reset()
        for name, value in found.items():
            figure = torch.as_tensor(value, dtype=torch.float32)
            # the same on every device already; saying so to Lightning costs less than its warning about each figure
            self.log(f"{stage}/{name}", figure, prog_bar=name == "ndcg@10", sync_dist=self.trainer.world_size > 1)
        self.forget_catalogue()

    def forget_catalogue(self) -> None:
        """Drops the encoded catalogue: the towers are about to change."""
        self._catalogue = self._table = None

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of all users."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of all users."""
        self._log_metrics("test")

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
        for users, vectors, table in self._answer_paths(interest, catalogue, known):
            seen = None if batch.seen is None else batch.seen[users]
            found_scores, found = top_k(vectors, table, k, seen, chunk_size=self.chunk_size)
            scores[users, : found.shape[1]] = found_scores
            rows[users, : found.shape[1]] = found
        return {"index": batch.index, "rows": rows, "scores": scores, "fallback": ~known}

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was trained and drops what the pretrained model brings along."""
        saved.on_save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the towers where there is no data, and checks every key."""
        saved.on_load(self, checkpoint, self._view)


def default_metrics() -> list[RankingMetric]:
    """All ranking metrics at several cut-offs, two of them by slices, and what lies beyond accuracy."""
    return [
        RankingMetrics(ks=(5, 10, 20, 50)),
        RankingMetrics(ks=(10,), names=("hr", "ndcg"), slices=("warm", "cold", "head", "torso", "tail")),
        BeyondAccuracy(k=10),
    ]
