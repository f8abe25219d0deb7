"""Data sets of the Hugging Face hub, by name, configuration, split and revision."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset

from lightning_rec.data.interactions import canonical_interactions
from lightning_rec.data.readers.base import RawData, Reader
from lightning_rec.data.readers.columns import ColumnName, choose_entities, choose_interactions
from lightning_rec.data.readers.entities import canonical_entities
from lightning_rec.data.table import OnBadRows, ReadReport, Table, arrow_text

_MARK = "read_as_text"


class HubDataset(Reader):
    """A data set of the hub, or a local folder of files that ``datasets.load_dataset`` reads.

    What was loaded once is read from the local cache, also without a network.

    Args:
        interactions: the data set that holds the log: ``owner/name``, or a local folder.
        name: its configuration, such as a category.
        split: its split; None joins all splits in their order.
        revision: its revision (a commit, a tag or a branch); name a commit to make a run repeatable.
        interaction_columns: canonical name (``user_id``, ``item_id``, ``rating``, ``timestamp``, ``review``) -> column;
            the usual names are recognised.
        items: the data set that holds the items, or None. It may be that of the interactions.
        items_name: its configuration.
        items_split: its split; None joins all splits.
        items_revision: its revision.
        item_columns: field -> column; other columns keep their names.
        on_bad_rows: ``error`` stops at a bad row with its number and reason; ``skip`` counts, lists and leaves it out.
        rating_range: lowest and highest rating; others are bad rows. None keeps every number.
        integer_ids: read ids like ``1430.0`` as ``1430``.
    """

    def __init__(
        self,
        interactions: str,
        name: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        interaction_columns: dict[str, str | int | list[str]] | None = None,
        items: str | None = None,
        items_name: str | None = None,
        items_split: str | None = None,
        items_revision: str | None = None,
        item_columns: dict[str, str | int | list[str]] | None = None,
        on_bad_rows: OnBadRows = "error",
        rating_range: tuple[float, float] | None = None,
        integer_ids: bool = False,
    ) -> None:
        self.interactions = interactions
        self.name = name
        self.split = split
        self.revision = revision
        self.interaction_columns: Mapping[str, ColumnName] = interaction_columns or {}
        self.items = items
        self.items_name = items_name
        self.items_split = items_split
        self.items_revision = items_revision
        self.item_columns: Mapping[str, ColumnName] = item_columns or {}
        self.on_bad_rows = on_bad_rows
        self.rating_range = rating_range
        self.integer_ids = integer_ids

    def paths(self) -> list[str]:
        """The names of the data sets."""
        return [self.interactions] + ([self.items] if self.items is not None else [])

    def read(self) -> RawData:
        """Loads the data sets and reads their tables."""
        report = ReadReport(self.on_bad_rows)
        log = _load(self.interactions, self.name, self.split, self.revision, report)
        chosen = choose_interactions(log.column_names, self.interaction_columns, self.interactions)
        table = _table(log, chosen, self.interactions)
        interactions = canonical_interactions(table, report, self.rating_range, self.integer_ids)
        items, fingerprint = None, str(log._fingerprint)
        if self.items is not None:
            catalogue = _load(self.items, self.items_name, self.items_split, self.items_revision, report)
            drop = list(chosen.values()) if self.items == self.interactions else []
            fields = choose_entities(
                catalogue.column_names, self.item_columns, "item_id", self.items, "item_columns", drop
            )
            table = _table(catalogue, fields, self.items)
            items = canonical_entities(table, "item_id", "items", report, self.integer_ids)
            fingerprint += str(catalogue._fingerprint)
        return RawData(interactions, items, None, report, fingerprint)


def _load(path: str, name: str | None, split: str | None, revision: str | None, report: ReadReport) -> Dataset:
    try:
        found = _join(load_dataset(path, name=name, split=split, revision=revision))
    except (ConnectionError, FileNotFoundError) as error:
        if Path(path).is_dir():
            raise ValueError(f"The folder {path} holds no file that datasets.load_dataset reads: {error}") from error
        raise FileNotFoundError(
            f"The data set {path} (configuration {name}, revision {revision or 'newest'}) is not in the local cache and"
            f" the hub does not have it or cannot be reached: {error}. Check the name, or load it once with a network:"
            f" datasets.load_dataset({path!r}, {name!r})."
        ) from error
    if found.builder_name != "csv":
        return found
    # The CSV loader guesses types, which makes 1 of 001 and nothing of `null`: read again as text.
    text = Features({column: Value("string") for column in found.column_names})
    options: dict[str, Any] = {"features": text, "keep_default_na": False, "na_filter": False}
    try:
        as_text = _join(load_dataset(path, name=name, split=split, revision=revision, **options))
        _mark(as_text)
        return as_text
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        marked = _marked(found)
        if marked is not None:
            return marked
        report.note(
            f"{path} could not be read again as text ({error}), so that its ids and titles are as the CSV loader"
            " guessed them: 001 may have become 1, and a title like `null` may be missing."
        )
        return found


def _mark(as_text: Dataset) -> None:
    """Marks the cached copy: without a network the library finds no copy by the options that it was loaded with."""
    for folder in {Path(file["filename"]).parent for file in as_text.cache_files}:
        with contextlib.suppress(OSError):  # a cache that others own can be read only
            (folder / _MARK).touch()


def _marked(found: Dataset) -> Dataset | None:
    """The same rows of the same revision as text, where they were cached before, or None."""
    parts = []
    for file in found.cache_files:
        guessed = Path(file["filename"])
        version, name, home = guessed.parents[1], guessed.parents[2], guessed.parents[3]  # home/name/version/revision
        marks = sorted(home.glob(f"{name.name}-*/{version.name}/{guessed.parent.name}/{_MARK}"))
        copies = [mark.with_name(guessed.name) for mark in marks if mark.with_name(guessed.name).is_file()]
        if not copies:
            return None
        parts.append(Dataset.from_file(str(copies[0])))
    # a part of a split, such as train[:10%], lies in the files of the whole
    return concatenate_datasets(parts) if parts and sum(map(len, parts)) == len(found) else None


def _join(found: Any) -> Dataset:
    return concatenate_datasets(list(found.values())) if isinstance(found, DatasetDict) else found


def _table(dataset: Dataset, chosen: Mapping[str, str], file: str) -> Table:
    arrow = dataset.with_format("arrow").select_columns(list(dict.fromkeys(chosen.values())))[:]
    columns = {field: arrow_text(arrow[column]) for field, column in chosen.items()}
    return Table(columns, np.arange(1, arrow.num_rows + 1), [file], [0], ["row"])
