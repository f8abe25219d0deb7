"""MIND's table of articles."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from lightning_rec.data.readers.delimited import read_delimited
from lightning_rec.data.readers.entities import canonical_entities
from lightning_rec.data.readers.sources import Source, read_head
from lightning_rec.data.table import ReadReport, Table, concat_tables, is_blank, keep_rows

_COLUMNS = ["item_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"]
_TEXTS = ("title", "abstract", "category", "subcategory")
_ENTITIES = ("title_entities", "abstract_entities")


def read_news(sources: Sequence[Source], report: ReadReport, encoding: str = "utf-8") -> Dataset:
    """The articles of several parts, each id once.

    Args:
        sources: the files ``news.tsv``; of an id in several rows, the first row is kept.
        report: takes bad rows, and a note on how many later rows of an id differ from the first.
        encoding: of the files.

    Returns:
        ``item_id``, ``title``, ``abstract``, ``category``, ``subcategory`` (string), ``entities`` (Wikidata ids) and
        ``entity_names`` (lists of strings of one length).
    """
    table = concat_tables([_read(source, report, encoding) for source in sources])
    for name in (*_TEXTS, *_ENTITIES):
        if name in table.columns:
            table.columns[name] = pc.fill_null(table.columns[name], "")
        else:  # files that follow the format may end earlier
            table.columns[name] = pa.chunked_array([pa.array([""] * len(table), pa.string())])
    blank = is_blank(table.columns["item_id"])
    for row in np.flatnonzero(blank).tolist():
        file, line, unit = table.where(row)
        report.bad_row(file, line, "the article's id is empty", unit)
    table = _first_rows(keep_rows(table, ~blank), report)

    ids, names, bad = _entities(table)
    for row in sorted(bad):
        file, line, unit = table.where(row)
        report.bad_row(file, line, bad[row], unit)
    for name in _ENTITIES:
        del table.columns[name]
    table.columns["entities"] = pa.chunked_array([pa.array(ids, pa.list_(pa.string()))])
    table.columns["entity_names"] = pa.chunked_array([pa.array(names, pa.list_(pa.string()))])
    keep = np.ones(len(table), bool)
    keep[list(bad)] = False
    items = canonical_entities(keep_rows(table, keep), "item_id", "items", report)
    return items.select_columns(["item_id", *_TEXTS, "entities", "entity_names"])


def _read(source: Source, report: ReadReport, encoding: str) -> Table:
    lines = [line for line in read_head(source).split(b"\n")[:100] if line.strip()]
    width = Counter(line.count(b"\t") + 1 for line in lines[: max(1, len(lines) - 1)]).most_common(1)
    n = width[0][0] if width else len(_COLUMNS)
    if n < 4:
        raise ValueError(
            f"{source} has {n} columns separated by tabs; news.tsv has id, category, subcategory, title, abstract, url,"
            " title entities and abstract entities, without a header."
        )
    names = _COLUMNS[:n] + [str(index) for index in range(len(_COLUMNS), n)]
    kept = {name: name for name in names if name in ("item_id", *_TEXTS, *_ENTITIES)}
    return read_delimited(source, lambda _: kept, report, delimiter="\t", encoding=encoding, quoted=False, names=names)


def _first_rows(table: Table, report: ReadReport) -> Table:
    codes = np.asarray(table.columns["item_id"].combine_chunks().dictionary_encode().indices)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    keep = np.zeros(len(table), bool)
    keep[first] = True
    if keep.all():
        return table
    later = np.flatnonzero(~keep)
    earlier = first[inverse[later]]
    differs = np.zeros(len(later), bool)
    for name in (*_TEXTS, *_ENTITIES):
        column = table.columns[name].combine_chunks()
        differs |= np.asarray(pc.not_equal(column.take(pa.array(later)), column.take(pa.array(earlier))))
    if differs.any():
        report.note(
            f"{int(differs.sum()):,} rows of news.tsv give an article again with another text (the first at"
            f" {table.place(int(later[differs][0]))}); the first row of each article was taken."
        )
    return keep_rows(table, keep)


def _entities(table: Table) -> tuple[list[list[str]], list[list[str]], dict[int, str]]:
    """Ids and labels of the entities of each article, and row -> why they cannot be read."""
    ids: list[list[str]] = []
    names: list[list[str]] = []
    bad: dict[int, str] = {}
    pairs = zip(*(table.columns[name].to_pylist() for name in _ENTITIES), strict=True)
    for row, texts in enumerate(pairs):
        found: dict[str, str] = {}
        for text, name in zip(texts, _ENTITIES, strict=True):
            if text in ("", "[]") or not text.strip():
                continue
            try:
                for entity in json.loads(text):
                    if entity.get("WikidataId"):
                        found.setdefault(str(entity["WikidataId"]), str(entity.get("Label") or ""))
            except (ValueError, TypeError, AttributeError) as error:
                bad[row] = f"the {name.replace('_', ' ')} are no JSON list of entities ({error})"
        ids.append(list(found))
        names.append(list(found.values()))
    return ids, names, bad
