"""Named, switchable cleaning steps for texts."""

from __future__ import annotations

import difflib
import html
import re
import string
from collections.abc import Callable, Iterable, Sequence

Cleaner = Callable[[str], str]

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
    rf"<(?:!doctype[^<>]*|/?({_NAMES})(?:{_ATTRIBUTE})*\s*/?)>",
    re.IGNORECASE | re.DOTALL,
)
_HIDDEN = re.compile(r"<!(--)|<(script|style)\b[^<>]*>", re.IGNORECASE)
_HIDDEN_END = {
    "--": re.compile("-->"),
    "script": re.compile(r"</script\s*>", re.IGNORECASE),
    "style": re.compile(r"</style\s*>", re.IGNORECASE),
}
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


def _without_hidden(text: str) -> str:
    """A space in place of each comment, script and style sheet that is closed.

    One expression for all of it would search the whole rest of the text anew for each one that is never closed.
    """
    kept: list[str] = []
    unclosed: set[str] = set()
    end = 0
    for match in _HIDDEN.finditer(text):
        kind = (match[1] or match[2]).lower()
        if match.start() < end or kind in unclosed:
            continue
        close = _HIDDEN_END[kind].search(text, match.end())
        if close is None:
            unclosed.add(kind)
            continue
        kept += text[end : match.start()], " "
        end = close.end()
    return "".join([*kept, text[end:]])


def clean_html(text: str) -> str:
    """Removes HTML tags and comments, then decodes entities once.

    Only elements that HTML knows are tags: ``<3``, ``a < b and c > d`` and ``<Untitled>`` stay. A block tag
    (``<br>``, ``<p>``) leaves a space, an inline one (``<b>``, ``<sub>``) nothing; scripts and styles go with what
    they hold. Tags go first, so an escaped tag, ``&lt;b&gt;``, becomes the text ``<b>`` and stays: its writer meant
    it to be read. For the same reason ``&amp;lt;`` becomes ``&lt;`` and no more. An entity needs its semicolon.
    """
    if "<" in text:
        text = _TAG.sub(_tag_to_text, _without_hidden(text))
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


def remembering(cleaner: Cleaner) -> Cleaner:
    """The same cleaner, which cleans a short text once: brands and categories come again and again."""
    done: dict[str, str] = {}

    def cleaned(text: str) -> str:
        if len(text) > 40:
            return cleaner(text)
        found = done.get(text)
        if found is None:
            found = cleaner(text)
            if len(done) < 100_000:
                done[text] = found
        return found

    return cleaned
