"""One line, or one JSON entry, a user: the items in order, oldest first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_rec.data.interactions import canonical_interactions
from lightning_rec.data.readers.base import RawData, Reader
from lightning_rec.data.readers.columns import choose_entities
from lightning_rec.data.readers.delimited import Choose
from lightning_rec.data.readers.entities import canonical_entities
from lightning_rec.data.readers.files import find_format, read_table
from lightning_rec.data.readers.sources import Source, digest, find_sources, read_lines
from lightning_rec.data.table import OnBadRows, ReadReport, Table, concat_tables, make_table, text_array


class SequenceFiles(Reader):
    """Histories written as sequences: ``user<TAB>item item ...`` lines, or JSON ``{"user": ["item", ...]}``.

    Without a tab the first word of a line is the user. Items may come as JSON ``{"item": {"title": ..., ...}}`` or
    as any table that ``Files`` reads.

    Args:
        interactions: the histories, each oldest first; a file, a glob or several.
        items: the item table.
        encoding: of the text.
        on_bad_rows: ``error`` stops at a bad row with file, line and reason; ``skip`` counts, lists and leaves it out.
        item_columns: field -> column, for an item table that is not JSON of that form.
    """

    def __init__(
        self,
        interactions: str | list[str],
        items: str | list[str] | None = None,
        encoding: str = "utf-8",
        on_bad_rows: OnBadRows = "error",
        item_columns: dict[str, str | int | list[str]] | None = None,
    ) -> None:
        self.interactions = interactions
        self.items = items
        self.encoding = encoding
        self.on_bad_rows = on_bad_rows
        self.item_columns = item_columns or {}

    def paths(self) -> list[str]:
        """The files that ``read`` reads."""
        return [str(source) for source in self._log() + self._items()]

    def read(self) -> RawData:
        """Reads the histories and the items."""
        report = ReadReport(self.on_bad_rows)
        table = concat_tables([_histories(source, self.encoding, report) for source in self._log()])
        interactions = canonical_interactions(table, report)
        items = None
        sources = self._items()
        if sources:
            tables = [self._item_table(source, report) for source in sources]
            items = canonical_entities(concat_tables(tables), "item_id", "items", report)
        return RawData(interactions, items, None, report, digest(self._log() + sources))

    def _log(self) -> list[Source]:
        return find_sources(self.interactions, "interactions")

    def _items(self) -> list[Source]:
        return find_sources(self.items, "items") if self.items is not None else []

    def _item_table(self, source: Source, report: ReadReport) -> Table:
        def choose(names: list[str]) -> dict[str, str]:
            return choose_entities(names, self.item_columns, "item_id", str(source), "item_columns")

        if find_format(source) == "jsonl":
            records = _keyed_records(source, self.encoding, report)
            if records is not None:
                return _entries(source, records, choose)
        return read_table(source, choose, report, encoding=self.encoding)


def _keyed_records(source: Source, encoding: str, report: ReadReport) -> list[dict[str, Any]] | None:
    """The records of ``{"item": {"title": ...}}``, or None where the file is JSON of another form."""
    text = "\n".join(line for _, lines in read_lines(source, encoding, report) for line in lines)
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError:
        return None
    if not isinstance(content, dict) or not all(isinstance(record, dict) for record in content.values()):
        return None
    return [{"item_id": key} | record for key, record in content.items()]


def _entries(source: Source, records: list[dict[str, Any]], choose: Choose) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record))
    chosen = choose(names)
    chunks: dict[str, list[pa.Array | None]] = {
        field: [text_array([record.get(column) for record in records])] for field, column in chosen.items()
    }
    return make_table(chunks, [len(records)], np.arange(1, len(records) + 1), str(source), "entry")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one JSON object, so that one of them would be lost")
    return found


def _histories(source: Source, encoding: str, report: ReadReport) -> Table:
    if find_format(source) == "jsonl":
        entries, unit = _json_histories(source, encoding, report), "entry"
    else:
        entries, unit = _line_histories(source, encoding, report), "line"
    numbers: list[int] = []
    users: list[Any] = []
    items: list[Any] = []
    for number, user, history in entries:
        numbers += [number] * len(history)
        users += [user] * len(history)
        items += history
    chunks: dict[str, list[pa.Array | None]] = {"user_id": [text_array(users)], "item_id": [text_array(items)]}
    return make_table(chunks, [len(users)], np.asarray(numbers, dtype=np.int64), str(source), unit)


def _line_histories(source: Source, encoding: str, report: ReadReport) -> Iterator[tuple[int, str, list[str]]]:
    for first, lines in read_lines(source, encoding, report):
        for number, line in enumerate(lines, first):
            if not line.strip():
                continue
            if "\t" in line:
                user, _, rest = line.partition("\t")
                history = rest.split()
            else:
                user, *history = line.split()
            if history:
                yield number, user, history
            else:
                report.bad_row(str(source), number, f"the user {user.strip()!r} has no items")


def _json_histories(source: Source, encoding: str, report: ReadReport) -> Iterator[tuple[int, str, list[Any]]]:
    text = "\n".join(line for _, lines in read_lines(source, encoding, report) for line in lines)
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
    position, entry = len(text) - len(text.lstrip()), 0
    while position < len(text):
        try:
            content, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is no JSON: {error}.") from error
        except ValueError as error:
            raise ValueError(f"{source}: {error}. Give each user one entry.") from error
        if not isinstance(content, dict):
            raise ValueError(
                f'{source} must hold objects like {{"user": ["item", ...]}}, not {type(content).__name__}s.'
            )
        for user, history in content.items():
            entry += 1
            if isinstance(history, list) and history and all(isinstance(item, str | int | float) for item in history):
                yield entry, user, history
            else:
                report.bad_row(str(source), entry, f"the user {user!r} has no list of item ids", "entry")
        position += len(text[position:]) - len(text[position:].lstrip())
