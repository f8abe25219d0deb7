"""Where the parts of a data set in MIND's format lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lightning_rec.data.readers.sources import Source, zip_names

#: The parts, in the order in which they are read.
PARTS = ("train", "validation", "test", "predict")

_NAMES = {
    "train": r"(^|[_-])(train|training)$",
    "validation": r"(^|[_-])(dev|val|valid|validation)$",
    "test": r"(^|[_-])test$",
    "predict": r"(^|[_-])predict$",
}


@dataclass(frozen=True)
class Folder:
    """One folder (or one folder of an archive) in MIND's format.

    Attributes:
        names: the names that may tell its part: its own, then its archive's.
        behaviors: the impressions.
        news: the articles, or None when another part has them.
    """

    names: tuple[str, ...]
    behaviors: Source
    news: Source | None

    @property
    def sources(self) -> list[Source]:
        """Its files."""
        return [self.behaviors] + ([self.news] if self.news else [])

    @property
    def part(self) -> str | None:
        """The part that its name tells, or None."""
        for name in self.names:
            for part, pattern in _NAMES.items():
                if re.search(pattern, name.lower()):
                    return part
        return None


def find_parts(path: str | None, named: Mapping[str, str]) -> dict[str, Folder]:
    """The folders of a data set by part; ``""`` is the part of a single folder.

    Args:
        path: a folder or an archive, of one part or of several; or None.
        named: part -> its folder or archive, instead of ``path``.

    Raises:
        FileNotFoundError: a folder or a file is missing.
        ValueError: neither or both of ``path`` and parts are given, or two folders claim one part.
    """
    if (path is None) == (not named):
        raise ValueError("Give either path, or one or more of train, validation, test and predict.")
    if path is not None:
        return _with_news(_parts_of(Path(path).expanduser()), path)
    found = {}
    for part in PARTS:
        if part in named:
            folders = _folders(Path(named[part]).expanduser())
            own = [folder for folder in folders if folder.part == part] if len(folders) > 1 else folders
            if len(own) != 1:
                raise ValueError(_several(part, own or folders))
            found[part] = own[0]
    return _with_news(found, ", ".join(named.values()))


def _with_news(parts: dict[str, Folder], where: str) -> dict[str, Folder]:
    if not any(folder.news for folder in parts.values()):
        raise FileNotFoundError(
            f"{where} holds behaviors.tsv but no news.tsv. Put the articles beside the impressions."
        )
    return parts


def _parts_of(path: Path) -> dict[str, Folder]:
    folders = _folders(path)
    if len(folders) == 1 and folders[0].behaviors.path.parent == path and folders[0].behaviors.member is None:
        return {"": folders[0]}
    if len(folders) == 1 and path.is_file():
        return {"": folders[0]}
    found: dict[str, Folder] = {}
    for folder in folders:
        if folder.part is None:
            raise ValueError(
                f"{folder.behaviors}: the name of its folder tells no part (train, dev, validation or test). Rename it,"
                " or give the folders one by one as train, validation, test and predict."
            )
        if folder.part in found:
            raise ValueError(_several(folder.part, [found[folder.part], folder]))
        found[folder.part] = folder
    return {part: found[part] for part in PARTS if part in found}


def _several(part: str, folders: list[Folder]) -> str:
    places = ", ".join(str(folder.behaviors) for folder in folders)
    return f"Several folders could be the {part} part: {places}. Give the one you mean as {part}."


def _folders(path: Path) -> list[Folder]:
    """The folders in MIND's format that a place holds: itself, else the folders and archives in it."""
    if path.is_file():
        found = _in_archive(path)
    elif path.is_dir():
        found = _in_folder(path)
        if not found:
            for entry in sorted(path.iterdir()):
                if entry.is_dir():
                    found += _in_folder(entry)
            unpacked = {folder.names[0] for folder in found}
            for entry in sorted(path.glob("*.zip")):
                if entry.stem not in unpacked:
                    found += _in_archive(entry)
    else:
        raise FileNotFoundError(f"There is no folder or zip archive {path}.")
    if not found:
        raise FileNotFoundError(
            f"{path} holds no behaviors.tsv, and no folder or archive in it does. Name the folder with behaviors.tsv"
            " and news.tsv, or the one with train, dev and test in it."
        )
    return found


def _in_folder(path: Path) -> list[Folder]:
    files = {Source(file).name: Source(file) for file in sorted(path.iterdir()) if file.is_file()}
    if "behaviors.tsv" not in files:
        return []
    return [Folder((path.resolve().name,), files["behaviors.tsv"], files.get("news.tsv"))]


def _in_archive(path: Path) -> list[Folder]:
    groups: dict[str, dict[str, Source]] = {}
    for name in zip_names(path):
        source = Source(path, name)
        groups.setdefault(str(PurePosixPath(name).parent), {})[source.name] = source
    return [
        Folder((PurePosixPath(folder).name, path.stem), files["behaviors.tsv"], files.get("news.tsv"))
        for folder, files in groups.items()
        if "behaviors.tsv" in files
    ]
