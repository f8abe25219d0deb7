"""Checkpoints and early stopping of a run that may be stopped and resumed at any time."""

from __future__ import annotations

import os
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, but with ``save_last`` the file ``last.ckpt`` is the run's last state.

    Lightning 2.6 writes it only when it also writes one of the best: after epochs that did not improve, a resumed run
    would begin again at the best of them. And with ``check_val_every_n_epoch`` above 1 it waits for a validation, which
    a run on all events (``fit_on: train_validation``) does not have: a stopped one would leave nothing. Its folder is
    absolute, also where a logger names a relative one: by its folder a resumed run knows its own checkpoints again.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the folder."""
        super().setup(trainer, pl_module, stage)
        if self.dirpath and "://" not in str(self.dirpath):
            self.dirpath = os.path.abspath(self.dirpath)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best and the last, where validation does not end with the epoch."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best, where validation ends with the epoch or there is none, and the last after every epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._keep_last(trainer)

    def _keep_last(self, trainer: Trainer) -> None:
        # skipped where this step has been saved, and outside of fit
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class PatientStopping(EarlyStopping):
    """Lightning's ``EarlyStopping``, but a resumed run has the patience that its own config names."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the best score and how long it has stood from a checkpoint."""
        super().load_state_dict({**state_dict, "patience": self.patience})
