"""The generic reader of impressions: a row an impression, or a row a candidate, in any common format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import pyarrow as pa
from datasets import Dataset

from lightning_rec.data.readers.base import ImpressionReader, RawImpressions
from lightning_rec.data.readers.cells import read_cells
from lightning_rec.data.readers.columns import GUESSES, ColumnName, mapped, missing_column, plain_name
from lightning_rec.data.readers.delimited import Choose
from lightning_rec.data.readers.entities import canonical_entities
from lightning_rec.data.readers.files import Files, Format
from lightning_rec.data.readers.impression_layouts import WIDE_LISTS, long_impressions, wide_impressions
from lightning_rec.data.readers.impression_rows import good_rows, note_unknown
from lightning_rec.data.readers.sources import Source, digest, find_sources
from lightning_rec.data.table import OnBadRows, ReadReport, Table, concat_tables, is_blank
from lightning_rec.data.timestamps import parse_times

Layout = Literal["auto", "wide", "long"]

_SHARED: dict[str, tuple[str, ...]] = {
    "impression_id": ("impressionid", "impression", "requestid", "pageviewid", "slateid", "listid"),
    "user_id": GUESSES["user_id"],
    "timestamp": (*GUESSES["timestamp"], "impressiontime", "requesttime", "servedat"),
    "feedback": ("feedback", "feedbacktext", "comment"),
    "part": ("part", "split"),
}  # fmt: skip
#: Layout -> canonical field -> names that are tried, written without case, spaces and underscores.
_GUESSES: dict[str, dict[str, tuple[str, ...]]] = {
    "wide": _SHARED | {
        "candidates": (
            "candidates", "candidateids", "shown", "shownitems", "inview", "articleidsinview", "slate", "items",
            "itemids",
        ),
        "labels": ("labels", "label", "clicks", "clickflags"),
        "clicked": ("clicked", "clickedids", "clickeditems", "clickeditemids", "articleidsclicked"),
        "history": ("history", "clickhistory", "userhistory", "historyids"),
        "positions": ("positions", "position", "ranks"),
        "propensities": ("propensities", "propensity"),
        "dwell": ("dwell", "dwelltimes", "dwelltime", "readtimes"),
    },
    "long": _SHARED | {
        "item_id": (*GUESSES["item_id"], "candidate", "candidateid"),
        "label": ("label", "labels", "clicked", "click", "isclick", "isclicked"),
        "position": ("position", "rank"),
        "propensity": ("propensity",),
        "dwell": ("dwell", "dwelltime", "readtime"),
    },
}  # fmt: skip
_REQUIRED = {"wide": ("user_id", "candidates"), "long": ("user_id", "item_id")}


class ImpressionFiles(ImpressionReader):
    """A table of impressions in JSON Lines, a JSON array, Parquet, CSV or TSV; plain or in gz, bz2, xz or zip.

    Two layouts. **wide**, a row an impression: ``user_id``, ``candidates``, and optionally ``impression_id``,
    ``timestamp``, ``labels`` (1 or 0 for each candidate) or ``clicked`` (the ids that were clicked), ``history``
    (oldest first), ``positions`` (from 1), ``propensities``, ``dwell`` (seconds), ``feedback`` (text) and ``part``
    (``train``, ``validation``, ``test`` or ``predict``). Lists are lists in JSON and Parquet, and words separated by
    spaces in text. **long**, a row a candidate: ``user_id``, ``item_id``, and optionally ``impression_id``,
    ``timestamp``, ``label``, ``position``, ``propensity``, ``dwell``, ``feedback`` and ``part``; the rows of one
    ``impression_id`` are one impression in the order of the file, at the time of its earliest row. Without
    ``impression_id``, the rows of one user at one time are.

    An impression whose labels (or clicked ids) are missing is unlabelled; where none of the candidates was clicked,
    ``clicked`` is an empty list (``[]`` in text). A path is a file, a folder, a glob, a member of a zip archive
    or a list of these; columns are recognised by their usual names unless they are mapped.

    Args:
        impressions: the log.
        items: the item table, or several that are merged by id. A field ``published`` is read as a time.
        users: the user table, likewise.
        columns: canonical name -> column of the log, or its number from 0 where there is no header; None leaves a
            column out that would be recognised.
        item_columns: field -> column of the item table.
        user_columns: field -> column of the user table.
        layout: ``wide``, ``long``, or ``auto``: wide where a column of candidates is found.
        format: of all files; ``auto`` looks at each.
        delimiter: of text tables; None looks.
        header: whether text tables start with the names of their columns; None looks.
        quoted: whether a double quote in a text table quotes a field; None: yes, except between tabs and ``::``.
        list_separator: between the values of a list in a text table; None: white space.
        encoding: of text files.
        on_bad_rows: ``error`` stops at a bad row with file, line and reason; ``skip`` counts, lists and leaves it out.
        integer_ids: read ids like ``1430.0`` as ``1430``, in all tables.
    """

    def __init__(
        self,
        impressions: str | list[str],
        items: str | list[str] | None = None,
        users: str | list[str] | None = None,
        columns: dict[str, str | int | list[str] | None] | None = None,
        item_columns: dict[str, str | int | list[str]] | None = None,
        user_columns: dict[str, str | int | list[str]] | None = None,
        layout: Layout = "auto",
        format: Format = "auto",
        delimiter: str | None = None,
        header: bool | None = None,
        quoted: bool | None = None,
        list_separator: str | None = None,
        encoding: str = "utf-8",
        on_bad_rows: OnBadRows = "error",
        integer_ids: bool = False,
    ) -> None:
        self.impressions = impressions
        self.items = items
        self.users = users
        self.columns = columns or {}
        self.item_columns = item_columns or {}
        self.user_columns = user_columns or {}
        self.layout = layout
        self.format = format
        self.delimiter = delimiter
        self.header = header
        self.quoted = quoted
        self.list_separator = list_separator
        self.encoding = encoding
        self.on_bad_rows = on_bad_rows
        self.integer_ids = integer_ids

    def paths(self) -> list[str]:
        """The files that ``read`` reads."""
        return [str(source) for sources in self._sources().values() for source in sources]

    def read(self) -> RawImpressions:
        """Reads all tables."""
        report = ReadReport(self.on_bad_rows)
        sources = self._sources()
        used: dict[Source, dict[str, str]] = {}
        layouts: dict[str, Source] = {}
        tables = []
        for source in sources["impressions"]:

            def choose(names: list[str], source: Source = source) -> dict[str, str]:
                layout = self._layout(names)
                layouts.setdefault(layout, source)
                used[source] = choose_columns(names, self.columns, layout, str(source))
                # In a long table a dwell time is one number, in a wide table a list.
                return {f"{field}_time" if (layout, field) == ("long", "dwell") else field: column
                        for field, column in used[source].items()}  # fmt: skip

            tables.append(self._cells(source, choose, report))
        if len(layouts) > 1:
            raise ValueError(
                f"{layouts['wide']} has a row an impression and {layouts['long']} a row a candidate; read them as two"
                " data sets, or set layout and columns."
            )
        first = next(iter(used.values()))
        report.note("Impressions: " + ", ".join(f"{field} from `{column}`" for field, column in first.items()) + ".")
        shape = wide_impressions if "wide" in layouts else long_impressions
        impressions = shape(concat_tables(tables), report, self.integer_ids)
        found = {kind: self._entities(kind, sources[kind], report) for kind in ("items", "users") if sources[kind]}
        if "items" in found:
            lists = {name: impressions.data.column(name) for name in ("candidates", "history")
                     if name in impressions.column_names}  # fmt: skip
            note_unknown(lists, found["items"], report)
        everything = [source for group in sources.values() for source in group]
        return RawImpressions(impressions, found.get("items"), found.get("users"), report, digest(everything))

    def _sources(self) -> dict[str, list[Source]]:
        places = {"impressions": self.impressions, "items": self.items, "users": self.users}
        return {kind: find_sources(paths, kind) if paths is not None else [] for kind, paths in places.items()}

    def _layout(self, names: Sequence[str]) -> str:
        if self.layout != "auto":
            return self.layout
        if {"candidates", "clicked", "labels"} & self.columns.keys():
            return "wide"
        if {"item_id", "label"} & self.columns.keys():
            return "long"
        plain = {plain_name(name) for name in names}
        wide = plain & set(_GUESSES["wide"]["candidates"])
        long = plain & set(_GUESSES["long"]["item_id"])
        return "long" if long and not wide else "wide"

    def _cells(self, source: Source, choose: Choose, report: ReadReport) -> Table:
        header = self.header
        if header is None and any(isinstance(column, int) for column in self.columns.values()):
            header = False
        return read_cells(
            source, choose, WIDE_LISTS, report, self.format, self.delimiter, header, self.encoding, self.quoted,
            self.list_separator,
        )  # fmt: skip

    def _entities(self, kind: str, sources: list[Source], report: ReadReport) -> Dataset:
        key, mapping = ("item_id", self.item_columns) if kind == "items" else ("user_id", self.user_columns)
        files = Files(
            self.impressions, format=self.format, delimiter=self.delimiter, header=self.header, quoted=self.quoted,
            encoding=self.encoding,
        )  # fmt: skip
        table = files.entity_table(sources, key, mapping, f"{key[:4]}_columns", {}, report)
        if kind != "items" or "published" not in table.columns:
            return canonical_entities(table, key, kind, report, self.integer_ids)
        times = parse_times(table.columns["published"])
        filled = ~is_blank(table.columns["published"])
        bad = {row: f"published: {why}" for row, why in times.bad.items() if filled[row]}
        items = canonical_entities(good_rows(table.columns, table, bad, report), key, kind, report, self.integer_ids)
        texts = items.data.column("published")
        seconds = parse_times(texts).seconds
        published = pa.array(seconds, mask=is_blank(texts))
        place = items.column_names.index("published")
        return Dataset(items.data.table.set_column(place, "published", published))


def choose_columns(
    names: Sequence[str], mapping: Mapping[str, ColumnName | None], layout: str, file: str
) -> dict[str, str]:
    """Canonical field -> column of the file.

    Args:
        names: the columns of the file.
        mapping: canonical field -> column; None leaves the field out.
        layout: ``wide`` or ``long``.
        file: name of the file, for messages.

    Raises:
        ValueError: a mapped column or a required one is missing, or a field is unknown.
    """
    guesses = _GUESSES[layout]
    unknown = [field for field in mapping if field not in guesses]
    if unknown:
        raise ValueError(
            f"columns: there is no field `{unknown[0]}` in the {layout} layout; the fields are {', '.join(guesses)}."
        )
    chosen: dict[str, str] = {}
    for field, wanted in mapping.items():
        if wanted is not None:
            column = mapped(field, wanted, names)
            if column is None:
                raise missing_column(field, wanted, names, file, "columns")
            chosen[field] = column
    free = {plain_name(name): name for name in reversed(names) if name not in chosen.values()}
    for field, guesses_of in guesses.items():
        if field in mapping or (field == "clicked" and "labels" in chosen):
            continue
        column = next((free.pop(guess) for guess in guesses_of if guess in free), None)
        if column is not None:
            chosen[field] = column
    for field in _REQUIRED[layout]:
        if field not in chosen:
            raise missing_column(field, None, names, file, "columns")
    return chosen
