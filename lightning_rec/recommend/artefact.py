"""The artefact: a folder from which a recommender answers, without the data and the run that it came from."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_rec.data.batch import CatalogueView, UserBatch
from lightning_rec.data.text import TITLE_FIELDS, Cleaner, Template, make_cleaner, title_text, user_text
from lightning_rec.recommend.context import CONTEXT, ScoreContext
from lightning_rec.recommend.item_reading import FIELDS, FieldReading
from lightning_rec.recommend.lazy_towers import TOWERS, LazyTowers
from lightning_rec.recommend.lives import LIVES, Lives
from lightning_rec.recommend.manifest import MANIFEST, ArtefactError, Manifest, check_digests, check_names
from lightning_rec.recommend.stored_users import USERS, StoredUsers
from lightning_rec.recommend.types import RequestError
from lightning_rec.recommend.vectors import VECTORS, read_vectors
from lightning_rec.towers import ItemTower, UserTower
from lightning_rec.towers.score import Score

__all__ = ["FIELD", "ITEMS", "Artefact", "ArtefactError", "Attributes", "Manifest"]

ITEMS = "items.parquet"
#: Stands before the name of a field in the columns of ``items.parquet``.
FIELD = "field."
#: The part of the manifest of runs of impressions, and the file with the vector of an article that the catalogue lacks.
IMPRESSIONS, UNKNOWN = "impressions", "unknown_item.safetensors"
_PATIENCE = 10.0  # seconds of replacements while an artefact is read


class Attributes(Mapping[str, list[Any]]):
    """The fields of the items, one value a row (None for padding); a column is made when it is first asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._names = [name[len(FIELD) :] for name in table.column_names if name.startswith(FIELD)]
        self._columns: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._columns:
            if name not in self._names:
                raise KeyError(name)
            self._columns[name] = [None, *self._table.column(FIELD + name).to_pylist()]
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Artefact:
    """An opened artefact. Open one with :meth:`read`.

    Every method may be called from several threads.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself.
        ids: raw id of each row; row 0 is padding, ``""``.
        texts: what the item tower reads of each row.
        display: what a person reads of each row.
        attributes: field -> one value a row.
        counts: ``(n_rows,)`` int64 training interactions of each row.
        lives: when each row can be recommended; None: always.
        context: what the moment of a request adds to scores; None: nothing.
        unknown: ``(d,)`` what the user tower reads of an event whose item the catalogue lacks; None: such events are
            passed over.
        raw_vectors: ``(n_rows, d)`` float32 item vectors as the user tower reads them; row 0 is zero.
        vectors: ``(n_rows, d)`` float32 item vectors, ready for the product with an interest vector.
        users: the users of the fitted data, or None where they were left out.
    """

    def __init__(self, folder: Path, manifest: Manifest, verify: bool) -> None:
        self.folder = folder
        self.manifest = manifest
        self._verify = verify
        self._verified: set[str] = set()
        self._lock = threading.RLock()
        self._written = (folder / MANIFEST).read_bytes()
        if verify:
            check_digests(folder, [name for name in manifest.digests if not manifest.lazy(name)], manifest)
        table = pq.read_table(folder / ITEMS)
        if table.num_rows != manifest.n_items:
            raise ArtefactError(f"{folder / ITEMS} has {table.num_rows:,} items, the manifest {manifest.n_items:,}.")
        self.ids: list[str] = ["", *table.column("item_id").to_pylist()]
        self.texts: list[str] = ["", *table.column("text").to_pylist()]
        self.display: list[str] = ["", *table.column("display").to_pylist()]
        self.attributes = Attributes(table)
        counts = torch.from_numpy(table.column("interactions").to_numpy().astype("int64"))
        self.counts = torch.cat([counts.new_zeros(1), counts])
        self.lives = Lives.of(table, manifest.parts[LIVES]) if LIVES in manifest.parts else None
        self.context = ScoreContext.read(folder, manifest.parts[CONTEXT]) if CONTEXT in manifest.parts else None
        self.unknown = load_file(folder / UNKNOWN)["vector"] if UNKNOWN in manifest.digests else None
        self.raw_vectors = read_vectors(folder)
        if self.raw_vectors.shape != (len(self.ids), manifest.dim):
            raise ArtefactError(
                f"{folder / VECTORS} has the shape {tuple(self.raw_vectors.shape)}; the manifest says "
                f"{(len(self.ids), manifest.dim)}."
            )
        self.users = StoredUsers.read(folder / USERS, self.ids) if "users" in manifest.parts else None
        self.towers = LazyTowers(folder, manifest, lambda: self._view, self._verify_towers)
        self.vectors = self.ready(self.raw_vectors)
        if self.vectors is not self.raw_vectors:
            self.vectors[0] = 0
        self.towers.try_user()

    @classmethod
    def read(cls, folder: str | os.PathLike[str], verify: bool = True) -> Artefact:
        """Opens an artefact.

        The language model is loaded when the first text is to be encoded, and its files are checked then; all other
        files are checked now. Nothing is unpickled. An artefact that is replaced meanwhile is read anew.

        Args:
            folder: what ``lightning-rec export`` wrote.
            verify: check the sha256 of every file. Missing and foreign files are refused in any case.

        Raises:
            ArtefactError: naming the file that is missing, foreign or altered, or saying that the folder is no
                artefact, or one of another format version, or holds a class that cannot be imported.
        """
        # absolute, for files that are read later; not resolved, since a link may be moved to a newer artefact
        path = Path(os.path.abspath(folder))
        deadline, again = time.monotonic() + _PATIENCE, 0
        while True:
            before = _seen(path, patient=not again)
            try:
                manifest = Manifest.from_json(before.manifest, path / MANIFEST)
                check_names(path, manifest)
                artefact = cls(path, manifest, verify)
                if artefact._written == before.manifest and _seen(path, patient=True) == before:
                    return artefact
            except Exception:
                # A link may point elsewhere and back while files are read: one more look tells that from a bad file.
                if _seen(path, patient=True) == before and (again := again + 1) > 1:
                    raise
            if time.monotonic() > deadline:
                raise ArtefactError(f"{path} was replaced again and again while it was read: try again.")

    # ------------------------------------------------------------------ files

    def part(self, name: str) -> Path:
        """The folder of an optional part, whose files are checked when it is first asked for.

        Raises:
            ArtefactError: the artefact has no such part, or a file of it is missing or altered.
        """
        if name not in self.manifest.parts:
            raise ArtefactError(
                f"{self.folder} has no part {name!r}; it has {', '.join(self.manifest.parts) or 'none'}."
            )
        with self._lock:
            if name not in self._verified:
                self._check(self.manifest.files_of(name))
                self._verified.add(name)
        return self.folder / name

    def _check(self, names: Sequence[str]) -> None:
        if _manifest_bytes(self.folder, patient=True) != self._written:
            raise ArtefactError(f"{self.folder} was replaced by another export since it was opened: open it again.")
        if self._verify:
            check_digests(self.folder, names, self.manifest)

    def _verify_towers(self) -> None:
        self._check([TOWERS])
        for name in self.manifest.language_models:
            self.part(name)

    # ------------------------------------------------------------------ towers

    @cached_property
    def _view(self) -> CatalogueView:
        manifest = self.manifest
        return CatalogueView(
            n_rows=len(self.ids),
            n_users=manifest.n_users,
            texts=self.texts,
            counts=self.counts,
            digest=manifest.texts_digest,
            ids_digest=manifest.ids_digest,
            users_digest=manifest.users_digest,
            rating_range=None
            if manifest.rating_range is None
            else (manifest.rating_range[0], manifest.rating_range[1]),
            rating_mean=manifest.rating_mean,
            fields={} if self.field_reading is None else self.field_reading.columns(self.attributes),
        )

    @property
    def item_tower(self) -> ItemTower:
        """The item tower, built when it is first needed."""
        return self.towers.item

    @property
    def user_tower(self) -> UserTower:
        """The user tower."""
        return self.towers.user

    @property
    def score(self) -> Score:
        """What makes vectors ready for the product."""
        return self.towers.score

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """Held while the item tower's language model, or its tokenizer, is at work; let go of it soon."""
        return self._lock

    @property
    def has_text_tower(self) -> bool:
        """True where the item tower reads texts."""
        return self.manifest.text_tower

    @property
    def reads_user_text(self) -> bool:
        """True where the user tower reads a user's text."""
        return self.manifest.reads_user_text

    def ready(self, raw: Tensor) -> Tensor:
        """``(n, d)`` item vectors ready for the product, of those that the item tower returns."""
        return self.score.items(raw)

    def interests(self, users: UserBatch, items: Tensor | None = None) -> Tensor:
        """The interest of users, ready for the product.

        Args:
            users: ``b`` users with histories of up to ``t`` events.
            items: ``(n, d)`` raw item vectors that ``users.history`` are positions in; None: :attr:`raw_vectors`.

        Returns:
            ``(b, t, d)`` float32: after every event of the history; or ``(b, 1, d)``.
        """
        table = self.raw_vectors if items is None else items
        if not self.reads_user_text:
            return self.score.interest(self.user_tower(users, table)).float()
        with self._lock:  # the tower remembers texts
            return self.score.interest(self.user_tower(users, table)).float()

    def knows(self, users: UserBatch) -> Tensor:
        """``(b,)`` True where the user tower has something to go by."""
        return self.user_tower.knows(users)

    def filters_seen(self, chosen: bool) -> bool:
        """Whether answers leave out what the history holds, where a request does not say it.

        Args:
            chosen: the request names its candidates. A run of impressions ranks those as they are, as it was tested.
        """
        return self.manifest.filter_seen and not (chosen and IMPRESSIONS in self.manifest.parts)

    def check_text_tower(self) -> None:
        """Raises a :class:`RequestError` where the item tower reads no text."""
        if not self.has_text_tower:
            raise RequestError(
                f"The item tower, {self.manifest.item_tower['class_path']}, reads no text.",
                "no_text_tower",
                "Export a run with a text item tower, such as lightning_rec.towers.TextItemTower.",
            )

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Raw vectors of items that are known by their text only, as the user tower reads them.

        Args:
            texts: ``n`` texts, see :meth:`item_text`.

        Returns:
            ``(n, d)`` float32; :meth:`ready` makes them ready for the product.

        Raises:
            RequestError: the item tower reads no text.
        """
        self.check_text_tower()
        with self._lock:
            tower: Any = self.item_tower
            return tower.encode_texts(list(texts)).float()

    # ------------------------------------------------------------------ texts

    @cached_property
    def field_reading(self) -> FieldReading | None:
        """How the item tower reads the fields of an item; None where it reads the item's text."""
        part = self.manifest.parts.get(FIELDS)
        return None if part is None else FieldReading(part["names"], self._cleaner)

    def reading(self, fields: Mapping[str, Any], text: str) -> str:
        """All that the item tower reads of an item, as one string; :meth:`encode_readings` makes vectors of such.

        Args:
            fields: of the item.
            text: the item's own text, see :meth:`item_text`.
        """
        return text if self.field_reading is None else self.field_reading.of(fields)

    def encode_readings(self, readings: Sequence[str]) -> Tensor:
        """Raw vectors of items by what is read of them; see :meth:`encode_texts`, which it is for most towers."""
        if self.field_reading is None:
            return self.encode_texts(readings)
        with self._lock:
            return self.field_reading.encode(self.item_tower, readings)

    @cached_property
    def _template(self) -> Template | None:
        return None if self.manifest.template is None else Template(self.manifest.template)

    @cached_property
    def _cleaner(self) -> Cleaner:
        return make_cleaner(self.manifest.cleaning)

    def item_text(self, row: Mapping[str, Any]) -> str:
        """The text of an item: the run's template and cleaning over the fields of ``row``; missing ones are skipped."""
        template = self._template
        return "" if template is None else template.render(row, self._cleaner)

    def item_title(self, row: Mapping[str, Any], text: str) -> str:
        """What stands for an item in the text of a user, as the run made it: its title, else the beginning of its text.

        Args:
            row: fields of the item.
            text: the item's own text, see :meth:`item_text`.
        """
        return title_text((row.get(name) for name in TITLE_FIELDS), text, self._cleaner)

    def clean(self, text: str) -> str:
        """Somebody's own words, cleaned as the run cleaned its texts."""
        return self._cleaner(text)

    def user_text(self, titles: Sequence[str], user: str | None = None) -> str:
        """The text of a user, by the run's template.

        Args:
            titles: titles of the history, oldest first, see :meth:`item_title`; the newest are used.
            user: raw id of a user of the fitted data, whose profile and newest reviews go in too; None: only titles.
        """
        template, limit = self.manifest.user_template, self.manifest.user_titles
        if template is None:
            return ""
        profile, reviews = self.users.profile(user) if self.users is not None and user is not None else ({}, [])
        return user_text(profile, reviews, titles, template, limit, limit)


class _Seen(NamedTuple):
    """What tells one artefact at a place from the next, though it be the same export again."""

    manifest: bytes
    folder: tuple[int, int, int]


def _seen(folder: Path, patient: bool) -> _Seen:
    for _ in range(100):
        written = _manifest_bytes(folder, patient)
        try:
            found = folder.stat()
        except OSError:  # it went away just now
            continue
        # a folder that takes the place of another by renaming has another number, or at least another time
        return _Seen(written, (found.st_dev, found.st_ino, found.st_ctime_ns))
    raise ArtefactError(f"{folder} comes and goes.")


def _manifest_bytes(folder: Path, patient: bool) -> bytes:
    """The manifest's bytes; a folder that is being replaced may be away for a moment."""
    for wait in (0.05, 0.2, 0.0) if patient else (0.0,):
        try:
            return (folder / MANIFEST).read_bytes()
        except OSError:
            if wait and not folder.exists():
                time.sleep(wait)
                continue
            break
    raise ArtefactError(
        f"{folder / MANIFEST} is missing, so {folder} is no artefact: give a folder that `lightning-rec export` wrote."
    )
