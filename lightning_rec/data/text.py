"""From a row to one text: named cleaning steps, and templates that skip what is missing."""

from __future__ import annotations

import difflib
import html
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Cleaner = Callable[[str], str]

# ---------------------------------------------------------------------------------------------------------------
# Cleaning

_BLOCK_TAGS = (
    "address article aside blockquote body br button caption center dd details div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 head header hr html iframe img input label legend li link main meta nav noscript "
    "ol option p pre script section select style summary table tbody td textarea tfoot th thead title tr ul video"
)
_INLINE_TAGS = (
    "a abbr acronym b bdi bdo big cite code del dfn em font i ins kbd mark nobr o:p q s samp small span strike "
    "strong sub sup tt u var wbr"
)
_INLINE = frozenset(_INLINE_TAGS.split())
# An attribute has a value, but for a few that never do: "<b and c>" is no tag.
_ATTRIBUTE = (
    r"""\s+(?:[A-Za-z_:@][\w:.-]*\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+)"""
    r"""|nowrap|disabled|checked|selected|hidden|async|defer|noshade|compact)"""
)
_NAMES = "|".join(sorted(f"{_BLOCK_TAGS} {_INLINE_TAGS}".split(), key=len, reverse=True))
_TAG = re.compile(
    rf"<(?:!--.*?--|!doctype[^<>]*|/?({_NAMES})(?:{_ATTRIBUTE})*\s*/?)>",
    re.IGNORECASE | re.DOTALL,
)
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
# Only with its semicolon: "?a=1&copy=2" and "AT&T" are text.
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_SPACE_CONTROL = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b\ufeff\ufffe\uffff]")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_STOP_WORD_LIST = (
    "a about after again all also am an and any are as at be because been before being but by can could did do does "
    "doing down during each few for from further had has have having he her here hers him his how i if in into is it "
    "its just me more most my no nor not now of off on once only or other our ours out over own same she should so "
    "some such than that the their theirs them then there these they this those through to too under until up very "
    "was we were what when where which while who whom why will with would you your yours"
)
_STOP_WORDS = frozenset(_STOP_WORD_LIST.split())


def _tag_to_text(match: re.Match[str]) -> str:
    name = match.group(1)
    return "" if name is not None and name.lower() in _INLINE else " "


def clean_html(text: str) -> str:
    """Removes HTML tags and comments, then decodes entities once.

    Only elements that HTML knows are tags: ``<3``, ``a < b and c > d`` and ``<Untitled>`` stay. A block tag
    (``<br>``, ``<p>``) leaves a space, an inline one (``<b>``, ``<sub>``) nothing; scripts and styles go with what
    they hold. Tags go first, so an escaped tag, ``&lt;b&gt;``, becomes the text ``<b>`` and stays: its writer meant
    it to be read. For the same reason ``&amp;lt;`` becomes ``&lt;`` and no more. An entity needs its semicolon.
    """
    if "<" in text:
        if "</" in text:
            text = _HIDDEN.sub(" ", text)
        text = _TAG.sub(_tag_to_text, text)
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
    return text


def clean_control(text: str) -> str:
    """Removes control characters, byte-order marks and zero-width spaces.

    Tab, line feed and carriage return are white space and stay; other control characters that act as white space
    (form feed, U+0085) become a space. Joiners that build emoji and Persian words stay.
    """
    return text if text.isprintable() else _CONTROL.sub("", _SPACE_CONTROL.sub(" ", text))


def clean_surrogates(text: str) -> str:
    """Joins surrogate pairs to the character they stand for and removes lone surrogates, which no UTF-8 can hold."""
    if text.isascii() or text.isprintable():
        return text
    text = _SURROGATE_PAIR.sub(
        lambda pair: chr(0x10000 + ((ord(pair[0][0]) - 0xD800) << 10) + ord(pair[0][1]) - 0xDC00), text
    )
    return _SURROGATE.sub("", text)


def clean_whitespace(text: str) -> str:
    """Makes every run of white space (line ends and no-break spaces too) one space, and none at the ends."""
    return " ".join(text.split())


def clean_lower(text: str) -> str:
    """Lower case. Off by default: the tokenizer of an uncased model does it, and a cased model reads the case."""
    return text.lower()


def clean_stop_words(text: str) -> str:
    """Removes English function words.

    Off by default: a pretrained language model with subword tokens was trained on whole sentences, reads "not" and
    "without" in them, and gets worse when they are missing. It serves bag-of-words towers. A text of stop words only
    ("The Who") stays as it is.
    """
    kept = [word for word in text.split() if word.strip(string.punctuation).lower() not in _STOP_WORDS]
    return " ".join(kept) if kept else text


#: The cleaning steps by name, in the order in which they are best applied.
CLEANING_STEPS: dict[str, Cleaner] = {
    "html": clean_html,
    "control": clean_control,
    "surrogates": clean_surrogates,
    "whitespace": clean_whitespace,
    "lower": clean_lower,
    "stop_words": clean_stop_words,
}
DEFAULT_CLEANING: tuple[str, ...] = ("html", "control", "surrogates", "whitespace")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the option nearest to ``name``, or an empty string when none is near."""
    options = list(options)
    folded = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def make_cleaner(steps: Sequence[str] = DEFAULT_CLEANING) -> Cleaner:
    """One function that applies the named steps in their order.

    Args:
        steps: names out of ``CLEANING_STEPS``; none leaves texts as they are.

    Raises:
        ValueError: a step does not exist.
    """
    if isinstance(steps, str):
        raise ValueError(f"Cleaning steps are a list of names, as in [{steps}]; {steps!r} is a single string.")
    for step in steps:
        if step not in CLEANING_STEPS:
            raise ValueError(
                f"There is no cleaning step {step!r}.{did_you_mean(str(step), CLEANING_STEPS)} "
                f"The steps are: {', '.join(CLEANING_STEPS)}."
            )
    functions = [CLEANING_STEPS[step] for step in steps]

    def cleaner(text: str) -> str:
        for function in functions:
            text = function(text)
        return text

    return cleaner


def clean(text: str, steps: Sequence[str] = DEFAULT_CLEANING) -> str:
    """Applies the named cleaning steps to one text, in the order given. See ``make_cleaner``."""
    return make_cleaner(steps)(text)


# ---------------------------------------------------------------------------------------------------------------
# Templates

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


def _remembering(cleaner: Cleaner) -> Cleaner:
    """The same cleaner, which cleans a short text once: brands and categories come again and again."""
    done: dict[str, str] = {}

    def remembering(text: str) -> str:
        if len(text) > 40:
            return cleaner(text)
        found = done.get(text)
        if found is None:
            found = cleaner(text)
            if len(done) < 100_000:
                done[text] = found
        return found

    return remembering


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
        cleaner = _remembering(cleaner) if cleaner is not None else None
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
