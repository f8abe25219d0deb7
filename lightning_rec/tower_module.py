"""TowerModule: the life of two towers, whatever they are trained and measured on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_rec import checkpoint as saved
from lightning_rec.data.batch import Batch, CatalogueView, ItemBatch
from lightning_rec.metrics.ranks import ScoreTable
from lightning_rec.optim import Schedule, fused, keep_settings, named_scheduler, parameter_groups, scheduler, settings
from lightning_rec.towers import ItemTower, UserTower, adalora, parameter_summary
from lightning_rec.towers.adapters import of_tower
from lightning_rec.towers.score import Dot, Score
from lightning_rec.transfer import start_from

Stage = Literal["val", "test"]


class TowerModule(LightningModule, ABC):
    """What :class:`TwoTower` and :class:`ImpressionTwoTower` share: building, optimizers, logging, checkpoints.

    Args:
        item_tower: turns items into vectors.
        user_tower: turns histories into interest vectors.
        score: dot product when None.
        lr: learning rate of all but the language models.
        language_lr: learning rate of pretrained language models and their adapters.
        weight_decay: AdamW's decay of matrices.
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.
        optimizer: any torch optimizer in the place of AdamW.
        lr_scheduler: any torch scheduler in the place of ``warmup_steps`` and ``schedule``.
        start_from: a checkpoint whose towers this run begins with.
    """

    #: True when ``predict`` scores what was shown, and False when it recommends from the whole catalogue.
    answers_impressions: ClassVar[bool] = False
    #: The figure that the progress bar shows.
    headline: ClassVar[str] = "ndcg@10"

    train_counts: Tensor

    def __init__(
        self,
        item_tower: ItemTower,
        user_tower: UserTower,
        score: Score | None = None,
        lr: float = 1e-3,
        language_lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        self.start_from = start_from
        self._has_weights = False  # True once a checkpoint brought them
        self.item_tower = item_tower
        self.user_tower = user_tower
        self.score = score if score is not None else Dot()
        self.lr = lr
        self.language_lr = language_lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._losses: list[Tensor] = []
        self._settings: list[dict[str, Any]] = []
        self._prepared: str | None = None
        self.restored_random_state: dict[str, Tensor] | None = None
        self.restored_gradients: dict[str, Tensor] = {}
        self.is_built = False  # True once the towers have their parameters
        self._catalogue: Tensor | None = None
        self._table: ScoreTable | None = None

    # ------------------------------------------------------------------ building

    def check_data(self, datamodule: LightningDataModule) -> None:
        """Refuses a data module whose batches this module cannot read; called before anything is read.

        Here: variants of texts that the item tower does not read.

        Raises:
            ValueError: naming the class or the option that goes with the data.
        """
        augmentation = getattr(datamodule, "text_augmentation", None)
        if augmentation is not None and augmentation.texts != "users" and not self.item_tower.reads_variants:
            raise ValueError(
                f"data.text_augmentation makes variants of the items' texts, but {type(self.item_tower).__name__} does "
                "not read them in training: variants are for lightning_rec.towers.TextItemTower, TextIdItemTower and "
                "NewsItemTower with a tuned language model (item_tower.peft, or item_tower.tune: full), and for "
                "NewsItemTower with words; the vectors of a frozen one are made once and cached. Choose such a tower, "
                "set text_augmentation.texts to users, or leave text_augmentation out."
            )

    def setup(self, stage: str) -> None:
        """Looks whether the data module goes with this module, and tells it which variants of texts are read."""
        datamodule: Any = getattr(self._trainer, "datamodule", None)
        if datamodule is not None:
            self.check_data(datamodule)
            if getattr(datamodule, "text_augmentation", None) is not None:
                datamodule.variant_fields = self.item_tower.text_fields

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
        with of_tower(f"The item tower ({type(self.item_tower).__name__})"):
            self.item_tower.configure(view)
        with of_tower(f"The user tower ({type(self.user_tower).__name__})"):
            self.user_tower.configure(view, self.item_tower)
        self.configure_parts(view)
        counts = torch.zeros(view.n_rows, dtype=torch.int64) if view.counts is None else view.counts
        self.register_buffer("train_counts", counts.clone())
        self.ids_digest, self.users_digest = view.ids_digest, view.users_digest
        self.is_built = True

    @abstractmethod
    def configure_parts(self, view: CatalogueView) -> None:
        """Sizes objective and metrics, after the towers."""

    def _prepare(self) -> None:
        """Attaches the data set to the towers: once for each catalogue."""
        view = self._view
        if view is None or self._prepared == view.digest:
            return
        if self.start_from is not None and not self._has_weights:
            start_from(self, self.start_from)  # before the towers look at the data, which they need not do again then
            self._has_weights = True
        for tower in (self.item_tower, self.user_tower):
            tower.prepare(view)
            tower.to(self.device)
        self._prepared = view.digest
        if self.trainer.training:
            for name, part in (
                ("", self),
                (" of the item tower", self.item_tower),
                (" of the user tower", self.user_tower),
            ):
                counts = parameter_summary(part)
                share = 100 * counts["trainable"] / max(counts["total"], 1)
                rank_zero_info(
                    f"Trainable parameters{name}: {counts['trainable']:,} of {counts['total']:,} ({share:.1f} %)."
                )

    def on_fit_start(self) -> None:
        """Encodes or tokenises the catalogue's text where a tower needs it."""
        self._prepare()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_start(self) -> None:
        """A resumed run goes on with the batches that it has not seen, and with the settings of its own config."""
        # Lightning tells a loader its place where it makes it, but a schedule that counts steps made it before.
        self.trainer.fit_loop._load_combined_loader_states()
        if adalora.has_schedule(self):
            adalora.start_schedule(self, self.trainer.estimated_stepping_batches)
        for name, gradient in self.restored_gradients.items():  # what was accumulated when the checkpoint was made
            parameter = self.get_parameter(name)
            parameter.grad = gradient.to(parameter)
        self.restored_gradients = {}
        if self.trainer.ckpt_path is not None:
            keep_settings(self.trainer.optimizers, self.trainer.lr_scheduler_configs, self._settings)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A resumed run goes on with the random numbers of the checkpoint."""
        if self.restored_random_state is not None:
            saved.set_random_state(self.restored_random_state, self.device)
            self.restored_random_state = None

    # ------------------------------------------------------------------ training

    @property
    def world_size(self) -> int:
        """Number of devices; 1 without a trainer."""
        return self.trainer.world_size if self._trainer is not None else 1

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The objective on a training batch: the mean over what is supervised, on all devices together."""

    def with_auxiliary(self, loss: Tensor) -> Tensor:
        """The loss and what the towers want added to it; see :meth:`lightning_rec.towers.Tower.auxiliary_loss`."""
        extras = (tower.auxiliary_loss() for tower in (self.item_tower, self.user_tower))
        return sum((extra for extra in extras if extra is not None), start=loss)

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
        penalty = adalora.orthogonality(self)
        return loss if penalty is None else loss + penalty

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and then lets AdaLoRA set its ranks, while the gradients are there and before a checkpoint is made."""
        super().optimizer_step(*args, **kwargs)
        adalora.advance(self, self.global_step + 1)

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
            optimizer = AdamW(groups, lr=self.lr, fused=fused(self))
        self._settings = settings(optimizer)
        if self.lr_scheduler is not None:
            return {"optimizer": optimizer, "lr_scheduler": named_scheduler(self.lr_scheduler(optimizer))}
        total = float("inf") if self.schedule == "constant" else self.trainer.estimated_stepping_batches
        schedule = scheduler(optimizer, self.schedule, self.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------ evaluation and prediction

    def encode_catalogue(self) -> Tensor:
        """``(n_rows, d)`` vectors of the whole catalogue; row 0 is padding."""
        return self.item_tower(ItemBatch(torch.arange(self.n_rows, device=self.device), whole=True))

    def catalogue(self) -> Tensor:
        """``(n_rows, d)`` vectors of the whole catalogue, encoded once until ``forget_catalogue``."""
        if self._catalogue is None:
            self._catalogue = self.encode_catalogue()
        return self._catalogue

    def score_table(self) -> ScoreTable:
        """The whole catalogue, ready for exact scores, until ``forget_catalogue``."""
        if self._table is None:
            self._table = ScoreTable(self.score.items(self.catalogue()).float())
        return self._table

    def interests(self, batch: Batch) -> tuple[Tensor, ScoreTable, Tensor]:
        """Encodes users against the whole catalogue, which is encoded once until ``forget_catalogue``.

        Returns:
            ``(b, d)`` interest vectors at the end of the history and the catalogue of ``(n_rows, d)`` item vectors,
            ready for a dot product, and ``(b,)`` True where the tower knows the user.
        """
        interest = last_step(self.user_tower(batch.users, self.catalogue()), batch)
        return self.score.interest(interest).float(), self.score_table(), self.user_tower.knows(batch.users)

    def forget_catalogue(self) -> None:
        """Drops the encoded catalogue: the towers are about to change."""
        self._catalogue = self._table = None

    def on_validation_epoch_start(self) -> None:
        """Encodes the catalogue once for all users."""
        self.forget_catalogue()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    @abstractmethod
    def metric_modules(self, stage: Stage) -> list[Any]:
        """What is computed and logged at the end of a validation or a test."""

    def _log_metrics(self, stage: Stage) -> None:
        found: dict[str, Any] = {}
        for metric in self.metric_modules(stage):
            value = metric.compute()  # sums of all devices, so each value is the same everywhere
            found |= value if isinstance(value, dict) else {type(metric).__name__.lower(): value}
            metric.reset()
        for name, value in found.items():
            figure = torch.as_tensor(value, dtype=torch.float32)
            # the same on every device already; saying so to Lightning costs less than its warning about each figure
            self.log(f"{stage}/{name}", figure, prog_bar=name == self.headline, sync_dist=self.trainer.world_size > 1)
        self.forget_catalogue()

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the whole validation."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the whole test."""
        self._log_metrics("test")

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was trained and drops what the pretrained model brings along."""
        saved.on_save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the towers where there is no data, and checks every key."""
        saved.on_load(self, checkpoint, self._view)
        self._has_weights = True


def last_step(interest: Tensor, batch: Batch) -> Tensor:
    """``(b, d)`` the interest at the end of each history, of a tower's ``(b, t, d)`` or ``(b, 1, d)``."""
    if interest.shape[1] == 1:
        return interest[:, 0]
    last = (batch.users.lengths - 1).clamp(min=0)
    return interest[torch.arange(len(interest), device=interest.device), last]
