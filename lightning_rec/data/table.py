"""What every reader fills: text columns that remember where each row came from, and a report of the reading."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

OnBadRows = Literal["error", "skip"]

#: How many skipped rows a report lists by name; the rest are only counted.
MAX_LISTED = 20


class BadRowError(ValueError):
    """A row that cannot be used, named by file and line. ``on_bad_rows: skip`` leaves such rows out instead."""


class BadRow(NamedTuple):
    """A row that was left out: its file, its line (1-based), the reason, and what counts as a line there."""

    file: str
    line: int
    reason: str
    unit: str = "line"


@dataclass
class ReadReport:
    """What was read and what was left out.

    Attributes:
        on_bad_rows: ``error`` stops at the first bad row, ``skip`` counts and lists it.
        rows: rows kept, by table (``interactions``, ``items``, ``users``).
        n_skipped: number of bad rows left out.
        skipped: the first of them (at most ``MAX_LISTED``), each with file, line and reason.
        n_duplicates: exact duplicate interactions that were dropped.
        notes: what a person should know, in whole sentences.
    """

    on_bad_rows: OnBadRows = "error"
    rows: dict[str, int] = field(default_factory=dict)
    n_skipped: int = 0
    skipped: list[BadRow] = field(default_factory=list)
    n_duplicates: int = 0
    notes: list[str] = field(default_factory=list)

    def bad_row(self, file: str, line: int, reason: str, unit: str = "line", remedy: str = "") -> None:
        """Skips and counts a bad row, or stops.

        Raises:
            BadRowError: when ``on_bad_rows`` is ``error``.
        """
        if self.on_bad_rows == "error":
            remedy = remedy or "Mend the row, or set on_bad_rows: skip to leave such rows out, counted and listed."
            raise BadRowError(f"{file}, {unit} {line}: {reason}. {remedy}")
        self.n_skipped += 1
        if len(self.skipped) < MAX_LISTED:
            self.skipped.append(BadRow(file, line, reason, unit))

    def note(self, text: str) -> None:
        """Adds a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)

    def lines(self) -> list[str]:
        """The report, one sentence a line."""
        kept = ", ".join(f"{count:,} {name}" for name, count in self.rows.items())
        lines = [f"Read {kept or 'nothing'}."]
        if self.n_duplicates:
            lines.append(f"Dropped {self.n_duplicates:,} exact duplicate interactions.")
        if self.n_skipped:
            lines.append(f"Skipped {self.n_skipped:,} bad rows:")
            lines += [f"  {row.file}, {row.unit} {row.line}: {row.reason}" for row in self.skipped]
            if self.n_skipped > len(self.skipped):
                lines.append(f"  ... and {self.n_skipped - len(self.skipped):,} more")
        return lines + self.notes

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass
class Table:
    """Rows as they were read, column by column.

    Attributes:
        columns: name -> arrow column of strings, or of lists of strings. Missing values are null.
        lines: ``(n,)`` line (text) or row (Parquet) of each row, 1-based.
        files: the file of each run of rows.
        starts: first row of each run, ``starts[0] == 0``.
        units: what ``lines`` counts in each run: ``line``, ``row`` (Parquet) or ``entry`` (one JSON object).
    """

    columns: dict[str, pa.ChunkedArray]
    lines: np.ndarray
    files: list[str]
    starts: list[int]
    units: list[str]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> tuple[str, int, str]:
        """File, line and unit of a row."""
        run = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.files[run], int(self.lines[row]), self.units[run]

    def place(self, row: int) -> str:
        """Where a row stands, for a message."""
        file, line, unit = self.where(row)
        return f"{file}, {unit} {line}"


def make_table(
    chunks: dict[str, list[pa.Array]], sizes: Sequence[int], lines: np.ndarray, file: str, unit: str
) -> Table:
    """A table of one file from column chunks.

    Args:
        chunks: name -> one array a block; an array is left out (None) where the block lacks the column.
        sizes: number of rows of each block.
        lines: line of each row.
        file: name of the file for messages.
        unit: what ``lines`` counts.
    """
    columns = {}
    for name, arrays in chunks.items():
        arrays = arrays + [None] * (len(sizes) - len(arrays))
        columns[name] = join_chunks(arrays, sizes)
    return Table(columns, lines, [file], [0], [unit])


def concat_tables(tables: Sequence[Table]) -> Table:
    """The rows of several tables one after the other; a column that a table lacks is null there."""
    if len(tables) == 1:
        return tables[0]
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    sizes = [len(table) for table in tables]
    columns = {name: join_chunks([table.columns.get(name) for table in tables], sizes) for name in names}
    files: list[str] = []
    starts: list[int] = []
    units: list[str] = []
    offset = 0
    for table in tables:
        files += table.files
        starts += [start + offset for start in table.starts]
        units += table.units
        offset += len(table)
    lines = np.concatenate([table.lines for table in tables]) if tables else np.zeros(0, np.int64)
    return Table(columns, lines, files, starts, units)


def join_chunks(arrays: Sequence[Any], sizes: Sequence[int]) -> pa.ChunkedArray:
    """One column from chunks that may be strings, lists of strings, or None (all null)."""
    listed = any(array is not None and pa.types.is_list(array.type) for array in arrays)
    kind = pa.list_(pa.string()) if listed else pa.string()
    parts: list[pa.Array] = []
    for array, size in zip(arrays, sizes, strict=True):
        if array is None:
            parts.append(pa.nulls(size, kind))
            continue
        for part in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
            if listed and not pa.types.is_list(part.type):
                part = pa.array([None if not text else [text] for text in part.to_pylist()], kind)
            parts.append(part)
    return pa.chunked_array(parts, type=kind)


def text_array(values: Sequence[Any]) -> pa.Array:
    """Python values (text, numbers, lists, None) as an arrow array of strings or of lists of strings.

    A whole number keeps no ``.0``: an integer column beside missing values is stored as floats by many tools. Text is
    untouched, so that ``1.0`` in quotes stays ``1.0``. Half of a surrogate pair, which UTF-8 cannot hold, becomes
    U+FFFD.
    """
    try:
        return pa.array(values, pa.string())
    except (pa.ArrowTypeError, pa.ArrowInvalid, UnicodeEncodeError):
        pass
    if any(isinstance(value, list | tuple) for value in values):
        lists = [value if isinstance(value, list | tuple) else [value] for value in values]
        texts = [[text for part in value if (text := plain_text(part)) is not None] for value in lists]
        return pa.array(texts, pa.list_(pa.string()))
    return pa.array([plain_text(value) for value in values], pa.string())


def plain_text(value: Any) -> str | None:
    """One value as text, None when it is missing."""
    if isinstance(value, str):
        return whole_text(value)
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, dict | list | tuple):
        return whole_text(json.dumps(value, ensure_ascii=False, default=str))
    return str(value)


def whole_text(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD and split pairs joined."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def arrow_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A typed arrow column (Parquet, hub) as strings or lists of strings, by the same rules as ``text_array``."""
    kind = column.type
    if pa.types.is_string(kind):
        return column
    if pa.types.is_dictionary(kind):
        return arrow_text(column.cast(kind.value_type))
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_integer(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):
        return _float_text(column.cast(pa.float64()))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return pc.strftime(column.cast(pa.timestamp("us", "UTC")), "%Y-%m-%dT%H:%M:%SZ")
    if pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
        return column
    return pa.chunked_array([text_array(chunk.to_pylist()) for chunk in column.chunks] or [pa.array([], pa.string())])


def _float_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    numbers = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    whole = pc.and_(pc.equal(numbers, pc.floor(numbers)), pc.less(pc.abs(numbers), 2.0**53))
    integers = pc.if_else(whole, numbers, pa.scalar(None, pa.float64())).cast(pa.int64()).cast(pa.string())
    return pc.if_else(pc.fill_null(whole, False), integers, numbers.cast(pa.string()))


def is_blank(column: pa.ChunkedArray) -> np.ndarray:
    """``(n,)`` True where a string column is null, empty or only white space."""
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)
    return np.asarray(pc.fill_null(blank, True).to_numpy())


def keep_rows(table: Table, keep: np.ndarray) -> Table:
    """The rows of a table where ``keep`` is True (a boolean mask)."""
    if keep.all():
        return table
    mask = pa.array(keep)
    columns = {name: column.filter(mask) for name, column in table.columns.items()}
    before = np.concatenate([[0], np.cumsum(keep)])
    return Table(columns, table.lines[keep], table.files, [int(before[start]) for start in table.starts], table.units)


def names_listed(names: Iterable[str]) -> str:
    """Names for a message: `a`, `b`, `c`."""
    return ", ".join(f"`{name}`" for name in names)
