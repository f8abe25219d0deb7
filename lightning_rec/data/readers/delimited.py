"""CSV, TSV and text with any other delimiter, line numbers exact."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lightning_rec.data.readers.columns import GUESSES, plain_name
from lightning_rec.data.readers.sources import Source, read_lines
from lightning_rec.data.table import ReadReport, Table, make_table, text_array

#: From the columns of a file to the ones to keep: new name -> column.
Choose = Callable[[list[str]], dict[str, str]]

DELIMITERS = ("::", "\t", ",", ";", "|")
_FIELD_LIMIT = 1 << 27


class _Rows(NamedTuple):
    lines: Sequence[int]
    values: list[list[str]]


def read_delimited(
    source: Source,
    choose: Choose,
    report: ReadReport,
    delimiter: str | None = None,
    header: bool | None = None,
    encoding: str = "utf-8",
    quoted: bool | None = None,
    names: Sequence[str] | None = None,
) -> Table:
    """Reads one text table.

    A row with more or fewer fields than the header, or a quote that is never closed, is a bad row.

    Args:
        source: the file.
        choose: picks the columns to keep.
        report: takes the bad rows.
        delimiter: None looks at the first lines.
        header: whether the first line names the columns; None looks at it. Columns without names are ``0``, ``1``, ...
        encoding: of the text.
        quoted: whether ``"`` quotes a field, so that it may hold delimiters and line breaks. None: yes, but not in
            text separated by tabs or ``::``, where a quote is a quote and a row ends with its line.
        names: names of the columns of a file without a header.

    Raises:
        ValueError: the file is empty.
    """
    blocks = read_lines(source, encoding, report)
    first = next(blocks, None)
    if first is None:
        raise ValueError(f"{source} is empty.")
    if delimiter is None:
        delimiter = find_delimiter(first[1], source.name)
    if quoted is None:
        quoted = delimiter not in ("\t", "::")
    rows = _rows(source, _chain(first, blocks), delimiter, quoted, report)

    chunks: dict[str, list[pa.Array]] = {}
    indices: dict[str, int] = {}
    sizes: list[int] = []
    numbers: list[np.ndarray] = []
    columns: list[str] = list(names or ())
    for lines, values in rows:
        if not sizes and not numbers:  # the first block holds the header
            if names is None:
                top = values[0]
                has_header = header if header is not None else _looks_like_header(top)
                columns = [name.strip() for name in top] if has_header else [str(i) for i in range(len(top))]
                if has_header:
                    lines, values = lines[1:], values[1:]
            indices = {field: columns.index(column) for field, column in choose(columns).items()}
            chunks = {field: [] for field in indices}
        lines, values = _of_width(source, lines, values, len(columns), delimiter, report)
        numbers.append(np.asarray(lines, dtype=np.int64))
        if not values:
            continue
        sizes.append(len(values))
        flat = list(zip(*values, strict=True))
        for field, index in indices.items():
            chunks[field].append(text_array(flat[index]))
    if not numbers:
        raise ValueError(f"{source} is empty.")
    return make_table(chunks, sizes, np.concatenate(numbers), str(source), "line")


def find_delimiter(lines: Sequence[str], name: str) -> str:
    """The delimiter of a table, by its first lines and, where they do not tell, by the suffix of its name.

    Args:
        lines: the first lines.
        name: the file's name.
    """
    lines = [line for line in lines[:50] if line.strip()]
    best, best_score = "\t" if name.endswith((".tsv", ".inter", ".item", ".user")) else ",", (0.0, 0)
    for delimiter in DELIMITERS:
        counts = [_count(line, delimiter) for line in lines]
        if not counts or counts[0] < 2:
            continue
        score = (sum(count == counts[0] for count in counts) / len(counts), counts[0])
        if score > best_score:
            best, best_score = delimiter, score
    return best


def _count(line: str, delimiter: str) -> int:
    if '"' in line and delimiter not in ("\t", "::"):
        return len(next(csv.reader([line], delimiter=delimiter), []))
    return line.count(delimiter) + 1


def _looks_like_header(top: Sequence[str]) -> bool:
    known = {name for names in GUESSES.values() for name in names} | {"id", "title"}
    if any(plain_name(cell) in known for cell in top):
        return True
    return not any(cell.strip().replace(".", "", 1).isdigit() for cell in top)


def _chain(first: tuple[int, list[str]], rest: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    yield first
    yield from rest


def _of_width(
    source: Source, lines: Sequence[int], values: list[list[str]], width: int, delimiter: str, report: ReadReport
) -> _Rows:
    if set(map(len, values)) <= {width}:
        return _Rows(lines, values)
    good: list[int] = []
    for i, row in enumerate(values):
        if len(row) == width:
            good.append(i)
        elif len(row) > 1 or (row and row[0].strip()):  # a blank line is no row
            report.bad_row(
                str(source), int(lines[i]), f"{len(row)} fields separated by {delimiter!r}, but {width} columns"
            )
    return _Rows([lines[i] for i in good], [values[i] for i in good])


def _rows(
    source: Source, blocks: Iterator[tuple[int, list[str]]], delimiter: str, quoted: bool, report: ReadReport
) -> Iterator[_Rows]:
    for number, lines in blocks:
        numbers: Sequence[int] = range(number, number + len(lines))
        if quoted and any('"' in line for line in lines):
            yield _quoted_rows(source, list(numbers), lines, blocks, delimiter, report)
        else:
            yield _Rows(numbers, [_cut(line).split(delimiter) for line in lines])


def _cut(line: str) -> str:
    return line[:-1] if line.endswith("\r") else line


def _quoted_rows(
    source: Source,
    numbers: list[int],
    lines: list[str],
    blocks: Iterator[tuple[int, list[str]]],
    delimiter: str,
    report: ReadReport,
) -> _Rows:
    """The rows of a block in which fields may be quoted; a row that runs on takes in the next blocks."""
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
    found = _Rows([], [])
    starts: list[int] = []
    position = 0

    def feed() -> Iterator[str]:
        nonlocal position
        while True:
            if position == len(lines):
                more = next(blocks, None)
                if more is None:
                    return
                numbers.extend(range(more[0], more[0] + len(more[1])))
                lines.extend(more[1])
            position += 1
            yield lines[position - 1] + "\n"

    while position < len(lines):
        start = position
        if '"' not in lines[start]:
            position += 1
            found.values.append(_cut(lines[start]).split(delimiter))
            starts.append(numbers[start])
            continue
        try:
            row = next(csv.reader(feed(), delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            opened = start + _opening_line(lines[start:position], delimiter)
            reason = "a quote opens here and is never closed" if "end of data" in str(error) else f"not CSV ({error})"
            if opened < position - 1 and "end of data" not in str(error):
                reason = f"a quote opens here and is closed at the wrong place, on line {numbers[position - 1]}"
            remedy = (
                "Double the quotes inside a field, or set quoted: false when quotes are plain text; on_bad_rows: skip"
            )
            report.bad_row(str(source), numbers[opened], reason, remedy=remedy + " leaves the line out.")
            for line in range(start, opened):
                report.bad_row(str(source), numbers[line], "the row runs into the unclosed quote below")
            position = opened + 1
            continue
        found.values.append(row)
        starts.append(numbers[start])
    return _Rows(starts, found.values)


def _opening_line(lines: Sequence[str], delimiter: str) -> int:
    """Which of a record's lines opened the quote that is still open at the end."""
    inside, opened = False, 0
    for index, line in enumerate(lines):
        at_start = not inside
        position = 0
        while position < len(line):
            if inside and line[position] == '"':
                if line[position + 1 : position + 2] == '"':
                    position += 1
                else:
                    inside = False
            elif not inside and at_start and line[position] == '"':
                inside, opened = True, index
            at_start = not inside and line.startswith(delimiter, position)
            position += 1
    return opened
