"""Files of ready-made vectors: GloVe's and word2vec's text format, and MIND's entity vectors."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

_SUFFIXES = (".txt", ".vec")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The lines of a plain, gzipped or zipped file; of an archive the one member that holds vectors."""
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no vector file {path}: give a file in GloVe's, word2vec's or MIND's text format (plain, .gz or "
            ".zip), or null to learn the vectors from the start."
        )
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(_SUFFIXES)]
            if len(members) != 1:
                listed = ", ".join(members) or "none"
                raise ValueError(
                    f"The archive {path} must hold one file of vectors (.txt or .vec), but holds: {listed}. "
                    "Unpack it and name the file that is wanted."
                )
            with archive.open(members[0]) as raw:
                yield io.TextIOWrapper(raw, "utf-8", errors="replace", newline="\n")
    elif path.suffix == ".gz":
        with gzip.open(path, "rb") as raw:
            yield io.TextIOWrapper(raw, "utf-8", errors="replace", newline="\n")
    else:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield file


def read_vectors(path: str, wanted: Collection[str], width: int, option: str, lower: bool = False) -> _Found:
    """Reads the vectors of the names that are wanted, and leaves the others out.

    A line is a name and its numbers, separated by spaces or tabs; word2vec's first line, the two sizes, is passed
    over. A name that comes twice keeps its first vector.

    Args:
        path: the file: plain, ``.gz``, or ``.zip`` with one ``.txt`` or ``.vec`` file in it.
        wanted: names.
        width: how many numbers each vector must have.
        option: the option that sets the width, for the error.
        lower: a name that is not in the file as it is written may be there in capitals.

    Returns:
        Name -> ``(width,)`` float32 vector.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: when vectors have another width or are no numbers, naming file and line.
    """
    source = Path(path).expanduser()
    names = wanted if isinstance(wanted, set | frozenset | dict) else set(wanted)
    found: _Found = {}
    otherwise: _Found = {}
    with _opened(source) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.rstrip(" \t\r\n")
            separator = "\t" if "\t" in line else " "
            name, _, rest = line.partition(separator)
            if number == 1:
                if name.isdigit() and rest.isdigit():
                    _check_width(int(rest), width, source, number, option)
                    continue
                if line:
                    _check_width(rest.count(separator) + 1, width, source, number, option)
            exact = name in names
            if not exact and not (lower and name.lower() in names):
                continue
            numbers = rest.split(separator)
            if len(numbers) > width:
                continue  # GloVe has names with spaces in them, none of which is a word
            vector = _numbers(numbers, width, source, number, option)
            if exact:
                found.setdefault(name, vector)
            else:
                otherwise.setdefault(name.lower(), vector)
    return otherwise | found


_Found = dict[str, NDArray[np.float32]]


def _check_width(given: int, width: int, source: Path, line: int, option: str) -> None:
    if given != width:
        raise ValueError(
            f"{source}, line {line}: the vectors are {given} wide, but {option} is {width}: set {option} to {given}, "
            f"or name a file of vectors that are {width} wide."
        )


def _numbers(values: list[str], width: int, source: Path, line: int, option: str) -> NDArray[np.float32]:
    _check_width(len(values), width, source, line, option)
    try:
        vector = np.array(values, dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"{source}, line {line}: a vector must be made of numbers ({error}).") from None
    if not np.isfinite(vector).all():
        raise ValueError(f"{source}, line {line}: a vector must be made of finite numbers.")
    return vector
