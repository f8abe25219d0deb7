"""What lies in an artefact: the manifest, and the check that the files are those that were written."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

#: Raise when an older reader would misread what is written.
FORMAT_VERSION = 1
KIND = "lightning_rec artefact"
MANIFEST = "manifest.json"


class ArtefactError(ValueError):
    """A folder that is no artefact, or not as it was written; the message names the file and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """What an artefact says of itself.

    Attributes:
        created: when it was written, ISO 8601 in UTC.
        package_version: the version of this package that wrote it.
        protocol: how the run was tested, in one sentence.
        metrics: test metrics of the exported checkpoint; empty where it was not tested.
        item_tower: ``class_path`` and ``init_args``; a language model in the artefact is named ``artefact:FOLDER``.
        user_tower: likewise.
        score: likewise.
        dim: width of the vectors.
        n_items: number of items, padding not counted.
        n_users: number of user rows that the towers were sized by, padding counted.
        dtype: how item vectors are stored: ``float32``, ``float16`` or ``int8`` (with a scale for each row).
        filter_seen: whether the test left out what a user had touched. True for runs of impressions, whose test ranks
            what was shown; see :meth:`lightning_rec.recommend.artefact.Artefact.filters_seen`.
        max_history: the longest history that the towers read.
        cleaning: names of the text cleaning steps of the run.
        template: how an item's fields become one text; None: there are no fields.
        text_tower: True where the item tower reads texts, so that new items can be encoded.
        reads_user_text: True where the user tower reads a user's text.
        user_template: how a user's text is made, or None.
        user_titles: at most so many titles and reviews go into a user's text.
        rating_range: lowest and highest rating, or None.
        rating_mean: mean of the training ratings, or None.
        ids_digest: hash of the raw item ids in order.
        users_digest: hash of the raw user ids in order.
        texts_digest: hash of the item texts in order.
        vector_loss: test NDCG@10 with the ``stored`` vectors and with ``float32``; None where they are float32.
        parts: the optional parts: what kind each one is, and what its kind says of it.
        digests: sha256 of each file but the manifest, by its path in the folder.
        format_version: version of the format.
    """

    created: str
    package_version: str
    protocol: str
    metrics: dict[str, float]
    item_tower: dict[str, Any]
    user_tower: dict[str, Any]
    score: dict[str, Any]
    dim: int
    n_items: int
    n_users: int
    dtype: str
    filter_seen: bool
    max_history: int
    cleaning: list[str]
    template: str | None
    text_tower: bool
    reads_user_text: bool
    user_template: str | None = None
    user_titles: int = 10
    rating_range: list[float] | None = None
    rating_mean: float | None = None
    ids_digest: str = ""
    users_digest: str = ""
    texts_digest: str = ""
    vector_loss: dict[str, float] | None = None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def language_models(self) -> dict[str, dict[str, Any]]:
        """The language models in the artefact: folder -> ``name``, ``tune``, ``merged``."""
        return {name: part for name, part in self.parts.items() if part.get("kind") == "language_model"}

    def lazy(self, file: str) -> bool:
        """True for a file of a part that is checked when it is first used."""
        return bool(self.parts.get(file.split("/", 1)[0], {}).get("lazy"))

    def files_of(self, part: str) -> list[str]:
        """The files in the folder of a part."""
        return [name for name in self.digests if name.startswith(f"{part}/")]

    def to_json(self) -> str:
        """The manifest as text, with a digest of itself."""
        content = {"kind": KIND, **asdict(self)}
        content["metrics"] = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        return json.dumps({**content, "digest": _own_digest(content)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> Manifest:
        """Reads a manifest.

        Args:
            data: the file's bytes.
            path: for messages.

        Raises:
            ArtefactError: no manifest, one of another format version, or an altered one.
        """
        try:
            content = json.loads(data.decode("utf-8"))
        except ValueError as error:
            raise ArtefactError(f"{path} was altered: it is no JSON ({error}). Export the run again.") from None
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ArtefactError(f"{path} is not the manifest of an artefact that `lightning-rec export` wrote.")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            remedy = "update lightning_rec" if newer else "export the run again with this version"
            raise ArtefactError(
                f"{path} has the format version {version!r} (written by lightning_rec "
                f"{content.get('package_version', '?')}), but this lightning_rec reads version {FORMAT_VERSION}: "
                f"{remedy}."
            )
        digest = content.pop("digest", None)
        if digest != _own_digest(content):
            raise ArtefactError(f"{path} was altered: it does not match its own digest. Export the run again.")
        del content["kind"]
        names = {item.name for item in fields(cls)}
        if set(content) != names:
            raise ArtefactError(f"{path} lacks or adds entries: {', '.join(sorted(set(content) ^ names))}.")
        for name in content["digests"]:
            _check_path(name, path)
        for name in content["parts"]:
            _check_path(name, path)
        return cls(**content)


def _own_digest(content: Mapping[str, Any]) -> str:
    data = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()


def _check_path(name: str, manifest: Path) -> None:
    """Refuses a name that would lead out of the folder."""
    path = PurePosixPath(name)
    plain = path.parts and not path.is_absolute() and ".." not in path.parts and str(path) == name
    if not plain or "\\" in name or ":" in name or "\0" in name or name == MANIFEST:
        raise ArtefactError(f"{manifest} names the file {name!r}, which may lead out of the artefact: it is refused.")


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """All files and links below a folder, by their path in it; the manifest is left out."""
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in (*names, *links)]
    return sorted(name.replace(os.sep, "/") for name in found if name != MANIFEST)


def check_names(folder: Path, manifest: Manifest) -> None:
    """Refuses a folder with a file too many or too few.

    Raises:
        ArtefactError: naming the file.
    """
    present, wanted = set(files_below(folder)), set(manifest.digests)
    missing, foreign = sorted(wanted - present), sorted(present - wanted)
    if missing:
        raise ArtefactError(
            f"{folder / missing[0]} is missing: the manifest names it{_more(missing)}. Copy the whole folder, or "
            "export the run again."
        )
    if foreign:
        raise ArtefactError(
            f"{folder / foreign[0]} is foreign: the manifest does not name it{_more(foreign)}. Move it out of the "
            "artefact, or export the run again."
        )


def check_digests(folder: Path, names: Iterable[str], manifest: Manifest) -> None:
    """Refuses a file that is missing or not as it was written.

    Raises:
        ArtefactError: naming the file.
    """
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise ArtefactError(f"{path} is a link: an artefact holds its own files only. Copy the whole folder.")
        if not path.is_file():
            raise ArtefactError(f"{path} is missing. Copy the whole folder, or export the run again.")
        if file_digest(path) != manifest.digests[name]:
            raise ArtefactError(
                f"{path} was altered: its sha256 is not the one in the manifest. Copy the artefact or export the run "
                "again."
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
