"""Tables in which a cell may be a list: JSON arrays, Parquet lists, and lists written as text."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_rec.data.readers.delimited import Choose, read_delimited
from lightning_rec.data.readers.files import Format, find_format
from lightning_rec.data.readers.impression_rows import lists, split_words
from lightning_rec.data.readers.sources import Source, opened
from lightning_rec.data.readers.structured import json_records
from lightning_rec.data.table import ReadReport, Table, arrow_text, make_table, plain_text, text_array

_BLOCK = 50_000


def read_cells(
    source: Source,
    choose: Choose,
    listed: Collection[str],
    report: ReadReport,
    format: Format = "auto",
    delimiter: str | None = None,
    header: bool | None = None,
    encoding: str = "utf-8",
    quoted: bool | None = None,
    separator: str | None = None,
) -> Table:
    """Reads one file in any format, as ``read_table`` does, but with lists whose missing values stay in their places.

    Args:
        source: the file.
        choose: picks the columns to keep.
        listed: the fields whose cells are lists; a cell that is missing or blank is null.
        report: takes the bad rows.
        format: ``auto`` looks at the file.
        delimiter: of a text table; None looks at the first lines.
        header: whether a text table starts with names; None looks.
        encoding: of the text.
        quoted: whether a double quote in a text table quotes a field.
        separator: between the values of a list that is written as text; None: white space.

    Returns:
        Columns of strings, and for the listed fields of lists of strings, which may hold nulls.
    """
    if format == "auto":
        format = find_format(source)
    if format == "parquet":
        return _read_parquet(source, choose, listed, separator)
    if format == "jsonl":
        return _read_json(source, choose, listed, report, encoding, separator)
    if format == "tsv" and delimiter is None:
        delimiter = "\t"
    table = read_delimited(source, choose, report, delimiter, header, encoding, quoted)
    for field in listed:
        if field in table.columns:
            chunks = [_from_text(chunk, separator) for chunk in table.columns[field].chunks]
            table.columns[field] = pa.chunked_array(chunks, type=pa.list_(pa.string()))
    return table


def _read_json(
    source: Source, choose: Choose, listed: Collection[str], report: ReadReport, encoding: str, separator: str | None
) -> Table:
    chunks: dict[str, list[pa.Array | None]] = {}
    names: dict[str, None] = {}
    chosen: dict[str, str] = {}
    sizes: list[int] = []
    numbers: list[int] = []

    def add(block: list[tuple[int, dict[str, Any]]]) -> None:
        nonlocal chosen
        found = dict.fromkeys(name for _, record in block for name in record)
        if not names or found.keys() - names.keys():
            names.update(found)
            chosen = choose(list(names))
        for field, column in chosen.items():
            known = chunks.setdefault(field, [])
            known += [None] * (len(sizes) - len(known))
            values = [record.get(column) for _, record in block]
            known.append(_from_values(values, separator) if field in listed else text_array(values))
        sizes.append(len(block))
        numbers.extend(number for number, _ in block)

    block: list[tuple[int, dict[str, Any]]] = []
    for record in json_records(source, report, encoding):
        block.append(record)
        if len(block) == _BLOCK:
            add(block)
            block = []
    if block or not sizes:
        add(block)
    return make_table(chunks, sizes, np.asarray(numbers, dtype=np.int64), str(source), "line")


def _read_parquet(source: Source, choose: Choose, listed: Collection[str], separator: str | None) -> Table:
    with opened(source) as stream:
        try:
            file = pq.ParquetFile(io.BytesIO(stream.read()) if source.member else stream)
            chosen = choose(list(file.schema_arrow.names))
            arrow = file.read(columns=list(dict.fromkeys(chosen.values())))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{source} is no readable Parquet file: {error}.") from error
    columns = {
        field: _from_arrow(arrow[column], separator) if field in listed else arrow_text(arrow[column])
        for field, column in chosen.items()
    }
    return Table(columns, np.arange(1, arrow.num_rows + 1), [str(source)], [0], ["row"])


def _from_arrow(column: pa.ChunkedArray, separator: str | None) -> pa.ChunkedArray:
    kind = column.type
    chunks = []
    for chunk in column.chunks:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            missing = np.asarray(chunk.is_null())
            lengths = np.asarray(pc.fill_null(pc.list_value_length(chunk), 0)).astype(np.int64)
            values = arrow_text(pa.chunked_array([pc.list_flatten(chunk)])).combine_chunks()
            chunks.append(lists(np.where(missing, 0, lengths), values, missing))
        else:
            text = arrow_text(pa.chunked_array([chunk])).combine_chunks()
            chunks.append(_from_text(text, separator))
    return pa.chunked_array(chunks, type=pa.list_(pa.string()))


def _from_values(values: Sequence[Any], separator: str | None) -> pa.Array:
    """Lists from JSON values; a text is split, a number is a list of one."""
    flat: list[Any] = []
    lengths = np.zeros(len(values), np.int64)
    missing = np.zeros(len(values), bool)
    for row, value in enumerate(values):
        if isinstance(value, str):
            value = _split(value, separator) if value.strip() else None
        if value is None or (isinstance(value, float) and math.isnan(value)):
            missing[row] = True
        elif isinstance(value, list):
            flat += value
            lengths[row] = len(value)
        else:
            flat.append(value)
            lengths[row] = 1
    try:
        texts = pa.array(flat, pa.string())
    except (pa.ArrowTypeError, pa.ArrowInvalid, UnicodeEncodeError):
        texts = pa.array([plain_text(value) for value in flat], pa.string())
    return lists(lengths, texts, missing)


def _from_text(column: pa.Array, separator: str | None) -> pa.Array:
    """Lists from text: ``a b c``, values with another separator, or ``["a", "b"]``."""
    bracketed = pc.any(pc.starts_with(pc.ascii_ltrim_whitespace(column), "[")).as_py()
    if bracketed or separator is not None:
        return _from_values(column.to_pylist(), separator)
    lengths, words = split_words(column)
    return lists(lengths, words, lengths == 0)


def _split(text: str, separator: str | None) -> list[Any]:
    text = text.strip()
    if text.startswith("["):
        try:
            values = json.loads(text)
            if isinstance(values, list):
                return values
        except ValueError:  # the form of Python or NumPy: ['a', 'b'] or ['a' 'b']
            pass
        return re.sub(r"[\[\]'\",\s]+", " ", text).split()
    return [value.strip() for value in text.split(separator)] if separator else text.split()
