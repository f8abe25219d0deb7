"""Item and user tables: one row an id, merged from several files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.interactions import canonical_ids
from lightning_rec.data.table import ReadReport, Table, is_blank, keep_rows


def canonical_entities(table: Table, key: str, kind: str, report: ReadReport, integer_ids: bool = False) -> Dataset:
    """One row an id, in the order of first appearance; of each field, the first value that is not empty.

    Args:
        table: the column ``key`` and fields, as strings or lists of strings.
        key: ``item_id`` or ``user_id``.
        kind: name of the table for the report: ``items`` or ``users``.
        report: takes bad rows (an empty id) and notes.
        integer_ids: read ids like ``1430.0`` as ``1430``.

    Returns:
        The key and the fields; a missing value is ``""`` or ``[]``.
    """
    blank = is_blank(table.columns[key])
    for row in np.flatnonzero(blank).tolist():
        file, line, unit = table.where(row)
        report.bad_row(file, line, f"the {key} is empty", unit)
    table = keep_rows(table, ~blank)
    ids = canonical_ids(table.columns[key], key, report, integer_ids)
    encoded = ids.combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices)
    columns: dict[str, pa.Array] = {key: encoded.dictionary}
    for name, column in table.columns.items():
        if name != key:
            columns[name] = _first_filled(column, codes, len(encoded.dictionary))
    report.rows[kind] = len(encoded.dictionary)
    repeated = len(table) - len(encoded.dictionary)
    if repeated and len(table.files) == 1:
        report.note(f"{repeated:,} rows of the {kind} table repeat an id; the first value of each field was taken.")
    return Dataset(pa.table(columns))


def _first_filled(column: pa.ChunkedArray, codes: NDArray[np.integer], size: int) -> pa.Array:
    listed = pa.types.is_list(column.type)
    if listed:
        filled = np.asarray(pc.fill_null(pc.greater(pc.list_value_length(column), 0), False))
    else:
        filled = ~is_blank(column)
    rows = np.flatnonzero(filled)
    ids, first = np.unique(codes[rows], return_index=True)
    take = np.full(size, -1)
    take[ids] = rows[first]
    values = column.combine_chunks().take(pa.array(take, mask=take < 0))
    if not listed:
        return pc.fill_null(values, "")
    return pa.array([value or [] for value in values.to_pylist()], column.type)
