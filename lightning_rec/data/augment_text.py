"""Random variants of training texts: words replaced by a table, swapped or left out. No network, no model."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_rec.data.batch import ItemBatch

Int = NDArray[np.int64]

# Scripts without spaces between words: each sign is a unit, and the table may name several in a row.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTER = rf"[^\W{_SIGNS}]"
_UNIT = re.compile(rf"[{_SIGNS}]|{_LETTER}+(?:['’-]{_LETTER}+)*")

#: Words in lower case, one after another -> what may stand in their place.
Table = dict[tuple[str, ...], list[str]]


@dataclass(frozen=True)
class TextAugmentation:
    """Training sees other variants of a text at every step: words are replaced, swapped and left out.

    Wei and Zou, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification Tasks" (EMNLP
    2019), without its insertion. Words are those of the text, before the tokenizer. What is drawn depends on the seed,
    the epoch and the step only, so that a resumed run sees the same. Texts of evaluation, prediction and export are
    never changed.

    The language model of the tower must be tuned: the vectors of a frozen one are made once, of the texts as they are.
    A tower that reads fields of the items one by one, such as titles and abstracts, gets variants of each of them. To
    word vectors a replacement that no text of the catalogue has is an unknown word.

    Args:
        probability: share of the texts that are changed at all.
        replace: probability that a word (or several, as the table says) is replaced, where the table knows it.
        swap: how many pairs of words change places, as a share of the number of words.
        delete: probability that a word is left out; one word always stays.
        table: the file of replacements. CSV or TSV: a word and then what may replace it, a line each, without a head
            line; JSON: ``{"word": ["other", ...]}``, or a list of lists of words that may replace each other. Upper and
            lower case do not matter; a first capital stays one. None: nothing is replaced.
        texts: whose texts are changed.

    Raises:
        ValueError: a number outside its range.
    """

    probability: float = 0.5
    replace: float = 0.1
    swap: float = 0.1
    delete: float = 0.1
    table: str | None = None
    texts: Literal["items", "users", "both"] = "items"

    def __post_init__(self) -> None:
        for name in ("probability", "replace", "swap", "delete"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"text_augmentation.{name} is a share from 0 to 1, not {value}.")


class TextVariants:
    """Makes the variants of a step.

    Args:
        options: what is changed, and how often.
        item_texts: one text a catalogue row.
        table: replacements, instead of those of the file that ``options`` names.
        fields: the fields that the item tower reads as texts: one value a catalogue row, a string or a list of strings.
            Empty: it reads ``item_texts``.

    Raises:
        FileNotFoundError: the table does not exist.
        ValueError: the table cannot be read; the message names the line.
    """

    def __init__(
        self,
        options: TextAugmentation,
        item_texts: Sequence[str],
        table: Table | None = None,
        fields: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.options = options
        self.item_texts = item_texts
        self.fields = {
            name: [value if isinstance(value, str) else " ".join(value or ()) for value in values]
            for name, values in (fields or {}).items()
        }
        if table is None:
            table = {} if options.table is None else read_table(options.table)
        self.table = table
        self._longest: dict[str, int] = {}  # by the first word of an entry
        for words in table:
            self._longest[words[0]] = max(len(words), self._longest.get(words[0], 0))

    def items(self, rows: Int, seed: Sequence[int]) -> list[str] | None:
        """Variants of the texts of catalogue rows; None where items' texts stay as they are."""
        if self.options.texts == "users":
            return None
        return [self._drawn(self.item_texts[row], (*seed, row)) for row in rows.tolist()]

    def add(self, items: ItemBatch, seed: Sequence[int]) -> None:
        """Gives a step's items their variants: of the fields that the tower reads, or of their whole texts."""
        rows = items.rows.numpy()
        if not self.fields:
            items.texts = self.items(rows, seed)
        elif self.options.texts != "users":
            items.fields = {
                name: [self._drawn(texts[row], (*seed, row, name)) for row in rows.tolist()]
                for name, texts in self.fields.items()
            }

    def check(self, user_texts: object) -> None:
        """Looks whether those texts are there whose variants are asked for.

        Args:
            user_texts: what makes the texts of users, or None.

        Raises:
            ValueError: variants of users' texts, and there are none.
        """
        if self.options.texts != "items" and user_texts is None:
            raise ValueError(
                f"text_augmentation.texts is {self.options.texts}, but users have no texts: set user_template, or "
                "text_augmentation.texts to items."
            )

    def users(self, texts: list[str], users: Int, seed: Sequence[int]) -> list[str]:
        """Variants of users' texts, or the texts themselves where those of users stay as they are.

        Args:
            texts: one text a user.
            users: ``(b,)`` a number of each text, by which its draws differ from those of the others.
            seed: seed of the run, epoch and step.
        """
        if self.options.texts == "items":
            return texts
        rows = (-users - 1).tolist()  # other numbers than those of items
        return [self._drawn(text, (*seed, row)) for text, row in zip(texts, rows, strict=True)]

    def _drawn(self, text: str, seed: tuple[int | str, ...]) -> str:
        # a string as seed is hashed by random itself, the same in every process
        rng = random.Random(repr(seed))
        return self.variant(text, rng) if rng.random() < self.options.probability else text

    def variant(self, text: str, rng: random.Random) -> str:
        """One variant of a text; what stands between words stays in its place."""
        found = list(_UNIT.finditer(text))
        if not found:
            return text
        words = [match.group() for match in found]
        edges = [0, *(edge for match in found for edge in match.span()), len(text)]
        gaps = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
        if self.table and self.options.replace:
            words, gaps = self._replaced(words, gaps, rng)
        if len(words) > 1:
            for _ in range(int(self.options.swap * len(words) + rng.random())):
                one, other = rng.sample(range(len(words)), 2)
                words[one], words[other] = words[other], words[one]
        kept = [rng.random() >= self.options.delete for _ in words]
        if not any(kept):
            kept[rng.randrange(len(kept))] = True
        out = gaps[0]
        for word, gap, keep in zip(words, gaps[1:], kept, strict=True):
            # with a word goes the space after it
            out += word + gap if keep else gap.lstrip()
        return out.strip()

    def _replaced(self, words: list[str], gaps: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
        """Words and gaps with some replaced, the longest entry of the table first."""
        lowered = [word.lower() for word in words]
        new_words: list[str] = []
        new_gaps = [gaps[0]]
        place = 0
        while place < len(words):
            size = self._match(lowered, gaps, place) if lowered[place] in self._longest else 0
            if size and rng.random() < self.options.replace:
                other = rng.choice(self.table[tuple(lowered[place : place + size])])
                new_words.append(_like(words[place], other))
                new_gaps.append(gaps[place + size])
            else:
                size = size or 1
                new_words += words[place : place + size]
                new_gaps += gaps[place + 1 : place + size + 1]
            place += size
        return new_words, new_gaps

    def _match(self, lowered: list[str], gaps: list[str], place: int) -> int:
        """How many words from ``place`` on are the longest entry of the table; 0 where there is none."""
        for size in range(min(self._longest[lowered[place]], len(lowered) - place), 0, -1):
            if tuple(lowered[place : place + size]) in self.table and not any(
                gap.strip() for gap in gaps[place + 1 : place + size]
            ):
                return size
        return 0


def _like(word: str, other: str) -> str:
    if len(word) > 1 and word.isupper():
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def read_table(path: str) -> Table:
    """Reads a table of replacements; see :class:`TextAugmentation` for the formats.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file and the line or entry that cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"text_augmentation.table names {path}, which is no file.")
    table: Table = {}
    kind = file.suffix.lower()
    text = file.read_text(encoding="utf-8-sig")
    if kind == ".json":
        entries = _json_entries(text, path)
    elif kind in (".csv", ".tsv"):
        rows = csv.reader(text.splitlines(), delimiter="," if kind == ".csv" else "\t")
        entries = [(f"line {rows.line_num}", row[0], row[1:]) for row in rows if any(cell.strip() for cell in row)]
    else:
        raise ValueError(f"text_augmentation.table is a file .csv, .tsv or .json, but names {path}.")
    for place, word, others in entries:
        key = tuple(match.group().lower() for match in _UNIT.finditer(word))
        wanted = [other.strip() for other in others if other.strip()]
        if not key or not wanted:
            raise ValueError(
                f"{path}, {place}: a word and at least one replacement are needed, but it holds {word!r} and {others}."
            )
        known = table.setdefault(key, [])
        known += [other for other in wanted if other not in known]
    return table


def _json_entries(text: str, path: str) -> list[tuple[str, str, list[str]]]:
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: it is not JSON ({error.msg}).") from None
    if isinstance(content, dict):
        pairs: Iterable[tuple[str, Any]] = content.items()
        found: list[tuple[str, Any, Any]] = [
            (f"entry {word!r}", word, [others] if isinstance(others, str) else others) for word, others in pairs
        ]
    elif isinstance(content, list) and all(isinstance(group, list) for group in content):
        found = [
            (f"list {number}", word, [*group[:place], *group[place + 1 :]])
            for number, group in enumerate(content, start=1)
            for place, word in enumerate(group)
        ]
    else:
        raise ValueError(f"{path}: it should hold an object of words, or a list of lists of words.")
    for place, word, others in found:
        if not isinstance(word, str) or not isinstance(others, list) or not all(isinstance(o, str) for o in others):
            raise ValueError(f"{path}, {place}: words and their replacements are texts.")
    return found
