"""From the columns of a table, a row an impression or a row a candidate, to the canonical impressions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.interactions import canonical_ids, check_times, parse_numbers
from lightning_rec.data.readers.impression_rows import LIST_COLUMNS, bounds, clean_impressions, good_rows, lists
from lightning_rec.data.table import ReadReport, Table, is_blank
from lightning_rec.data.timestamps import parse_times

#: The fields of a wide table whose cells are lists.
WIDE_LISTS = (*LIST_COLUMNS, "clicked")

_PARTS = {"train": "train", "validation": "validation", "dev": "validation", "val": "validation",
          "valid": "validation", "test": "test", "predict": "predict"}  # fmt: skip
#: What a number of a candidate is called in a long table, and what a value must be: lowest, highest, whole.
_NUMBERS = {
    "labels": ("label", 0.0, 1.0, True),
    "positions": ("position", 1.0, 2.0**31, True),
    "propensities": ("propensity", 0.0, 1.0, False),
    "dwell": ("dwell time", 0.0, np.inf, False),
}
_RULES = {
    "labels": "neither 0 nor 1",
    "positions": "no place on a page (1, 2, 3, ...)",
    "propensities": "no probability above 0 and at most 1",
    "dwell": "no time in seconds",
}


def wide_impressions(table: Table, report: ReadReport, integer_ids: bool = False) -> Dataset:
    """A table with a row an impression.

    Args:
        table: ``user_id``, ``impression_id``, ``timestamp``, ``feedback`` and ``part`` as strings, the fields of
            ``WIDE_LISTS`` as lists of strings; all but ``user_id`` and ``candidates`` optional.
        report: takes bad rows, duplicates and notes.
        integer_ids: read ids like ``1430.0`` as ``1430``.

    Raises:
        BadRowError: a bad row under ``on_bad_rows: error``.
        ValueError: times in two writings, or no row is left.
    """
    columns, bad = _shared_columns(table, report, integer_ids)
    sizes, candidates = _flat(table.columns["candidates"])
    candidates = canonical_ids(pa.chunked_array([candidates]), "item_id", report, integer_ids).combine_chunks()
    rows = np.repeat(np.arange(len(table)), sizes)
    _mark(bad, np.flatnonzero(sizes == 0), "there is no candidate")
    _mark(bad, rows[_blank(candidates)], "the id of a candidate is empty")
    columns["candidates"] = pa.chunked_array([lists(sizes, candidates)])
    if "history" in table.columns:
        lengths, history = _flat(table.columns["history"])
        history = canonical_ids(pa.chunked_array([history]), "item_id", report, integer_ids).combine_chunks()
        _mark(bad, np.repeat(np.arange(len(table)), lengths)[_blank(history)], "an id in the history is empty")
        columns["history"] = pa.chunked_array([lists(lengths, history)])
    for name in _NUMBERS:
        if name in table.columns:
            columns[name] = _numbers_wide(table, name, sizes, bad)
    if "clicked" in table.columns and "labels" not in columns:
        columns["labels"] = _labels_of_clicked(table, candidates, sizes, integer_ids, bad)
    return clean_impressions(columns, table, bad, report)


def long_impressions(table: Table, report: ReadReport, integer_ids: bool = False) -> Dataset:
    """A table with a row a candidate.

    Args:
        table: strings: ``user_id``, ``item_id``, and optionally ``impression_id``, ``timestamp``, ``label``,
            ``position``, ``propensity``, ``dwell_time``, ``feedback`` and ``part``.
        report: takes bad rows, duplicates and notes.
        integer_ids: read ids like ``1430.0`` as ``1430``.

    Raises:
        BadRowError: a bad row under ``on_bad_rows: error``.
        ValueError: neither ids nor times tell the impressions apart; times in two writings; no row is left.
    """
    columns, bad = _shared_columns(table, report, integer_ids)
    columns["item_id"] = canonical_ids(table.columns["item_id"], "item_id", report, integer_ids)
    _mark(bad, np.flatnonzero(is_blank(columns["item_id"])), "the item_id is empty")
    for name, field in (("labels", "label"), ("positions", "position"), ("propensities", "propensity"),
                        ("dwell", "dwell_time")):  # fmt: skip
        if field in table.columns:
            numbers, problems = _checked(table.columns[field], name)
            for row, why in problems.items():
                bad.setdefault(row, why)
            columns[name] = pa.chunked_array([pa.array(numbers)])
    if "impression_id" in columns:
        _mark(bad, np.flatnonzero(is_blank(columns["impression_id"])), "the impression_id is empty")
    elif "timestamp" not in columns:
        raise ValueError(
            f"{table.files[0]} has a row a candidate, but neither impression_id nor timestamp: nothing tells which rows"
            " are one impression. Map one of them with columns."
        )
    kept = good_rows(columns, table, bad, report)
    arrow = pa.table(kept.columns)
    repeated = arrow.to_pandas().duplicated().to_numpy()
    report.n_duplicates += int(repeated.sum())
    keep = np.flatnonzero(~repeated)
    return _grouped(arrow.take(pa.array(keep)), kept, keep, report)


def _grouped(arrow: pa.Table, table: Table, places: NDArray[np.int64], report: ReadReport) -> Dataset:
    """Impressions from candidates; ``places`` are the rows of ``table`` that ``arrow`` holds."""
    key = ["impression_id"] if "impression_id" in arrow.column_names else ["user_id", "timestamp"]
    frame = arrow.select(key).to_pandas()
    groups = frame.groupby(key, sort=False).ngroup().to_numpy()
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups).astype(np.int64)
    arrow, starts = arrow.take(pa.array(order)), bounds(sizes)[:-1]
    heads = pa.array(starts)
    bad: dict[int, str] = {}
    group = np.repeat(np.arange(len(sizes)), sizes)
    columns = {"candidates": pa.chunked_array([lists(sizes, arrow["item_id"].combine_chunks())])}
    if "feedback" in arrow.column_names:
        columns["feedback"] = _joined(arrow["feedback"], group, len(sizes))
    for name in ("impression_id", "user_id", "part"):
        if name in arrow.column_names:
            columns[name] = arrow[name].take(heads)
            if name in ("user_id", "part"):
                codes = np.asarray(arrow[name].combine_chunks().dictionary_encode().indices)
                reason = f"the rows of this impression_id have more than one {name}"
                _mark(bad, group[codes != codes[starts][group]], reason)
    if "timestamp" in arrow.column_names:
        columns["timestamp"] = pa.chunked_array([pa.array(np.minimum.reduceat(np.asarray(arrow["timestamp"]), starts))])
    for name in _NUMBERS:
        if name in arrow.column_names:
            numbers = np.asarray(arrow[name])
            n_known = np.add.reduceat(~np.isnan(numbers), starts)
            if name == "labels":
                partly = (n_known > 0) & (n_known < sizes)
                _mark(bad, np.flatnonzero(partly), "some candidates have a label and others have none")
            columns[name] = _typed(name, numbers, sizes, (n_known == 0) | ((name == "labels") & (n_known < sizes)))
    firsts = places[order[starts]]
    runs = np.searchsorted(table.starts, firsts, side="right") - 1
    # An impression stands where its first row does; files follow one another, so runs stay in order.
    begins = [0, *(np.flatnonzero(np.diff(runs)) + 1).tolist()]
    files = [table.files[runs[begin]] for begin in begins]
    units = [table.units[runs[begin]] for begin in begins]
    return clean_impressions(columns, Table({}, table.lines[firsts], files, begins, units), bad, report)


def _joined(texts: pa.ChunkedArray, group: NDArray[np.int64], n: int) -> pa.ChunkedArray:
    """What was written about the candidates of each of ``n`` impressions, each text once, in their order."""
    found: dict[int, dict[str, None]] = {}
    for row in np.flatnonzero(~is_blank(texts)).tolist():
        found.setdefault(int(group[row]), {})[texts[row].as_py()] = None
    return pa.chunked_array([pa.array([" ".join(found.get(number, ())) for number in range(n)], pa.string())])


def _shared_columns(
    table: Table, report: ReadReport, integer_ids: bool
) -> tuple[dict[str, pa.ChunkedArray], dict[int, str]]:
    """The columns that both layouts have, and row -> why it cannot be used."""
    columns = {"user_id": canonical_ids(table.columns["user_id"], "user_id", report, integer_ids)}
    bad: dict[int, str] = {}
    _mark(bad, np.flatnonzero(is_blank(columns["user_id"])), "the user_id is empty")
    if "impression_id" in table.columns:
        columns["impression_id"] = pc.fill_null(table.columns["impression_id"], "")
    if "timestamp" in table.columns and not is_blank(table.columns["timestamp"]).all():
        times = parse_times(table.columns["timestamp"])
        check_times(times, table)
        for text in times.notes:
            report.note(text)
        for row, why in times.bad.items():
            bad.setdefault(row, why)
        columns["timestamp"] = pa.chunked_array([pa.array(times.seconds)])
    if "feedback" in table.columns:
        columns["feedback"] = pc.fill_null(table.columns["feedback"], "")
    if "part" in table.columns and not is_blank(table.columns["part"]).all():
        encoded = pc.utf8_lower(pc.utf8_trim_whitespace(table.columns["part"])).combine_chunks().dictionary_encode()
        names = [_PARTS.get(name) for name in encoded.dictionary.to_pylist()]
        parts = pa.array(names, pa.string()).take(encoded.indices)
        for row in np.flatnonzero(np.asarray(parts.is_null())).tolist():
            value = table.columns["part"][row].as_py()
            bad.setdefault(row, f"the part {value!r} is none of train, validation, test and predict")
        columns["part"] = pa.chunked_array([parts])
    return columns, bad


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """``(n,)`` lengths, 0 where a list is missing, and all values one after the other."""
    column = column.combine_chunks()
    if not pa.types.is_list(column.type):  # no file had a list here
        return np.zeros(len(column), np.int64), pa.array([], pa.string())
    return np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64), pc.list_flatten(column)


def _blank(values: pa.Array) -> NDArray[np.bool_]:
    return is_blank(pa.chunked_array([values]))


def _mark(bad: dict[int, str], rows: NDArray[np.integer], why: str) -> None:
    for row in rows.tolist():
        bad.setdefault(row, why)


def _checked(values: pa.ChunkedArray, name: str) -> tuple[NDArray[np.float64], dict[int, str]]:
    """Numbers, NaN where there is none, and index -> why a value cannot be used."""
    what, low, high, whole = _NUMBERS[name]
    if name == "labels":
        values = pc.utf8_lower(values)
        for text, number in (("true", "1"), ("false", "0")):
            values = pc.if_else(pc.fill_null(pc.equal(values, text), False), number, values)
    numbers, bad = parse_numbers(values, what)
    wrong = (numbers < low) | (numbers > high) | (whole & (numbers != np.floor(numbers)))
    wrong |= (name == "propensities") & (numbers == 0)
    for index in np.flatnonzero(wrong & ~np.isnan(numbers)).tolist():
        bad[index] = f"the {what} {values[index].as_py()} is {_RULES[name]}"
    return numbers, bad


def _typed(
    name: str, numbers: NDArray[np.float64], sizes: NDArray[np.int64], missing: NDArray[np.bool_]
) -> pa.ChunkedArray:
    """A column of lists of numbers; ``numbers`` holds the values of all rows, of the missing ones too."""
    numbers = numbers[np.repeat(~missing, sizes)]
    if _NUMBERS[name][3]:
        numbers = np.nan_to_num(numbers).astype(np.int64)  # an unknown position is 0
    return pa.chunked_array([lists(np.where(missing, 0, sizes), pa.array(numbers), missing)])


def _numbers_wide(table: Table, name: str, sizes: NDArray[np.int64], bad: dict[int, str]) -> pa.ChunkedArray:
    lengths, values = _flat(table.columns[name])
    rows = np.repeat(np.arange(len(table)), lengths)
    for row in np.flatnonzero((lengths > 0) & (lengths != sizes)).tolist():
        bad.setdefault(row, f"there are {sizes[row]} candidates but {lengths[row]} {name}")
    numbers, problems = _checked(pa.chunked_array([values]), name)
    for index, why in problems.items():
        bad.setdefault(int(rows[index]), why)
    if name == "labels":
        _mark(bad, rows[np.isnan(numbers)], "a label is empty; leave all labels of an unlabelled impression out")
    return _typed(name, numbers, lengths, lengths == 0)


def _labels_of_clicked(
    table: Table, candidates: pa.Array, sizes: NDArray[np.int64], integer_ids: bool, bad: dict[int, str]
) -> pa.ChunkedArray:
    """Labels from the ids that were clicked; every candidate with such an id counts as clicked."""
    lengths, clicked = _flat(table.columns["clicked"])
    clicked = canonical_ids(pa.chunked_array([clicked]), "item_id", ReadReport(), integer_ids).combine_chunks()
    codes = np.asarray(pa.concat_arrays([candidates, clicked]).dictionary_encode("encode").indices).astype(np.int64)
    width = int(codes.max(initial=0)) + 1
    shown = np.repeat(np.arange(len(table)), sizes) * width + codes[: len(candidates)]
    rows = np.repeat(np.arange(len(table)), lengths)
    chosen = rows * width + codes[len(candidates) :]
    for index in np.flatnonzero(~np.isin(chosen, shown)).tolist():
        bad.setdefault(int(rows[index]), f"the clicked item {clicked[index].as_py()!r} is not among the candidates")
    missing = np.asarray(table.columns["clicked"].is_null())
    return _typed("labels", np.isin(shown, chosen).astype(np.float64), sizes, missing)
