"""The generic reader: tables in any common format, told apart by looking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lightning_rec.data.interactions import canonical_interactions
from lightning_rec.data.readers.base import RawData, Reader
from lightning_rec.data.readers.columns import ColumnName, choose_entities, choose_interactions, mapped, missing_column
from lightning_rec.data.readers.delimited import Choose, read_delimited
from lightning_rec.data.readers.entities import canonical_entities
from lightning_rec.data.readers.sources import Source, digest, find_sources, read_head
from lightning_rec.data.readers.structured import read_json, read_parquet
from lightning_rec.data.table import OnBadRows, ReadReport, Table, concat_tables

Format = Literal["auto", "csv", "tsv", "jsonl", "parquet"]


class Files(Reader):
    """CSV, TSV or other delimited text, JSON Lines, a JSON array or Parquet; plain or in gz, bz2, xz or zip.

    A path is a file, a folder, a glob, a member of a zip archive (``archive.zip/member.csv``) or a list of these;
    several files are shards of one table, in sorted order. Columns are recognised by their usual names (``userId``,
    ``reviewerID``, ``email``; ``movieId``, ``asin``, ``article_id``; ``overall``, ``stars``; ``unixReviewTime``, ...)
    unless they are mapped. Item and user columns that are not mapped keep their own names.

    Args:
        interactions: the log: a user, an item, and optionally a rating, a timestamp, a review text and a position.
        items: the item table, or several that are merged by id: the first value of a field that is not empty wins.
        users: the user table, likewise.
        interaction_columns: canonical name (``user_id``, ``item_id``, ``rating``, ``timestamp``, ``review``,
            ``position``, or a name of your own) -> column of the file, or its number from 0 where there is no header.
        item_columns: field -> column; a list of names takes the first that a file has.
        user_columns: field -> column, likewise.
        format: of all files; ``auto`` looks at each.
        delimiter: of text tables; None looks for a comma, tab, semicolon, bar or double colon.
        header: whether text tables start with the names of their columns; None looks (a table whose columns are mapped
            by number has none).
        quoted: whether a double quote in a text table quotes a field; None: yes, except between tabs and ``::``.
        encoding: of text files.
        on_bad_rows: ``error`` stops at a bad row with file, line and reason; ``skip`` counts, lists and leaves it out.
        rating_range: lowest and highest rating; others are bad rows. None keeps every number.
        integer_ids: read ids like ``1430.0`` as ``1430``, in all tables.
    """

    def __init__(
        self,
        interactions: str | list[str],
        items: str | list[str] | None = None,
        users: str | list[str] | None = None,
        interaction_columns: dict[str, str | int | list[str]] | None = None,
        item_columns: dict[str, str | int | list[str]] | None = None,
        user_columns: dict[str, str | int | list[str]] | None = None,
        format: Format = "auto",
        delimiter: str | None = None,
        header: bool | None = None,
        quoted: bool | None = None,
        encoding: str = "utf-8",
        on_bad_rows: OnBadRows = "error",
        rating_range: tuple[float, float] | None = None,
        integer_ids: bool = False,
    ) -> None:
        self.interactions = interactions
        self.items = items
        self.users = users
        self.interaction_columns = interaction_columns or {}
        self.item_columns = item_columns or {}
        self.user_columns = user_columns or {}
        self.format = format
        self.delimiter = delimiter
        self.header = header
        self.quoted = quoted
        self.encoding = encoding
        self.on_bad_rows = on_bad_rows
        self.rating_range = rating_range
        self.integer_ids = integer_ids

    def paths(self) -> list[str]:
        """The files that ``read`` reads."""
        return [str(source) for sources in self._sources().values() for source in sources]

    def read(self) -> RawData:
        """Reads all tables."""
        report = ReadReport(self.on_bad_rows)
        sources = self._sources()
        used: dict[Source, dict[str, str]] = {}
        tables = []
        for source in sources["interactions"]:

            def choose(names: list[str], source: Source = source) -> dict[str, str]:
                used[source] = choose_interactions(names, self.interaction_columns, str(source))
                return used[source]

            tables.append(self._table(source, choose, report, self.interaction_columns))
        chosen = next(iter(used.values()), {})
        report.note("Interactions: " + ", ".join(f"{field} from `{column}`" for field, column in chosen.items()) + ".")
        interactions = canonical_interactions(concat_tables(tables), report, self.rating_range, self.integer_ids)

        found = {}
        for kind, key, mapping in (("items", "item_id", self.item_columns), ("users", "user_id", self.user_columns)):
            if sources[kind]:
                table = self.entity_table(sources[kind], key, mapping, f"{key[:4]}_columns", used, report)
                found[kind] = canonical_entities(table, key, kind, report, self.integer_ids)
        everything = [source for group in sources.values() for source in group]
        return RawData(interactions, found.get("items"), found.get("users"), report, digest(everything))

    def _sources(self) -> dict[str, list[Source]]:
        places = {"interactions": self.interactions, "items": self.items, "users": self.users}
        return {kind: find_sources(paths, kind) if paths is not None else [] for kind, paths in places.items()}

    def entity_table(
        self,
        sources: list[Source],
        key: str,
        mapping: Mapping[str, ColumnName],
        option: str,
        used: Mapping[Source, Mapping[str, str]],
        report: ReadReport,
    ) -> Table:
        """An item or user table as it stands in its files, with the options of this reader.

        Args:
            sources: the files.
            key: ``item_id`` or ``user_id``.
            mapping: field -> column.
            option: name of the mapping's option, for messages.
            used: columns of the log, where a file serves as both: they are no fields.
            report: takes the bad rows.
        """
        names_seen: dict[str, None] = {}
        tables = []
        for source in sources:

            def choose(names: list[str], source: Source = source) -> dict[str, str]:
                names_seen.update(dict.fromkeys(names))
                # Where the log itself serves as a table, its users, times and ratings are no fields of an item.
                drop = list(used.get(source, {}).values())
                return choose_entities(names, mapping, key, str(source), option, drop)

            tables.append(self._table(source, choose, report, mapping))
        for field, wanted in mapping.items():
            if mapped(field, wanted, list(names_seen)) is None:
                raise missing_column(field, wanted, list(names_seen), ", ".join(map(str, sources)), option)
        return concat_tables(tables)

    def _table(self, source: Source, choose: Choose, report: ReadReport, mapping: Mapping[str, ColumnName]) -> Table:
        header = self.header
        if header is None and any(isinstance(column, int) for column in mapping.values()):
            header = False
        return read_table(source, choose, report, self.format, self.delimiter, header, self.encoding, self.quoted)


def read_table(
    source: Source,
    choose: Choose,
    report: ReadReport,
    format: Format = "auto",
    delimiter: str | None = None,
    header: bool | None = None,
    encoding: str = "utf-8",
    quoted: bool | None = None,
) -> Table:
    """Reads one file in any format; the arguments are those of ``Files`` and ``read_delimited``."""
    if format == "auto":
        format = find_format(source)
    if format == "parquet":
        return read_parquet(source, choose)
    if format == "jsonl":
        return read_json(source, choose, report, encoding)
    if format == "tsv" and delimiter is None:
        delimiter = "\t"
    return read_delimited(source, choose, report, delimiter, header, encoding, quoted)


def find_format(source: Source) -> Format:
    """The format of a file: Parquet by its first bytes, JSON and others by name, else JSON by its first character."""
    head = read_head(source, 4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    if source.name.endswith((".json", ".jsonl", ".ndjson")):
        return "jsonl"
    if source.name.endswith((".csv", ".tsv", ".inter", ".item", ".user")):
        return "csv"
    return "jsonl" if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[") else "csv"
