"""The events of each user in the order of time, and which of them count. Pure functions on numpy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

Repeats = Literal["keep", "first", "last"]


@dataclass
class Histories:
    """The events of each user in the order of time, users one after the other.

    Attributes:
        user_ids: raw id of each user row; ``user_ids[0] == ""`` is padding, its history is empty.
        indptr: ``(n_users + 1,)`` int64: the events of user ``u`` are ``indptr[u] : indptr[u + 1]``.
        items: ``(n,)`` int64 catalogue rows, never 0.
        times: ``(n,)`` int64 seconds since 1970, or None.
        ratings: ``(n,)`` float32, NaN where there is none, or None.
        event: ``(n,)`` int64 row of the event in the interactions table (to reach its review).
        report: what was left out while the histories were built, counted; see ``build_histories``.
        core_dropped: rows of the interactions table that the k-core left out.
    """

    user_ids: list[str]
    indptr: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    ratings: np.ndarray | None
    event: np.ndarray
    report: dict[str, int] = field(default_factory=dict)
    core_dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def n_users(self) -> int:
        """Number of user rows, padding included."""
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """``(n_users,)`` number of events of each user."""
        return np.diff(self.indptr)

    def __len__(self) -> int:
        """Number of events."""
        return len(self.items)

    def history(self, user: int) -> np.ndarray:
        """All catalogue rows of a user, oldest first: a view, not a copy."""
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def users_of_events(self) -> np.ndarray:
        """``(n,)`` int64 user row of each event."""
        return np.repeat(np.arange(self.n_users), self.lengths)

    def only(self, chosen: np.ndarray) -> Histories:
        """The histories that the events ``chosen``, an ``(n,)`` bool mask, make up; every user keeps the row."""
        return replace(
            self,
            indptr=np.concatenate([[0], np.cumsum(chosen)])[self.indptr],
            items=self.items[chosen],
            times=None if self.times is None else self.times[chosen],
            ratings=None if self.ratings is None else self.ratings[chosen],
            event=self.event[chosen],
        )


def k_core(users: np.ndarray, items: np.ndarray, user_min: int, item_min: int) -> tuple[np.ndarray, dict[str, int]]:
    """Drops users and items with too few events until all that are left have enough.

    Dropping an item shortens histories, which may drop users, and so on: the rule is repeated until nothing changes.

    Args:
        users: ``(n,)`` user of each event, not negative.
        items: ``(n,)`` item of each event, not negative.
        user_min: fewest events of a user.
        item_min: fewest events of an item. Repeats of one user and item count as events.

    Returns:
        ``(n,)`` bool mask of the events kept, and the counts ``core_users_dropped``, ``core_items_dropped``,
        ``core_events_dropped`` and ``core_rounds``.
    """
    alive = np.arange(len(users))
    rounds = 0
    while len(alive):
        of_user, of_item = np.bincount(users[alive]), np.bincount(items[alive])
        keep = (of_user[users[alive]] >= user_min) & (of_item[items[alive]] >= item_min)
        if keep.all():
            break
        alive = alive[keep]
        rounds += 1
    mask = np.zeros(len(users), bool)
    mask[alive] = True
    counts = {
        "core_users_dropped": _distinct(users) - _distinct(users[mask]),
        "core_items_dropped": _distinct(items) - _distinct(items[mask]),
        "core_events_dropped": int((~mask).sum()),
        "core_rounds": rounds,
    }
    return mask, counts


def _distinct(codes: np.ndarray) -> int:
    """Number of distinct codes; counting them is faster than sorting."""
    return int(np.count_nonzero(np.bincount(codes)))


def build_histories(
    user_codes: np.ndarray,
    items: np.ndarray,
    times: np.ndarray | None = None,
    ratings: np.ndarray | None = None,
    *,
    user_ids: list[str],
    keep: np.ndarray | None = None,
    repeats: Repeats = "keep",
    user_min: int = 0,
    item_min: int = 0,
) -> Histories:
    """Sorts interactions into histories: by user, then time, then the order of the file.

    In this order: events of unknown items and events that do not count are left out, repeats are treated, then
    users and items with too few events are dropped. A user who loses all events keeps the row, with an empty history.

    Args:
        user_codes: ``(n,)`` user row of each interaction, from 1.
        items: ``(n,)`` catalogue row of each interaction; 0 marks an unknown item.
        times: ``(n,)`` seconds since 1970; None keeps the order of the file.
        ratings: ``(n,)`` ratings, NaN where there is none.
        user_ids: raw id of each user row, ``user_ids[0] == ""``; rows in the order of first appearance in the file.
        keep: ``(n,)`` bool, False for interactions that do not count (not positive).
        repeats: what becomes of events of the same user and item: ``keep`` all, the ``first`` or the ``last`` only.
        user_min: fewest events of a user, see ``k_core``.
        item_min: fewest events of an item, see ``k_core``.

    Returns:
        The histories. Their ``report`` counts ``interactions``, ``unknown_item_events``, ``not_counted_events``,
        ``repeats_dropped``, ``events``, ``users``, ``users_without_events`` and what ``k_core`` counts.

    Raises:
        ValueError: arrays of different lengths, a user code out of range, an unknown value of ``repeats``.
    """
    user_codes, items = np.asarray(user_codes, np.int64), np.asarray(items, np.int64)
    for name, array in (("items", items), ("times", times), ("ratings", ratings), ("keep", keep)):
        if array is not None and len(array) != len(user_codes):
            raise ValueError(f"There are {len(user_codes)} user codes, but {len(array)} {name}.")
    if not user_ids or user_ids[0] != "":
        raise ValueError("Row 0 of the users is padding: user_ids[0] is an empty string.")
    if len(user_codes) and not (user_codes.min() >= 1 and user_codes.max() < len(user_ids)):
        raise ValueError(
            f"User codes go from 1 to {len(user_ids) - 1}; here from {user_codes.min()} to {user_codes.max()}."
        )
    if repeats not in ("keep", "first", "last"):
        raise ValueError(f"repeats is 'keep', 'first' or 'last', not {repeats!r}.")
    report = {"interactions": len(user_codes), "unknown_item_events": int((items == 0).sum())}
    counted = np.ones(len(items), bool) if keep is None else np.asarray(keep, bool)
    report["not_counted_events"] = int(((items != 0) & ~counted).sum())
    event = np.flatnonzero((items != 0) & counted)
    # lexsort is stable: events of one instant stay in the order of the file.
    keys = (user_codes[event],) if times is None else (np.asarray(times, np.int64)[event], user_codes[event])
    event = event[np.lexsort(keys)]

    before = len(event)
    if repeats != "keep":
        event = event[_without_repeats(user_codes[event], items[event], repeats)]
    report["repeats_dropped"] = before - len(event)
    core_dropped = event[:0]
    if user_min > 1 or item_min > 1:
        mask, counts = k_core(user_codes[event], items[event], user_min, item_min)
        event, core_dropped = event[mask], event[~mask]
        report |= counts
    lengths = np.bincount(user_codes[event], minlength=len(user_ids))
    report |= {
        "events": len(event),
        "users": len(user_ids) - 1,
        "users_without_events": int((lengths[1:] == 0).sum()),
    }
    return Histories(
        user_ids=user_ids,
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=items[event],
        times=None if times is None else np.asarray(times, np.int64)[event],
        ratings=None if ratings is None else np.asarray(ratings, np.float32)[event],
        event=event.astype(np.int64),
        report=report,
        core_dropped=core_dropped.astype(np.int64),
    )


def _without_repeats(users: np.ndarray, items: np.ndarray, repeats: Repeats) -> np.ndarray:
    """Positions of the first (or last) event of each user and item, in order."""
    pair = users * (int(items.max(initial=0)) + 1) + items
    if repeats == "first":
        return np.sort(np.unique(pair, return_index=True)[1])
    return np.sort(len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1])
