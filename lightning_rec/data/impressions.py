"""A log of impressions as columns: who was shown what, when, and what was clicked. Pure functions on numpy and pyarrow.

The candidates of all impressions lie one after the other in one array, and so do the events of all histories. What
the model may know of the past is cut here once: an impression sees what is strictly earlier than itself and belongs to
no later part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.collate import gather_flat

Int = NDArray[np.int64]

Part = Literal["train", "validation", "test", "predict"]
#: The parts of a log; the number of a part is its place here. A part sees nothing of those after it.
PARTS: tuple[Part, ...] = ("train", "validation", "test", "predict")


@dataclass
class Impressions:
    """``n`` impressions in the order of the files, with ``m`` candidates and ``h`` events of histories together.

    Attributes:
        ids: raw id of each impression, not always distinct.
        users: ``(n,)`` user rows, from 1.
        times: ``(n,)`` int64 seconds since 1970, or None.
        starts: ``(n + 1,)`` the candidates of impression ``i`` are ``starts[i] : starts[i + 1]``.
        candidates: ``(m,)`` int32 catalogue rows in the order in which they were shown, with repeats.
        labels: ``(m,)`` int8: 1 clicked, 0 not, -1 unlabelled.
        history_starts: ``(n,)`` the history of impression ``i`` is ``history_starts[i] : history_ends[i]``.
        history_ends: ``(n,)``.
        history: ``(h,)`` int32 catalogue rows, oldest first; impressions of one user may share them.
        has_history: False while histories have to be made of clicks, see :func:`with_click_histories`.
        history_times: ``(h,)`` int64 seconds since 1970, or None where the log does not tell.
        positions: ``(m,)`` int32 place on the page from 1, 0 unknown; or None.
        propensities: ``(m,)`` float32, NaN unknown; or None.
        dwell: ``(m,)`` float32 seconds, NaN unknown; or None.
        parts: ``(n,)`` int8 places in ``PARTS``, or None where the files do not say.
        feedback: what the user wrote at each impression, ``""`` where nothing; or None.
        report: counts of what was met and left out.
    """

    ids: list[str]
    users: Int
    times: Int | None
    starts: Int
    candidates: NDArray[np.int32]
    labels: NDArray[np.int8]
    history_starts: Int
    history_ends: Int
    history: NDArray[np.int32]
    has_history: bool = True
    history_times: Int | None = None
    positions: NDArray[np.int32] | None = None
    propensities: NDArray[np.float32] | None = None
    dwell: NDArray[np.float32] | None = None
    parts: NDArray[np.int8] | None = None
    feedback: list[str] | None = None
    report: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def sizes(self) -> Int:
        """``(n,)`` number of candidates of each impression."""
        return np.diff(self.starts)

    @property
    def owner(self) -> Int:
        """``(m,)`` the impression of each candidate."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.sizes)

    def counts(self, label: int) -> Int:
        """``(n,)`` number of candidates of each impression that have the label."""
        return _sums(self.labels == label, self.starts)

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """``(n,)`` True where at least one candidate has a label."""
        return _sums(self.labels >= 0, self.starts) > 0

    def clicks(self, parts: NDArray[np.bool_] | None = None) -> tuple[Int, Int]:
        """Offsets of all clicked candidates (of impressions where ``parts`` is True), and the impression of each."""
        owner = self.owner
        clicked = self.labels == 1
        offsets = np.flatnonzero(clicked if parts is None else clicked & parts[owner])
        return offsets, owner[offsets]


def _sums(flags: NDArray[np.bool_], starts: Int) -> Int:
    return np.diff(np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])[starts])


def arrow_column(table: Dataset, name: str) -> pa.ChunkedArray | None:
    """A column as Arrow holds it; None when the table lacks it or it is null throughout."""
    if name not in table.column_names:
        return None
    column = (table if table._indices is None else table.flatten_indices()).data.column(name)
    return None if len(column) and column.null_count == len(column) else column


def flat_lists(column: pa.ChunkedArray) -> tuple[Int, pa.ChunkedArray]:
    """``(n,)`` length of each list (0 where it is null), and the values of all lists one after the other."""
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)
    chunks = [chunk.flatten() for chunk in column.chunks]
    return lengths, pa.chunked_array(chunks, type=column.type.value_type)


def item_ids(table: Dataset) -> pa.Array:
    """The distinct raw ids of all candidates and histories."""
    found: list[pa.Array] = []
    for name in ("candidates", "history"):
        column = arrow_column(table, name)
        if column is not None:
            found.append(pc.unique(flat_lists(column)[1]).cast(pa.large_string()))
    return pc.unique(pa.chunked_array(found, type=pa.large_string()))


def build_impressions(table: Dataset, catalogue: Catalogue, users: Int) -> Impressions:
    """Turns the canonical table into columns of catalogue rows.

    Args:
        table: see :class:`~lightning_rec.data.readers.RawImpressions`.
        catalogue: gives the rows. A candidate or an event of a history whose item it lacks is left out and counted
            (``dropped_candidates``, ``dropped_history``); a catalogue built with ``unknown_items: add`` lacks none.
        users: ``(n,)`` user row of each impression.

    Raises:
        ValueError: a list that is not as long as the candidates, a label other than 0 and 1, a part or a time that
            is missing in some rows only; the message names the impression.
    """
    ids = _ids(table)
    shown = arrow_column(table, "candidates")
    if shown is None:
        raise ValueError("The impressions have no candidates: what was shown is needed to learn from and to rank.")
    sizes, values = flat_lists(shown)
    starts = _starts(sizes)
    candidates = catalogue.rows(values).astype(np.int32)
    labels = _aligned(table, "labels", sizes, ids, -1, np.int8)
    if labels is not None and ((labels < -1) | (labels > 1)).any():
        place = int(np.flatnonzero((labels < -1) | (labels > 1))[0])
        number = int(np.searchsorted(starts, place, "right")) - 1
        raise ValueError(f"{_name(ids, number)} has the label {labels[place]}; labels are 1 (clicked) and 0 (not).")
    past = arrow_column(table, "history")
    if past is None:
        lengths, history = np.zeros(len(table), dtype=np.int64), np.zeros(0, dtype=np.int32)
    else:
        lengths, events = flat_lists(past)
        history = catalogue.rows(events).astype(np.int32)
    bounds = _starts(lengths)
    feedback = arrow_column(table, "feedback")
    impressions = Impressions(
        ids=ids,
        users=np.asarray(users, dtype=np.int64),
        times=_times(table, ids),
        starts=starts,
        candidates=candidates,
        labels=np.full(len(candidates), -1, dtype=np.int8) if labels is None else labels,
        history_starts=bounds[:-1],
        history_ends=bounds[1:],
        history=history,
        has_history=past is not None,
        positions=_aligned(table, "positions", sizes, ids, 0, np.int32),
        propensities=_aligned(table, "propensities", sizes, ids, np.nan, np.float32),
        dwell=_aligned(table, "dwell", sizes, ids, np.nan, np.float32),
        parts=_parts(table, ids),
        feedback=None if feedback is None else pc.fill_null(feedback, "").to_pylist(),
    )
    _drop_unknown(impressions)
    return impressions


def _ids(table: Dataset) -> list[str]:
    column = arrow_column(table, "impression_id")
    if column is None:
        return [str(number) for number in range(1, len(table) + 1)]
    return pc.fill_null(column, "").to_pylist()


def _name(ids: list[str], number: int) -> str:
    return f"Impression {ids[number]!r} (number {number + 1:,} of the log)"


def _starts(lengths: Int) -> Int:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _aligned(table: Dataset, name: str, sizes: Int, ids: list[str], missing: Any, dtype: Any) -> NDArray[Any] | None:
    """One value a candidate, ``missing`` where there is none."""
    column = arrow_column(table, name)
    if column is None:
        return None
    present = np.asarray(column.is_valid())
    lengths, values = flat_lists(column)
    wrong = np.flatnonzero(present & (lengths != sizes))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{_name(ids, first)} has {lengths[first]} {name} and {sizes[first]} candidates. The list has one value a "
            "candidate, or is missing."
        )
    found = np.full(int(sizes.sum()), missing, dtype=dtype)
    found[np.repeat(present, sizes)] = np.asarray(pc.fill_null(values.cast(pa.float64()), float(missing))).astype(dtype)
    return found


def _times(table: Dataset, ids: list[str]) -> Int | None:
    column = arrow_column(table, "timestamp")
    if column is None:
        return None
    if column.null_count:
        first = int(np.flatnonzero(np.asarray(column.is_null()))[0])
        raise ValueError(
            f"{_name(ids, first)} has no time, and others have one ({column.null_count:,} lack it). Let the reader "
            "leave such rows out, or leave out the whole column."
        )
    return column.to_numpy().astype(np.int64)


def _parts(table: Dataset, ids: list[str]) -> NDArray[np.int8] | None:
    column = arrow_column(table, "part")
    if column is None:
        return None
    parts = np.asarray(pc.fill_null(pc.index_in(column, pa.array(PARTS, column.type)), -1)).astype(np.int8)
    if (parts < 0).any():
        first = int(np.flatnonzero(parts < 0)[0])
        raise ValueError(
            f"{_name(ids, first)} belongs to the part {column[first].as_py()!r}; the parts are {', '.join(PARTS)}."
        )
    return parts


def _drop_unknown(impressions: Impressions) -> None:
    """Leaves out what the catalogue does not have."""
    known = impressions.candidates > 0
    if not known.all():
        impressions.report["dropped_candidates"] = int((~known).sum())
        impressions.starts = _starts(_sums(known, impressions.starts))
        for name in ("candidates", "labels", "positions", "propensities", "dwell"):
            values = getattr(impressions, name)
            if values is not None:
                setattr(impressions, name, values[known])
    known = impressions.history > 0
    if not known.all():
        impressions.report["dropped_history"] = int((~known).sum())
        kept = np.concatenate([[0], np.cumsum(known, dtype=np.int64)])
        impressions.history_starts = kept[impressions.history_starts]
        impressions.history_ends = kept[impressions.history_ends]
        impressions.history = impressions.history[known]


def with_click_histories(impressions: Impressions) -> None:
    """Makes the histories of a log that has none: the clicks of the user's strictly earlier impressions.

    Impressions of one time do not see each other. Without times the order of the files counts, a part after the other.
    Nothing of a later part is seen, even where it is earlier in time.

    Args:
        impressions: with ``parts``; its histories are replaced.
    """
    offsets, owner = impressions.clicks()
    events, impressions.history_starts, impressions.history_ends = earlier_events(impressions, owner)
    impressions.history = impressions.candidates[offsets[events]]
    impressions.history_times = None if impressions.times is None else impressions.times[owner[events]]
    impressions.has_history = True


def earlier_events(impressions: Impressions, owner: Int) -> tuple[Int, Int, Int]:
    """What each impression may know of events that happened at impressions of the same user.

    Args:
        impressions: with ``parts``.
        owner: ``(e,)`` the impression at which each event happened, ascending.

    Returns:
        ``(k,)`` numbers of events, oldest first within what an impression sees; ``(n,)`` and ``(n,)`` start and end
        of what each impression sees among them.
    """
    parts = impressions.parts
    assert parts is not None
    if impressions.times is not None:
        moments = impressions.times
    else:
        moments = np.empty(len(impressions), dtype=np.int64)
        moments[np.lexsort((np.arange(len(impressions)), parts))] = np.arange(len(impressions))
    ranks = np.unique(moments, return_inverse=True)[1].reshape(-1).astype(np.int64)
    width = int(ranks.max(initial=0)) + 1
    keys = impressions.users * width + ranks
    starts, ends = (np.zeros(len(impressions), dtype=np.int64) for _ in range(2))
    passes = [np.ones(len(impressions), dtype=bool)]
    if not _in_order(ranks, parts, owner):
        passes = [parts == part for part in np.unique(parts)]
    found: list[Int] = []
    for asking in passes:
        last = int(parts[asking].max(initial=0))
        events = np.flatnonzero(parts[owner] <= last)
        events = events[np.argsort(keys[owner[events]], kind="stable")]
        sorted_keys = keys[owner[events]]
        before = sum(map(len, found))
        starts[asking] = before + np.searchsorted(sorted_keys, impressions.users[asking] * width)
        ends[asking] = before + np.searchsorted(sorted_keys, keys[asking])
        found.append(events)
    return np.concatenate(found) if found else owner[:0], starts, ends


def _in_order(ranks: Int, parts: NDArray[np.int8], owner: Int) -> bool:
    """True when whatever is earlier than an impression belongs to its part or an earlier one."""
    for part in np.unique(parts)[:-1]:
        later = ranks[owner[parts[owner] > part]]
        if len(later) and later.min() < ranks[parts <= part].max():
            return False
    return True


def history_slices(impressions: Impressions, numbers: Int, limit: int) -> tuple[Int, Int]:
    """Start and end of the newest ``limit`` events of the histories of some impressions."""
    ends = impressions.history_ends[numbers]
    return np.maximum(impressions.history_starts[numbers], ends - limit), ends


def unknown_shares(impressions: Impressions, numbers: Int, n_known: int) -> dict[str, float]:
    """The share of candidates, clicks and events of histories whose item has no row in the item table.

    Args:
        impressions: the log.
        numbers: the impressions that are looked at.
        n_known: number of catalogue rows that come from the item table, padding included.

    Returns:
        ``candidates``, ``clicks`` and ``history``; 0 where there are none.
    """
    offsets, _ = gather_flat(impressions.starts[numbers], impressions.starts[numbers + 1])
    events, _ = gather_flat(impressions.history_starts[numbers], impressions.history_ends[numbers])
    shown = impressions.candidates[offsets]
    rows = {
        "candidates": shown,
        "clicks": shown[impressions.labels[offsets] == 1],
        "history": impressions.history[events],
    }
    return {name: float((values >= n_known).mean()) if len(values) else 0.0 for name, values in rows.items()}
