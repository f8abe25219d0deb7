"""Pairs of items that the same users touched, as pairs of texts, for contrastive training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_rec.data import RecDataModule
from lightning_rec.data.collate import BatchIndex
from lightning_rec.pretraining.data import Domain, Int, PretrainingData, PretrainingDataset


@dataclass
class PairBatch:
    """A batch of pairs of texts.

    Attributes:
        anchors: ``(b,)`` int64 places of the first texts in the data module's ``texts``.
        partners: ``(b,)`` int64 places of the second texts.
        excluded: ``(b, b)`` True where the anchor of the row and the partner of the column are one text or a known
            pair, but not this row's own: no negative.
    """

    anchors: Tensor
    partners: Tensor
    excluded: Tensor


class KnownPairs:
    """All pairs of texts that are known to go together.

    Args:
        pairs: ``(m, 2)`` int64 distinct pairs, the lower place first.
        count: number of texts.
    """

    def __init__(self, pairs: Int, count: int) -> None:
        self.count = count
        self.keys = np.sort(pairs[:, 0] * count + pairs[:, 1])

    def __call__(self, first: Int, second: Int) -> np.ndarray:
        """True where ``first`` and ``second``, which broadcast, are a pair in any order."""
        keys = np.minimum(first, second) * self.count + np.maximum(first, second)
        places = np.searchsorted(self.keys, keys).clip(max=max(len(self.keys) - 1, 0))
        return self.keys[places] == keys if len(self.keys) else np.zeros(keys.shape, bool)


class TextPairs(PretrainingDataset):
    """Pairs of texts."""

    def __init__(self, pairs: Int, known: KnownPairs) -> None:
        self.pairs = pairs
        self.known = known
        self.sort_key = np.zeros(len(pairs), dtype=np.int64)  # texts are sorted by length where they are encoded

    def __getitem__(self, index: BatchIndex) -> PairBatch:
        first, second = self.pairs[index.samples].T
        excluded = (first[:, None] == second) | self.known(first[:, None], second[None])
        np.fill_diagonal(excluded, False)
        return PairBatch(torch.tensor(first), torch.tensor(second), torch.from_numpy(excluded))


def co_occurring(owners: Int, texts: Int, window: int) -> tuple[Int, Int]:
    """Pairs of texts that stand near each other in a history.

    Args:
        owners: ``(n,)`` user of each event; the events of a user lie together, oldest first.
        texts: ``(n,)`` text of each event; -1: it has none.
        window: how far apart two events of a pair may be; 1: neighbours only.

    Returns:
        ``(m, 2)`` distinct pairs of different texts, the lower number first, ascending, and ``(m,)`` how often each
        was found.
    """
    found = [np.zeros((0, 2), dtype=np.int64)]
    for distance in range(1, window + 1):
        first, second = texts[:-distance], texts[distance:]
        real = (owners[:-distance] == owners[distance:]) & (first != second) & (first >= 0) & (second >= 0)
        found.append(np.stack([np.minimum(first, second)[real], np.maximum(first, second)[real]], 1))
    pairs, counts = np.unique(np.concatenate(found), axis=0, return_counts=True)
    return pairs, counts


class PretrainingPairs(PretrainingData):
    """Texts of items that stand near each other in the training part of a user's history.

    Each distinct pair comes once an epoch. Items with the same text are one, and items without a text are left out.

    Args:
        domain: which domain's data module reads ``path``: ``ecommerce``, ``video`` or ``news``.
        path: a folder or file of a data set that the domain recognises.
        source: a data module of interactions in the place of ``domain`` and ``path``, with any of its options.
        window: how many events apart two items of a pair may be; 1: neighbours only.
        min_count: pairs that were seen together less often are left out.
        validation_share: share of the pairs that is held out, on which ``validate`` and ``test`` measure.
        batch_size: pairs a training step, on each device: each competes with the partners of the others.
        eval_batch_size: pairs a step of validation and test. The figures depend on it.
        num_workers: loader processes.
        seed: seed of the order of pairs and of what is held out.
    """

    def __init__(
        self,
        domain: Domain = "ecommerce",
        path: str | None = None,
        source: RecDataModule | None = None,
        window: int = 2,
        min_count: int = 1,
        validation_share: float = 0.05,
        batch_size: int = 128,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(domain, path, source, validation_share, batch_size, eval_batch_size, num_workers, seed)
        for name, value in (("window", window), ("min_count", min_count)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1.")
        if batch_size < 2:
            raise ValueError(f"batch_size is {batch_size}; a pair needs another one in its batch to compete with.")
        self.window = window
        self.min_count = min_count

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the data, and collects the pairs, once.

        Raises:
            ValueError: there are fewer than two pairs.
        """
        if hasattr(self, "texts"):
            return
        self.source.setup(stage)
        histories = self.source.histories
        distinct = {text: place for place, text in enumerate(dict.fromkeys(filter(str.strip, self._item_texts)))}
        text_of = np.array([distinct.get(text, -1) for text in self._item_texts], dtype=np.int64)
        train = self.source.split.in_part(histories, "train")
        owners, texts = histories.users_of_events()[train], text_of[histories.items[train]]
        pairs, counts = co_occurring(owners, texts, self.window)
        self.pairs: Int = pairs[counts >= self.min_count]
        if len(self.pairs) < 2:
            raise ValueError(
                f"{len(self.pairs)} pairs of texts were seen together at least {self.min_count} times within "
                f"{self.window} events of a training history, which is nothing to learn from: lower data.min_count, "
                "raise data.window, and see that the items have texts."
            )
        self.known = KnownPairs(self.pairs, len(distinct))
        self.texts = list(distinct)
        self.train_rows, self.held_rows = self.held_out(len(self.pairs))
        rank_zero_info(
            f"Pretraining on {len(self.pairs):,} pairs of {len(np.unique(self.pairs)):,} texts, within {self.window} "
            f"events of each other in training histories, {len(self.held_rows):,} of them held out."
        )

    @property
    def _item_texts(self) -> list[str]:
        return self.source.catalogue.texts

    @property
    def protocol(self) -> str:
        """One sentence on what is measured on."""
        return (
            f"{len(self.held_rows):,} pairs held out of {len(self.pairs):,} (seed {self.seed}), each among the "
            f"partners of {self.eval_batch_size} pairs."
        )

    def dataset(self, part: Literal["train", "validation"]) -> TextPairs:
        """What is trained on, or what is held out."""
        return TextPairs(self.pairs[self.train_rows if part == "train" else self.held_rows], self.known)
