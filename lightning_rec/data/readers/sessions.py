"""Logs of single events, as Adressa's (Gulla et al., WI 2017), folded into sessions of clicks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.interactions import canonical_ids, check_times, parse_numbers
from lightning_rec.data.readers.alive import sample_alive
from lightning_rec.data.readers.base import ImpressionReader, RawImpressions
from lightning_rec.data.readers.columns import GUESSES, ColumnName, mapped, missing_column, plain_name
from lightning_rec.data.readers.entities import canonical_entities
from lightning_rec.data.readers.files import Format, read_table
from lightning_rec.data.readers.impression_rows import good_rows, lists
from lightning_rec.data.readers.sources import digest, find_sources
from lightning_rec.data.table import OnBadRows, ReadReport, Table, concat_tables, is_blank
from lightning_rec.data.timestamps import parse_times

_GUESSES: dict[str, tuple[str, ...]] = {
    "user_id": GUESSES["user_id"],
    "item_id": ("id", "articleid", "documentid", "newsid", "itemid", "canonicalurl", "url"),
    "timestamp": GUESSES["timestamp"],
    "event_id": ("eventid",),
    "title": ("title", "headline"),
    "category": ("category", "category1", "section"),
    "published": ("published", "publishtime", "publishedat"),
    "dwell": ("activetime", "dwell", "dwelltime", "readtime"),
    "session_start": ("sessionstart",),
    "session_stop": ("sessionstop",),
}
#: What of a log is about the article and not about the event.
_ARTICLE = ("title", "category", "published")


class EventSessions(ImpressionReader):
    """A log of events (JSON Lines, one event a line; CSV and Parquet too), folded into sessions.

    A session is a run of a user's events with gaps of at most ``gap_minutes``, or the run between the log's own flags.
    Each article that is read in a session gives one impression, at its first event there: the article is clicked, and
    ``negatives`` other articles are not. **These candidates are sampled; the log does not tell what was shown.** They
    are drawn uniformly, whatever their popularity, from the articles that were alive (read by anybody in the last
    ``alive_hours``, this moment included) and that the user reads nowhere in the log. Figures on them compare models on
    one log; they are no figures of a real page, and the report says so. Dwell times of the clicked article are summed
    over the session. There is no column ``history``: it is the user's earlier clicks.

    Events without an article (front pages) keep a session going and are counted. Items have the fields of the events
    (``title``, ``category``; ``a|b`` becomes ``category`` a and ``subcategory`` b) and ``published``: the log's own
    time of publication, else the first time that anybody read the article.

    Args:
        events: the log: a file, a folder, a glob, a member of a zip archive or a list of these; also compressed.
        gap_minutes: a longer pause between two events of a user starts a new session.
        boundaries: ``gap``, or ``flags``: the fields ``sessionStart`` and ``sessionStop`` (``gap_minutes`` unused).
        negatives: number of articles drawn for each click.
        alive_hours: how long an article stays alive after anybody read it.
        seed: of the draws; the same log and seed give the same candidates.
        columns: canonical name (``user_id``, ``item_id``, ``timestamp``, ``event_id``, ``title``, ``category``,
            ``published``, ``dwell``, ``session_start``, ``session_stop``) -> field of the log; None leaves one out.
        format: of the files; ``auto`` looks at each.
        encoding: of the files.
        on_bad_rows: ``error`` stops at a bad event with file, line and reason; ``skip`` counts, lists and leaves it
            out.
    """

    def __init__(
        self,
        events: str | list[str],
        gap_minutes: float = 30.0,
        boundaries: Literal["gap", "flags"] = "gap",
        negatives: int = 4,
        alive_hours: float = 36.0,
        seed: int = 0,
        columns: dict[str, str | int | list[str] | None] | None = None,
        format: Format = "auto",
        encoding: str = "utf-8",
        on_bad_rows: OnBadRows = "error",
    ) -> None:
        if gap_minutes <= 0 or alive_hours <= 0 or negatives < 0:
            raise ValueError("gap_minutes and alive_hours must be above 0, and negatives at least 0.")
        self.events = events
        self.gap_minutes = gap_minutes
        self.boundaries = boundaries
        self.negatives = negatives
        self.alive_hours = alive_hours
        self.seed = seed
        self.columns = columns or {}
        self.format = format
        self.encoding = encoding
        self.on_bad_rows = on_bad_rows

    def paths(self) -> list[str]:
        """The files that ``read`` reads."""
        return [str(source) for source in find_sources(self.events, "events")]

    def read(self) -> RawImpressions:
        """Reads the events and folds them."""
        report = ReadReport(self.on_bad_rows)
        sources = find_sources(self.events, "events")
        tables = [
            read_table(
                source,
                lambda names, source=source: choose_event_columns(names, self.columns, str(source)),  # type: ignore[misc]
                report,
                self.format,
                encoding=self.encoding,
            )
            for source in sources
        ]
        arrow, table = _events(concat_tables(tables), report)
        users = np.asarray(arrow["user_id"].combine_chunks().dictionary_encode().indices).astype(np.int64)
        seconds = np.asarray(arrow["timestamp"])
        order = np.lexsort([seconds, users])  # stable: file order among equal times
        sessions = np.empty(len(order), np.int64)
        sessions[order] = self._sessions(arrow, order, users, seconds)
        report.rows |= {"events": len(order), "sessions": int(sessions.max()) + 1}

        blank = is_blank(arrow["item_id"])
        if blank.all():
            raise ValueError(f"No event of {', '.join(table.files)} names an article. Map item_id with columns.")
        if blank.any():
            report.note(f"{int(blank.sum()):,} of {len(blank):,} events have no article (front pages and the like).")
        reads = np.flatnonzero(~blank)
        encoded = arrow["item_id"].take(pa.array(reads)).combine_chunks().dictionary_encode()
        codes = np.asarray(encoded.indices).astype(np.int64)
        items = _items(arrow.take(pa.array(reads)), table, reads, codes, report)
        impressions = self._impressions(arrow, reads, codes, users, seconds, sessions, encoded.dictionary, report)
        return RawImpressions(impressions, items, None, report, digest(sources))

    def _sessions(
        self, arrow: pa.Table, order: NDArray[np.int64], users: NDArray[np.int64], seconds: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """``(n,)`` session of each event of ``order`` (by user, then time), numbered from 0."""
        users, seconds = users[order], seconds[order]
        fresh = np.ones(len(order), bool)
        fresh[1:] = users[1:] != users[:-1]
        if self.boundaries == "gap":
            fresh[1:] |= np.diff(seconds) > self.gap_minutes * 60
            return np.cumsum(fresh) - 1
        flags = {}
        for name in ("session_start", "session_stop"):
            if name not in arrow.column_names:
                raise ValueError(
                    f"boundaries: flags needs the fields sessionStart and sessionStop, and the log has no {name}."
                    " Map it with columns, or set boundaries: gap."
                )
            texts = pc.utf8_lower(pc.fill_null(arrow[name], ""))
            flags[name] = np.asarray(pc.is_in(texts, pa.array(["true", "1", "yes"])))[order]
        fresh |= flags["session_start"]
        fresh[1:] |= flags["session_stop"][:-1]
        return np.cumsum(fresh) - 1

    def _impressions(
        self,
        arrow: pa.Table,
        reads: NDArray[np.int64],
        codes: NDArray[np.int64],
        users: NDArray[np.int64],
        seconds: NDArray[np.int64],
        sessions: NDArray[np.int64],
        ids: pa.Array,
        report: ReadReport,
    ) -> Dataset:
        users, seconds, sessions = users[reads], seconds[reads], sessions[reads]
        # One click an article and session, at its first event; in the order of time.
        order = np.lexsort([np.arange(len(reads)), seconds])
        pairs = sessions[order] * len(ids) + codes[order]
        _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
        rank = np.argsort(first)
        clicks = order[first[rank]]
        if len(clicks) < len(reads):
            report.note(f"{len(reads) - len(clicks):,} events repeat an article of their session; they are one click.")
        drawn = sample_alive(seconds, codes, users, clicks, self.negatives, int(self.alive_hours * 3600), self.seed)
        sizes = np.array([len(row) for row in drawn], np.int64)
        flat = np.fromiter((code for row in drawn for code in row), np.int64, int(sizes.sum()))
        labels = (flat == np.repeat(codes[clicks], sizes)).astype(np.int64)
        short = int((sizes <= self.negatives).sum())
        report.note(
            f"The candidates are sampled: each click stands beside {self.negatives} articles, drawn uniformly from"
            f" those read by anybody in the {self.alive_hours:g} hours before and not by this user. The log does not"
            " tell what was shown, so figures on these impressions hold for this sampling only."
        )
        if short:
            report.note(f"{short:,} of {len(clicks):,} clicks have fewer than {self.negatives} such articles.")
        n_of_session = np.empty(len(clicks), np.int64)
        by_session = np.argsort(sessions[clicks], kind="stable")
        own = sessions[clicks][by_session]
        n_of_session[by_session] = np.arange(len(own)) - np.searchsorted(own, own)
        names = [f"{session + 1}-{n + 1}" for session, n in zip(sessions[clicks], n_of_session, strict=True)]
        columns = {
            "impression_id": pa.array(names, pa.string()),
            "user_id": arrow["user_id"].take(pa.array(reads[clicks])),
            "timestamp": pa.array(seconds[clicks]),
            "candidates": lists(sizes, ids.take(pa.array(flat))),
            "labels": lists(sizes, pa.array(labels)),
        }
        if "dwell" in arrow.column_names:
            times = np.asarray(arrow["dwell"])[reads][order]
            known = ~np.isnan(times)
            total = np.bincount(inverse, np.where(known, times, 0.0))
            total[np.bincount(inverse, known) == 0] = np.nan
            spread = np.where(labels == 1, np.repeat(total[rank], sizes), np.nan)
            columns["dwell"] = lists(sizes, pa.array(spread))
        report.rows["impressions"] = len(clicks)
        return Dataset(pa.table(columns))


def choose_event_columns(names: list[str], mapping: Mapping[str, ColumnName | None], file: str) -> dict[str, str]:
    """Canonical field -> field of the log.

    Args:
        names: the fields of the log.
        mapping: canonical field -> field; None leaves one out.
        file: name of the file, for messages.

    Raises:
        ValueError: a mapped field, the user, the article or the time is missing.
    """
    chosen: dict[str, str] = {}
    unknown = [field for field in mapping if field not in _GUESSES]
    if unknown:
        raise ValueError(f"columns: there is no field `{unknown[0]}`; the fields are {', '.join(_GUESSES)}.")
    for field, wanted in mapping.items():
        column = mapped(field, wanted, names) if wanted is not None else None
        if column is not None:
            chosen[field] = column
        elif wanted is not None:
            raise missing_column(field, wanted, names, file, "columns")
    free = {plain_name(name): name for name in reversed(names) if name not in chosen.values()}
    for field, guesses in _GUESSES.items():
        column = None if field in mapping else next((free.pop(guess) for guess in guesses if guess in free), None)
        if column is not None:
            chosen[field] = column
    for field in ("user_id", "item_id", "timestamp"):
        if field not in chosen:
            raise missing_column(field, None, names, file, "columns")
    return chosen


def _events(table: Table, report: ReadReport) -> tuple[pa.Table, Table]:
    """The usable events, each once, and the table that tells where they stand."""
    columns = dict(table.columns)
    columns["user_id"] = canonical_ids(columns["user_id"], "user_id", report, False)
    columns["item_id"] = canonical_ids(columns["item_id"], "item_id", report, False)
    times = parse_times(columns["timestamp"])
    check_times(times, table)
    for text in times.notes:
        report.note(text)
    bad = dict(times.bad)
    for row in np.flatnonzero(is_blank(columns["user_id"])).tolist():
        bad.setdefault(row, "the user_id is empty")
    columns["timestamp"] = pa.chunked_array([pa.array(times.seconds)])
    if "dwell" in columns:
        dwell, problems = parse_numbers(columns["dwell"], "dwell time", (0.0, np.inf))
        for row, why in problems.items():
            bad.setdefault(row, why)
        columns["dwell"] = pa.chunked_array([pa.array(dwell)])
    kept = good_rows(columns, table, bad, report)
    repeated = pa.table({name: column for name, column in kept.columns.items() if name not in _ARTICLE}).to_pandas()
    keep = np.flatnonzero(~repeated.duplicated().to_numpy())
    report.n_duplicates += len(kept) - len(keep)
    runs = [int(np.searchsorted(keep, start)) for start in kept.starts]
    arrow = pa.table(kept.columns).take(pa.array(keep))
    return arrow, Table({}, kept.lines[keep], kept.files, runs, kept.units)


def _items(
    arrow: pa.Table, table: Table, reads: NDArray[np.int64], codes: NDArray[np.int64], report: ReadReport
) -> Dataset:
    """One row an article, in the order of first appearance; of each field, the first value that is not empty."""
    columns = {
        name: arrow[name] for name in ("item_id", "title", "category", "published") if name in arrow.column_names
    }
    quiet = ReadReport()
    items = canonical_entities(
        Table(columns, table.lines[reads], table.files, [0] * len(table.files), table.units), "item_id", "items", quiet
    )
    found = {name: items.data.column(name) for name in items.column_names if name != "published"}
    if "category" in found:
        texts = ["|".join(value) if isinstance(value, list) else value for value in found["category"].to_pylist()]
        found["category"] = pa.array([text.split("|")[0] for text in texts], pa.string())
        if any("|" in text for text in texts):
            found["subcategory"] = pa.array([text.rpartition("|")[2] if "|" in text else "" for text in texts])
    published = np.full(len(items), np.iinfo(np.int64).max)
    np.minimum.at(published, codes, np.asarray(arrow["timestamp"]))
    if "published" in columns:
        texts = items.data.column("published")
        times = parse_times(texts)
        usable = np.ones(len(items), bool)
        usable[list(times.bad)] = False
        published = np.where(usable, times.seconds, published)
        unreadable = int((~usable & ~is_blank(texts)).sum())
        if unreadable:
            report.note(
                f"The time of publication of {unreadable:,} articles cannot be read; their first read stands for it."
            )
    else:
        report.note("The log has no times of publication; the first read of an article stands for its own.")
    found["published"] = pa.array(published)
    report.rows["items"] = len(items)
    return Dataset(pa.table(found))
