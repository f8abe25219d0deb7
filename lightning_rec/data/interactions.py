"""Who touched what, when and how much: from columns of text to the canonical table of interactions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.table import ReadReport, Table, is_blank, keep_rows
from lightning_rec.data.timestamps import Times, parse_times

#: The canonical columns of interactions. ``position`` orders the rows of a user where there are no times; it is used
#: while reading and then dropped.
INTERACTION_COLUMNS = ("user_id", "item_id", "rating", "timestamp", "review", "position")


def canonical_interactions(
    table: Table,
    report: ReadReport,
    rating_range: tuple[float, float] | None = None,
    integer_ids: bool = False,
) -> Dataset:
    """Turns text columns into the canonical interactions, in file order.

    Bad rows (an empty id, a time or a rating that is none) stop the run with file and line, or are skipped and counted.
    Exact duplicates (every column equal) are dropped and counted when the data has times, or positions that number the
    rows of a user. Without either nothing tells a row written twice from something done twice: such rows are kept as
    repeats, and a note counts them.
    Where times are finer than a second, rows of the same second are put in their true order.

    Args:
        table: columns ``user_id`` and ``item_id``, and optionally ``rating``, ``timestamp``, ``review``, ``position``
            and columns of your own, all as strings.
        report: where bad rows, duplicates and notes are written.
        rating_range: lowest and highest rating; a rating outside is a bad row. None keeps every number.
        integer_ids: read ids like ``1430.0`` as ``1430``.

    Returns:
        ``user_id``, ``item_id`` (string), ``rating`` (float64, NaN = none), ``timestamp`` (int64, seconds since 1970),
        ``review`` (string) and columns of your own (string). Optional columns are there when the table has them.

    Raises:
        BadRowError: a bad row under ``on_bad_rows: error``.
        ValueError: times in two writings; most ratings or times unreadable; no row at all.
    """
    if not len(table):
        raise ValueError(f"There are no interactions in {', '.join(table.files)}: at most a header and no rows.")
    bad: dict[int, str] = {}
    for name in ("user_id", "item_id", "rating", "timestamp", "position"):
        if name in table.columns and pa.types.is_list(table.columns[name].type):
            table.columns[name], lists = _single_values(table.columns[name], name)
            bad |= lists
    for name in ("user_id", "item_id"):
        table.columns[name] = canonical_ids(table.columns[name], name, report, integer_ids)

    times, ratings = None, None
    if "timestamp" in table.columns and not is_blank(table.columns["timestamp"]).all():
        times = parse_times(table.columns["timestamp"])
        check_times(times, table)
        bad = times.bad | bad
        for text in times.notes:
            report.note(text)
    if "rating" in table.columns:
        ratings, problems = parse_numbers(table.columns["rating"], "rating", rating_range)
        _check_share(problems, table, "rating")
        bad = problems | bad
    positions = None
    if "position" in table.columns and times is None:
        positions, problems = parse_numbers(table.columns["position"], "position")
        bad = (
            problems
            | {int(row): "the position is empty" for row in np.flatnonzero(is_blank(table.columns["position"]))}
            | bad
        )
    for name in ("item_id", "user_id"):
        bad = {int(row): f"the {name} is empty" for row in np.flatnonzero(is_blank(table.columns[name]))} | bad
    for row in sorted(bad):
        file, line, unit = table.where(row)
        report.bad_row(file, line, bad[row], unit)

    columns = {
        name: column for name, column in table.columns.items() if name not in ("timestamp", "rating", "position")
    }
    if positions is not None:
        columns["position"] = pa.chunked_array([pa.array(positions)])
    elif "position" in table.columns:
        columns["position"] = table.columns["position"]  # beside times it orders nothing, but tells rows apart
    if ratings is not None:
        columns["rating"] = pa.chunked_array([pa.array(ratings)])
    if times is not None:
        columns["timestamp"] = pa.chunked_array([pa.array(times.seconds)])
        if times.nanoseconds.any():
            columns["_fraction"] = pa.chunked_array([pa.array(times.nanoseconds)])
    keep = np.ones(len(table), bool)
    keep[list(bad)] = False
    clean = keep_rows(Table(columns, table.lines, table.files, table.starts, table.units), keep)
    if not len(clean):
        raise ValueError(f"Every row of {', '.join(table.files)} is bad. The first: {report.lines()[-1].strip()}")
    arrow = _ordered(pa.table(clean.columns))
    distinct = _distinct_rows(arrow)
    if n_equal := arrow.num_rows - len(distinct):
        if times is not None or (positions is not None and _numbers_rows(arrow.take(pa.array(distinct)))):
            report.n_duplicates += n_equal
            arrow = arrow.take(pa.array(distinct))
        else:
            report.note(
                f"{n_equal:,} interactions equal an earlier one in every column. Without times, or positions that"
                " number the rows of a user, they are kept as repeats; set repeats: first in the data module to keep"
                " the first of each user and item."
            )
    names = [name for name in INTERACTION_COLUMNS if name in arrow.column_names]
    names += [name for name in arrow.column_names if name not in names]
    arrow = arrow.select([name for name in names if name not in ("position", "_fraction")])
    report.rows["interactions"] = arrow.num_rows
    return Dataset(arrow)


def _single_values(column: pa.ChunkedArray, name: str) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """A column of JSON in which lists stand as well: their rows are bad, the others have one value each."""
    bad = {}
    values: list[str | None] = []
    for row, value in enumerate(column.to_pylist()):
        found = value or [None]
        if len(found) > 1:
            bad[row] = f"the {name} is a list of {len(found)} values, {', '.join(map(str, found))[:80]}"
        values.append(found[0])
    return pa.chunked_array([pa.array(values, pa.string())]), bad


def canonical_ids(column: pa.ChunkedArray, name: str, report: ReadReport, integer_ids: bool) -> pa.ChunkedArray:
    """Ids as strings, exactly as the file has them, with a note on what looks like a mistake.

    Args:
        column: strings.
        name: name of the column for notes.
        report: where notes are written.
        integer_ids: read ids like ``1430.0`` as ``1430``.
    """
    if integer_ids:
        return pc.replace_substring_regex(column, r"^(-?\d+)\.0+$", r"\1")
    distinct = pc.unique(column).drop_null()
    wide = distinct.filter(pc.invert(pc.string_is_ascii(distinct)))
    if len(wide):
        _warn_of_normal_forms(wide, name, report)
    floats = pc.match_substring_regex(distinct, r"^-?\d+\.0$")
    if len(distinct) and pc.all(floats).as_py():
        report.note(
            f"Every {name} is written like {distinct[0].as_py()}; set integer_ids: true to read it without the .0,"
            " for example to join another table."
        )
    return column


def _warn_of_normal_forms(ids: pa.Array, name: str, report: ReadReport) -> None:
    first: dict[str, str] = {}
    pairs = []
    for raw, composed in zip(ids.to_pylist(), pc.utf8_normalize(ids, form="NFC").to_pylist(), strict=True):
        if first.setdefault(composed, raw) != raw:
            pairs.append((first[composed], raw))
    if pairs:
        one, other = pairs[0]
        report.note(
            f"{len(pairs)} {name} values differ from another one only by their Unicode normal form, such as"
            f" {one!r} ({one!a}) and {other!r} ({other!a}). They are kept apart."
        )


def parse_numbers(
    column: pa.ChunkedArray, name: str, limits: tuple[float, float] | None = None
) -> tuple[NDArray[np.float64], dict[int, str]]:
    """Numbers (ratings, positions), NaN where there is none.

    Args:
        column: strings; empty and ``NaN`` mean no number.
        name: name of the column for messages.
        limits: lowest and highest value, or None.

    Returns:
        ``(n,)`` numbers, and row -> why its value cannot be used.
    """
    text = pc.utf8_trim_whitespace(column)
    text = pc.if_else(pc.fill_null(pc.equal(pc.utf8_lower(text), "nan"), False), pa.scalar(None, pa.string()), text)
    text = pc.if_else(pc.fill_null(pc.equal(text, ""), False), pa.scalar(None, pa.string()), text)
    numeric = pc.match_substring_regex(text, r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$")
    bad: dict[int, str] = {}
    wrong = np.flatnonzero(np.asarray(pc.fill_null(pc.invert(numeric), False)))
    for row in wrong.tolist():
        bad[row] = f"the {name} {text[row].as_py()[:80]!r} is no number"
    plain = pc.replace_substring_regex(pc.if_else(numeric, text, pa.scalar(None, pa.string())), r"^\+", "")
    numbers = np.array(pc.fill_null(plain.cast(pa.float64()), float("nan")), dtype=np.float64)
    for row in np.flatnonzero(np.isinf(numbers)).tolist():
        bad[row] = f"the {name} {text[row].as_py()[:80]!r} is too large a number"
    if limits is not None:
        low, high = limits
        for row in np.flatnonzero((numbers < low) | (numbers > high)).tolist():
            bad[row] = f"the {name} {numbers[row]:g} is outside {low:g} to {high:g}"
    return numbers, bad


def check_times(times: Times, table: Table) -> None:
    """Refuses a column of times that is mixed or mostly unreadable.

    Args:
        times: what ``parse_times`` made of the column ``timestamp`` of the table.
        table: tells where each row stands.

    Raises:
        ValueError: the column is mixed, or most of it is no time.
    """
    if times.mixture:
        examples = [
            f"{table.place(row)} ({table.columns['timestamp'][row].as_py()!r}: {name})"
            for name, rows in times.mixture.items()
            for row in rows
        ]
        good = next((row for row in range(len(table)) if row not in times.bad), 0)
        own = table.columns["timestamp"][good].as_py()
        raise ValueError(
            f"The timestamps are mixed: most are {times.writing}, like {own!r} in {table.place(good)}, but these are"
            f" not: {'; '.join(examples)}. Write the whole column in one way."
        )
    _check_share(times.bad, table, "timestamp")


def _check_share(bad: dict[int, str], table: Table, name: str) -> None:
    """A column that is mostly unreadable is the wrong column, not a column of bad rows."""
    if len(table) > 1 and len(bad) > len(table) / 2:
        row = min(bad)
        raise ValueError(
            f"Most values of the {name} column cannot be read ({len(bad):,} of {len(table):,} rows), the first at"
            f" {table.place(row)}: {bad[row]}. Map {name} to the right column, or leave it out."
        )


def _ordered(arrow: pa.Table) -> pa.Table:
    """Rows in file order, but by sub-second time or by position where the file is not in that order already."""
    if "_fraction" in arrow.column_names:
        keys = [np.asarray(arrow["_fraction"]), np.asarray(arrow["timestamp"])]
    elif "position" in arrow.column_names and "timestamp" not in arrow.column_names:
        users = np.asarray(arrow["user_id"].combine_chunks().dictionary_encode().indices)
        keys = [np.asarray(arrow["position"]), users]
    else:
        return arrow
    order = np.lexsort(keys)
    return arrow if bool((np.diff(order) == 1).all()) else arrow.take(pa.array(order))


def _numbers_rows(arrow: pa.Table) -> bool:
    """Whether no user has two rows at one position, as where positions count within a session or a page."""
    return len(_distinct_rows(arrow.select(["user_id", "position"]))) == arrow.num_rows


def _distinct_rows(arrow: pa.Table) -> NDArray[np.int64]:
    """The rows that equal no earlier one, in order."""
    key = np.zeros(arrow.num_rows, np.int64)
    for name in arrow.column_names:
        column = arrow[name].combine_chunks()
        if pa.types.is_list(column.type):  # a column of your own out of JSON, which Arrow does not encode
            column = pa.array([repr(value) for value in column.to_pylist()], pa.large_string())
        codes = np.asarray(pc.fill_null(column.dictionary_encode("encode").indices, -1)).astype(np.int64)
        # Renumbering after each column keeps the combined key far below 2^63.
        _, key = np.unique(key * (int(codes.max(initial=0)) + 2) + codes + 1, return_inverse=True)
    return np.sort(np.unique(key, return_index=True)[1])


def number_column(table: Dataset, name: str, dtype: Any) -> NDArray[Any] | None:
    """A numeric column, NaN where it is null; None when the table lacks it or it is null throughout."""
    if name not in table.column_names:
        return None
    column = table.data.column(name) if table._indices is None else table.flatten_indices().data.column(name)
    if column.null_count == len(column):
        return None
    values = column.to_numpy()
    if np.issubdtype(dtype, np.integer) and column.null_count:
        row = int(np.flatnonzero(np.isnan(values))[0])
        raise ValueError(
            f"Row {row} of the interactions has no {name}, and others have one ({column.null_count:,} rows lack it). "
            f"Let the reader leave such rows out, or leave out the whole column."
        )
    return np.asarray(values, dtype=dtype)
