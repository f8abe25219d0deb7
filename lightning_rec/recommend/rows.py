"""Requests, answers and explanations as rows of a file."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lightning_rec.recommend.types import Answer, Explanation, Request, RequestError, Words

if TYPE_CHECKING:
    from lightning_rec.recommend.recommender import Recommender
    from lightning_rec.recommend.sentences import Sentences

#: Fields of a request that say who asks; the others say what is wanted.
WHO = ("user", "history", "times", "text")
_NAMES = [part.name for part in fields(Request)]
_ITEM = pa.struct({"id": pa.string(), "score": pa.float64(), "text": pa.string()})
_REASON = pa.struct({"id": pa.string(), "text": pa.string(), "effect": pa.float64(), "place": pa.int64()})
_WORD = pa.struct({"text": pa.string(), "effect": pa.float64()})
_ERROR = pa.struct({"code": pa.string(), "message": pa.string()})
#: Columns of a file of answers.
ANSWERS = pa.schema(
    {
        "user": pa.string(),
        "items": pa.list_(_ITEM),
        "path": pa.string(),
        "unknown": pa.list_(pa.string()),
        "error": _ERROR,
    }
)
#: Columns of a file of explanations.
EXPLANATIONS = pa.schema(
    {
        "user": pa.string(),
        "item": pa.string(),
        "text": pa.string(),
        "score": pa.float64(),
        "reasons": pa.list_(_REASON),
        "words": pa.list_(_WORD),
        "sentence": pa.string(),
        "error": _ERROR,
    }
)


def wanted_by(request: Request) -> dict[str, Any]:
    """The fields of a request that say what is wanted, whoever asks."""
    return {name: getattr(request, name) for name in _NAMES if name not in WHO}


def answer_rows(recommender: Recommender, rows: Sequence[Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Answers rows of a file with one matrix product, in order; what is no request gets a row with an ``error``.

    Args:
        recommender: what answers.
        rows: each a line of JSON, or the fields of a :class:`Request`; None: a user whose id is missing.
        options: fields of requests that do not say them, such as ``{"k": 5}``.
    """
    asked: list[Request | dict[str, Any]] = []
    for row in rows:
        values: dict[str, Any] = {}
        try:
            values = _values(row)
            request = _request(values, options)
            recommender.check(request)
            asked.append(request)
        except ValueError as error:
            asked.append(_failed(error, values))
    good = [request for request in asked if isinstance(request, Request)]
    try:
        answers: list[Answer | RequestError] = list(recommender.recommend(good)) if good else []
    except RequestError:  # what only shows on the way, such as words where no tower reads text
        answers = [_alone(recommender, request) for request in good]
    found = iter(answers)
    out: list[dict[str, Any]] = []
    for asks in asked:
        if isinstance(asks, Request):
            answer = next(found)
            who = {"user": asks.user}
            out.append(_failed(answer, who) if isinstance(answer, RequestError) else answer_row(answer, asks))
        else:
            out.append(asks)
    return out


def answer_row(answer: Answer, request: Request) -> dict[str, Any]:
    """One answer as a row of a file."""
    row = _user(request.user) | {"items": [asdict(item) for item in answer.items], "path": answer.path}
    if answer.unknown:
        row["unknown"] = answer.unknown
    return row


def explanation_rows(
    recommender: Recommender, rows: Sequence[Any], words: Words = "none", sentences: Sentences | None = None
) -> list[dict[str, Any]]:
    """Explains rows of a file, in order; what cannot be explained gets a row with an ``error``.

    Args:
        recommender: what answers.
        rows: each a line of JSON, or the fields of a :class:`Request` and the ``item`` that is asked about.
        words: weigh the words of the item's text, see :func:`lightning_rec.recommend.explain.explain`.
        sentences: how it is said; None: in plain English.
    """
    from lightning_rec.recommend.explain import explain

    out = []
    for row in rows:
        values: dict[str, Any] = {}
        item: Any = None
        try:
            values = _values(row)
            item = values.pop("item", None)
            if not _is_text(item):
                raise ValueError("A row says with item, an id, which item is asked about.")
            request = _request(values, {})
            out.append(explanation_row(explain(recommender, request, item, words, sentences), request))
        except ValueError as error:
            out.append(
                _user(values.get("user"))
                | {"item": item if _is_text(item) else None, "text": None, "score": None}
                | {"reasons": [], "words": [], "sentence": None, "error": _told(error)}
            )
    return out


def explanation_row(explanation: Explanation, request: Request) -> dict[str, Any]:
    """One explanation as a row of a file."""
    return _user(request.user) | asdict(explanation)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a Parquet file as the fields of a request: nothing that is null, and maps as objects."""
    plain = {name: value for name, value in row.items() if value is not None}
    for name in ("where", "at_most"):
        if isinstance(plain.get(name), list | dict):  # a map comes as pairs, a struct with all of its fields
            plain[name] = {key: value for key, value in dict(plain[name]).items() if value is not None}
    return plain


def _alone(recommender: Recommender, request: Request) -> Answer | RequestError:
    try:
        return recommender.recommend(request)
    except RequestError as error:
        return error


def _user(user: Any) -> dict[str, Any]:
    return {"user": user} if _is_text(user) else {}


def _told(error: Exception) -> dict[str, str]:
    return {"code": error.code if isinstance(error, RequestError) else "bad_request", "message": str(error)}


def _failed(error: Exception, values: Mapping[str, Any]) -> dict[str, Any]:
    return _user(values.get("user")) | {"items": [], "path": None, "error": _told(error)}


def _values(row: Any) -> dict[str, Any]:
    """The fields of a row; one that is null says nothing."""
    if isinstance(row, str):
        try:
            row = json.loads(row.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"This is no JSON: {error}.") from error
    if row is None:
        raise ValueError("The id of the user is missing.")
    if not isinstance(row, dict):
        raise ValueError(f"A request is an object of fields, not {type(row).__name__}.")
    return {name: value for name, value in row.items() if value is not None}


def _request(values: Mapping[str, Any], options: Mapping[str, Any]) -> Request:
    for name, value in values.items():
        if name not in _KINDS:
            near = difflib.get_close_matches(name, _NAMES, n=1)
            raise ValueError(
                f"A request has no field {name!r}."
                + (f" Did you mean {near[0]!r}?" if near else f" The fields are: {', '.join(_NAMES)}.")
            )
        fits, kind = _KINDS[name]
        if not fits(value):
            raise ValueError(f"{name} is {kind}; here it is {repr(value)[:80]}.")
    return Request(**{**options, **values})


def _is_text(value: Any) -> bool:
    # half of a surrogate pair, which JSON can hold, could not be written again
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_plain(value: Any) -> bool:
    return _is_text(value) or _is_number(value) or isinstance(value, bool)


def _all(fits: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(fits, value))


_IDS = (lambda value: _all(_is_text, value), "a list of ids, each a string")
_NUMBER = (_is_number, "a number")
#: What the value of each field must be.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "user": (_is_text, "an id, a string"),
    "history": _IDS,
    "times": (lambda value: _all(_is_whole, value), "a list of whole numbers, seconds since 1970"),
    "text": (_is_text, "a string"),
    "k": (_is_whole, "a whole number"),
    "filter_seen": (lambda value: isinstance(value, bool), "true or false"),
    "candidates": _IDS,
    "exclude": _IDS,
    "where": (
        lambda value: (
            isinstance(value, dict) and all(_is_plain(part) or _all(_is_plain, part) for part in value.values())
        ),
        "an object: for each field a value or a list of values",
    ),
    "at_most": (
        lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
        "an object: for each field a whole number",
    ),
    "diversity": _NUMBER,
    "explore": (lambda value: value in ("none", "ucb", "thompson"), "none, ucb or thompson"),
    "exploration": _NUMBER,
    "half_life": _NUMBER,
    "seed": (_is_whole, "a whole number"),
}
