"""What serves the batches of a data module: one loader for training, validation, test and prediction each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from lightning import LightningDataModule

from lightning_rec.data.collate import TrainDataset
from lightning_rec.data.evaluation import EvaluationDataset
from lightning_rec.data.loader import LengthSampler, ResumableLoader, make_loader


class ServedDataModule(LightningDataModule, ABC):
    """Serves batches of users who are alike in length, each device its share.

    Attributes:
        batch_size: samples a training step, on each device.
        eval_batch_size: samples a step of validation, test and prediction.
        num_workers: loader processes.
        seed: seed of the order of training samples.
    """

    batch_size: int
    eval_batch_size: int
    num_workers: int
    seed: int

    @abstractmethod
    def train_dataset(self) -> TrainDataset:
        """The training samples."""

    @abstractmethod
    def evaluation_dataset(self, part: Literal["validation", "test"]) -> EvaluationDataset:
        """What is evaluated in a part."""

    @abstractmethod
    def prediction_dataset(self) -> EvaluationDataset:
        """What is predicted for."""

    def keep_plain_hyperparameters(self) -> None:
        """Leaves out what was given from Python as an object: a safe checkpoint holds plain values only.

        Called after ``save_hyperparameters``. From the command line every hyperparameter is plain.
        """
        plain = (str, int, float, bool, list, tuple, dict, type(None))
        for name in [name for name, value in self.hparams.items() if not isinstance(value, plain)]:
            del self.hparams[name]

    @property
    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def _loader(self, dataset: TrainDataset | EvaluationDataset, shuffle: bool = False) -> ResumableLoader:
        rank, world_size = self._place
        sampler = LengthSampler(
            dataset.sort_key,
            batch_size=self.batch_size if shuffle else self.eval_batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        return make_loader(dataset, sampler, self.num_workers)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of training samples of similar length."""
        return self._loader(self.train_dataset(), shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        """Every user with a validation target, once."""
        return self._loader(self.evaluation_dataset("validation"))

    def test_dataloader(self) -> ResumableLoader:
        """Every user with a test target, once."""
        return self._loader(self.evaluation_dataset("test"))

    def predict_dataloader(self) -> ResumableLoader:
        """Every user asked for, once."""
        return self._loader(self.prediction_dataset())
