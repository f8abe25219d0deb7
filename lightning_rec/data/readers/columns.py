"""Which column is which: the names that people give, and errors that help."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from lightning_rec.data.table import names_listed

#: What a column may be mapped from: its name, its number in a file without a header (from 0), or several of these, of
#: which a file's first is taken.
ColumnName = str | int | list[str]

#: Names that are tried when a column is not mapped, in order, written without case, spaces and underscores.
GUESSES: dict[str, tuple[str, ...]] = {
    "user_id": (
        "userid", "user", "uid", "reviewerid", "customerid", "customer", "visitorid", "memberid", "accountid",
        "clientid", "personid", "readerid", "viewerid", "subscriberid", "sessionid", "session", "useremail", "email",
        "username",
    ),
    "item_id": (
        "itemid", "item", "movieid", "movie", "filmid", "productid", "product", "parentasin", "asin", "sku",
        "articleid", "article", "newsid", "news", "videoid", "video", "contentid", "content", "documentid", "docid",
        "bookid", "isbn", "trackid", "songid", "gameid", "iid",
    ),
    "rating": ("rating", "ratings", "overall", "stars", "star", "starrating", "score"),
    "timestamp": (
        "timestamp", "time", "unixreviewtime", "datetime", "date", "ts", "eventtime", "createdat", "ratedat",
        "unixtime", "clicktime", "viewtime", "reviewtime",
    ),
    "review": ("review", "reviewtext", "reviewbody", "comment"),
    "position": ("position",),
}  # fmt: skip


def plain_name(name: str) -> str:
    """A column name without case, separators and the ``:type`` suffix of atomic files."""
    name = re.sub(r":(token|token_seq|float|float_seq)$", "", name)
    return re.sub(r"[^a-z0-9]", "", name.lower())


def guess(field: str, names: Sequence[str]) -> str | None:
    """The column that is most likely the canonical ``field``, or None."""
    plain = {plain_name(name): name for name in reversed(names)}
    candidates = GUESSES.get(field, (plain_name(field),))
    if field in ("user_id", "item_id"):
        candidates = (*candidates, *(("id",) if len(names) else ()))
    return next((plain[candidate] for candidate in candidates if candidate in plain), None)


def mapped(field: str, wanted: ColumnName, names: Sequence[str]) -> str | None:
    """The column that a mapping names in this file, or None when the file lacks it."""
    for name in wanted if isinstance(wanted, list) else [wanted]:
        if str(name) in names:
            return str(name)
        bare = [column for column in names if re.sub(r":(token|token_seq|float|float_seq)$", "", column) == name]
        if bare:
            return bare[0]
    return None


def missing_column(field: str, wanted: ColumnName | None, names: Sequence[str], file: str, option: str) -> ValueError:
    """The error for a column that a file lacks: the columns found, the nearest name and the option to set."""
    found = f"The columns are {names_listed(names)}." if names else "It has no columns."
    if len(names) == 1:
        found = f"Its one column is {names_listed(names)}; if that is several, set delimiter."
    if wanted is None:
        near = difflib.get_close_matches(plain_name(field), [plain_name(name) for name in names], n=1, cutoff=0.5)
        lead = f"{file}: no column looks like `{field}`."
        remedy = (
            f"Name it with {option}: {{{field}: <column>}}; without a header, set header: false and give its number."
        )
    else:
        text = wanted if isinstance(wanted, list) else [wanted]
        near = difflib.get_close_matches(plain_name(str(text[0])), [plain_name(name) for name in names], n=1)
        lead = f"{file}: {option} maps `{field}` to {names_listed(map(str, text))}, but the file has no such column."
        remedy = f"Correct {option}."
    likely = [name for name in names if near and plain_name(name) == near[0]]
    hint = f" Did you mean `{likely[0]}`?" if likely else ""
    return ValueError(f"{lead}{hint} {found} {remedy}")


def choose_interactions(
    names: Sequence[str], mapping: Mapping[str, ColumnName], file: str, option: str = "interaction_columns"
) -> dict[str, str]:
    """Canonical field -> column of the file, for interactions.

    Args:
        names: the columns of the file.
        mapping: canonical field (or a name of your own) -> column.
        file: name of the file, for messages.
        option: name of the mapping's option, for messages.

    Raises:
        ValueError: a mapped column, the user or the item is missing.
    """
    chosen: dict[str, str] = {}
    for field, wanted in mapping.items():
        column = mapped(field, wanted, names)
        if column is None:
            raise missing_column(field, wanted, names, file, option)
        chosen[field] = column
    free = [name for name in names if name not in chosen.values()]
    for field in ("user_id", "item_id", "rating", "timestamp", "review", "position"):
        if field in chosen:
            continue
        column = guess(field, free)
        if column is not None:
            chosen[field] = column
            free.remove(column)
        elif field in ("user_id", "item_id"):
            raise missing_column(field, None, names, file, option)
    return chosen


def choose_entities(
    names: Sequence[str], mapping: Mapping[str, ColumnName], key: str, file: str, option: str, drop: Sequence[str] = ()
) -> dict[str, str]:
    """Field -> column of the file, for an item or user table; columns that are not mapped keep their own names.

    Args:
        names: the columns of the file.
        mapping: field -> column. A field that this file lacks is left out (another file may have it).
        key: ``item_id`` or ``user_id``.
        file: name of the file, for messages.
        option: name of the mapping's option, for messages.
        drop: columns that are left out unless they are mapped.

    Raises:
        ValueError: the id column is missing.
    """
    chosen: dict[str, str] = {}
    column = mapped(key, mapping[key], names) if key in mapping else guess(key, names)
    if column is None:
        raise missing_column(key, mapping.get(key), names, file, option)
    chosen[key] = column
    for field, wanted in mapping.items():
        column = mapped(field, wanted, names)
        if field != key and column is not None:
            chosen[field] = column
    for name in names:
        field = re.sub(r":(token|token_seq|float|float_seq)$", "", name)
        if field and name not in chosen.values() and field not in chosen and name not in drop:
            chosen[field] = name
    return chosen
