"""CSV, TSV and text with any other delimiter, line numbers exact."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from lightning_rec.data.readers.sources import Source, read_blocks
from lightning_rec.data.table import ReadReport, Table, make_table, text_array

#: From the columns of a file to the ones to keep: new name -> column.
Choose = Callable[[list[str]], dict[str, str]]

DELIMITERS = ("::", "\t", ",", ";", "|")
_FIELD_LIMIT = 1 << 27
_LOOK_AT = 1 << 16


class _Rows(NamedTuple):
    lines: Sequence[int]
    values: list[list[str]]


class _Part(NamedTuple):
    lines: Sequence[int]
    columns: dict[str, pa.Array]


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
    blocks = read_blocks(source, encoding, report)
    first = next(blocks, None)
    if first is None:
        raise ValueError(f"{source} is empty.")
    number, text = first
    blank = len(text) - len(text.lstrip("\r\n"))
    first = (number + text.count("\n", 0, blank), text[blank:])
    if not first[1].strip():
        raise ValueError(f"{source} is empty.")
    top_lines = first[1][:_LOOK_AT].split("\n")
    if delimiter is None:
        delimiter = find_delimiter(top_lines, source.name)
    if quoted is None:
        quoted = delimiter not in ("\t", "::")
    parser = _Parser(source, delimiter, quoted, report)

    parts: list[_Part] = []
    columns = list(names or ())
    indices: dict[str, int] = {}
    for number, text in itertools.chain([first], blocks):
        if indices:
            parts += parser.parse(number, text, blocks, columns, indices)
            continue
        if names is None:  # the first block holds the header
            rows = parser.rows(number, text, blocks) if '"' in top_lines[0] and quoted else None
            top = rows.values[0] if rows is not None and rows.values else parser.split(text.partition("\n")[0])
            has_header = header if header is not None else _looks_like_header(top)
            columns = [name.strip() for name in top] if has_header else [str(index) for index in range(len(top))]
            indices = {field: columns.index(column) for field, column in choose(columns).items()}
            if rows is not None:
                parts.append(parser.part(_Rows(rows.lines[has_header:], rows.values[has_header:]), columns, indices))
                continue
            if has_header:
                number, (_, _, text) = number + 1, text.partition("\n")
        else:
            indices = {field: columns.index(column) for field, column in choose(columns).items()}
        parts += parser.parse(number, text, blocks, columns, indices)
    chunks = {field: [part.columns[field] for part in parts] for field in indices}
    lines = np.concatenate([np.asarray(part.lines, dtype=np.int64) for part in parts])
    return make_table(chunks, [len(part.lines) for part in parts], lines, str(source), "line")


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
    """Names are short and none is a number."""
    return all(len(cell) <= 60 and not cell.strip().replace(".", "", 1).isdigit() for cell in top)


class _Parser:
    """From a block of text to columns: by pyarrow where the block is plain, else row by row."""

    def __init__(self, source: Source, delimiter: str, quoted: bool, report: ReadReport) -> None:
        self.source = source
        self.delimiter = delimiter
        self.quoted = quoted
        self.report = report

    def parse(
        self, number: int, text: str, blocks: Iterator[tuple[int, str]], columns: list[str], indices: dict[str, int]
    ) -> list[_Part]:
        """The columns of a block; no part where the block holds no row."""
        if not text.strip():
            return [_Part([], {field: pa.array([], pa.string()) for field in indices})]
        plain = self._plain(number, text, len(columns), indices)
        return [plain if plain is not None else self.part(self.rows(number, text, blocks), columns, indices)]

    def _plain(self, number: int, text: str, width: int, indices: dict[str, int]) -> _Part | None:
        """The columns of a block without quotes and carriage returns; None where a row does not fit."""
        delimiter = self.delimiter
        if "\r" in text or (self.quoted and '"' in text):
            return None
        if len(delimiter) > 1:
            if "\x1f" in text:
                return None
            text, delimiter = text.replace(delimiter, "\x1f"), "\x1f"
        names = [str(index) for index in range(width)]
        try:
            table = pa_csv.read_csv(
                pa.py_buffer(text.encode()),
                pa_csv.ReadOptions(use_threads=False, block_size=1 << 30, column_names=names),
                pa_csv.ParseOptions(delimiter=delimiter, quote_char=False, ignore_empty_lines=False),
                pa_csv.ConvertOptions(
                    check_utf8=False,
                    column_types=dict.fromkeys(names, pa.string()),
                    strings_can_be_null=False,
                    include_columns=list(dict.fromkeys(str(index) for index in indices.values())),
                ),
            )
        except pa.ArrowInvalid:
            return None
        if table.num_rows != text.count("\n") + 1 or width == 1:
            return None
        columns = {field: table[str(index)].combine_chunks() for field, index in indices.items()}
        return _Part(range(number, number + table.num_rows), columns)

    def part(self, rows: _Rows, columns: list[str], indices: dict[str, int]) -> _Part:
        """Columns from rows; a row of another width than the header is a bad row."""
        width = len(columns)
        lines, values = rows
        if not set(map(len, values)) <= {width}:
            good: list[int] = []
            for i, row in enumerate(values):
                if len(row) == width:
                    good.append(i)
                elif len(row) > 1 or (row and row[0].strip()):  # a blank line is no row
                    reason = f"{len(row)} fields separated by {self.delimiter!r}, but {width} columns"
                    self.report.bad_row(str(self.source), int(lines[i]), reason)
            lines, values = [lines[i] for i in good], [values[i] for i in good]
        flat = list(zip(*values, strict=True)) if values else [()] * width
        return _Part(lines, {field: text_array(flat[index]) for field, index in indices.items()})

    def rows(self, number: int, text: str, blocks: Iterator[tuple[int, str]]) -> _Rows:
        """The rows of a block; a quoted field that runs on takes in the next blocks."""
        lines = text.split("\n")
        numbers = range(number, number + len(lines))
        if self.quoted and '"' in text:
            return _quoted_rows(self.source, list(numbers), lines, blocks, self.delimiter, self.report)
        return _Rows(numbers, [self.split(line) for line in lines])

    def split(self, line: str) -> list[str]:
        """The fields of a line without quotes."""
        return line.removesuffix("\r").split(self.delimiter)


def _quoted_rows(
    source: Source,
    numbers: list[int],
    lines: list[str],
    blocks: Iterator[tuple[int, str]],
    delimiter: str,
    report: ReadReport,
) -> _Rows:
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
                fresh = more[1].split("\n")
                numbers.extend(range(more[0], more[0] + len(fresh)))
                lines.extend(fresh)
            position += 1
            yield lines[position - 1] + "\n"

    while position < len(lines):
        start = position
        if '"' not in lines[start]:
            position += 1
            found.values.append(lines[start].removesuffix("\r").split(delimiter))
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
