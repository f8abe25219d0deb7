"""The items: raw id <-> row, text, attributes."""

from __future__ import annotations

import difflib
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from lightning_rec.data.batch import CatalogueView
from lightning_rec.data.catalogue_fields import NO_TEXT, Fields
from lightning_rec.data.cleaning import DEFAULT_CLEANING, did_you_mean, make_cleaner
from lightning_rec.data.text import TITLE_FIELDS, Template, field_text, title_text

_EXAMPLES = 5


def encode_ids(ids: Any) -> tuple[np.ndarray, list[str]]:
    """Numbers raw ids in the order of first appearance.

    Args:
        ids: strings: a list, a numpy or pyarrow array, or a column of a data set.

    Returns:
        ``(n,)`` int64 codes from 0, and the distinct ids: ``distinct[codes[i]] == ids[i]``.
    """
    encoded = _as_arrow(ids).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _as_arrow(ids: Any) -> pa.Array:
    """One pyarrow array of strings, so that millions of ids never pass through a Python loop."""
    if not isinstance(ids, pa.Array | pa.ChunkedArray):
        if not isinstance(ids, list | np.ndarray):
            ids = list(ids[:]) if hasattr(ids, "__getitem__") else list(ids)
        try:
            ids = pa.array(ids, type=pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"Ids are strings, since '001' and '1' differ; read them as text ({error}).") from None
    if isinstance(ids, pa.ChunkedArray):
        # Cast first: 32-bit offsets overflow when the chunks of a long column are joined.
        chunks = [chunk.cast(pa.large_string()) if pa.types.is_string(chunk.type) else chunk for chunk in ids.chunks]
        ids = pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise ValueError(f"Ids are strings, since '001' and '1' differ; here they are of type {ids.type}.")
    if ids.null_count:
        first = int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"An id is missing: {ids.null_count} of {len(ids)} ids are null, the first in row {first}.")
    return ids


class Catalogue:
    """The items of a run, one row each.

    Row 0 is padding. The rows of the item table follow in its order, then items that only interactions name.

    Args:
        ids: raw id of each row; ``ids[0] == ""``, the rest distinct and not empty.
        texts: text of each row; ``texts[0] == ""``.
        table: the item table, whose row ``i`` is catalogue row ``i + 1``; it may be shorter than the catalogue.
        report: what was counted while the catalogue was built, see ``Catalogue.build``.
        cleaning: names of the cleaning steps for the fields that towers read.

    Raises:
        ValueError: lengths that do not fit, a missing padding row, an empty or repeated id.
    """

    def __init__(
        self,
        ids: list[str],
        texts: list[str],
        table: Dataset | None = None,
        report: dict[str, int] | None = None,
        cleaning: Sequence[str] = DEFAULT_CLEANING,
    ) -> None:
        if not ids or ids[0] != "" or not texts or texts[0] != "":
            raise ValueError("Row 0 of a catalogue is padding: its id and its text are empty strings.")
        if len(ids) != len(texts):
            raise ValueError(f"A catalogue has one text a row; here are {len(ids)} ids and {len(texts)} texts.")
        if table is not None and len(table) > len(ids) - 1:
            raise ValueError(f"The item table has {len(table)} rows, the catalogue only {len(ids) - 1} items.")
        self.ids = ids
        self.texts = texts
        self.table = table
        self.cleaning = tuple(cleaning)
        self._rows = {id_: row for row, id_ in enumerate(ids)}
        if len(self._rows) != len(ids):
            raise ValueError("The ids of a catalogue are distinct and not empty; here some are repeated or empty.")
        del self._rows[""]
        #: Counts: ``items``, ``duplicate_items``, ``unknown_items``, ``unknown_interactions``, ``added_items``,
        #: ``untouched_items``, ``empty_texts``. Those that were not looked at are absent.
        self.report: dict[str, int] = {"items": len(ids) - 1} | (report or {})
        self.report["empty_texts"] = self.empty_texts
        #: A few raw ids of each kind that the report counts, for messages.
        self.examples: dict[str, list[str]] = {}

    @classmethod
    def build(
        cls,
        items: Dataset | None,
        interaction_item_ids: Any,
        template: Template | str | None = None,
        cleaning: Sequence[str] = DEFAULT_CLEANING,
        unknown_items: Literal["drop", "add"] = "drop",
        optional_fields: bool = False,
    ) -> Catalogue:
        """Builds the catalogue from the item table and the ids that interactions name.

        Args:
            items: the item table with a string column ``item_id``; of rows with the same id the first is kept and
                the others are counted (``duplicate_items``). None: the items are those that interactions name, in
                the order of first appearance, with empty texts.
            interaction_item_ids: the item id of every interaction, in any order and with repeats (a list, an array
                or a column); may be empty.
            template: makes the text of a row from its fields. None joins all fields in the order of the table.
            cleaning: names of the cleaning steps applied to each field, see ``text.CLEANING_STEPS``.
            unknown_items: what becomes of an item that interactions name and the table does not have: ``drop``
                leaves it out (``rows`` gives 0 for it), ``add`` gives it a row with an empty text. Both are counted.
            optional_fields: a field of the template that the table does not have is missing in every row, instead of
                an error: for a domain's own template, which names more than every data set has.

        Raises:
            ValueError: no column ``item_id``, ids that are not strings or are empty, an unknown field in the
                template, an unknown cleaning step or option.
        """
        if unknown_items not in ("drop", "add"):
            raise ValueError(f"unknown_items is 'drop' or 'add', not {unknown_items!r}.")
        cleaner = make_cleaner(cleaning)
        codes, touched = encode_ids(interaction_item_ids)
        if "" in touched:
            row = int(np.flatnonzero(codes == touched.index(""))[0])
            raise ValueError(f"Interaction {row} has an empty item id.")
        if items is None:
            catalogue = cls(["", *touched], [""] * (len(touched) + 1))
            catalogue.report["untouched_items"] = 0
            return catalogue

        items, ids, duplicates = _distinct_items(items)
        texts = _render(items, template, cleaner, optional_fields)
        known = set(ids)
        unknown = [position for position, id_ in enumerate(touched) if id_ not in known]
        counts = np.bincount(codes, minlength=len(touched))
        report = {
            "duplicate_items": len(duplicates),
            "unknown_items": len(unknown),
            "unknown_interactions": int(counts[unknown].sum()) if unknown else 0,
            "added_items": len(unknown) if unknown_items == "add" else 0,
            "untouched_items": len(ids) - (len(touched) - len(unknown)),
        }
        added = [touched[position] for position in unknown] if unknown_items == "add" else []
        catalogue = cls(["", *ids, *added], ["", *texts, *([""] * len(added))], items, report, cleaning)
        catalogue.examples = {
            "duplicate_items": duplicates[:_EXAMPLES],
            "unknown_items": [touched[position] for position in unknown[:_EXAMPLES]],
        }
        return catalogue

    def __len__(self) -> int:
        """Number of rows, padding included."""
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Catalogue({len(self) - 1} items)"

    def __contains__(self, id_: object) -> bool:
        return id_ in self._rows

    @property
    def empty_texts(self) -> int:
        """Number of items whose whole text is empty."""
        return self.texts.count("") - 1

    def row(self, id_: object) -> int:
        """The row of a raw id.

        Raises:
            ValueError: no item has this id; the message names ids that look like it.
        """
        row = self._rows.get(id_) if isinstance(id_, str) else None
        if row is None:
            raise ValueError(f"The catalogue has no item with the id {id_!r}.{self._near(id_)}")
        return row

    def _near(self, id_: object) -> str:
        if not isinstance(id_, str):
            text = f" as in {str(id_)!r}" if str(id_) in self._rows else ""
            return f" Ids are strings{text}; this one is of type {type(id_).__name__}."
        forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
        for form in forms:
            if unicodedata.normalize(form, id_) in self._rows:
                return f" It has the same letters in another Unicode normal form ({form})."
        if id_.strip() in self._rows:
            return f" It has {id_.strip()!r}, without the white space."
        near = difflib.get_close_matches(id_, self.ids[1:50_001], n=3, cutoff=0.7)
        return f" Ids that look like it: {', '.join(map(repr, near))}." if near else ""

    def rows(self, ids: Any) -> np.ndarray:
        """The rows of many raw ids.

        Args:
            ids: strings: a list, an array or a column of a data set, with repeats.

        Returns:
            ``(n,)`` int64 rows, 0 where no item has the id.
        """
        codes, distinct = encode_ids(ids)
        table = np.fromiter((self._rows.get(id_, 0) for id_ in distinct), np.int64, len(distinct))
        return table[codes]

    @cached_property
    def _titles(self) -> list[list[Any]]:
        names = self.table.column_names if self.table is not None else []
        return [self.attribute(name) for name in TITLE_FIELDS if name in names]

    def title(self, row: int) -> str:
        """What a language model reads for a row in a user's text, cleaned by the steps of this catalogue.

        Its title or name, else its text cut at 80 characters, else ``""``; what a person reads is ``display``.
        """
        return title_text((column[row] for column in self._titles), self.texts[row], make_cleaner(self.cleaning))

    def display(self, row: int) -> str:
        """What a person reads for a row: its title or name, else its text cut at 80 characters, else its raw id."""
        title = field_text(self._titles[0][row], make_cleaner()) if self._titles else ""
        if title:
            return title
        text = self.texts[row]
        return (text if len(text) <= 80 else text[:79].rstrip() + "…") or self.ids[row]

    def attribute(self, name: str) -> list[Any]:
        """A column of the item table, one value a catalogue row; None for padding and for items without a table row.

        Raises:
            ValueError: the item table has no such column.
        """
        columns = self.table.column_names if self.table is not None else []
        if self.table is None or name not in columns:
            listed = ", ".join(columns) or "none, since there is no item table"
            raise ValueError(
                f"The items have no field {name!r}.{did_you_mean(name, columns)} The fields are: {listed}."
            )
        values = _columns(self.table, [name])[name]
        return [None, *values, *([None] * (len(self) - 1 - len(values)))]

    @cached_property
    def digest(self) -> str:
        """A hash of texts and fields in their order, the same in every process."""
        texts = ids_hash(self.texts)
        return ids_hash([texts, self.fields.digest]) if self.fields else texts

    @cached_property
    def fields(self) -> Fields:
        """The fields of the item table, cleaned; each is read where it is asked for."""
        return Fields(self.table, len(self), self.cleaning)

    @cached_property
    def ids_digest(self) -> str:
        """A hash of the raw ids in their order, the same in every process."""
        return ids_hash(self.ids)

    def view(
        self,
        counts: np.ndarray | torch.Tensor | None = None,
        n_users: int = 1,
        rating_range: tuple[float, float] | None = None,
        users_digest: str = "",
        group_field: str | None = "category",
        recent_counts: np.ndarray | torch.Tensor | None = None,
    ) -> CatalogueView:
        """What towers may know of the data. Its ``fields`` are read and cleaned where they are asked for.

        Args:
            counts: ``(n_rows,)`` number of training interactions of each row.
            n_users: number of user rows, padding included.
            rating_range: lowest and highest rating.
            users_digest: a hash of the raw user ids, see ``ids_hash``.
            group_field: the field whose values are the groups of items; no groups where the items lack it.
            recent_counts: ``(n_rows,)`` training interactions of each row, the older the less.
        """
        tensor = None if counts is None else torch.as_tensor(counts)
        if tensor is not None and tensor.shape != (len(self),):
            raise ValueError(f"counts has the shape {tuple(tensor.shape)}; the catalogue has {len(self)} rows.")
        return CatalogueView(
            n_rows=len(self),
            n_users=n_users,
            texts=self.texts,
            counts=tensor,
            digest=self.digest,
            ids_digest=self.ids_digest,
            users_digest=users_digest,
            rating_range=rating_range,
            fields=self.fields,
            groups=self.groups(group_field),
            recent_counts=None if recent_counts is None else torch.as_tensor(recent_counts, dtype=torch.float32),
        )

    def groups(self, name: str | None) -> torch.Tensor | None:
        """``(n_rows,)`` int64 number of each row's value of a field, from 1 in the order of first appearance.

        Of a list the first value counts. Rows without a value have 0. None where there is no such field, or no value.
        """
        if name is None or name not in self.fields:
            return None
        numbers: dict[str, int] = {"": 0}
        values = (value if isinstance(value, str) else "".join(value[:1]) for value in self.fields[name])
        found = [numbers.setdefault(value, len(numbers)) for value in values]
        return torch.tensor(found, dtype=torch.int64) if len(numbers) > 1 else None


def _columns(table: Dataset, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns as Python lists, read through Arrow in one go."""
    arrow = table.select_columns(list(names)).with_format("arrow")[:]
    return {name: arrow.column(name).to_pylist() for name in names}


def _distinct_items(items: Dataset) -> tuple[Dataset, list[str], list[str]]:
    """The table without repeated ids, its ids, and the id of each row left out."""
    if "item_id" not in items.column_names:
        raise ValueError(f"The item table has no column 'item_id'; its columns are: {', '.join(items.column_names)}.")
    if items.features["item_id"].dtype not in ("string", "large_string"):
        raise ValueError(
            f"The ids of the item table are of type {items.features['item_id'].dtype}. Ids are strings, since '001' "
            "and '1' differ: read the column item_id as text."
        )
    ids = _columns(items, ["item_id"])["item_id"]
    first: dict[str, int] = {}
    for row, id_ in enumerate(ids):
        if not id_:
            raise ValueError(f"Row {row} of the item table has no item_id.")
        first.setdefault(id_, row)
    if len(first) == len(ids):
        return items, ids, []
    kept = list(first.values())
    left_out = set(range(len(ids))) - set(kept)
    return items.select(kept), list(first), [ids[row] for row in sorted(left_out)]


def _render(items: Dataset, template: Template | str | None, cleaner: Any, optional: bool) -> list[str]:
    fields = [name for name in items.column_names if name not in NO_TEXT]
    if template is None:
        if not fields:
            return [""] * len(items)
        template = Template(". ".join("{" + name + "}" for name in fields))
    elif isinstance(template, str):
        template = Template(template)
    if not optional:
        template.check(items.column_names)
    present = [name for name in template.fields if name in items.column_names]
    columns: dict[str, list[Any]] = {name: [None] * len(items) for name in template.fields}
    return template.render_columns(columns | _columns(items, present), cleaner)


def ids_hash(texts: Iterable[str]) -> str:
    """A sha256 over strings and their order, the same in every process."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
