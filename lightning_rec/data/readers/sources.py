"""From a path to lines of text: shards, globs, compressed files, members of zip archives, encodings."""

from __future__ import annotations

import bz2
import codecs
import difflib
import fnmatch
import glob
import gzip
import hashlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from lightning_rec.data.table import BadRowError, ReadReport

#: What one or several places of a table may be written as in YAML.
Paths = str | Sequence[str]

_BLOCK = 1 << 22
_COMPRESSED = {".gz", ".bz2", ".xz"}
_DATA = {".csv", ".tsv", ".txt", ".dat", ".data", ".json", ".jsonl", ".ndjson", ".parquet", ".inter", ".item", ".user"}


@dataclass(frozen=True)
class Source:
    """One file, or one member of a zip archive (which is read in place and never extracted)."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """The file's name without ``.gz`` and the like, in lower case: its suffix tells the format."""
        name = PurePosixPath(self.member).name if self.member else self.path.name
        pure = PurePosixPath(name.lower())
        return pure.stem if pure.suffix in _COMPRESSED else str(pure)

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)


def find_sources(paths: Paths, what: str) -> list[Source]:
    """The files that paths name: files, folders, globs, zip archives, and members as ``archive.zip/member.csv``.

    A folder or a glob gives its files in sorted order; a list keeps its order.

    Args:
        paths: one path or several.
        what: name of the option, for messages.

    Raises:
        FileNotFoundError: nothing is there; the message lists similar names.
        ValueError: a zip archive holds a name that escapes its folder, or no usable member.
    """
    found: list[Source] = []
    for text in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(text).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file() and _is_data(file.name))
            if not files:
                raise FileNotFoundError(f"{what}: the folder {path} holds no data file.")
        elif path.exists():
            files = [path]
        elif archive := next((parent for parent in path.parents if parent.is_file()), None):
            found += _members(archive, path.relative_to(archive).as_posix(), what)
            continue
        else:
            files = sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_file())
            if not files:
                raise FileNotFoundError(f"{what}: there is no file {path}.{_similar(path)}")
        for file in files:
            found += _members(file, None, what) if _is_zip(file) else [Source(file)]
    if not found:
        raise FileNotFoundError(f"{what}: the list of files is empty.")
    return found


def _is_data(name: str) -> bool:
    if name.startswith((".", "_")):
        return False
    pure = PurePosixPath(name.lower())
    suffix = PurePosixPath(pure.stem).suffix if pure.suffix in _COMPRESSED else pure.suffix
    return suffix in _DATA or pure.suffix == ".zip"


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist."
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=3)
    return f" Did you mean {', '.join(near)}?" if near else ""


def zip_names(path: Path) -> list[str]:
    """The files in a zip archive, in sorted order, names that escape its folder refused.

    Raises:
        ValueError: a member's name is absolute, has a drive or climbs with ``..``; or the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a readable zip archive: {error}.") from error
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
            raise ValueError(f"{path} holds a member named {name!r}, which would escape its folder; it is not read.")
    return sorted(name for name in names if not name.startswith("__MACOSX/"))


def _members(archive: Path, pattern: str | None, what: str) -> list[Source]:
    if not _is_zip(archive):
        raise FileNotFoundError(f"{what}: {archive} is a file and no zip archive, so it has no member {pattern}.")
    names = zip_names(archive)
    chosen = [n for n in names if _is_data(PurePosixPath(n).name)] or names
    if pattern is not None:
        chosen = [name for name in names if name == pattern or fnmatch.fnmatch(name, pattern)]
    if not chosen:
        raise FileNotFoundError(f"{what}: {archive} holds no member {pattern or ''}; it holds {', '.join(names)}.")
    return [Source(archive, name) for name in chosen]


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """The decompressed bytes of a source; the kind of compression is told by the first bytes, not by the name."""
    try:
        with _raw(source) as raw:
            head = raw.peek(6)[:6] if isinstance(raw, io.BufferedReader) else b""
            if head.startswith(b"\x1f\x8b"):
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
            elif head.startswith(b"BZh"):
                yield cast(BinaryIO, bz2.BZ2File(raw))
            elif head.startswith(b"\xfd7zXZ"):
                yield cast(BinaryIO, lzma.LZMAFile(raw))  # noqa: SIM115  # the raw stream is closed by its own context
            else:
                yield raw
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise ValueError(f"{source} is damaged and cannot be decompressed: {error}. Fetch it again.") from error


@contextmanager
def _raw(source: Source) -> Iterator[BinaryIO]:
    if source.member is None:
        with source.path.open("rb") as stream:
            yield stream
        return
    with zipfile.ZipFile(source.path) as archive:
        try:
            member = archive.open(source.member)
        except RuntimeError as error:
            raise ValueError(
                f"{source} cannot be read: {error}. Archives with a password are not supported."
            ) from error
        with member, io.BufferedReader(cast(io.RawIOBase, member), _BLOCK) as stream:
            yield stream


def digest(sources: Sequence[Source]) -> str:
    """A hash of the content of all files, in their order."""
    total = hashlib.sha256()
    for path in dict.fromkeys(source.path for source in sources):
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    total.update("\n".join(source.member or "" for source in sources).encode())
    return total.hexdigest()


def read_head(source: Source, size: int = 1 << 16) -> bytes:
    """The first decompressed bytes of a source."""
    with opened(source) as stream:
        return stream.read(size)


def read_lines(source: Source, encoding: str, report: ReadReport) -> Iterator[tuple[int, list[str]]]:
    """Like ``read_blocks``, with each block split into its lines."""
    for number, text in read_blocks(source, encoding, report):
        yield number, text.split("\n")


def read_blocks(source: Source, encoding: str, report: ReadReport) -> Iterator[tuple[int, str]]:
    """Decoded text in blocks of whole lines: the number of the first line, and the text without its last line feed.

    Lines end at a line feed only; a carriage return stays where it is. A UTF-8 byte order mark is removed.

    Raises:
        BadRowError: a byte does not decode; the message names file, line, byte offset and the encoding option.
    """
    wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    with opened(source) as stream:
        number, offset, rest = 1, 0, b""
        while True:
            block = stream.read() if wide else stream.read(_BLOCK)
            if not block:
                break
            data = rest + block
            cut = len(data) if wide else data.rfind(b"\n") + 1
            data, rest = data[:cut], data[cut:]
            if data:
                yield from _decoded(source, data, number, offset, encoding, report)
                number += data.count(b"\n")
                offset += len(data)
        if rest:
            yield from _decoded(source, rest, number, offset, encoding, report)


def _decoded(
    source: Source, data: bytes, number: int, offset: int, encoding: str, report: ReadReport
) -> Iterator[tuple[int, str]]:
    skip_mark = 3 if offset == 0 and data.startswith(codecs.BOM_UTF8) and codecs.lookup(encoding).name == "utf-8" else 0
    try:
        text = data[skip_mark:].decode(encoding)
    except UnicodeDecodeError as error:
        if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):  # a line cannot be cut out of these
            raise BadRowError(f"{source} is not {encoding}: {error}. Set the encoding option to its own.") from error
        lines = data[skip_mark:].split(b"\n")
        position = offset + skip_mark
        good: list[str] = []
        first = number
        for line in lines if lines[-1] else lines[:-1]:
            try:
                good.append(line.decode(encoding))
            except UnicodeDecodeError as bad:
                place = position + bad.start
                _bad_byte(source, number, line[bad.start], place, encoding, report)
                if good:
                    yield first, "\n".join(good)
                good, first = [], number + 1
            number += 1
            position += len(line) + 1
        if good:
            yield first, "\n".join(good)
        return
    yield number, (text.removeprefix("\ufeff") if offset == 0 else text).removesuffix("\n")


def _bad_byte(source: Source, line: int, byte: int, place: int, encoding: str, report: ReadReport) -> None:
    reason = f"byte 0x{byte:02x} at offset {place} of the file is not {encoding}"
    remedy = (
        "Set the encoding option to the file's own (`latin-1`, `cp1252`, ...); on_bad_rows: skip leaves the line out."
    )
    report.bad_row(str(source), line, reason, remedy=remedy)
