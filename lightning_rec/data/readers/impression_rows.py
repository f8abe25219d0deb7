"""What every reader of impressions shares: cells that are lists, bad rows out, exact duplicates out."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.table import ReadReport, Table, keep_rows

#: The canonical columns of impressions, in their order.
IMPRESSION_COLUMNS = (
    "impression_id", "user_id", "timestamp", "history", "candidates", "labels", "positions", "propensities", "dwell",
    "feedback", "part",
)  # fmt: skip
#: Those whose cells are lists; all but ``history`` are as long as ``candidates``.
LIST_COLUMNS = ("history", "candidates", "labels", "positions", "propensities", "dwell")


def split_words(column: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    """Splits strings at white space.

    Args:
        column: strings; null and blank hold no word.

    Returns:
        ``(n,)`` number of words of each row, and the words of all rows one after the other.
    """
    text = pc.ascii_trim_whitespace(column)
    text = pc.if_else(pc.equal(pc.binary_length(text), 0), pa.scalar(None, pa.string()), text)
    words = pc.ascii_split_whitespace(text)
    lengths = np.asarray(pc.fill_null(pc.list_value_length(words), 0)).astype(np.int64)
    return lengths, words.flatten()


def lists(lengths: NDArray[np.int64], values: pa.Array, missing: NDArray[np.bool_] | None = None) -> pa.ListArray:
    """A column of lists.

    Args:
        lengths: ``(n,)`` length of each list, 0 where it is missing.
        values: the values of all rows one after the other.
        missing: ``(n,)`` True where there is no list at all; None: nowhere.
    """
    offsets = pa.array(bounds(lengths).astype(np.int32))
    mask = pa.array(missing) if missing is not None and missing.any() else None
    return pa.ListArray.from_arrays(offsets, values, mask=mask)


def bounds(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(n + 1,)`` where each row starts among the values of all rows, and where the last ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def row_counts(flags: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(n,)`` number of values of each row for which ``flags`` is True."""
    return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(flags)])[bounds(lengths)])


def clean_impressions(
    columns: Mapping[str, pa.ChunkedArray], table: Table, bad: Mapping[int, str], report: ReadReport
) -> Dataset:
    """The impressions without bad rows and without exact duplicates, in file order.

    A row is an exact duplicate of an earlier one when every column is equal. Without ids and without times two equal
    rows are two impressions.

    Args:
        columns: canonical columns.
        table: tells where each row stands.
        bad: row -> why it cannot be used.
        report: takes the bad rows and the number of duplicates.

    Raises:
        BadRowError: a bad row under ``on_bad_rows: error``.
        ValueError: no row is left.
    """
    ordered = {name: columns[name] for name in IMPRESSION_COLUMNS if name in columns}
    kept = good_rows(ordered, table, bad, report)
    arrow = _without_duplicates(pa.table(kept.columns), report)
    report.rows["impressions"] = arrow.num_rows
    # A fingerprint of its own: Dataset would pickle the whole table to hash it, which takes longer than reading it.
    return Dataset(arrow, fingerprint=uuid.uuid4().hex)


def good_rows(columns: dict[str, pa.ChunkedArray], table: Table, bad: Mapping[int, str], report: ReadReport) -> Table:
    """The rows that are not bad; the bad ones are reported in file order.

    Args:
        columns: the columns to keep.
        table: tells where each row stands.
        bad: row -> why it cannot be used.
        report: takes the bad rows.

    Raises:
        BadRowError: a bad row under ``on_bad_rows: error``.
        ValueError: no row is left.
    """
    for row in sorted(bad):
        file, line, unit = table.where(row)
        report.bad_row(file, line, bad[row], unit)
    keep = np.ones(len(table), bool)
    keep[list(bad)] = False
    kept = keep_rows(Table(columns, table.lines, table.files, table.starts, table.units), keep)
    if not len(kept):
        reason = f"Every row is bad. The first: {report.skipped[0].reason}." if report.skipped else "There is no row."
        raise ValueError(f"There are no impressions in {', '.join(table.files)}. {reason}")
    return kept


def _without_duplicates(arrow: pa.Table, report: ReadReport) -> pa.Table:
    if not {"impression_id", "timestamp"} & set(arrow.column_names):
        return arrow
    # Lists are compared only where user, id and time are equal, which is seldom.
    keys = np.zeros(arrow.num_rows, np.int64)
    for name in ("impression_id", "user_id", "timestamp", "part"):
        if name in arrow.column_names:
            codes = np.asarray(arrow[name].combine_chunks().dictionary_encode("encode").indices).astype(np.int64)
            _, keys = np.unique(keys * (int(codes.max(initial=0)) + 1) + codes, return_inverse=True)
    suspects = np.flatnonzero(np.bincount(keys)[keys] > 1)
    if not len(suspects):
        return arrow
    seen: set[str] = set()
    repeated: list[int] = []
    for row, record in zip(suspects.tolist(), arrow.take(pa.array(suspects)).to_pylist(), strict=True):
        content = repr(record)
        if content in seen:
            repeated.append(row)
        seen.add(content)
    report.n_duplicates += len(repeated)
    keep = np.ones(arrow.num_rows, bool)
    keep[repeated] = False
    return arrow.filter(pa.array(keep))


def note_unknown(columns: Mapping[str, pa.ChunkedArray], items: Dataset, report: ReadReport) -> None:
    """Notes how many candidates and events of histories have no row in the item table.

    Args:
        columns: ``candidates``, and optionally ``history``.
        items: the item table.
        report: takes the note.
    """
    known = items.data.column("item_id").combine_chunks()
    shares = []
    for name, what in (("candidates", "candidates"), ("history", "events of histories")):
        if name not in columns:
            continue
        total = missing = 0
        unknown: set[Any] = set()
        for chunk in columns[name].chunks:
            values = chunk.flatten()
            absent = values.filter(pc.invert(pc.is_in(values, known)))
            total, missing = total + len(values), missing + len(absent)
            unknown.update(pc.unique(absent).to_pylist())
        if missing:
            shares.append(f"{missing:,} of {total:,} {what} ({missing / total:.1%}; {len(unknown):,} different ids)")
    if shares:
        report.note(f"Without a row in the item table: {' and '.join(shares)}; they are kept as items without text.")
