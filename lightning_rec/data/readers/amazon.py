"""Amazon reviews and metadata, as JSON Lines of 2018 (Ni et al., EMNLP 2019) and of 2023 (Hou et al., 2024)."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.compute as pc

from lightning_rec.data.interactions import canonical_interactions
from lightning_rec.data.readers.base import RawData, Reader
from lightning_rec.data.readers.columns import choose_entities, choose_interactions
from lightning_rec.data.readers.entities import canonical_entities
from lightning_rec.data.readers.files import read_table
from lightning_rec.data.readers.sources import Source, digest, find_sources
from lightning_rec.data.table import OnBadRows, ReadReport, Table, concat_tables, is_blank

#: Field -> its columns, those of 2023 first: there ``parent_asin`` is the product that reviews and metadata share.
_ITEM_COLUMNS: dict[str, str | int | list[str]] = {
    "item_id": ["parent_asin", "asin"],
    "title": "title",
    "brand": ["brand", "store"],
    "categories": ["categories", "category", "main_category"],
    "description": "description",
    "features": ["features", "feature"],
}


class AmazonReviews(Reader):
    """Amazon reviews, with the metadata of the products.

    Interactions have ``rating``, ``timestamp`` and ``review`` (summary and text). Items have ``title``, ``brand``,
    ``categories``, ``description`` and ``features``. The fields of 2018 (``reviewerID``, ``asin``, ``overall``,
    ``unixReviewTime``, ``summary``, ``reviewText``) and of 2023 (``user_id``, ``parent_asin``, ``rating``,
    ``timestamp`` in milliseconds, ``title``, ``text``) are told apart by their names.

    Args:
        reviews: JSON Lines files, also compressed; a path, a glob or several.
        metadata: likewise; None leaves items without text.
        review_text: read the reviews' text; off saves memory where no user text needs it.
        encoding: of the files.
        on_bad_rows: ``error`` stops at a bad row with file, line and reason; ``skip`` counts, lists and leaves it out.
        rating_range: lowest and highest rating; others are bad rows. None keeps every number.
    """

    def __init__(
        self,
        reviews: str | list[str],
        metadata: str | list[str] | None = None,
        review_text: bool = True,
        encoding: str = "utf-8",
        on_bad_rows: OnBadRows = "error",
        rating_range: tuple[float, float] | None = None,
    ) -> None:
        self.reviews = reviews
        self.metadata = metadata
        self.review_text = review_text
        self.encoding = encoding
        self.on_bad_rows = on_bad_rows
        self.rating_range = rating_range

    def paths(self) -> list[str]:
        """The files that ``read`` reads."""
        return [str(source) for source in self._log() + self._products()]

    def read(self) -> RawData:
        """Reads the reviews and the metadata."""
        report = ReadReport(self.on_bad_rows)
        table = concat_tables([self._reviews(source, report) for source in self._log()])
        interactions = canonical_interactions(table, report, self.rating_range)
        items = None
        products = self._products()
        if products:
            tables = [self._metadata(source, report) for source in products]
            items = canonical_entities(concat_tables(tables), "item_id", "items", report)
        return RawData(interactions, items, None, report, digest(self._log() + products))

    def _log(self) -> list[Source]:
        return find_sources(self.reviews, "reviews")

    def _products(self) -> list[Source]:
        return find_sources(self.metadata, "metadata") if self.metadata is not None else []

    def _reviews(self, source: Source, report: ReadReport) -> Table:
        def choose(names: list[str]) -> dict[str, str]:
            chosen = choose_interactions(names, {}, str(source), "the fields of Amazon reviews")
            chosen = {
                field: chosen[field] for field in ("user_id", "item_id", "rating", "timestamp") if field in chosen
            }
            if self.review_text:
                parts = ("summary", "reviewText") if "reviewText" in names or "summary" in names else ("title", "text")
                chosen |= {f"_{part}": part for part in parts if part in names}
            return chosen

        table = read_table(source, choose, report, encoding=self.encoding)
        parts = [table.columns.pop(name) for name in list(table.columns) if name.startswith("_")]
        if parts:
            table.columns["review"] = _joined(parts)
        return table

    def _metadata(self, source: Source, report: ReadReport) -> Table:
        def choose(names: list[str]) -> dict[str, str]:
            chosen = choose_entities(names, _ITEM_COLUMNS, "item_id", str(source), "the fields of Amazon metadata")
            return {field: column for field, column in chosen.items() if field in _ITEM_COLUMNS}

        table = read_table(source, choose, report, encoding=self.encoding)
        if "categories" in table.columns and pa.types.is_list(table.columns["categories"].type):
            table.columns["categories"] = _flat(table.columns["categories"])
        return table


def _joined(parts: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """A summary and a text as one review."""
    if len(parts) == 1:
        return pc.fill_null(parts[0], "")
    summary, text = pc.fill_null(parts[0], ""), pc.fill_null(parts[1], "")
    ends = pc.match_substring_regex(pc.utf8_rtrim_whitespace(summary), r"[.!?…]$")
    glue = pc.if_else(ends, pa.scalar(" "), pa.scalar(". "))
    both = pc.binary_join_element_wise(pc.utf8_rtrim_whitespace(summary), text, glue)
    joined = pc.if_else(pa.chunked_array([pa.array(is_blank(text))]), summary, both)
    return pc.if_else(pa.chunked_array([pa.array(is_blank(summary))]), text, joined)


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Category paths of 2014 are lists in a list, kept as JSON text by the reader of the file: one flat list."""
    rows = []
    for values in column.to_pylist():
        flat: list[str] = []
        for value in values or []:
            flat += json.loads(value) if value.startswith('["') else [value]
        rows.append(list(dict.fromkeys(flat)))
    return pa.chunked_array([pa.array(rows, pa.list_(pa.string()))])
