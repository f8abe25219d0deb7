"""The catalogue's and the users' own texts, for masked-token and next-token training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_rec.data import RecDataModule
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.readers.base import RawData, Reader
from lightning_rec.data.text import clean
from lightning_rec.pretraining.data import Domain, Int, PretrainingData, PretrainingDataset


@dataclass
class TextBatch:
    """A batch of texts.

    Attributes:
        rows: ``(b,)`` int64 places in the data module's ``texts``.
    """

    rows: Tensor


class TextRows(PretrainingDataset):
    """Texts by their place; a batch holds texts of like length."""

    def __init__(self, rows: Int, texts: list[str]) -> None:
        self.rows = rows
        self.sort_key = np.array([len(texts[row]) for row in rows], dtype=np.int64)

    def __getitem__(self, index: BatchIndex) -> TextBatch:
        return TextBatch(torch.from_numpy(self.rows[index.samples]))


class AlreadyRead(Reader):
    """Hands out what has been read, so that no file is read twice."""

    def __init__(self, raw: RawData) -> None:
        self.raw = raw

    def read(self) -> RawData:
        """The tables."""
        return self.raw


class PretrainingTexts(PretrainingData):
    """The distinct texts of a data set: of its items, and what its users wrote.

    A user's texts are the reviews of the training interactions, each by itself, and, where ``source`` has a
    ``user_template``, the user's text as it was at the end of the training part. A review that belongs to an
    interaction of validation or test is not trained on.

    Args:
        domain: which domain's data module reads ``path``: ``ecommerce``, ``video`` or ``news``.
        path: a folder or file of a data set that the domain recognises.
        source: a data module of interactions in the place of ``domain`` and ``path``, with any of its options, such as
            ``reader``, ``template`` and ``user_template``.
        texts: whose texts: of ``items``, of ``users``, or ``all``.
        validation_share: share of the texts that is held out, on which ``validate`` and ``test`` measure.
        batch_size: texts a training step, on each device.
        eval_batch_size: texts a step of validation and test.
        num_workers: loader processes.
        seed: seed of the order of texts and of what is held out.
    """

    def __init__(
        self,
        domain: Domain = "ecommerce",
        path: str | None = None,
        source: RecDataModule | None = None,
        texts: Literal["items", "users", "all"] = "all",
        validation_share: float = 0.05,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(domain, path, source, validation_share, batch_size, eval_batch_size, num_workers, seed)
        self.chosen = texts

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the data, and collects the texts, once.

        Raises:
            ValueError: there is no text.
        """
        if hasattr(self, "texts"):
            return
        raw = self.source.read()
        reader, self.source.reader = self.source.reader, AlreadyRead(raw)
        try:
            self.source.setup(stage)
        finally:
            self.source.reader = reader
        items = self.source.catalogue.texts[1:] if self.chosen != "users" else []
        found = dict.fromkeys(text for text in items if text.strip())
        of_items = len(found)
        if self.chosen != "items":
            found |= dict.fromkeys(text for text in self._of_users(raw) if text.strip())
        if not found:
            raise ValueError(
                f"There is no text to train on: data.texts is {self.chosen!r}, and the data has none of that kind. "
                "Items need fields that data.source.template names; users need reviews, or a data.source.user_template."
            )
        self.texts = list(found)
        self.train_rows, self.held_rows = self.held_out(len(self.texts))
        rank_zero_info(
            f"Pretraining on {len(self.texts):,} distinct texts, {of_items:,} of items and "
            f"{len(found) - of_items:,} of users in training, {len(self.held_rows):,} of them held out."
        )

    def _of_users(self, raw: RawData) -> Iterator[str]:
        histories, split = self.source.histories, self.source.split
        if "review" in raw.interactions.column_names:
            reviews = raw.interactions["review"][:]
            for event in histories.event[split.in_part(histories, "train")].tolist():
                if reviews[event]:
                    yield clean(reviews[event], self.source.cleaning)
        if self.source.user_texts is not None:
            users = split.users(histories, "train")
            yield from self.source.user_texts(users, split.train_end[users])

    @property
    def protocol(self) -> str:
        """One sentence on what is measured on."""
        return f"{len(self.held_rows):,} texts held out of {len(self.texts):,} (seed {self.seed})."

    def dataset(self, part: Literal["train", "validation"]) -> TextRows:
        """What is trained on, or what is held out."""
        return TextRows(self.train_rows if part == "train" else self.held_rows, self.texts)
