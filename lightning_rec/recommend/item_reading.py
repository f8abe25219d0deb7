"""What an item tower reads of an item that comes after the export: its text, or some of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_rec.data.text import Cleaner, field_text

#: The part of the manifest of towers that read fields, such as ``NewsItemTower``; the others read the item's text.
FIELDS = "fields"


class FieldReading:
    """The fields of an item as one string, which tells whether an item says the same as before, and back again.

    Args:
        names: the fields that the tower reads.
        cleaner: the run's cleaning of values.
    """

    def __init__(self, names: Sequence[str], cleaner: Cleaner) -> None:
        self.names = list(names)
        self._cleaner = cleaner

    def of(self, fields: Mapping[str, Any]) -> str:
        """The reading of an item; fields that it lacks are empty, as in the catalogue of the run."""
        return self.written([self._cleaned(fields.get(name)) for name in self.names])

    @staticmethod
    def written(values: Sequence[Any]) -> str:
        """A reading of cleaned values, one for each field."""
        return json.dumps(list(values), ensure_ascii=False)

    @staticmethod
    def values(reading: str) -> list[Any]:
        """The cleaned values of a reading, one for each field: a string, or a list of strings."""
        found: list[Any] = json.loads(reading)
        return found

    def _cleaned(self, value: Any) -> str | list[str]:
        if isinstance(value, list | tuple):
            return [text for part in value if (text := field_text(part, self._cleaner))]
        return field_text(value, self._cleaner)

    def columns(self, attributes: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """The cleaned values of all items, a field at a time where it is asked for.

        Args:
            attributes: one value a row for each field that the items have.
        """
        return _Cleaned(attributes, self)

    def encode(self, tower: Any, readings: Sequence[str]) -> Tensor:
        """``(n, d)`` vectors of readings.

        Args:
            tower: an item tower with ``encode_items``, such as ``NewsItemTower``.
            readings: ``n`` of them.
        """
        rows = [self.values(reading) for reading in readings]
        vectors: Tensor = tower.encode_items({name: [row[at] for row in rows] for at, name in enumerate(self.names)})
        return vectors.float()


class _Cleaned(Mapping[str, Sequence[Any]]):
    def __init__(self, attributes: Mapping[str, Sequence[Any]], reading: FieldReading) -> None:
        self._attributes = attributes
        self._reading = reading
        self._names = [name for name in reading.names if name in set(attributes)]

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._names:
            raise KeyError(name)
        return [self._reading._cleaned(value) for value in self._attributes[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
