"""What serves the batches of a data module: one loader for training, validation, test and prediction each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from lightning import LightningDataModule

from lightning_rec.data.augment_text import TextAugmentation, TextVariants
from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.collate import TrainDataset
from lightning_rec.data.evaluation import EvaluationDataset
from lightning_rec.data.impression_batches import ImpressionEvaluationDataset, ImpressionTrainDataset
from lightning_rec.data.loader import LengthSampler, ResumableLoader, make_loader


class ServedDataModule(LightningDataModule, ABC):
    """Serves batches of users, or of what they were shown, that are alike in length, each device its share.

    Attributes:
        batch_size: samples a training step, on each device.
        eval_batch_size: samples a step of validation, test and prediction.
        num_workers: loader processes.
        seed: seed of the order of training samples.
        catalogue: the items; there from ``setup`` on.
        text_augmentation: how training texts are changed; None: they are not.
        variant_fields: fields of the items whose variants training brings; none: those of the items' whole texts. The
            model of the run sets it to what its item tower reads.
    """

    batch_size: int
    eval_batch_size: int
    num_workers: int
    seed: int
    catalogue: Catalogue
    text_augmentation: TextAugmentation | None
    variant_fields: Sequence[str] = ()

    @abstractmethod
    def train_dataset(self) -> TrainDataset | ImpressionTrainDataset:
        """The training samples."""

    @abstractmethod
    def evaluation_dataset(
        self, part: Literal["validation", "test"]
    ) -> EvaluationDataset | ImpressionEvaluationDataset:
        """What is evaluated in a part."""

    @abstractmethod
    def prediction_dataset(self) -> EvaluationDataset | ImpressionEvaluationDataset:
        """What is predicted for."""

    def text_variants(self) -> TextVariants | None:
        """Makes the variants of training texts, or None where there are none."""
        if self.text_augmentation is None:
            return None
        columns = self.catalogue.fields
        fields = {name: columns[name] for name in self.variant_fields if name in columns}
        return TextVariants(self.text_augmentation, self.catalogue.texts, fields=fields)

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

    def _loader(
        self,
        dataset: TrainDataset | EvaluationDataset | ImpressionTrainDataset | ImpressionEvaluationDataset,
        shuffle: bool = False,
    ) -> ResumableLoader:
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
        """Batches of training samples with histories of similar length."""
        return self._loader(self.train_dataset(), shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        """Every user with a validation target, or every labelled impression of validation, once."""
        return self._loader(self.evaluation_dataset("validation"))

    def test_dataloader(self) -> ResumableLoader:
        """Every user with a test target, or every labelled impression of the test, once."""
        return self._loader(self.evaluation_dataset("test"))

    def predict_dataloader(self) -> ResumableLoader:
        """Every user or impression asked for, once."""
        return self._loader(self.prediction_dataset())
