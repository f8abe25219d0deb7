"""What the data modules of pretraining share: they read as a domain does, and hold a share out for validation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NoReturn

import numpy as np
from lightning import LightningDataModule, LightningModule
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_rec.data import EcommerceDataModule, NewsDataModule, RecDataModule, VideoDataModule
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.loader import LengthSampler, ResumableLoader, make_loader

Domain = Literal["ecommerce", "video", "news"]
Int = NDArray[np.int64]

_DOMAINS: dict[str, type[RecDataModule]] = {
    "ecommerce": EcommerceDataModule,
    "video": VideoDataModule,
    "news": NewsDataModule,
}


class PretrainingDataset(Dataset[Any], ABC):
    """Samples that are asked for by the batch.

    Attributes:
        sort_key: ``(s,)`` a number in which the samples of a batch should be alike.
    """

    sort_key: Int

    def __len__(self) -> int:
        return len(self.sort_key)

    @abstractmethod
    def __getitem__(self, index: BatchIndex) -> Any:
        """The batch of the samples that ``index`` names."""


class PretrainingData(LightningDataModule, ABC):
    """Reads and splits a data set as its domain does, and serves what a language model is pretrained on.

    Nothing of the domain's validation and test parts is served. A seeded share of what is left is held out, on which
    ``validate`` and ``test`` measure how well the language model does its own task.

    Args:
        domain: which domain's data module reads ``path``.
        path: a folder or file of a data set that the domain recognises.
        source: a data module of interactions in the place of ``domain`` and ``path``, with any of its options.
        validation_share: the share that is held out.
        batch_size: samples a training step, on each device.
        eval_batch_size: samples a step of validation and test.
        num_workers: loader processes.
        seed: seed of the order of samples and of what is held out.

    Raises:
        ValueError: no data set or two of them, or an option out of its range.
    """

    #: The distinct texts that batches name by their place; known after ``setup``.
    texts: list[str]

    def __init__(
        self,
        domain: Domain,
        path: str | None,
        source: RecDataModule | None,
        validation_share: float,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if (path is None) == (source is None):
            raise ValueError(
                "Pretraining reads one data set: set data.path to one that data.domain recognises, or data.source to a "
                "data module of interactions such as lightning_rec.EcommerceDataModule."
            )
        if not 0 <= validation_share < 1:
            raise ValueError(f"validation_share is {validation_share}; it is at least 0 and below 1.")
        self.source = source if source is not None else _DOMAINS[domain](path=path)
        self.validation_share = validation_share
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed

    def check_model(self, module: LightningModule) -> None:
        """Refuses a model that cannot be pretrained; called before anything is read.

        Raises:
            ValueError: naming the classes that go with this data.
        """
        from lightning_rec.pretraining.module import PretrainingModule

        if not isinstance(module, PretrainingModule):
            raise ValueError(
                f"{type(self).__name__} serves texts for pretraining, which {type(module).__name__} cannot read: set "
                "model.class_path to lightning_rec.pretraining.LanguageModelling or ContrastiveItems, or "
                "data.class_path to a data module of interactions."
            )

    @property
    @abstractmethod
    def protocol(self) -> str:
        """One sentence on what is measured on, stated beside each result."""

    @abstractmethod
    def dataset(self, part: Literal["train", "validation"]) -> PretrainingDataset:
        """What is trained on, or what is held out."""

    def held_out(self, count: int) -> tuple[Int, Int]:
        """Places below ``count`` to train on, and those that are held out, both in a seeded order."""
        held = max(1, round(count * self.validation_share)) if self.validation_share and count > 1 else 0
        order = np.random.default_rng(self.seed).permutation(count)
        return order[held:], order[:held]

    def _loader(self, part: Literal["train", "validation"]) -> ResumableLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        dataset = self.dataset(part)
        train = part == "train"
        size = self.batch_size if train else self.eval_batch_size
        sampler = LengthSampler(dataset.sort_key, size, train, self.seed, rank, world)
        return make_loader(dataset, sampler, self.num_workers)

    def train_dataloader(self) -> ResumableLoader:
        """Every sample once an epoch, in a seeded order."""
        return self._loader("train")

    def val_dataloader(self) -> ResumableLoader:
        """What is held out, once."""
        return self._loader("validation")

    def test_dataloader(self) -> ResumableLoader:
        """What is held out, once: the same as in validation."""
        return self._loader("validation")

    def predict_dataloader(self) -> NoReturn:
        """There is nothing to predict.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Pretraining predicts nothing: fit a recommender whose tower has the pretrained folder as language_model, "
            "and let it predict."
        )
