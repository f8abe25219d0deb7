"""From impressions to batches: whole batches at a time, by array operations, with no loop over events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_rec.data.augment_history import HistoryAugmentation
from lightning_rec.data.augment_text import TextVariants
from lightning_rec.data.batch import Batch, ImpressionBatch, ItemBatch, UserBatch
from lightning_rec.data.collate import (
    BatchIndex,
    Int,
    KnownItems,
    distinct_pairs,
    gather_flat,
    gather_slices,
)
from lightning_rec.data.impression_signals import Ages, Popularity
from lightning_rec.data.impressions import Impressions, history_slices

ShownCandidates = Literal["sampled", "whole"]
Mask = NDArray[np.bool_]

#: Numbers of impressions -> one text for the user of each.
ImpressionTexts = Callable[[Int], list[str]]


@dataclass
class Known:
    """What the impressions of a part may know.

    Attributes:
        max_history: longest history in events; the newest are kept.
        users: ``(n,)`` user row of each impression of the log, 0 where the user is new.
        ages: of items, or None without times.
        popularity: of items, or None without times.
        texts: makes the texts of users, or None.
    """

    max_history: int
    users: Int
    ages: Ages | None = None
    popularity: Popularity | None = None
    texts: ImpressionTexts | None = None


class _ImpressionDataset(Dataset[Batch]):
    """What training and evaluation share."""

    def __init__(self, impressions: Impressions, known: Known) -> None:
        self.impressions = impressions
        self.known = known

    def _history(self, numbers: Int) -> tuple[Int, Mask, Int]:
        """Offsets ``(b, t)`` of the newest events, where there are some, and their catalogue rows."""
        starts, ends = history_slices(self.impressions, numbers, self.known.max_history)
        offsets, mask = gather_slices(starts, ends, least=1)
        return offsets, mask, _picked(self.impressions.history, offsets, mask, 0, np.int64)

    def _users(self, numbers: Int, offsets: Int, mask: Mask, history: Int) -> UserBatch:
        times = self.impressions.history_times
        return UserBatch(
            history=torch.from_numpy(history),
            lengths=torch.from_numpy(mask.sum(1)),
            users=torch.from_numpy(self.known.users[numbers]),
            times=None if times is None else torch.from_numpy(_picked(times, offsets, mask, 0, np.int64)),
            texts=None if self.known.texts is None else self.known.texts(numbers),
        )

    def _shown(self, numbers: Int, offsets: Int, mask: Mask, rows: Int, labelled: bool) -> ImpressionBatch:
        """The candidates at ``(b, c)`` offsets, still as catalogue rows."""
        log = self.impressions
        labels = None
        if labelled:
            found = _picked(log.labels, offsets, mask, -1, np.float32)
            labels = torch.from_numpy(np.where(found < 0, np.float32(np.nan), found))
        shown = ImpressionBatch(
            candidates=torch.from_numpy(rows),
            sizes=torch.from_numpy(mask.sum(1)),
            labels=labels,
            positions=_tensor(log.positions, offsets, mask, 0, np.int64),
            propensities=_tensor(log.propensities, offsets, mask, np.nan, np.float32),
            dwell=_tensor(log.dwell, offsets, mask, np.nan, np.float32),
        )
        if log.times is not None:
            times = np.broadcast_to(log.times[numbers][:, None], rows.shape)
            shown.times = torch.from_numpy(log.times[numbers])
            if self.known.ages is not None:
                ages = np.where(mask, self.known.ages(rows, times), np.float32(np.nan))
                shown.ages = torch.from_numpy(ages)
            if self.known.popularity is not None:
                popularity = np.where(mask, self.known.popularity(rows, times), np.float32(0))
                shown.popularity = torch.from_numpy(popularity)
        return shown

    def _lengths(self, numbers: Int) -> Int:
        starts, ends = history_slices(self.impressions, numbers, self.known.max_history)
        return ends - starts

    def _both_lengths(self, numbers: Int) -> Int:
        """A key by length of history first, and by number of candidates among equals."""
        return self._lengths(numbers) * 4096 + np.minimum(self.impressions.sizes[numbers], 4095)


class ImpressionEvaluationDataset(_ImpressionDataset):
    """Makes batches of impressions with all their candidates, each impression once.

    Candidates and histories are catalogue rows. ``Batch.index`` is the place of an impression in ``numbers``.

    Args:
        impressions: the log.
        numbers: ``(s,)`` the impressions, in the order of the files.
        known: what they may know.
        labelled: give labels.
    """

    def __init__(self, impressions: Impressions, numbers: Int, known: Known, labelled: bool = True) -> None:
        super().__init__(impressions, known)
        self.numbers = numbers
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def sort_key(self) -> Int:
        """``(s,)`` what impressions are alike in when they make a batch: the length of history, then the candidates."""
        return self._both_lengths(self.numbers)

    def __getitem__(self, index: BatchIndex) -> Batch:
        numbers = self.numbers[index.samples]
        places, past, history = self._history(numbers)
        log = self.impressions
        offsets, mask = gather_slices(log.starts[numbers], log.starts[numbers + 1], least=1)
        rows = _picked(log.candidates, offsets, mask, 0, np.int64)
        return Batch(
            users=self._users(numbers, places, past, history),
            index=torch.from_numpy(np.asarray(index.samples, dtype=np.int64)),
            impressions=self._shown(numbers, offsets, mask, rows, self.labelled),
        )


class ImpressionTrainDataset(_ImpressionDataset):
    """Makes training batches; item ``i`` of the data set is asked for by a :class:`BatchIndex`.

    ``Batch.log_q`` is the log of the chance that a candidate is among the clicks of a step, which is the expected
    number of times that it serves as an in-batch negative, since each distinct click does so once. What is never
    clicked gets a number that stands for no chance.

    Args:
        impressions: the log.
        numbers: the impressions to learn from; those without labels are left out.
        known: what they may know.
        clicked: known training clicks of each user row.
        n_rows: catalogue rows, padding included.
        candidates: ``sampled``: a sample for each click: the click first, then non-clicks of its impression, drawn
            without replacement; an item that was shown several times is drawn once, and one that was also clicked
            never. ``whole``: a sample for each impression with all its candidates as they were shown.
        negatives: non-clicks of a sample of ``sampled``; there are fewer where fewer were shown.
        max_candidates: candidates of a sample of ``whole`` at most; all clicks are kept, and of the others as many as
            there is room for. None keeps all.
        augmentation: changes histories at random, or None.
        variants: changes texts at random, or None.

    Attributes:
        samples: ``(s,)`` the impression of each sample.
    """

    def __init__(
        self,
        impressions: Impressions,
        numbers: Int,
        known: Known,
        clicked: KnownItems,
        n_rows: int,
        candidates: ShownCandidates = "sampled",
        negatives: int = 4,
        max_candidates: int | None = None,
        augmentation: HistoryAugmentation | None = None,
        variants: TextVariants | None = None,
    ) -> None:
        super().__init__(impressions, known)
        if variants is not None:
            variants.check(known.texts)
        self.clicked = clicked
        self.n_rows = n_rows
        self.candidates = candidates
        self.negatives = negatives
        self.max_candidates = max_candidates
        self.augmentation = augmentation
        self.variants = variants
        wanted = np.zeros(len(impressions), dtype=bool)
        wanted[numbers] = True
        offsets, owner = impressions.clicks(wanted)
        rows = impressions.candidates[offsets].astype(np.int64)
        self._clicks = offsets
        self.samples = owner
        if candidates == "whole":
            self.samples = np.flatnonzero(wanted & impressions.labelled)
            rows = distinct_pairs(owner, rows)[1]  # an item that was clicked twice in a sample is one click of it
        self._chances = np.bincount(rows, minlength=n_rows) / max(len(self.samples), 1)
        self._position = np.zeros(n_rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sort_key(self) -> Int:
        """``(s,)`` what samples are alike in when they make a batch: the length of history, then the candidates."""
        return self._lengths(self.samples) if self.candidates == "sampled" else self._both_lengths(self.samples)

    def __getitem__(self, index: BatchIndex) -> Batch:
        rng = np.random.default_rng(index.seed)
        numbers = self.samples[index.samples]
        if self.candidates == "sampled":
            offsets, mask, weights = self._sampled(numbers, self._clicks[index.samples], rng)
        else:
            offsets, mask, weights = self._whole(numbers, rng)
        rows = _picked(self.impressions.candidates, offsets, mask, 0, np.int64)
        places, past, history = self._history(numbers)
        clicked = self.clicked.matrix(self.impressions.users[numbers])
        if self.augmentation is not None:
            # what is hidden of a history was read all the same: it is no negative of the user
            clicked = np.concatenate([clicked, history], axis=1)
            places, past, history = self._augmented(index, self.augmentation)
        shown = self._shown(numbers, offsets, mask, rows, labelled=True)
        shown.weights = torch.from_numpy(np.where(mask, weights, 0).astype(np.float32))
        users = self._users(numbers, places, past, history)
        if users.texts is not None and self.variants is not None:
            users.texts = self.variants.users(users.texts, index.samples, index.seed)
        batch = Batch(
            users=users,
            known=torch.from_numpy(clicked),
            index=torch.from_numpy(numbers),
            impressions=shown,
        )
        self._add_table(batch, rows, history)
        if self.variants is not None and batch.items is not None:
            self.variants.add(batch.items, index.seed)
        return batch

    def _augmented(self, index: BatchIndex, augmentation: HistoryAugmentation) -> tuple[Int, Mask, Int]:
        """The histories as :meth:`_history` returns them, cropped, reordered and masked."""
        epoch = index.seed[:2]
        starts, ends = history_slices(self.impressions, self.samples[index.samples], self.known.max_history)
        # what follows a history is no event of it, but stands in the place of one
        starts, ends = augmentation.cropped(starts, ends + 1, epoch, index.samples, keep_end=True)
        offsets, mask = gather_slices(starts, ends - 1, least=1)
        rows = _picked(self.impressions.history, offsets, mask, 0, np.int64)
        return offsets, mask, augmentation.changed(rows, mask, epoch, index.samples)[0]

    def _sampled(self, numbers: Int, clicks: Int, rng: np.random.Generator) -> tuple[Int, Mask, NDArray[Any]]:
        """``(b, 1 + negatives)`` offsets of the click and of drawn non-clicks, where there are some, and weights."""
        log = self.impressions
        offsets, owner = gather_flat(log.starts[numbers], log.starts[numbers + 1])
        labels = log.labels[offsets]
        keys = owner * self.n_rows + log.candidates[offsets]
        free = np.flatnonzero(labels == 0)
        first = free[np.unique(keys[free], return_index=True)[1]]
        first = first[~np.isin(keys[first], keys[labels == 1])]
        left = np.bincount(owner[first], minlength=len(numbers))
        drawn, place = _drawn(owner[first], len(numbers), np.full(len(numbers), self.negatives), rng)
        drawn = first[drawn]
        matrix = np.zeros((len(numbers), 1 + min(self.negatives, int(left.max(initial=0)))), dtype=np.int64)
        mask = np.zeros(matrix.shape, dtype=bool)
        matrix[:, 0], mask[:, 0] = clicks, True
        matrix[owner[drawn], place + 1], mask[owner[drawn], place + 1] = offsets[drawn], True
        weights = np.ones(matrix.shape)
        weights[:, 1:] = (left / np.clip(left, 1, max(self.negatives, 1)))[:, None]
        return matrix, mask, weights

    def _whole(self, numbers: Int, rng: np.random.Generator) -> tuple[Int, Mask, NDArray[Any]]:
        """``(b, c)`` offsets of the candidates in the order shown, where there are some, and weights."""
        log = self.impressions
        starts, ends = log.starts[numbers], log.starts[numbers + 1]
        if self.max_candidates is None or int((ends - starts).max(initial=0)) <= self.max_candidates:
            offsets, mask = gather_slices(starts, ends, least=1)
            return offsets, mask, np.ones(mask.shape)
        flat, owner = gather_flat(starts, ends)
        clicked = log.labels[flat] == 1
        clicks = np.bincount(owner[clicked], minlength=len(numbers))
        others = np.flatnonzero(~clicked)
        left = np.bincount(owner[others], minlength=len(numbers))
        room = np.minimum(np.maximum(self.max_candidates - clicks, 0), left)
        drawn, _ = _drawn(owner[others], len(numbers), room, rng)
        kept = np.sort(np.concatenate([np.flatnonzero(clicked), others[drawn]]))
        flat, owner, clicked = flat[kept], owner[kept], clicked[kept]
        sizes = clicks + room
        place = np.arange(len(flat)) - (np.cumsum(sizes) - sizes)[owner]
        matrix = np.zeros((len(numbers), max(int(sizes.max(initial=0)), 1)), dtype=np.int64)
        mask, weights = np.zeros(matrix.shape, dtype=bool), np.ones(matrix.shape)
        matrix[owner, place], mask[owner, place] = flat, True
        weights[owner, place] = np.where(clicked, 1.0, (left / np.maximum(room, 1))[owner])
        return matrix, mask, weights

    def _add_table(self, batch: Batch, rows: Int, history: Int) -> None:
        """Gathers the distinct rows of the step and points candidates and histories into them."""
        assert batch.impressions is not None
        candidates = np.unique(rows)
        candidates = candidates[candidates > 0]
        extra = np.setdiff1d(history, candidates)
        table = np.concatenate([[0], candidates, extra[extra > 0]])
        position = self._position
        position[table] = np.arange(len(table))
        batch.items = ItemBatch(torch.from_numpy(table))
        batch.n_candidates = len(candidates)
        batch.impressions.candidates = torch.from_numpy(position[rows])
        batch.users.history = torch.from_numpy(position[history])
        position[table] = 0
        log_missed = len(rows) * np.log1p(-np.minimum(self._chances[candidates], 1 - 1e-12))
        batch.log_q = torch.from_numpy(np.log(np.maximum(-np.expm1(log_missed), 1e-30))).float()


def _drawn(owner: Int, n_owners: int, wanted: Int, rng: np.random.Generator) -> tuple[Int, Int]:
    """Draws up to ``wanted`` of each owner's elements without replacement.

    Returns:
        Numbers of the elements drawn, in the order of owner and draw, and the place of each among its owner's.
    """
    order = np.lexsort((rng.random(len(owner)), owner))
    counts = np.bincount(owner, minlength=n_owners)
    place = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner[order]]
    kept = place < wanted[owner[order]]
    return order[kept], place[kept]


def _picked(values: NDArray[Any], offsets: Int, mask: Mask, missing: Any, dtype: Any) -> NDArray[Any]:
    """Values at a padded matrix of offsets."""
    if not len(values):
        return np.full(offsets.shape, missing, dtype=dtype)
    return np.where(mask, values[offsets], missing).astype(dtype)


def _tensor(values: NDArray[Any] | None, offsets: Int, mask: Mask, missing: Any, dtype: Any) -> Tensor | None:
    return None if values is None else torch.from_numpy(_picked(values, offsets, mask, missing, dtype))
