"""From a row to one text: templates over fields that skip what is missing."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_rec.data.cleaning import (
    CLEANING_STEPS,
    DEFAULT_CLEANING,
    Cleaner,
    clean,
    did_you_mean,
    make_cleaner,
    remembering,
)

__all__ = [
    "CLEANING_STEPS",
    "DEFAULT_CLEANING",
    "TITLE_FIELDS",
    "Cleaner",
    "Template",
    "clean",
    "clean_value",
    "cut_text",
    "did_you_mean",
    "field_text",
    "make_cleaner",
    "title_text",
    "user_text",
]

#: Fields that name an item, the first that an item has.
TITLE_FIELDS = ("title", "name")
_TITLE_CHARS = 80

# What may follow a value: closing brackets and quotes belong to it, then comes the separator, then the label of
# the next value.
_LITERAL = re.compile(
    r"(?P<suffix>[)\]}»”’\"']*)(?P<separator>[^\w\s(\[{«“\u2018\"'<#@$€£]*\s*)(?P<label>.*)", re.DOTALL
)
_SENTENCE_END = re.compile(r"[.!?…。\uff01\uff1f][)\]}»”’\"']*$")


def field_text(value: Any, cleaner: Cleaner | None = None) -> str:
    """The text of a field, ``""`` when it is missing (see ``Template``); lists are joined with ``", "``."""
    if value is None:
        return ""
    if isinstance(value, str):
        return (cleaner(value) if cleaner is not None else value).strip()
    if isinstance(value, float):
        return "" if value != value else str(value)
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        return ", ".join(filter(None, (field_text(part, cleaner) for part in value)))
    return str(value)


def cut_text(text: str, max_chars: int) -> str:
    """The first ``max_chars`` characters at most, cut between words where a space is near."""
    if len(text) <= max_chars:
        return text
    head = text[:max_chars]
    if not text[max_chars].isspace():
        whole_words = head.rpartition(" ")[0]
        head = whole_words if 2 * len(whole_words) >= max_chars else head
    return head.rstrip()


def clean_value(value: Any, cleaner: Cleaner) -> Any:
    """The value of a field with its strings cleaned, those in a list too; other values stay as they are."""
    if isinstance(value, str):
        return cleaner(value)
    if isinstance(value, list):
        return [clean_value(part, cleaner) for part in value]
    return value


def title_text(values: Iterable[Any], text: str, cleaner: Cleaner | None = None) -> str:
    """What stands for an item in the text of a user, for a language model to read.

    Args:
        values: those of the item's ``TITLE_FIELDS``.
        text: the item's own text, cleaned already.
        cleaner: applied to the values.

    Returns:
        The first value that is not empty, else the beginning of the text, 80 characters at most, else ``""``: a raw
        id would say nothing.
    """
    for value in values:
        title = field_text(value, cleaner)
        if title:
            return title
    return cut_text(text, _TITLE_CHARS)


class Template:
    """A text with placeholders, ``"{title}. {brand}. {categories}. {description}"``, that skips what is missing.

    The literal text between two placeholders has up to three parts: closing brackets and quotes belong to the value
    before, then comes the separator (punctuation and the white space after it), and what is left is the label of
    the value after. In ``"{title} ({year}). Genres: {genres}"`` the year owns both brackets, ``". "`` separates, and
    ``"Genres: "`` is the label of the genres. The text before the first placeholder is its label, the text after
    the last belongs to the last.

    - A missing value goes with its label and its closing brackets. Missing are None, NaN, an empty or blank
      string, and a list of such. ``"null"`` and ``"NA"`` are texts like any other.
    - Between two present neighbours stands the longest of the template's separators between them (the first of
      equally long ones); before the first and after the last present value there is none.
    - A separator's full stop is left out after a value that ends a sentence already (``. ! ? …``), and any
      punctuation mark after a value that ends with the same mark.
    - Lists are joined with ``", "``. ``{{`` and ``}}`` stand for plain braces.

    Args:
        text: the template.
        max_chars: longest text of a field in characters, one number for all fields or one for each named field. A
            long description then does not fill the token limit alone.

    Raises:
        ValueError: the template has no placeholder, an unbalanced brace, or a format that it does not know.
    """

    def __init__(self, text: str, max_chars: int | Mapping[str, int] | None = None) -> None:
        self.text = text
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"The template {text!r} cannot be read: {error}. Plain braces are written {{{{ }}}}."
            ) from None
        self._slots: list[str] = []
        literals = [""]
        for literal, name, spec, conversion in pieces:
            literals[-1] += literal
            if name is None:
                continue
            if not name.strip() or spec or conversion:
                raise ValueError(
                    f"The template {text!r} holds a placeholder that is not the plain name of a field, as in {{title}}."
                )
            self._slots.append(name.strip())
            literals.append("")
        if not self._slots:
            raise ValueError(f"The template {text!r} names no field. A field is written in braces, as in {{title}}.")
        self._labels, self._suffixes, self._separators = [literals[0]], [], []
        for literal in literals[1:-1]:
            match = _LITERAL.match(literal)
            assert match is not None  # every part of the pattern may be empty
            self._suffixes.append(match["suffix"])
            self._separators.append(match["separator"])
            self._labels.append(match["label"])
        self._suffixes.append(literals[-1])
        self.max_chars = max_chars
        for name in max_chars if isinstance(max_chars, Mapping) else ():
            if name not in self._slots:
                raise ValueError(
                    f"max_chars names {name!r}, which is not a field of the template {text!r}."
                    f"{did_you_mean(name, self._slots)} Its fields are: {', '.join(self.fields)}."
                )

    @property
    def fields(self) -> list[str]:
        """The names of the fields, each once, in the order of the template."""
        return list(dict.fromkeys(self._slots))

    def __repr__(self) -> str:
        return f"Template({self.text!r}, max_chars={self.max_chars!r})"

    def check(self, columns: Iterable[str], where: str = "the item table") -> None:
        """Checks that every field of the template is a column.

        Raises:
            ValueError: a field is in no row of the table; the message lists the columns.
        """
        columns = list(columns)
        for name in self.fields:
            if name not in columns:
                raise ValueError(
                    f"The template {self.text!r} names the field {name!r}, which {where} does not have."
                    f"{did_you_mean(name, columns)} The fields are: {', '.join(columns) or 'none'}."
                )

    def _limit(self, name: str) -> int | None:
        return self.max_chars.get(name) if isinstance(self.max_chars, Mapping) else self.max_chars

    def render(self, values: Mapping[str, Any], cleaner: Cleaner | None = None) -> str:
        """The text of one row.

        Args:
            values: the row; a field that is not in it counts as missing.
            cleaner: applied to every value (not to the template's own text) before it is looked at, so that a
                value of markup only counts as missing. See ``make_cleaner``.
        """
        return self.join([self.value(name, values.get(name), cleaner) for name in self._slots])

    def render_columns(self, columns: Mapping[str, Sequence[Any]], cleaner: Cleaner | None = None) -> list[str]:
        """The texts of all rows of a table given as columns of equal length."""
        cleaner = remembering(cleaner) if cleaner is not None else None
        done = {name: [self.value(name, value, cleaner) for value in columns[name]] for name in self.fields}
        return [self.join(values) for values in zip(*(done[name] for name in self._slots), strict=True)]

    def value(self, name: str, value: Any, cleaner: Cleaner | None = None) -> str:
        """The cleaned and cut text of one field."""
        text = field_text(value, cleaner)
        limit = self._limit(name)
        return text if limit is None else cut_text(text, limit)

    def join(self, values: Sequence[str]) -> str:
        """Puts one finished text per placeholder together; an empty one is missing."""
        out = ""
        separator: str | None = None  # None until a value has been written
        for slot, value in enumerate(values):
            if value:
                out = out + _fitting(out, separator or "") + self._labels[slot] + value
                out += _fitting(out, self._suffixes[slot])
                separator = ""
            if separator is not None and slot < len(self._separators):
                separator = max(separator, self._separators[slot], key=len)
        return out.strip()


def _fitting(text: str, separator: str) -> str:
    """The separator without a mark that the text before it has already."""
    if separator and text and not text[-1].isalnum():
        doubled = separator[0] == text[-1] and separator[0] not in ")]}\"'"
        if doubled or (separator[0] == "." and _SENTENCE_END.search(text[-4:])):
            return separator[1:]
    return separator


def user_text(
    profile: Mapping[str, Any] | None,
    reviews: Sequence[str],
    titles: Sequence[str],
    template: Template | str,
    max_titles: int = 20,
    max_reviews: int = 5,
    cleaner: Cleaner | None = None,
) -> str:
    """The text of a user at one moment, such as ``"{age} {occupation}. Likes: {titles}. Wrote: {reviews}"``.

    The newest titles and reviews are kept, and the newest stands first, so that a token limit cuts the oldest.

    Args:
        profile: the user's row of the user table, or None.
        reviews: reviews that the user wrote up to this moment, oldest first; None and empty ones are skipped.
        titles: titles of the history up to this moment, oldest first.
        template: its fields are those of the profile, ``titles`` and ``reviews``.
        max_titles: how many titles are kept.
        max_reviews: how many reviews are kept.
        cleaner: applied to every value, see ``make_cleaner``.
    """
    template = template if isinstance(template, Template) else Template(template)
    values: dict[str, Any] = dict(profile or {})
    values["titles"] = _newest(titles, max_titles, cleaner, ", ") if "titles" in template.fields else None
    values["reviews"] = _newest(reviews, max_reviews, cleaner, " ") if "reviews" in template.fields else None
    return template.join(
        [
            template.value(name, values.get(name), None if name in ("titles", "reviews") else cleaner)
            for name in template._slots
        ]
    )


def _newest(texts: Sequence[str], limit: int, cleaner: Cleaner | None, glue: str) -> str:
    kept: list[str] = []
    for text in reversed(texts):
        if len(kept) >= limit:
            break
        done = field_text(text, cleaner)
        if done:
            kept.append(done)
    return glue.join(kept)
