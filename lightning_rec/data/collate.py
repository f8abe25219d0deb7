"""From histories to batches: whole batches at a time, by array operations, with no loop over events.

A training sample is a slice of one user's training events; its first events are the history and each next event is a
target. How users are evaluated is in ``evaluation.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_rec.data.augment_history import HistoryAugmentation
from lightning_rec.data.augment_text import TextVariants
from lightning_rec.data.batch import Batch, ItemBatch, UserBatch
from lightning_rec.data.histories import Histories
from lightning_rec.data.sampling import NegativeSampler

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Supervision = Literal["every", "random", "last"]
CandidateMode = Literal["catalogue", "batch", "sampled"]


class UserTexts(Protocol):
    """Makes the texts of users."""

    def __call__(self, users: Int, ends: Int, names: Sequence[str] | None = None, /) -> list[str]:
        """One text for each of ``users``, of the events before an offset; ``names``: raw ids, for those without row."""


class BatchIndex(NamedTuple):
    """Which samples a batch holds, and the seed of what is drawn at random for it."""

    samples: Int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """Slices of the event arrays, one a sample.

    Attributes:
        users: ``(s,)`` user row of each sample.
        starts: ``(s,)`` offset of the first event.
        ends: ``(s,)`` offset after the last event.
    """

    users: Int
    starts: Int
    ends: Int

    def __len__(self) -> int:
        return int(self.users.shape[0])

    @property
    def lengths(self) -> Int:
        """``(s,)`` number of events of each sample."""
        return self.ends - self.starts


def training_samples(
    histories: Histories, train_end: Int, max_history: int, windows: Literal["newest", "all"] = "newest"
) -> Samples:
    """The slices that training reads: up to ``max_history`` events of history plus the last target.

    Args:
        histories: events by user.
        train_end: ``(n_users,)`` offset after each user's last training event.
        max_history: longest history, in events.
        windows: ``newest`` keeps the newest ``max_history + 1`` events of a user; ``all`` cuts a longer history into
            windows that end at the newest event and together have every event but the first as a target once.

    Returns:
        Samples of at least two events. Users with fewer than two training events give none.
    """
    starts = histories.indptr[:-1]
    users = np.flatnonzero(train_end - starts >= 2)
    first, last = starts[users], train_end[users]
    if windows == "newest":
        return Samples(users, np.maximum(first, last - max_history - 1), last)
    # each window of max_history targets needs one event before its first target
    counts = -(-(last - first - 1) // max_history)
    owner = np.repeat(np.arange(len(users)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = last[owner] - number * max_history
    return Samples(users[owner], np.maximum(first[owner], ends - max_history - 1), ends)


def gather_slices(starts: Int, ends: Int, least: int = 0) -> tuple[Int, NDArray[np.bool_]]:
    """Offsets of each slice as a right-padded matrix.

    Returns:
        ``(s, w)`` offsets (0 where there is none) and ``(s, w)`` True where there is an event; ``w`` is the longest,
        but no less than ``least``.
    """
    lengths = ends - starts
    width = int(lengths.max(initial=least))
    offsets = starts[:, None] + np.arange(width, dtype=np.int64)
    mask = np.arange(width) < lengths[:, None]
    return np.where(mask, offsets, 0), mask


class KnownItems:
    """The distinct items of each user's training events, as sorted rows of a CSR matrix.

    Args:
        indptr: ``(n_users + 1,)``.
        items: sorted and distinct within each user.
    """

    def __init__(self, indptr: Int, items: Int) -> None:
        self.indptr = indptr
        self.items = items

    @classmethod
    def of(cls, histories: Histories, ends: Int) -> KnownItems:
        """The distinct items of each user's events before ``ends``."""
        offsets, owner = gather_flat(histories.indptr[:-1], ends)
        owner, items = distinct_pairs(owner, histories.items[offsets])
        indptr = np.zeros(len(ends) + 1, dtype=np.int64)
        np.cumsum(np.bincount(owner, minlength=len(ends)), out=indptr[1:])
        return cls(indptr, items)

    def __getitem__(self, user: int) -> Int:
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def matrix(self, users: Int) -> Int:
        """``(b, k)`` known rows of ``users``, padded with 0."""
        if not len(self.items):
            return np.zeros((len(users), 0), dtype=np.int64)
        offsets, mask = gather_slices(self.indptr[users], self.indptr[users + 1])
        return np.where(mask, self.items[offsets], 0)


def gather_flat(starts: Int, ends: Int) -> tuple[Int, Int]:
    """Offsets of all slices one after another, and the number of the slice that each belongs to."""
    lengths = ends - starts
    owner = np.repeat(np.arange(len(starts), dtype=np.int64), lengths)
    first = np.cumsum(lengths) - lengths
    return np.arange(len(owner), dtype=np.int64) - first[owner] + starts[owner], owner


def distinct_pairs(owner: Int, rows: Int) -> tuple[Int, Int]:
    """Distinct (owner, row) pairs, sorted by owner and then by row."""
    width = int(rows.max(initial=0)) + 1
    keys = np.unique(owner * width + rows)
    return keys // width, keys % width


class TrainDataset(Dataset[Batch]):
    """Makes training batches; item ``i`` of the data set is asked for by a :class:`BatchIndex`.

    Args:
        histories: events by user.
        samples: slices of training events only.
        known: known training positives of each user.
        n_rows: catalogue rows, padding included.
        candidates: ``catalogue``: every item; ``batch``: the targets of the step; ``sampled``: the targets of the step
            plus sampled negatives.
        candidate_rows: ``(c,)`` ascending rows, every target and event among them, which are the candidates of
            ``catalogue`` in the place of every item; None: every item.
        sampler: draws the negatives of ``sampled`` and gives their log-q.
        negatives: how many are drawn, for the step, or for each user with ``per_user``.
        per_user: draw ``negatives`` items for each user from what that user has not touched, so that even a user who
            has touched nearly everything meets as many true negatives as there are.
        supervision: ``every`` step of the history is supervised; ``random``: one random prefix of each sample, of which
            the last step is supervised; ``last``: the last step of the sample.
        user_texts: makes user texts from what lies before an offset, or None.
        augmentation: changes histories at random, or None.
        variants: changes texts at random, or None.
    """

    def __init__(
        self,
        histories: Histories,
        samples: Samples,
        known: KnownItems,
        n_rows: int,
        candidates: CandidateMode,
        sampler: NegativeSampler | None = None,
        negatives: int = 0,
        per_user: bool = False,
        supervision: Supervision = "every",
        user_texts: UserTexts | None = None,
        augmentation: HistoryAugmentation | None = None,
        variants: TextVariants | None = None,
        candidate_rows: Int | None = None,
    ) -> None:
        self.histories = histories
        self.samples = samples
        self.known = known
        self.n_rows = n_rows
        self.candidates = candidates
        self.sampler = sampler
        self.negatives = negatives
        self.per_user = per_user
        self.supervision = supervision
        self.user_texts = user_texts
        self.augmentation = augmentation
        self.variants = variants
        if variants is not None:
            variants.check(user_texts)
        self._chances, self._mean_targets = target_chances(histories, samples, supervision, n_rows)
        self._draw_chances = sampler.probabilities if sampler is not None else np.zeros(n_rows)
        self._table = np.arange(n_rows) if candidate_rows is None else np.append(0, candidate_rows)
        self._position = np.zeros(n_rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sort_key(self) -> Int:
        """``(s,)`` what samples are alike in when they make a batch: their length, and how much their user knows.

        One user with very many known items widens ``known`` for the whole batch, so that such users go together. Below
        a thousand it does not matter, and samples stay as mixed as they can be.
        """
        known = np.diff(self.known.indptr)[self.samples.users]
        return self.samples.lengths * 64 + np.frexp(known // 1024)[1]

    def __getitem__(self, index: BatchIndex) -> Batch:
        rng = np.random.default_rng(index.seed)
        chosen = index.samples
        users = self.samples.users[chosen]
        starts, ends = self.samples.starts[chosen], self.samples.ends[chosen]
        if self.supervision == "random":
            ends = rng.integers(starts + 2, ends, endpoint=True)
        epoch = index.seed[:2]
        if self.augmentation is not None:
            starts, ends = self.augmentation.cropped(starts, ends, epoch, chosen, self.supervision != "every")
        offsets, mask = gather_slices(starts, ends - 1)
        items = self.histories.items
        history = np.where(mask, items[offsets], 0)
        following = offsets + 1
        supervised = mask
        if self.augmentation is not None:
            history, supervised = self.augmentation.changed(history, mask, epoch, chosen)
        if self.supervision != "every":
            supervised = np.zeros_like(mask)
            supervised[np.arange(len(users)), ends - starts - 2] = True
        targets = np.where(supervised, items[np.where(supervised, following, 0)], 0)
        times, ratings = self.histories.times, self.histories.ratings
        texts = None if self.user_texts is None else self.user_texts(users, ends - 1)
        if texts is not None and self.variants is not None:
            texts = self.variants.users(texts, users, index.seed)
        batch = Batch(
            users=UserBatch(
                history=torch.from_numpy(history),
                lengths=torch.from_numpy(ends - starts - 1),
                users=torch.from_numpy(users),
                times=None if times is None else torch.from_numpy(np.where(mask, times[offsets], 0)),
                texts=texts,
            ),
            ratings=None
            if ratings is None
            else torch.from_numpy(np.where(supervised, ratings[np.where(supervised, following, 0)], np.nan)),
        )
        self._add_candidates(batch, users, history, targets, rng)
        if self.variants is not None and batch.items is not None:
            self.variants.add(batch.items, index.seed)
        return batch

    def _add_candidates(self, batch: Batch, users: Int, history: Int, targets: Int, rng: np.random.Generator) -> None:
        batch.known = torch.from_numpy(self.known.matrix(users))
        if self.candidates == "catalogue":
            self._add_table(batch, history, targets, self._table, len(self._table) - 1)
            return
        positives = np.unique(targets)
        positives = positives[positives > 0]
        candidates = positives
        if self.candidates == "sampled":
            candidates = np.concatenate([positives, self._draw(users, positives, rng)])
        extra = np.setdiff1d(history, candidates)
        rows = np.concatenate([[0], candidates, extra[extra > 0]])
        self._add_table(batch, history, targets, rows, len(candidates))
        # the expected count of a row in a set of distinct rows is the chance that it is in the set at all
        log_missed = self._log_not_target(candidates, int((targets > 0).sum()))
        if self.candidates == "sampled":
            log_missed = log_missed + self._log_not_drawn(candidates, positives, users)
        batch.log_q = torch.from_numpy(np.log(np.maximum(-np.expm1(log_missed), 1e-30))).float()

    def _add_table(self, batch: Batch, history: Int, targets: Int, table: Int, n_candidates: int) -> None:
        """Adds the step's table of items, and turns catalogue rows into positions in it."""
        whole = table is self._table and len(table) == self.n_rows
        batch.items, batch.n_candidates = ItemBatch(torch.from_numpy(table), whole), n_candidates
        if not whole:
            position = self._position
            position[table] = np.arange(len(table))
            history, targets = position[history], position[targets]
            position[table] = 0
        batch.users.history, batch.targets = torch.from_numpy(history), torch.from_numpy(targets)

    def _draw(self, users: Int, positives: Int, rng: np.random.Generator) -> Int:
        """Distinct negatives that are not targets of the step."""
        assert self.sampler is not None
        if self.per_user:
            drawn = self.sampler.sample_batch(rng, [self.known[int(user)] for user in users], self.negatives)
            # a user who knows everything draws padding
            return np.setdiff1d(drawn, np.append(positives, 0))
        return np.unique(self.sampler.sample(rng, positives, self.negatives))

    def _log_not_target(self, rows: Int, n_targets: int) -> Float:
        """``(c,)`` log of the chance that no target of a step with ``n_targets`` targets is one of ``rows``.

        Steps hold samples of similar length, so that the number of targets says more than the number of samples.
        """
        return n_targets / self._mean_targets * _log_missed(self._chances[rows])

    def _log_not_drawn(self, rows: Int, positives: Int, users: Int) -> Float:
        """``(c,)`` log of the chance that none of the step's draws is one of ``rows``."""
        chances = self._draw_chances
        own = chances[rows]
        if not self.per_user:
            # the draws share what is not a target; a target is judged as if it were none
            left = max(1.0 - float(chances[positives].sum()), 0.0)
            left_with_own = left + np.where(np.isin(rows, positives), own, 0.0)
            return self.negatives * _log_missed(own / np.maximum(left_with_own, own))
        # many users, each with a small chance: the number of times that a row is drawn is close to Poisson
        offsets, owner = gather_flat(self.known.indptr[users], self.known.indptr[users + 1])
        known = self.known.items[offsets]
        can_be_drawn = chances > 0
        unknown = can_be_drawn.sum() - np.bincount(owner[can_be_drawn[known]], minlength=len(users))
        mass = np.maximum(1.0 - np.bincount(owner, chances[known], len(users)), chances[can_be_drawn].min())
        share = np.where(unknown > 0, 1.0 / mass, 0.0)
        shares = share.sum() - np.bincount(known, share[owner], self.n_rows)[rows]
        return -self.negatives * own * np.maximum(shares, 0.0)


def target_chances(
    histories: Histories, samples: Samples, supervision: Supervision, n_rows: int
) -> tuple[Float, float]:
    """How likely each row is to be a target, for the log-q of in-batch candidates.

    Returns:
        ``(n_rows,)`` chance that a row is among the targets of one sample, and the mean number of targets of a sample.
    """
    number = max(len(samples), 1)
    if supervision == "last":
        return np.bincount(histories.items[samples.ends - 1], minlength=n_rows) / number, 1.0
    offsets, owner = gather_flat(samples.starts + 1, samples.ends)
    rows = histories.items[offsets]
    if supervision == "random":
        weights = 1 / (samples.lengths - 1)[owner]
        return np.bincount(rows, weights, n_rows) / number, 1.0
    mean = max(len(rows) / number, 1.0)
    return np.bincount(distinct_pairs(owner, rows)[1], minlength=n_rows) / number, mean


def _log_missed(chance: Float) -> Float:
    return np.log1p(-np.minimum(chance, 1 - 1e-12))
