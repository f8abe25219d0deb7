"""JSON Lines, JSON arrays and Parquet as text columns."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_rec.data.readers.delimited import Choose
from lightning_rec.data.readers.sources import Source, opened, read_lines
from lightning_rec.data.table import ReadReport, Table, arrow_text, make_table, text_array

_BLOCK = 50_000


def read_json(source: Source, choose: Choose, report: ReadReport, encoding: str = "utf-8") -> Table:
    """Reads JSON Lines (an object a line) or one JSON array of objects.

    Args:
        source: the file.
        choose: picks the fields to keep.
        report: takes the bad rows: what is no JSON object.
        encoding: of the text.

    Raises:
        ValueError: the file is empty, or a JSON array is broken.
    """
    chunks: dict[str, list[pa.Array | None]] = {}
    chosen: dict[str, str] = {}
    names: dict[str, None] = {}
    sizes: list[int] = []
    numbers: list[int] = []
    for block in _blocks(json_records(source, report, encoding)):
        fresh = {name for _, record in block for name in record} - names.keys()
        if fresh or not names:
            names |= dict.fromkeys(name for _, record in block for name in record)
            chosen = choose(list(names))
        for field, column in chosen.items():
            known = chunks.setdefault(field, [])
            known += [None] * (len(sizes) - len(known))
            known.append(text_array([record.get(column) for _, record in block]))
        sizes.append(len(block))
        numbers += [number for number, _ in block]
    return make_table(chunks, sizes, np.asarray(numbers, dtype=np.int64), str(source), "line")


def _blocks(records: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    block = []
    for record in records:
        block.append(record)
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block


def json_records(source: Source, report: ReadReport, encoding: str = "utf-8") -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each record of a JSON Lines file or a JSON array."""
    blocks = read_lines(source, encoding, report)
    empty = True
    for number, lines in blocks:
        if empty and any(line.strip() for line in lines):
            empty = False
            top = next(line for line in lines if line.strip()).lstrip()
            if top.startswith("["):
                yield from _array_records(
                    source, number, "\n".join(lines + [x for _, more in blocks for x in more]), report
                )
                return
        for offset, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                report.bad_row(str(source), number + offset, f"the line is no JSON ({error})")
                continue
            if isinstance(record, dict):
                yield number + offset, record
            else:
                report.bad_row(str(source), number + offset, "the line is no JSON object")
    if empty:
        raise ValueError(f"{source} is empty.")


def _array_records(source: Source, line: int, text: str, report: ReadReport) -> Iterator[tuple[int, dict[str, Any]]]:
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    line += text.count("\n", 0, position)
    while True:
        start = position
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", start, position)
        if text[position : position + 1] == "]":
            return
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {line}: the JSON array is broken here ({error.msg}).") from error
        if isinstance(record, dict):
            yield line, record
        else:
            report.bad_row(str(source), line, "the element of the array is no JSON object")
        line += text.count("\n", position, end)
        position = end


def read_parquet(source: Source, choose: Choose) -> Table:
    """Reads a Parquet file; ``Table.lines`` counts its rows from 1.

    Args:
        source: the file.
        choose: picks the columns to keep.

    Raises:
        ValueError: the file is damaged.
    """
    with opened(source) as stream:
        try:
            file = pq.ParquetFile(io.BytesIO(stream.read()) if source.member else stream)
            chosen = choose(list(file.schema_arrow.names))
            arrow = file.read(columns=list(dict.fromkeys(chosen.values())))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{source} is no readable Parquet file: {error}.") from error
    columns = {field: arrow_text(arrow[column]) for field, column in chosen.items()}
    return Table(columns, np.arange(1, arrow.num_rows + 1), [str(source)], [0], ["row"])
