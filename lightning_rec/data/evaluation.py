"""Who is evaluated, at which moment, and what is to be found.

An evaluation sample is one user: everything before a boundary is the history, what follows it up to the next boundary
is to be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_rec.data.batch import Batch, UserBatch
from lightning_rec.data.collate import BatchIndex, Int, UserTexts, distinct_pairs, gather_flat, gather_slices
from lightning_rec.data.freshness import Lifetimes
from lightning_rec.data.histories import Histories


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
        request_time: time of every request in prediction, in seconds since 1970; None when the data has no times. In
            evaluation a request is made at the time of the first event to be found.
        names: ``s`` raw user ids, by which ``user_texts`` finds what is known of users without a row; None: nothing is.
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
        request_time: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.histories = histories
        self.users = users
        self.cuts = cuts
        self.ends = ends
        self.max_history = max_history
        self.filter_seen = filter_seen
        self.touched = touched
        self.user_texts = user_texts
        self.request_time = request_time
        self.names = names

    def __len__(self) -> int:
        return len(self.users)

    @property
    def sort_key(self) -> Int:
        """``(s,)`` what users are alike in when they make a batch: their whole history, which ``seen`` holds."""
        return self.cuts - self.histories.indptr[self.users]

    def filtered_targets(self) -> int:
        """Number of targets that ``filter_seen`` turns into misses, since their user touched them before."""
        if not self.filter_seen or self.ends is None:
            return 0
        before, before_owner = gather_flat(self.histories.indptr[self.users], self.cuts)
        after, after_owner = gather_flat(self.cuts, self.ends)
        items = self.histories.items
        after_rows, before_rows = items[after], items[before]
        if self.touched is not None:
            others, other_owner = self._touched_before(self.users, self.cuts)
            before_rows, before_owner = np.append(before_rows, others), np.append(before_owner, other_owner)
        width = int(max(after_rows.max(initial=0), before_rows.max(initial=0))) + 1
        targets = np.unique(after_owner * width + after_rows)
        return int(np.isin(targets, before_owner * width + before_rows).sum())

    def targets_not_alive(self, lifetimes: Lifetimes) -> int:
        """Number of targets that are not alive when their user's request is made, which makes them misses."""
        if self.ends is None or not len(self.users):
            return 0
        offsets, owner = gather_flat(self.cuts, self.ends)
        owner, rows = distinct_pairs(owner, self.histories.items[offsets])
        times = self._times(np.arange(len(self)))
        assert times is not None
        return int((~lifetimes.alive(rows, times[owner])).sum())

    def _times(self, chosen: Int) -> Int | None:
        """``(b,)`` time of each request."""
        times = self.histories.times
        if self.ends is not None:
            return None if times is None else times[self.cuts[chosen]]
        return None if self.request_time is None else np.full(len(chosen), self.request_time, dtype=np.int64)

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
                texts=self._texts(users, cuts, chosen),
            ),
            index=torch.from_numpy(np.asarray(chosen, dtype=np.int64)),
        )
        moments = self._times(chosen)
        if moments is not None:
            batch.times = torch.from_numpy(moments)
        if self.ends is not None:
            ends = self.ends[chosen]
            offsets, mask = gather_slices(cuts, ends)
            targets = self._distinct(np.where(mask, items[offsets], 0))
            batch.targets = torch.from_numpy(targets)
            if self.histories.ratings is not None:
                ratings = np.where(targets > 0, self.histories.ratings[offsets], np.nan)
                batch.ratings = torch.from_numpy(ratings)
        if self.filter_seen:
            batch.seen = torch.from_numpy(self._seen(users, first, cuts))
        return batch

    def _texts(self, users: Int, cuts: Int, chosen: Int) -> list[str] | None:
        if self.user_texts is None:
            return None
        if self.names is None:
            return self.user_texts(users, cuts)
        return self.user_texts(users, cuts, [self.names[sample] for sample in chosen.tolist()])

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
        """What was touched without being positive, up to the request."""
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
        elif self.ends is None and self.request_time is not None and touched.times is not None:
            before = touched.times[offsets] <= self.request_time
            offsets, owner = offsets[before], owner[before]
        return touched.items[offsets], owner


def asked_users(asked: list[str] | str | None, everyone: list[str]) -> list[str]:
    """The raw ids of the users to predict for.

    Args:
        asked: ids, a text file with one id a line, or None for ``everyone``.
        everyone: all ids that the data knows.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    return everyone if asked is None else listed_ids(asked, "predict_users", "user")


def user_rows(names: Sequence[str], user_ids: Sequence[str]) -> Int:
    """``(len(names),)`` the row of each user, 0 for one who is not among ``user_ids``."""
    rows = {user: row for row, user in enumerate(user_ids)}
    return np.array([rows.get(name, 0) for name in names], dtype=np.int64)


def listed_ids(given: list[str] | str, option: str, kind: str) -> list[str]:
    """The raw ids that an option gives.

    Args:
        given: the ids, or a text file with one a line.
        option: the option of the data, for the error.
        kind: what the ids are of, likewise.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    if not isinstance(given, str):
        return [str(one) for one in given]
    try:
        text = Path(given).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.{option} names the file {given}, which does not exist. It should hold one {kind} id a line."
        ) from None
    return [line for line in text.split("\n") if line.strip()]
