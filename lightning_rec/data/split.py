"""Who touched what, in order, and which of it is for training, validation and test. Pure functions on numpy.

The histories of all users lie one after the other in one array, and a split is two offsets a user. Nothing of the
validation and test parts can be reached by a reader that stops at ``train_end``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Literal

import numpy as np

from lightning_rec.data.histories import Histories

Part = Literal["train", "validation", "test"]
Moment = float | int | str | date


@dataclass
class Split:
    """Which events are for training, validation and test.

    For user ``u``: training is ``indptr[u] : train_end[u]``, validation ``validation_begin[u] : validation_end[u]``,
    test ``test_begin[u] : indptr[u + 1]``. The history for a validation target ends at ``validation_begin[u]``, that
    for a test target at ``test_begin[u]``: it holds the validation events. Without a gap each part begins where the one
    before it ends; events in a gap are neither trained on nor to be found, but they are in later histories.

    Attributes:
        train_end: ``(n_users,)`` int64 offsets into the events.
        validation_begin: ``(n_users,)`` int64 offsets into the events.
        validation_end: ``(n_users,)`` int64 offsets into the events.
        test_begin: ``(n_users,)`` int64 offsets into the events.
        validation_users: rows of the users to validate on, ascending; a user outside is not evaluated, whatever
            the offsets hold.
        test_users: rows of the users to test on, ascending.
        name: ``leave_one_out`` or ``global_time``.
        description: one sentence, printed beside each result.
        counts: users, events of each part, users evaluated, and users excluded by reason.
        held_out: ``(n,)`` bool events that training does not have although they lie before ``train_end``, those of
            items held out as cold (see ``cold.py``); None: there are none.
    """

    train_end: np.ndarray
    validation_begin: np.ndarray
    validation_end: np.ndarray
    test_begin: np.ndarray
    validation_users: np.ndarray
    test_users: np.ndarray
    name: str
    description: str
    counts: dict[str, int]
    held_out: np.ndarray | None = None

    def bounds(self, histories: Histories, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """``(n_users,)`` start and ``(n_users,)`` end of each user's events of a part."""
        if part == "train":
            return histories.indptr[:-1], self.train_end
        if part == "validation":
            return self.validation_begin, self.validation_end
        return self.test_begin, histories.indptr[1:]

    def users(self, histories: Histories, part: Part) -> np.ndarray:
        """Rows of the users that a part trains on (those with at least one event) or evaluates, ascending."""
        if part == "train":
            trained, ends = self.training(histories)
            return np.flatnonzero(ends > trained.indptr[:-1])
        return self.validation_users if part == "validation" else self.test_users

    def in_part(self, histories: Histories, part: Part) -> np.ndarray:
        """``(n,)`` bool: the events of a part."""
        start, end = self.bounds(histories, part)
        position = np.arange(len(histories))
        user = histories.users_of_events()
        inside = (position >= start[user]) & (position < end[user])
        return inside & ~self.held_out if part == "train" and self.held_out is not None else inside

    def training(self, histories: Histories) -> tuple[Histories, np.ndarray]:
        """What training may read: histories, and the ``(n_users,)`` offsets after each user's last training event.

        They are the histories themselves, or, where events are held out, histories of the other training events alone.
        """
        if self.held_out is None:
            return histories, self.train_end
        trained = histories.only(self.in_part(histories, "train"))
        return trained, trained.indptr[1:]

    def train_counts(self, histories: Histories, n_rows: int) -> np.ndarray:
        """``(n_rows,)`` int64 number of training events of each catalogue row."""
        return np.bincount(histories.items[self.in_part(histories, "train")], minlength=n_rows)

    def train_ratings(self, histories: Histories) -> np.ndarray:
        """The ratings of the training events that have one; what comes later must not shape the model."""
        if histories.ratings is None:
            return np.zeros(0, dtype=np.float32)
        ratings = histories.ratings[self.in_part(histories, "train")]
        return ratings[np.isfinite(ratings)]


def refit(split: Split, histories: Histories) -> Split:
    """The split of a last fit, once all settings are chosen: validation events become training events.

    The test part stays as it is. Nothing is left to validate on.
    """
    merged = split.validation_end
    counts = split.counts | {
        "train_users": int((merged > histories.indptr[:-1]).sum()),
        "validation_users": 0,
        "train_events": int((merged - histories.indptr[:-1]).sum()),
        "validation_events": 0,
        "validation_targets": 0,
        "gap_events": int((split.test_begin - merged).sum()),
    }
    return replace(
        split,
        train_end=merged,
        validation_begin=merged,
        validation_users=split.validation_users[:0],
        description=f"{split.description.rstrip('.')}; validation events are trained on.",
        counts=counts,
    )


def _split(
    histories: Histories,
    train_end: np.ndarray,
    validation_begin: np.ndarray,
    validation_end: np.ndarray,
    test_begin: np.ndarray,
    cold_users: bool,
    name: str,
    text: str,
) -> Split:
    """Finds the users to evaluate and counts."""
    start, end = histories.indptr[:-1], histories.indptr[1:]
    has_validation, has_test = validation_end > validation_begin, end > test_begin
    known_validation, known_test = validation_begin > start, test_begin > start
    validation_users = np.flatnonzero(has_validation & (known_validation | cold_users))
    test_users = np.flatnonzero(has_test & (known_test | cold_users))
    counts = {
        "users": histories.n_users - 1,
        "train_users": int((train_end > start).sum()),
        "validation_users": len(validation_users),
        "test_users": len(test_users),
        "train_events": int((train_end - start).sum()),
        "validation_events": int((validation_end - validation_begin).sum()),
        "test_events": int((end - test_begin).sum()),
        "validation_targets": int((validation_end - validation_begin)[validation_users].sum()),
        "test_targets": int((end - test_begin)[test_users].sum()),
        "gap_events": int((validation_begin - train_end + test_begin - validation_end).sum()),
    }
    if not cold_users:
        counts["validation_users_excluded_cold"] = int((has_validation & ~known_validation).sum())
        counts["test_users_excluded_cold"] = int((has_test & ~known_test).sum())
    cuts = train_end, validation_begin, validation_end, test_begin
    return Split(*cuts, validation_users, test_users, name, text, counts)


def leave_one_out(histories: Histories, min_events: int = 3) -> Split:
    """The newest event of each user is for test, the one before it for validation, the rest for training.

    Args:
        histories: the events.
        min_events: users with fewer events are not evaluated; all their events are for training.

    Raises:
        ValueError: ``min_events`` leaves no event for training.
    """
    if min_events < 3:
        raise ValueError(
            f"min_events is at least 3 (one event each for training, validation and test), not {min_events}."
        )
    start, end = histories.indptr[:-1], histories.indptr[1:]
    enough = end - start >= min_events
    text = (
        f"Leave-one-out: the newest event of each user with at least {min_events} events is the test target, "
        "the one before it the validation target."
    )
    first, second = end - 2 * enough, end - enough
    split = _split(histories, first, first, second, second, False, "leave_one_out", text)
    few = (end > start) & ~enough
    split.counts["users_excluded_few_events"] = int(few.sum())
    split.counts["users_excluded_no_events"] = int((end == start)[1:].sum())
    return split


def global_time(
    histories: Histories,
    validation_start: Moment = 0.8,
    test_start: Moment = 0.9,
    cold_users: bool = False,
    gap: float = 0.0,
) -> Split:
    """Two moments cut all histories: training before the first, validation up to the second, test after it.

    Events at the very instant of a cut all belong to the later part.

    Args:
        histories: the events, with times.
        validation_start: a fraction of the events below 1 (0.8: the moment when 80 % of them have happened),
            seconds since 1970, or an ISO date or time such as ``2018-09-01`` (UTC unless it says otherwise).
        test_start: the same for the test part.
        cold_users: also evaluate users who have no event before the part, with an empty history. Otherwise they
            are excluded and counted.
        gap: hours before each of the two moments whose events are in no part: what a model that was trained so long
            before it is asked could not have learnt. They are in later histories all the same.

    Raises:
        ValueError: the histories have no times, a moment cannot be read, the gap is negative, or a part is left
            without events.
    """
    if histories.times is None:
        raise ValueError(
            "A global time split needs times, and the interactions have none. Map a column to timestamp, or set "
            "data.split: leave_one_out, which goes by the order of the file."
        )
    times = np.sort(histories.times)
    if not len(times):
        raise ValueError("A global time split needs events, and there are none.")
    first, second = (
        read_moment(value, times, name)
        for value, name in ((validation_start, "validation_start"), (test_start, "test_start"))
    )
    if not (np.isfinite(gap) and gap >= 0):
        raise ValueError(f"gap is {gap}; it is a number of hours, at least 0.")
    wait = round(gap * 3600)
    spans = {
        "training": (times < first - wait).sum(),
        "validation": ((times >= first) & (times < second - wait)).sum(),
        "test": (times >= second).sum(),
    }
    for part, n_events in spans.items():
        if not n_events:
            waiting = f", with a gap of {gap:g} hours before each," if wait else ""
            raise ValueError(
                f"The split at {iso_time(first)} and {iso_time(second)}{waiting} leaves no event for {part}. The times "
                f"of the events go from {iso_time(int(times[0]))} to {iso_time(int(times[-1]))}."
            )
    text = (
        f"Global time: training before {iso_time(first)}, validation from then on, test from {iso_time(second)} on, "
        f"for users {'with or without' if cold_users else 'with'} an event before"
        f"{f'; the {gap:g} hours before each moment are left out' if wait else ''}."
    )
    return _split(
        histories,
        train_end=_ends(histories, first - wait),
        validation_begin=_ends(histories, first),
        validation_end=_ends(histories, second - wait),
        test_begin=_ends(histories, second),
        cold_users=cold_users,
        name="global_time",
        text=text,
    )


def known_by(histories: Histories, time: int) -> np.ndarray:
    """``(n_users,)`` offset after each user's last event at ``time`` or earlier."""
    return _ends(histories, time + 1)


def _ends(histories: Histories, moment: int) -> np.ndarray:
    """``(n_users,)`` offset of each user's first event at the moment or later."""
    assert histories.times is not None
    earlier = np.concatenate([[0], np.cumsum(histories.times < moment)])
    start, end = histories.indptr[:-1], histories.indptr[1:]
    return start + earlier[end] - earlier[start]


def read_moment(value: Moment, times: np.ndarray, name: str) -> int:
    """Seconds since 1970 of a fraction, a number or an ISO string."""
    number: float | int | None = None
    if isinstance(value, str):
        try:
            number = float(value) if "." in value else int(value)
        except ValueError:
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                raise ValueError(
                    f"{name} is {value!r}, which is neither a fraction of the events (0.8), nor seconds since 1970, "
                    "nor an ISO date or time (2018-09-01, 2018-09-01T12:00:00+02:00)."
                ) from None
    elif isinstance(value, float | int) and not isinstance(value, bool):
        number = value
    if isinstance(value, date):
        moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        # A cut between two seconds lies before the later one.
        return int(-(-moment.timestamp() // 1))
    if number is None or not np.isfinite(number):
        raise ValueError(f"{name} is {value!r}; it is a fraction of the events, seconds since 1970 or an ISO date.")
    if isinstance(number, float) and 0 < number < 1:
        return int(times[min(int(number * len(times)), len(times) - 1)])
    return int(-(-number // 1))


def iso_time(seconds: int) -> str:
    """Seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
