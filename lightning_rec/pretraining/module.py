"""PretrainingModule: the life of a language model that is trained on its own, to go into a tower afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_rec import checkpoint as saved
from lightning_rec.callbacks.results import run_folder
from lightning_rec.optim import Schedule, fused, keep_settings, parameter_groups, scheduler, settings
from lightning_rec.pretraining.data import PretrainingData
from lightning_rec.pretraining.output import best_checkpoint, check_folder, weights_of, write_language_model
from lightning_rec.towers import adalora, parameter_summary
from lightning_rec.towers.language import TextEncoder

Stage = Literal["val", "test"]


class PretrainingModule(LightningModule, ABC):
    """What :class:`LanguageModelling` and :class:`ContrastiveItems` share: optimizer, figures, checkpoints, output.

    At the end of ``fit`` the language model lies in the folder ``pretrained`` of the run, as it was in the best
    checkpoint where one is monitored, else as it is: a plain Hugging Face folder with any adapter merged.

    Args:
        output: the folder to write; None: ``pretrained`` in the run's folder.
        lr: learning rate of the language model, or of its adapter.
        head_lr: learning rate of a head that the language model does not bring.
        weight_decay: AdamW's decay of matrices; norms and biases are not decayed.
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.
    """

    #: What reads texts: it knows the folder, the tokenizer and the length limit.
    text: TextEncoder

    def __init__(
        self, output: str | None, lr: float, head_lr: float, weight_decay: float, warmup_steps: int, schedule: Schedule
    ) -> None:
        super().__init__()
        self.output = output
        self.lr = lr
        self.head_lr = head_lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.is_built = False
        self.restored_random_state: dict[str, Tensor] | None = None
        self._losses: list[Tensor] = []
        self._settings: list[dict[str, Any]] = []
        self._sums = torch.zeros(3, dtype=torch.float64)  # of losses, of hits, of what was asked
        self._read: list[str] | None = None

    # ------------------------------------------------------------------ what a kind of pretraining says

    @abstractmethod
    def check_data(self, datamodule: LightningDataModule) -> None:
        """Refuses a data module whose batches this module cannot read; called before anything is read.

        Raises:
            ValueError: naming the class that goes with this module.
        """

    @abstractmethod
    def build(self) -> None:
        """Creates the parameters."""

    @abstractmethod
    def prepare(self, texts: list[str]) -> None:
        """Tokenises the texts that batches name by their place."""

    @abstractmethod
    def losses(self, batch: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """What is asked in a batch.

        Args:
            batch: of the data module.
            generator: what is drawn at random comes from it; None: from torch's own.

        Returns:
            ``(n,)`` loss of each answer, and ``(n,)`` True where the right one has the highest score, alone.
        """

    @abstractmethod
    def figures(self, loss: Tensor, hits: Tensor) -> dict[str, Tensor]:
        """What is logged of the mean loss and the share of hits."""

    @abstractmethod
    def language_model(self) -> nn.Module:
        """The model without any head and with any adapter merged; its parameters may be this module's own."""

    @abstractmethod
    def language_parameters(self) -> list[nn.Parameter]:
        """The parameters that get ``lr``; all others get ``head_lr``."""

    @property
    def keeps_sentence_files(self) -> bool:
        """True where a vector is still made as the files of a sentence-transformers folder state."""
        return True

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Loads the language model, once."""
        if not self.is_built:
            self.build()
            self.is_built = True

    def setup(self, stage: str) -> None:
        """Looks whether the data module goes with this module."""
        self.check_data(self._data)

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning

    def _prepare(self) -> None:
        texts = self._data.texts
        if self._read is not texts:
            self.prepare(texts)
            self._read = texts

    def on_fit_start(self) -> None:
        """Reads the texts, and looks whether the output can be written before hours are spent on it."""
        check_folder(self.output_folder())
        self._prepare()
        counts = parameter_summary(self)
        share = 100 * counts["trainable"] / max(counts["total"], 1)
        rank_zero_info(f"Trainable parameters: {counts['trainable']:,} of {counts['total']:,} ({share:.1f} %).")

    def on_validation_start(self) -> None:
        """Reads the texts."""
        self._prepare()

    on_test_start = on_validation_start

    def on_train_start(self) -> None:
        """A resumed run goes on with the batches that it has not seen, and with the settings of its own config."""
        self.trainer.fit_loop._load_combined_loader_states()
        if adalora.has_schedule(self):
            adalora.start_schedule(self, self.trainer.estimated_stepping_batches)
        if self.trainer.ckpt_path is not None:
            keep_settings(self.trainer.optimizers, self.trainer.lr_scheduler_configs, self._settings)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A resumed run goes on with the random numbers of the checkpoint."""
        if self.restored_random_state is not None:
            saved.set_random_state(self.restored_random_state, self.device)
            self.restored_random_state = None

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step; a non-finite loss stops the run.

        Raises:
            FloatingPointError: naming the step, when the loss is not finite.
        """
        losses, _ = self.losses(batch)
        loss = losses.sum() / max(len(losses), 1)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch}, batch "
                f"{batch_idx}). Lower lr, set trainer.gradient_clip_val, or set trainer.precision to 32-true or "
                "bf16-mixed."
            )
        self._losses.append(loss.detach())
        penalty = adalora.orthogonality(self)
        return loss if penalty is None else loss + penalty

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and then lets AdaLoRA set its ranks."""
        super().optimizer_step(*args, **kwargs)
        adalora.advance(self, self.global_step + 1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the loss of the step once, as the mean of its accumulated batches."""
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and schedule."""
        groups = parameter_groups(self, self.language_parameters(), self.head_lr, self.lr, self.weight_decay)
        optimizer = AdamW(groups, lr=self.lr, fused=fused(self))
        self._settings = settings(optimizer)
        total = float("inf") if self.schedule == "constant" else self.trainer.estimated_stepping_batches
        schedule = scheduler(optimizer, self.schedule, self.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------ validation and test

    def _measure(self, batch: Any, batch_idx: int) -> None:
        # the same tokens are hidden in every validation, and training draws as if there had been none
        generator = torch.Generator().manual_seed(batch_idx * self.trainer.world_size + self.global_rank)
        losses, hits = self.losses(batch, generator)
        self._sums += torch.tensor([float(losses.sum()), float(hits.sum()), len(losses)], dtype=torch.float64)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Sums losses and hits."""
        self._measure(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Sums losses and hits."""
        self._measure(batch, batch_idx)

    def _log_figures(self, stage: Stage) -> None:
        found: Any = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum")
        self._sums = torch.zeros(3, dtype=torch.float64)
        loss, hits, count = found.float()
        many = self.trainer.world_size > 1
        for name, value in self.figures(loss / count, hits / count).items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss", sync_dist=many)

    def on_validation_epoch_end(self) -> None:
        """Logs the figures of the whole validation."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """Logs the figures of the whole test."""
        self._log_figures("test")

    # ------------------------------------------------------------------ output and checkpoints

    def output_folder(self) -> Path:
        """Where the language model is written; call it on every device."""
        folder = run_folder(self.trainer)
        return folder / "pretrained" if self.output is None else Path(self.output)

    def on_fit_end(self) -> None:
        """Writes the language model of the best checkpoint, or of the last step where none is monitored."""
        folder = self.output_folder()
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by it
            best = best_checkpoint(self.trainer)
            with weights_of(self, best):
                write_language_model(self, folder, best, self._data.protocol)
        self.trainer.strategy.barrier("pretrained")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was trained; the rest comes from the language model's own folder again."""
        names = saved.written_names(self)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}
        checkpoint["pretraining"] = type(self).__name__
        checkpoint["random_state"] = saved.random_state(self.device)
        ranks = adalora.schedule_state(self)
        if ranks:
            checkpoint["adapter_ranks"] = ranks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the model where need be, and checks every key.

        Raises:
            RuntimeError: a checkpoint of another kind, or keys that are missing or foreign.
        """
        self.configure_model()
        kind = checkpoint.get("pretraining")
        given, current = checkpoint["state_dict"], self.state_dict()
        odd = sorted(saved.written_names(self) ^ set(given))
        if kind != type(self).__name__ or odd:
            what = (
                f"it was written by {kind or 'no pretraining'}" if not odd else f"they differ in {', '.join(odd[:5])}"
            )
            raise RuntimeError(
                f"The checkpoint does not fit this {type(self).__name__}: {what}. Use the config that the checkpoint "
                "was fitted with (config.yaml in its run folder)."
            )
        checkpoint["state_dict"] = {name: given.get(name, current[name]) for name in current}
        adalora.restore_schedule(self, checkpoint.get("adapter_ranks", {}))
        if checkpoint.get("global_step", 0) > 0:
            self.restored_random_state = checkpoint["random_state"]


def wants(datamodule: LightningDataModule, kind: type[PretrainingData], module: LightningModule) -> None:
    """Refuses a data module that is not of a kind.

    Raises:
        ValueError: naming the class to use.
    """
    if not isinstance(datamodule, kind):
        raise ValueError(
            f"{type(module).__name__} cannot read the batches of {type(datamodule).__name__}: set data.class_path to "
            f"lightning_rec.pretraining.{kind.__name__}, whose data.domain and data.path (or data.source) name the "
            "data set."
        )
