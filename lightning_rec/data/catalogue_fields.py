"""The fields of items, for towers that read more than one text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
from datasets import Dataset

from lightning_rec.data.text import field_text, make_cleaner, remembering

#: Columns of an item table that are no text.
NO_TEXT = ("item_id", "published")


class Fields(Mapping[str, Sequence[Any]]):
    """The fields of the items, cleaned; each is read once, where it is asked for.

    A value is a string or, where the column holds lists, a list of strings: one a catalogue row, ``""`` or ``[]`` where
    an item has none.

    Args:
        table: the item table, whose row ``i`` is catalogue row ``i + 1``, or None.
        n_rows: catalogue rows, padding included.
        cleaning: names of the cleaning steps.
    """

    def __init__(self, table: Dataset | None, n_rows: int, cleaning: Sequence[str]) -> None:
        self._table = table
        self._n_rows = n_rows
        self._cleaning = list(cleaning)
        self._names = [] if table is None else [name for name in table.column_names if name not in NO_TEXT]
        self._read: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            self._read[name] = self._cleaned(name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _cleaned(self, name: str) -> list[Any]:
        cleaner = remembering(make_cleaner(self._cleaning))
        column = self._arrow([name]).column(name)
        values = [None, *column.to_pylist()]
        values += [None] * (self._n_rows - len(values))
        if not _holds_lists(column.type):
            return [field_text(value, cleaner) for value in values]
        return [[text for part in value or () if (text := field_text(part, cleaner))] for value in values]

    def _arrow(self, names: list[str]) -> pa.Table:
        assert self._table is not None
        return self._table.select_columns(names).with_format("arrow")[:]

    @cached_property
    def digest(self) -> str:
        """A hash of all fields and of how they are cleaned, the same in every process."""
        digest = hashlib.sha256(repr((self._cleaning, self._n_rows)).encode())
        if self._names:
            # one chunk, so that the hash does not depend on how a file was read
            table = self._arrow(self._names).replace_schema_metadata(None).combine_chunks()
            for batch in table.to_batches():
                digest.update(str(batch.schema).encode())
                digest.update(batch.serialize())
        return digest.hexdigest()


def _holds_lists(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
