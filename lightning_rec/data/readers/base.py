"""What a reader is and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from datasets import Dataset

from lightning_rec.data.readers.sources import Source, digest
from lightning_rec.data.table import BadRow, BadRowError, OnBadRows, ReadReport

__all__ = [
    "BadRow",
    "BadRowError",
    "ImpressionReader",
    "OnBadRows",
    "RawData",
    "RawImpressions",
    "ReadReport",
    "Reader",
]


@dataclass
class RawData:
    """The tables of a data set, with raw ids.

    Attributes:
        interactions: ``user_id`` and ``item_id`` (string), and optionally ``rating`` (float64, NaN = none),
            ``timestamp`` (int64, seconds since 1970), ``review`` (string); the rows of a user stand oldest first where
            there are no timestamps.
        items: ``item_id``, each once, and text fields (strings, or lists of strings), or None.
        users: ``user_id``, each once, and text fields, or None.
        report: what was read and what was left out.
        source_digest: a hash of the content of all files that were read.
    """

    interactions: Dataset
    items: Dataset | None = None
    users: Dataset | None = None
    report: ReadReport = field(default_factory=ReadReport)
    source_digest: str = ""

    def __post_init__(self) -> None:
        self.report.rows.setdefault("interactions", len(self.interactions))


class Reader(ABC):
    """Reads the files of a data set. A reader of your own returns tables with the canonical columns::

        from datasets import Dataset
        from lightning_rec.data.readers import RawData, Reader

        class PlayLog(Reader):
            '''Lines of `when user song`, separated by spaces.'''

            def __init__(self, path: str) -> None:
                self.path = path

            def read(self) -> RawData:
                rows = [line.split() for line in open(self.path, encoding="utf-8")]
                table = {"timestamp": [int(row[0]) for row in rows]}
                table |= {"user_id": [row[1] for row in rows], "item_id": [row[2] for row in rows]}
                return RawData(Dataset.from_dict(table))

            def paths(self) -> list[str]:
                return [self.path]

    Name it in YAML as ``data.reader: {class_path: my_readers.PlayLog, init_args: {path: plays.log}}``. Constructor
    arguments are plain values. ``lightning_rec.data.interactions.canonical_interactions`` does the checks (bad rows,
    units of time, duplicates) for columns that are still text.
    """

    @abstractmethod
    def read(self) -> RawData:
        """Reads everything.

        Raises:
            BadRowError: a row cannot be used and bad rows are not skipped.
            FileNotFoundError: a file is missing.
            ValueError: a file, a column or an option does not fit.
        """

    def paths(self) -> list[str]:
        """The files that ``read`` reads, members of archives as ``archive.zip/member``."""
        return []


def source_digest(sources: list[Source]) -> str:
    """A hash of the content of all files, for ``RawData.source_digest``."""
    return digest(sources)


@dataclass
class RawImpressions:
    """The tables of a log of impressions, with raw ids.

    Attributes:
        impressions: a row an impression, in the order of the files. ``impression_id`` (string, not always distinct),
            ``user_id`` (string), ``candidates`` (list of string: item ids in the order in which they were shown, with
            repeats); and optionally ``timestamp`` (int64, seconds since 1970), ``history`` (list of string, oldest
            first; absent: the clicks of the user's earlier impressions), ``labels`` (list of int64, 1 or 0, as long as
            ``candidates``; null where the impression is unlabelled), ``positions`` (list of int64, from 1),
            ``propensities`` and ``dwell`` (lists of float64), ``feedback`` (string: what the user wrote), ``part``
            (string: ``train``, ``validation``, ``test`` or ``predict``, where the files are divided already).
        items: ``item_id``, each once, and fields (strings, or lists of strings), and optionally ``published`` (int64,
            seconds since 1970, null where unknown); or None.
        users: ``user_id``, each once, and text fields, or None.
        report: what was read and what was left out.
        source_digest: a hash of the content of all files that were read.
    """

    impressions: Dataset
    items: Dataset | None = None
    users: Dataset | None = None
    report: ReadReport = field(default_factory=ReadReport)
    source_digest: str = ""

    def __post_init__(self) -> None:
        self.report.rows.setdefault("impressions", len(self.impressions))


class ImpressionReader(ABC):
    """Reads the files of a log of impressions; the counterpart of :class:`Reader`."""

    @abstractmethod
    def read(self) -> RawImpressions:
        """Reads everything.

        Raises:
            BadRowError: a row cannot be used and bad rows are not skipped.
            FileNotFoundError: a file is missing.
            ValueError: a file, a column or an option does not fit.
        """

    def paths(self) -> list[str]:
        """The files that ``read`` reads, members of archives as ``archive.zip/member``."""
        return []
