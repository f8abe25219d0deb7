"""From histories to batches: whole batches at a time, by array operations, with no loop over events.

A training sample is a slice of one user's training events; its first events are the history and each next event is a
target. An evaluation sample is one user: everything before a boundary is the history, what follows it up to the next
boundary is to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_rec.data.batch import Batch, ItemBatch, UserBatch
from lightning_rec.data.sampling import NegativeSampler
from lightning_rec.data.split import Histories

Int = NDArray[np.int64]
Supervision = Literal["every", "random", "last"]
CandidateMode = Literal["catalogue", "batch", "sampled"]

#: users, offsets of the first event not in the history -> one text a user.
UserTexts = Callable[[Int, Int], list[str]]


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
        sampler: draws the negatives of ``sampled`` and gives their log-q.
        negatives: how many are drawn, for the step, or for each user with ``per_user``.
        per_user: draw ``negatives`` items for each user from what that user has not touched, so that even a user who
            has touched nearly everything meets as many true negatives as there are.
        counts: ``(n_rows,)`` how often each row is a target, for the log-q of in-batch candidates.
        supervision: ``every`` step of the history is supervised; ``random``: one random prefix of each sample, of which
            the last step is supervised; ``last``: the last step of the sample.
        user_texts: makes user texts from what lies before an offset, or None.
    """

    def __init__(
        self,
        histories: Histories,
        samples: Samples,
        known: KnownItems,
        n_rows: int,
        candidates: CandidateMode,
        counts: Int,
        sampler: NegativeSampler | None = None,
        negatives: int = 0,
        per_user: bool = False,
        supervision: Supervision = "every",
        user_texts: UserTexts | None = None,
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
        total = max(int(counts.sum()), 1)
        self.target_share = counts / total
        self._whole = torch.arange(n_rows)
        self._position = np.zeros(n_rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: BatchIndex) -> Batch:
        rng = np.random.default_rng(index.seed)
        chosen = index.samples
        users = self.samples.users[chosen]
        starts, ends = self.samples.starts[chosen], self.samples.ends[chosen]
        if self.supervision == "random":
            ends = rng.integers(starts + 2, ends, endpoint=True)
        offsets, mask = gather_slices(starts, ends - 1)
        items = self.histories.items
        history = np.where(mask, items[offsets], 0)
        following = offsets + 1
        supervised = mask
        if self.supervision != "every":
            supervised = np.zeros_like(mask)
            supervised[np.arange(len(users)), ends - starts - 2] = True
        targets = np.where(supervised, items[np.where(supervised, following, 0)], 0)
        times, ratings = self.histories.times, self.histories.ratings
        batch = Batch(
            users=UserBatch(
                history=torch.from_numpy(history),
                lengths=torch.from_numpy(ends - starts - 1),
                users=torch.from_numpy(users),
                times=None if times is None else torch.from_numpy(np.where(mask, times[offsets], 0)),
                texts=None if self.user_texts is None else self.user_texts(users, ends - 1),
            ),
            ratings=None
            if ratings is None
            else torch.from_numpy(np.where(supervised, ratings[np.where(supervised, following, 0)], np.nan)),
        )
        self._add_candidates(batch, users, history, targets, rng)
        return batch

    def _add_candidates(self, batch: Batch, users: Int, history: Int, targets: Int, rng: np.random.Generator) -> None:
        batch.known = torch.from_numpy(self.known.matrix(users))
        if self.candidates == "catalogue":
            batch.items = ItemBatch(self._whole, whole=True)
            batch.targets = torch.from_numpy(targets)
            batch.n_candidates = self.n_rows - 1
            return
        candidates = np.unique(targets)
        candidates = candidates[candidates > 0]
        log_missed = int((targets > 0).sum()) * np.log1p(-self._below_one(self.target_share))
        if self.candidates == "sampled" and self.sampler is not None:
            drawn, number = self._draw(users, candidates, rng)
            candidates = np.concatenate([candidates, drawn])
            log_missed = log_missed + number * np.log1p(-self._below_one(self.sampler.probabilities))
        extra = np.setdiff1d(history, candidates)
        rows = np.concatenate([[0], candidates, extra[extra > 0]])
        position = self._position
        position[rows] = np.arange(len(rows))
        batch.items = ItemBatch(torch.from_numpy(rows))
        batch.targets = torch.from_numpy(position[targets])
        batch.users.history = torch.from_numpy(position[history])
        batch.n_candidates = len(candidates)
        # the expected count of a row in a set of distinct rows is the chance that it was drawn at all
        batch.log_q = torch.from_numpy(np.log(np.maximum(-np.expm1(log_missed[candidates]), 1e-30))).float()
        position[rows] = 0

    @staticmethod
    def _below_one(share: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.minimum(share, 1 - 1e-12)

    def _draw(self, users: Int, candidates: Int, rng: np.random.Generator) -> tuple[Int, int]:
        """Distinct negatives that are not targets of the step, and the number of draws that were made."""
        assert self.sampler is not None
        if self.per_user:
            drawn = self.sampler.sample_batch(rng, [self.known[int(user)] for user in users], self.negatives)
            # a user who knows everything draws padding
            rows = np.setdiff1d(drawn, np.append(candidates, 0))
            return rows, self.negatives * len(users)
        return np.unique(self.sampler.sample(rng, candidates, self.negatives)), self.negatives


class EvaluationDataset(Dataset[Batch]):
    """Makes batches of users whose next items are to be ranked over the whole catalogue.

    Args:
        histories: events by user.
        users: ``(s,)`` user rows, 0 for a user that the data does not know.
        cuts: ``(s,)`` offset of the first event that the model may not see.
        ends: ``(s,)`` offset after the last event to be found; None in prediction.
        max_history: longest history in events; the newest are kept.
        filter_seen: give the items touched before the cut as not to be recommended.
        touched: items touched without being positive (low ratings), which ``filter_seen`` leaves out too.
        user_texts: makes user texts from what lies before an offset, or None.
    """

    def __init__(
        self,
        histories: Histories,
        users: Int,
        cuts: Int,
        ends: Int | None,
        max_history: int,
        filter_seen: bool,
        touched: Histories | None = None,
        user_texts: UserTexts | None = None,
    ) -> None:
        self.histories = histories
        self.users = users
        self.cuts = cuts
        self.ends = ends
        self.max_history = max_history
        self.filter_seen = filter_seen
        self.touched = touched
        self.user_texts = user_texts

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> Int:
        """``(s,)`` length of the history that the model reads."""
        return np.minimum(self.cuts - self.histories.indptr[self.users], self.max_history)

    def filtered_targets(self) -> int:
        """Number of targets that ``filter_seen`` turns into misses, since their user touched them before."""
        if not self.filter_seen or self.ends is None:
            return 0
        before, before_owner = gather_flat(self.histories.indptr[self.users], self.cuts)
        after, after_owner = gather_flat(self.cuts, self.ends)
        items = self.histories.items
        width = int(items.max(initial=0)) + 1
        return int(np.isin(after_owner * width + items[after], before_owner * width + items[before]).sum())

    def __getitem__(self, index: BatchIndex) -> Batch:
        chosen = index.samples
        users, cuts = self.users[chosen], self.cuts[chosen]
        first = self.histories.indptr[users]
        offsets, mask = gather_slices(np.maximum(first, cuts - self.max_history), cuts, least=1)
        items, times = self.histories.items, self.histories.times
        empty = np.zeros(mask.shape, dtype=np.int64)
        batch = Batch(
            users=UserBatch(
                history=torch.from_numpy(np.where(mask, items[offsets], 0) if len(items) else empty),
                lengths=torch.from_numpy(mask.sum(1)),
                users=torch.from_numpy(users),
                times=None if times is None or not len(items) else torch.from_numpy(np.where(mask, times[offsets], 0)),
                texts=None if self.user_texts is None else self.user_texts(users, cuts),
            ),
            index=torch.from_numpy(np.asarray(chosen, dtype=np.int64)),
        )
        if self.ends is not None:
            ends = self.ends[chosen]
            offsets, mask = gather_slices(cuts, ends)
            batch.targets = torch.from_numpy(self._distinct(np.where(mask, items[offsets], 0)))
            if self.histories.ratings is not None:
                ratings = np.where(mask, self.histories.ratings[offsets], np.nan)
                batch.ratings = torch.from_numpy(ratings)
        if self.filter_seen:
            batch.seen = torch.from_numpy(self._seen(users, first, cuts))
        return batch

    @staticmethod
    def _distinct(targets: Int) -> Int:
        """The same rows with each item once (its later repeats become padding)."""
        if targets.shape[1] < 2:
            return targets
        order = np.argsort(targets, axis=1, kind="stable")
        ordered = np.take_along_axis(targets, order, axis=1)
        repeat = np.zeros_like(ordered, dtype=bool)
        repeat[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        ordered[repeat] = 0
        result = np.zeros_like(targets)
        np.put_along_axis(result, order, ordered, axis=1)
        return result

    def _seen(self, users: Int, first: Int, cuts: Int) -> Int:
        rows, owner = gather_flat(first, cuts)
        rows = self.histories.items[rows]
        if self.touched is not None:
            others, other_owner = self._touched_before(users, cuts)
            rows, owner = np.concatenate([rows, others]), np.concatenate([owner, other_owner])
        owner, rows = distinct_pairs(owner, rows)
        counts = np.bincount(owner, minlength=len(users))
        seen = np.zeros((len(users), int(counts.max(initial=0))), dtype=np.int64)
        column = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        seen[owner, column] = rows
        return seen

    def _touched_before(self, users: Int, cuts: Int) -> tuple[Int, Int]:
        """What was touched without being positive, up to the moment of the first event to be found."""
        touched = self.touched
        assert touched is not None
        offsets, owner = gather_flat(touched.indptr[users], touched.indptr[users + 1])
        if self.ends is not None and len(self.histories.items):
            cut = np.minimum(cuts, len(self.histories.items) - 1)
            event = self.histories.event[cut][owner]
            before = touched.event[offsets] < event
            if touched.times is not None and self.histories.times is not None:
                moment, limit = touched.times[offsets], self.histories.times[cut][owner]
                before = (moment < limit) | ((moment == limit) & before)
            offsets, owner = offsets[before], owner[before]
        return touched.items[offsets], owner
