"""Files of requests and of users, and files of answers."""

from __future__ import annotations

import csv
import difflib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_rec.recommend.rows import plain_row

#: Requests that are answered with one matrix product.
BATCH = 256
_ROWS = 65_536  # of one group of a Parquet file
_USER = ("user_id", "user")


def read_rows(source: str) -> Iterator[Any]:
    """The requests of a file as they stand: lines of JSON, or the fields of each row.

    Args:
        source: a Parquet file or a folder of such, which are read in the order of their names; else JSON Lines, from
            the standard input for ``-``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no Parquet file.
    """
    if is_parquet(source):
        for path in parquet_files(source):
            yield from read_parquet(path)
    else:
        with open_text(source, "r") as file:
            for line in file:
                if line.strip():
                    yield line


def is_parquet(source: str) -> bool:
    """Whether requests lie in a Parquet file, or a folder of such."""
    return source != "-" and (source.endswith(".parquet") or Path(source).is_dir())


def parquet_files(source: str) -> list[str]:
    """A Parquet file, or those of a folder in the order of their names."""
    return sorted(map(str, Path(source).glob("*.parquet"))) if Path(source).is_dir() else [source]


def row_groups(path: str) -> list[int]:
    """The groups of rows of a Parquet file that are not empty; each can be read by itself."""
    metadata = _opened(path).metadata
    return [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]


def read_parquet(path: str, group: int | None = None) -> Iterator[dict[str, Any]]:
    """The fields of each row of a Parquet file.

    Args:
        path: the file.
        group: only this group of rows; None: all.
    """
    return map(plain_row, _parquet(path, groups=None if group is None else [group]))


def read_users(source: str) -> Iterator[Any]:
    """A request for each user of a file: ``{"user": id}``, or None where the id is missing.

    Args:
        source: Parquet, JSON Lines, CSV or TSV with a column ``user_id`` (or ``user``), by the ending; else one id
            a line, from the standard input for ``-``. Blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a table without such a column.
    """
    ending = Path(source).suffix.lower()
    if ending == ".parquet":
        name = _user_column(_opened(source).schema_arrow.names, source)
        yield from (_asks(row[name]) for row in _parquet(source, [name]))
        return
    with open_text(source, "r") as file:
        if ending in (".csv", ".tsv"):
            table = csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ",")
            name = _user_column(list(table.fieldnames or ()), source)
            yield from (_asks(row[name]) for row in table)
        elif ending in (".jsonl", ".ndjson", ".json"):
            yield from (_asks_in(line) for line in file if line.strip())
        else:
            yield from (_asks(line.rstrip("\n")) for line in file if line.strip())


def batches(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Rows by the batch."""
    while batch := list(islice(rows, BATCH)):
        yield batch


@contextmanager
def open_text(path: str, mode: Literal["r", "w"]) -> Iterator[TextIO]:
    """A text file in UTF-8, or the standard input or output for ``-``. Bytes that are no UTF-8 become surrogates."""
    if path == "-":
        yield sys.stdin if mode == "r" else sys.stdout
        return
    if mode == "r":
        with open(_existing(path), encoding="utf-8-sig", errors="surrogateescape") as file:
            yield file
        return
    _check_folder(path)
    with open(path, "w", encoding="utf-8") as file:
        yield file


@contextmanager
def open_rows(output: str, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes one row after another, as JSON Lines, or as Parquet where the name ends so.

    A Parquet file takes its place when it is whole.
    """
    if not output.endswith(".parquet"):
        with open_text(output, "w") as file:
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)
        return
    _check_folder(output)
    part = Path(output + ".part")
    rows: list[dict[str, Any]] = []
    try:
        with pq.ParquetWriter(part, schema) as file:

            def write(row: dict[str, Any]) -> None:
                rows.append(row)
                if len(rows) == _ROWS:
                    file.write_table(pa.Table.from_pylist(rows, schema))
                    rows.clear()

            yield write
            file.write_table(pa.Table.from_pylist(rows, schema))
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def check_apart(source: str, output: str) -> None:
    """Refuses to write over what is read.

    Raises:
        ValueError: both are the same file.
    """
    if "-" not in (source, output) and Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output} is read and written at once: name another file with --output.")


def _existing(source: str) -> str:
    if not Path(source).is_file():
        raise FileNotFoundError(f"There is no file {Path(source).absolute()}: name one that exists.")
    return source


def _check_folder(output: str) -> None:
    folder = Path(output).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to write {Path(output).name} into: make it first.")


def _opened(source: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(_existing(source))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source} is no Parquet file: {error}") from error


def _parquet(
    source: str, columns: list[str] | None = None, groups: list[int] | None = None
) -> Iterator[dict[str, Any]]:
    for part in _opened(source).iter_batches(batch_size=BATCH, row_groups=groups, columns=columns):
        yield from part.to_pylist()


def _user_column(names: Sequence[str], source: str) -> str:
    for name in _USER:
        if name in names:
            return name
    near = difflib.get_close_matches("user_id", names, n=1)
    raise ValueError(
        f"{source} has no column user_id (or user); it has: {', '.join(names) or 'none'}. "
        + (f"Rename {near[0]}, or give" if near else "Give")
        + " a file with one id a line, whose name ends in .txt."
    )


def _asks(user: Any) -> dict[str, Any] | None:
    if user is None or user == "":
        return None
    # an id that is a whole number in the file is written in one way only
    return {"user": str(user) if isinstance(user, int) and not isinstance(user, bool) else user}


def _asks_in(line: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line  # which is then told as what it is: no JSON
    return _asks(next((row[name] for name in _USER if name in row), None)) if isinstance(row, dict) else line
