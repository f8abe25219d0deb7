"""The format of MIND, the news data set of Microsoft (Wu et al., ACL 2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lightning_rec.data.interactions import canonical_ids
from lightning_rec.data.readers.base import ImpressionReader, RawImpressions
from lightning_rec.data.readers.delimited import read_delimited
from lightning_rec.data.readers.impression_rows import (
    clean_impressions,
    lists,
    note_unknown,
    row_counts,
    split_words,
)
from lightning_rec.data.readers.mind_files import PARTS, Folder, find_parts
from lightning_rec.data.readers.mind_news import read_news
from lightning_rec.data.readers.sources import digest
from lightning_rec.data.table import OnBadRows, ReadReport, Table, concat_tables, is_blank
from lightning_rec.data.timestamps import parse_times

_COLUMNS = ["impression_id", "user_id", "timestamp", "history", "impressions"]
_TIME = (
    r"^(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>[12]\d{3}) (?P<hour>\d{1,2}):(?P<minute>\d{2}):(?P<second>\d{2})"
    r" (?P<half>[AP]M)$"
)


class Mind(ImpressionReader):
    """MIND's ``behaviors.tsv`` and ``news.tsv``, and data of others in that format.

    ``path`` is one folder (or zip archive) with both files, or a folder that holds the parts: ``train`` (also
    ``MINDsmall_train``, ``MINDlarge_train.zip``, ...), ``dev`` or ``validation``, ``test``. Archives are read in place.
    Where the parts are known, the impressions have a column ``part``; a test part without labels, such as the
    official one, is ``predict``. Times are read as UTC. The news of several parts are merged by id.

    Items have ``title``, ``abstract``, ``category``, ``subcategory``, ``entities`` (Wikidata ids, those of the title
    first, each once) and ``entity_names`` (their labels, in the same order).

    Args:
        path: the folder or the archive.
        train: folder or archive of the training part, instead of ``path``.
        validation: likewise of the validation part.
        test: likewise of the test part.
        predict: likewise of impressions without labels, to be ranked only.
        on_bad_rows: ``error`` stops at a bad row with file, line and reason; ``skip`` counts, lists and leaves it out.
        encoding: of the files.
    """

    def __init__(
        self,
        path: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        on_bad_rows: OnBadRows = "error",
        encoding: str = "utf-8",
    ) -> None:
        self.path = path
        self.train = train
        self.validation = validation
        self.test = test
        self.predict = predict
        self.on_bad_rows = on_bad_rows
        self.encoding = encoding

    def paths(self) -> list[str]:
        """The files that ``read`` reads."""
        return [str(source) for folder in self._parts().values() for source in folder.sources]

    def read(self) -> RawImpressions:
        """Reads the news and the impressions of all parts."""
        report = ReadReport(self.on_bad_rows)
        parts = self._parts()
        items = read_news([folder.news for folder in parts.values() if folder.news], report, self.encoding)
        known = items.data.column("item_id").combine_chunks()
        read = [_Part(part, self._behaviors(folder, report)) for part, folder in parts.items()]
        for part in read:
            part.fill(known, report)
        table = concat_tables([part.table for part in read])
        names = list(read[0].columns)
        columns = {name: pa.chunked_array([c for part in read for c in part.columns[name].chunks]) for name in names}
        columns["user_id"] = canonical_ids(columns["user_id"], "user_id", report, False)
        starts = np.cumsum([0] + [len(part.table) for part in read])
        bad = {
            int(start) + row: why for start, part in zip(starts, read, strict=False) for row, why in part.bad.items()
        }
        if any(part.name for part in read):
            values = [pa.array(np.full(len(part.table), part.name, dtype=object), pa.string()) for part in read]
            columns["part"] = pa.chunked_array(values)
        impressions = clean_impressions(columns, table, bad, report)
        note_unknown({name: impressions.data.column(name) for name in ("candidates", "history")}, items, report)
        everything = [source for folder in parts.values() for source in folder.sources]
        return RawImpressions(impressions, items, None, report, digest(everything))

    def _parts(self) -> dict[str, Folder]:
        named = {part: getattr(self, part) for part in PARTS}
        return find_parts(self.path, {part: path for part, path in named.items() if path is not None})

    def _behaviors(self, folder: Folder, report: ReadReport) -> Table:
        keep: Callable[[list[str]], dict[str, str]] = lambda names: dict(zip(names, names, strict=True))  # noqa: E731
        return read_delimited(
            folder.behaviors, keep, report, delimiter="\t", encoding=self.encoding, quoted=False, names=_COLUMNS
        )


@dataclass
class _Part:
    """The impressions of one ``behaviors.tsv``.

    Attributes:
        name: ``train``, ``validation``, ``test``, ``predict``, or ``""`` where that is unknown.
        table: the rows as they were read.
        columns: the canonical columns, without ``part``.
        bad: row -> why it cannot be used.
    """

    name: str
    table: Table
    columns: dict[str, pa.ChunkedArray] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)

    def fill(self, known: pa.Array, report: ReadReport) -> None:
        """Makes the columns; ``known`` are the ids of all articles."""
        texts = self.table.columns
        seconds, self.bad = mind_times(texts["timestamp"], report)
        if len(self.table) > 1 and len(self.bad) > len(self.table) / 2:
            row = min(self.bad)
            raise ValueError(
                f"Most times of {self.table.files[0]} cannot be read ({len(self.bad):,} of {len(self.table):,} rows),"
                f" the first at {self.table.place(row)}: {self.bad[row]}. The columns of behaviors.tsv are impression"
                " id, user id, time, history and impressions, separated by tabs, without a header."
            )
        self.bad |= {int(row): "the user_id is empty" for row in np.flatnonzero(is_blank(texts["user_id"]))}
        history = [lists(*split_words(chunk)) for chunk in texts["history"].chunks]
        self.columns = {
            "impression_id": texts["impression_id"],
            "user_id": texts["user_id"],
            "timestamp": pa.chunked_array([pa.array(seconds)]),
            "history": pa.chunked_array(history, type=pa.list_(pa.string())),
        }
        self._candidates(known, report)

    def _candidates(self, known: pa.Array, report: ReadReport) -> None:
        words = [split_words(chunk) for chunk in self.table.columns["impressions"].chunks]
        ones = [np.asarray(pc.ends_with(tokens, "-1")) for _, tokens in words]
        zeros = [np.asarray(pc.ends_with(tokens, "-0")) for _, tokens in words]
        sizes = np.concatenate([lengths for lengths, _ in words])
        counts = [row_counts(one | zero, n) for one, zero, (n, _) in zip(ones, zeros, words, strict=True)]
        n_labels = np.concatenate(counts)
        labelled = (n_labels == sizes) & (sizes > 0)
        self.bad |= {int(row): "there is no candidate" for row in np.flatnonzero(sizes == 0)}
        # The rows that are not like most of the file are looked at one by one: an id may end in -0 or -1 itself.
        mainly = 2 * int(labelled.sum()) >= len(sizes) - len(self.bad)
        odd = np.flatnonzero((labelled != mainly) | ((n_labels > 0) & (n_labels < sizes)))
        ids = set(known.to_pylist()) if len(odd) else set()
        for row in odd.tolist():
            if sizes[row]:
                tokens = self.table.columns["impressions"][row].as_py().split()
                labelled[row], reason = judge(tokens, ids, mainly)
                if reason:
                    self.bad.setdefault(row, reason)

        start, candidates, labels = 0, [], []
        for (lengths, tokens), one in zip(words, ones, strict=True):
            mine = labelled[start : start + len(lengths)]
            each = np.repeat(mine, lengths)
            stems = pc.utf8_slice_codeunits(tokens, 0, -2)
            empty = np.repeat(np.arange(len(lengths)), lengths)[each & np.asarray(pc.equal(pc.binary_length(stems), 0))]
            for row in empty.tolist():
                self.bad.setdefault(start + row, "a candidate has a label and no id")
            candidates.append(lists(lengths, stems if each.all() else pc.if_else(pa.array(each), stems, tokens)))
            labels.append(lists(np.where(mine, lengths, 0), pa.array(one[each].astype(np.int64)), ~mine))
            start += len(lengths)
        self.columns["candidates"] = pa.chunked_array(candidates, type=pa.list_(pa.string()))
        self.columns["labels"] = pa.chunked_array(labels, type=pa.list_(pa.int64()))
        if not labelled.any():
            if self.name in ("train", "validation"):
                raise ValueError(
                    f"{self.table.files[0]} has no labels (N1-1 N2-0), so it cannot serve as the {self.name} part;"
                    " give it as predict."
                )
            if self.name != "predict":
                report.note(f"{self.table.files[0]} has no labels; its impressions can be ranked, but not tested.")
            self.name = "predict"


def judge(tokens: list[str], known: set[str], mainly_labelled: bool) -> tuple[bool, str]:
    """Whether a row that is not like most of its file is labelled, and what is wrong with it, if anything.

    Args:
        tokens: the candidates as they are written.
        known: the ids of all articles.
        mainly_labelled: whether most rows of the file are labelled.

    Returns:
        True when the candidates end in labels, and the reason why the row cannot be used (empty: it can).
    """
    whole = [token for token in tokens if token in known]
    stems = [token.rpartition("-") for token in tokens]
    marked = [stem for stem in stems if stem[2] in ("0", "1") and stem[1]]
    if len(whole) == len(tokens):  # every candidate is an article as it stands
        return False, ""
    if len(marked) == len(tokens):
        # In a file without labels, ids that end in -0 or -1 by chance: unless the articles know them without it.
        return mainly_labelled or any(stem[0] in known for stem in marked), ""
    for (stem, dash, label), token in zip(stems, tokens, strict=True):
        strange = dash and label not in ("0", "1") and token not in known
        if strange and (stem in known or (mainly_labelled and label.lstrip("-").replace(".", "", 1).isdigit())):
            return True, f"the candidate {token!r} has the label {label!r}, which is neither 0 nor 1"
    if not marked:
        return False, ""
    if not mainly_labelled and not any(stem[0] in known for stem in marked):
        return False, ""
    bare = next(token for token, stem in zip(tokens, stems, strict=True) if stem not in marked)
    return True, f"some candidates have a label and others, such as {bare!r}, have none"


def mind_times(column: pa.ChunkedArray, report: ReadReport) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Times like ``11/13/2019 9:05:58 AM``, month first; a column in another writing is told by ``parse_times``.

    Args:
        column: strings.
        report: takes notes on what was assumed.

    Returns:
        ``(n,)`` seconds since 1970, and row -> why its time cannot be used.
    """
    fields = pc.extract_regex(pc.ascii_trim_whitespace(column), pattern=_TIME).combine_chunks()
    matched = np.asarray(pc.is_valid(fields))
    if not matched.any():
        times = parse_times(column)
        for text in times.notes:
            report.note(text)
        return times.seconds, times.bad
    rows = np.flatnonzero(matched)
    found = fields.take(pa.array(rows))
    month, day, year, hour, minute, second = (
        np.asarray(found.field(name).cast(pa.int64())) for name in ("month", "day", "year", "hour", "minute", "second")
    )
    afternoon = np.asarray(pc.equal(found.field("half"), "PM"))
    good = (month >= 1) & (month <= 12) & (hour >= 1) & (hour <= 12) & (minute < 60) & (second < 60) & (day >= 1)
    months = ((year - 1970) * 12 + np.where(good, month, 1) - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    good &= days.astype("datetime64[M]") == months  # February has no 30th
    stamps = days.astype(np.int64) * 86400 + (hour % 12 + 12 * afternoon) * 3600 + minute * 60 + second
    seconds = np.zeros(len(column), np.int64)
    seconds[rows[good]] = stamps[good]
    wrong = np.ones(len(column), bool)
    wrong[rows[good]] = False
    bad = {}
    for row in np.flatnonzero(wrong).tolist():
        text = column[row].as_py()
        bad[row] = f"{text[:80]!r} is no time like '11/13/2019 9:05:58 AM'" if text else "the time is empty"
    return seconds, bad
