"""The users of the fitted data, as an artefact holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightning_rec.recommend.types import Event

USERS = "users.parquet"


class StoredUsers:
    """Histories as the data module knew them, by raw user id.

    Args:
        table: columns ``user_id``, ``items`` (item rows, oldest first), ``times`` (or null), ``touched`` (item rows
            that the user touched without a positive interaction), ``profile`` (JSON, or null), ``reviews`` (or null).
            Users without any interaction, of whom the user table told, come last; their ``items`` are null. Perhaps
            ``trained``: False for users who came after training, whom towers do not know by their row.
        item_ids: raw id of each item row.
    """

    def __init__(self, table: pa.Table, item_ids: Sequence[str]) -> None:
        self._table = table
        self._item_ids = item_ids
        self._forgotten: set[str] = set()
        self._fitted = table.num_rows - table.column("items").null_count
        self.indptr, self.rows = _lists(table, "items")
        times = _lists(table, "times")[1]
        #: Time of each event in seconds since 1970, or None.
        self.times: NDArray[np.int64] | None = times if len(times) or not len(self.rows) else None
        self._touched = _lists(table, "touched")

    @classmethod
    def read(cls, path: Path, item_ids: Sequence[str]) -> StoredUsers:
        """Reads the file of an artefact."""
        return cls(pq.read_table(path), item_ids)

    def __len__(self) -> int:
        """Number of users."""
        return self._table.num_rows

    @cached_property
    def ids(self) -> list[str]:
        """Raw ids; a user's place here is the row minus one, for those who have a row."""
        return self._table.column("user_id").to_pylist()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {user: number for number, user in enumerate(self.ids, start=1)}

    def _number(self, user: str) -> int:
        """The number of a user in the table, from 1; 0: unknown."""
        return 0 if user in self._forgotten else self._numbers.get(user, 0)

    def row(self, user: str) -> int:
        """The row of a user in the fitted data, by which towers with a vector for each user know them.

        0: unknown, or known by a profile only.
        """
        number = self._number(user)
        return number if number <= self._fitted else 0

    @cached_property
    def _untrained(self) -> set[int]:
        if "trained" not in self._table.column_names:
            return set()
        trained = self._table.column("trained").to_pylist()
        return {row for row, value in enumerate(trained, start=1) if value is False}

    def tower_row(self, user: str) -> int:
        """The row by which towers with a vector for each user know one; 0: they do not know the user."""
        row = self.row(user)
        return 0 if row in self._untrained else row

    def history(self, user: str, newest: int) -> list[Event]:
        """The ``newest`` events of a user, oldest first."""
        row = self.row(user)
        if not row or newest <= 0:
            return []
        start, end = int(self.indptr[row - 1]), int(self.indptr[row])
        start = max(start, end - newest)
        times = [None] * (end - start) if self.times is None else self.times[start:end].tolist()
        rows = self.rows[start:end].tolist()
        return [Event(self._item_ids[item], time) for item, time in zip(rows, times, strict=True)]

    def touched(self, user: str) -> list[str]:
        """Raw ids of items that the user touched without liking them: not in the history, yet seen."""
        row = self.row(user)
        indptr, rows = self._touched
        return [self._item_ids[item] for item in rows[indptr[row - 1] : indptr[row]].tolist()] if row else []

    def profile(self, user: str) -> tuple[Mapping[str, Any], list[str]]:
        """What the user's text is made of beside titles: fields of the user table, and the newest reviews."""
        number = self._number(user)
        if not number:
            return {}, []
        profile, reviews = (self._table.column(name)[number - 1].as_py() for name in ("profile", "reviews"))
        return json.loads(profile) if profile else {}, reviews or []

    def sample(self, limit: int) -> list[str]:
        """Up to ``limit`` users with a history, in the order of the data."""
        found: list[str] = []
        for user, length in zip(self.ids, np.diff(self.indptr).tolist(), strict=True):
            if len(found) >= limit:
                break
            if length and user not in self._forgotten:
                found.append(user)
        return found

    def forget(self, user: str) -> None:
        """Forgets a user until the process ends; the file is not changed."""
        self._forgotten.add(user)


def _lists(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and values of a column of lists; a null is an empty list."""
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    lengths = np.asarray(column.value_lengths().fill_null(0))
    values = np.asarray(column.flatten()).astype(np.int64, copy=False)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values


def users_table(
    ids: Sequence[str],
    items: tuple[NDArray[np.int64], NDArray[np.int64]],
    times: NDArray[np.int64] | None,
    touched: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    profiles: Sequence[Mapping[str, Any]] | None = None,
    reviews: Sequence[Sequence[str]] | None = None,
    strangers: Mapping[str, Mapping[str, Any]] | None = None,
) -> pa.Table:
    """The table of an artefact's users.

    Args:
        ids: raw user ids, without padding.
        items: offsets ``(n + 1,)`` of each user's events, and their item rows.
        times: time of each event, or None.
        touched: offsets and item rows of what was touched without being positive, or None.
        profiles: fields of the user table, one mapping a user, or None.
        reviews: the newest reviews, oldest first, one list a user, or None.
        strangers: raw id -> fields of the user table, of users without any interaction.
    """
    empty = (np.zeros(len(ids) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    stamps = (
        pa.nulls(len(ids), pa.large_list(pa.int64())) if times is None else _list_array(items[0], times, pa.int64())
    )
    table = pa.table(
        {
            "user_id": pa.array(list(ids), pa.string()),
            "items": _list_array(*items, pa.int32()),
            "times": stamps,
            "touched": _list_array(*(empty if touched is None else touched), pa.int32()),
            "profile": pa.nulls(len(ids), pa.string()) if profiles is None else _json(profiles),
            "reviews": (
                pa.nulls(len(ids), pa.list_(pa.string()))
                if reviews is None
                else pa.array([list(part) for part in reviews], pa.list_(pa.string()))
            ),
        }
    )
    if not strangers:
        return table
    # null items tell them from users whose interactions did not count, who have an empty list
    rest: dict[str, pa.Array] = {field.name: pa.nulls(len(strangers), field.type) for field in table.schema}
    rest["user_id"] = pa.array(list(strangers), pa.string())
    rest["profile"] = _json(strangers.values())
    return pa.concat_tables([table, pa.table(rest)])


def _json(profiles: Iterable[Mapping[str, Any]]) -> pa.Array:
    return pa.array([json.dumps(dict(part), ensure_ascii=False) for part in profiles], pa.string())


def _list_array(offsets: NDArray[np.int64], values: NDArray[np.int64], kind: pa.DataType) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values).cast(kind))
