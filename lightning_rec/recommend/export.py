"""From a fitted run to an artefact."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

import lightning_rec
from lightning_rec.data.catalogue_fields import NO_TEXT
from lightning_rec.data.datamodule import RecDataModule
from lightning_rec.data.freshness import NEVER, Lifetimes
from lightning_rec.data.text import Template
from lightning_rec.recommend.artefact import FIELD, ITEMS
from lightning_rec.recommend.compress import compress
from lightning_rec.recommend.export_impressions import FittedImpressions
from lightning_rec.recommend.export_towers import write_towers
from lightning_rec.recommend.fitted import Fitted, open_run
from lightning_rec.recommend.item_reading import FIELDS
from lightning_rec.recommend.lives import BORN, DIES, LIVES
from lightning_rec.recommend.manifest import MANIFEST, Manifest, file_digest, files_below
from lightning_rec.recommend.onnx import write_onnx
from lightning_rec.recommend.publish import check_output, new_folder
from lightning_rec.recommend.stored_users import USERS, users_table
from lightning_rec.recommend.vectors import VectorType, write_vectors
from lightning_rec.towers import LanguageUserTower

#: Writes an optional part: given the run and the new folder, which holds all else but the manifest. It returns the
#: part's name, which is also its folder's, and what the manifest says of it (``kind``, and ``lazy`` for files that are
#: checked when they are first used).
PartWriter = Callable[[Fitted, Path], tuple[str, Mapping[str, Any]]]


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    vectors: VectorType = "float32",
    users: bool = True,
    merge: bool = False,
    parts: Sequence[PartWriter] = (),
    progress: bool = True,
    keep_layers: int | None = None,
    quantise: bool = False,
    onnx: bool = False,
    max_age: float | None = None,
) -> Manifest:
    """Writes a fitted run as an artefact: a folder that answers without the data and the run.

    The folder is written beside its place and takes it at the end, whole; an artefact that lies there is replaced. A
    run of impressions (``ImpressionTwoTower``) is exported like one of interactions: a user's history then is the
    newest one that the log tells, with the clicks since; what the run learned of age and popularity adds to scores at
    the moment of a request, from the clicks of the log. Probabilities of clicks are no part of an artefact.

    Args:
        checkpoint: a file that ``lightning-rec fit`` wrote. Its data must still be where the run read it.
        output: the new folder, or an artefact to replace.
        vectors: how item vectors are stored: ``float32``; ``float16``, half as large; ``int8``, a quarter, with a scale
            for each row. What float16 and int8 cost in test NDCG@10 is measured and printed.
        users: export the histories of the users, with their raw ids, and what towers that read users' texts need of the
            user table. Without them a request must bring its history, and towers with a vector for each user know
            nobody.
        merge: merge an adapter into the language model, which then loads and answers faster.
        parts: writers of further parts.
        progress: show a progress bar.
        keep_layers: keep so many layers of the item tower's language model, counted from the input, and drop those
            above; None: all. For frozen models, those tuned whole and merged adapters. The projection behind it is
            fitted anew, by ridge regression from what the kept layers say to what all said, the catalogue is encoded
            anew, and what it saves and costs is printed.
        quantise: store the item tower's language model as int8 and compute with it, a quarter as large; likewise.
        onnx: write both towers as ONNX too, see :class:`lightning_rec.recommend.onnx.OnnxTowers`.
        max_age: for a run of impressions: answers hold items that were published, or first shown, at most so many hours
            before the request. None: all. A run of interactions brings its own limit, ``data.max_age``.

    Returns:
        The manifest that was written.

    Raises:
        ArtefactError: ``output`` holds something that is no artefact, or a run that cannot be exported.
        ValueError: vectors that are not finite or too large for float16; an adapter that cannot be merged; a tower
            that cannot be compressed or written as ONNX; ``max_age`` that the run cannot have.

    Example::

        export("runs/version_0/checkpoints/last.ckpt", "artefact", vectors="int8")
    """
    place = Path(os.path.abspath(output))
    check_output(place)  # before minutes of work
    fitted = open_run(Path(checkpoint))
    if not users and fitted.module.user_tower.uses_ids:
        warnings.warn(
            f"{type(fitted.module.user_tower).__name__} has a vector for each user, but users are not exported: "
            "popularity will answer those whom it knows by id only.",
            stacklevel=2,
        )
    with new_folder(place) as folder:
        manifest = write_artefact(
            fitted,
            folder,
            vectors,
            users,
            merge,
            parts,
            progress,
            keep_layers=keep_layers,
            quantise=quantise,
            onnx=onnx,
            max_age=max_age,
        )
    size = sum((place / name).stat().st_size for name in manifest.digests)
    strangers = manifest.parts.get("users", {}).get("profile_only", 0)
    count = manifest.n_users - 1 + strangers if users else 0
    by_profile = f", {strangers:,} of them by their profile only," if strangers else ""
    rank_zero_info(
        f"{manifest.n_items:,} items and {count:,} users{by_profile} were exported to {place} "
        f"({size / 2**20:,.1f} MiB)."
    )
    return manifest


def write_artefact(
    fitted: Fitted,
    folder: Path,
    vectors: VectorType = "float32",
    users: bool = True,
    merge: bool = False,
    parts: Sequence[PartWriter] = (),
    progress: bool = True,
    keep_layers: int | None = None,
    quantise: bool = False,
    onnx: bool = False,
    max_age: float | None = None,
) -> Manifest:
    """Writes all files of an artefact into an empty folder, the manifest last; see :func:`export`."""
    module, data = fitted.module, fitted.data
    shown = FittedImpressions.of(fitted)
    lifetimes = _lifetimes(fitted, shown, max_age)
    raw = _encode(fitted, progress)
    towers = write_towers(fitted, folder, merge)
    if keep_layers is not None or quantise:
        raw = compress(fitted, folder, towers, raw, keep_layers, quantise, progress)
    if onnx:
        name, said = write_onnx(fitted, folder, towers, raw)
        towers.parts[name] = said
    stored = write_vectors(folder, raw, vectors)
    loss = None if vectors == "float32" else _loss(fitted, raw, stored, vectors, progress)
    pq.write_table(items_table(fitted, lifetimes), folder / ITEMS)
    written = dict(towers.parts)
    if lifetimes is not None:
        hours = lifetimes.max_age
        written[LIVES] = {"kind": LIVES, "max_age": hours if np.isfinite(hours) else None}
    if (fields := _fields_read(fitted)) is not None:
        written[FIELDS] = {"kind": FIELDS, "names": fields}
    if shown is not None:
        written |= shown.write(folder)
    view = data.view
    reads_text = any(isinstance(part, LanguageUserTower) for part in module.user_tower.modules()) or (
        data.user_template is not None and not type(module.user_tower).__module__.startswith("lightning_rec.")
    )
    if users:
        if shown is not None:
            strangers = shown.strangers() if reads_text else {}
            table = shown.users(strangers)
        else:
            strangers = _strangers(fitted) if reads_text else {}
            table = _users(fitted, strangers)
        pq.write_table(table, folder / USERS)
        written["users"] = {"kind": "users"} | ({"profile_only": len(strangers)} if strangers else {})
        written["users"] |= {} if shown is None else shown.until()
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        package_version=lightning_rec.__version__,
        protocol=data.protocol if shown is None else shown.protocol(lifetimes),
        metrics=fitted.test_metrics(),
        item_tower=towers.specs["item_tower"],
        user_tower=towers.specs["user_tower"],
        score=towers.specs["score"],
        dim=int(stored.shape[1]),
        n_items=module.n_rows - 1,
        n_users=module.n_users,
        dtype=vectors,
        filter_seen=data.filter_seen if isinstance(data, RecDataModule) else True,
        max_history=data.max_history,
        cleaning=list(data.cleaning),
        template=_template(fitted),
        text_tower=_reads_text(module.item_tower),
        reads_user_text=reads_text,
        user_template=data.user_template,
        user_titles=data.user_titles,
        rating_range=None if view.rating_range is None else [float(value) for value in view.rating_range],
        rating_mean=view.rating_mean,
        ids_digest=view.ids_digest,
        users_digest=view.users_digest,
        texts_digest=view.digest,
        vector_loss=loss,
        parts=written,
    )
    for write in parts:
        part, told = write(fitted, folder)
        manifest.parts[part] = dict(told)
    manifest = replace(manifest, digests={name: file_digest(folder / name) for name in files_below(folder)})
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _encode(fitted: Fitted, progress: bool) -> Tensor:
    total = fitted.module.n_rows - 1
    with tqdm(total=total, desc="Encoding items", unit="item", disable=not progress, leave=False) as bar:
        return fitted.encode_catalogue(bar)


def _loss(fitted: Fitted, raw: Tensor, stored: Tensor, dtype: str, progress: bool) -> dict[str, float] | None:
    one = "user" if isinstance(fitted.data, RecDataModule) else "impression"
    with tqdm(total=2 * fitted.n_test, desc="Testing vectors", unit=one, disable=not progress, leave=False) as bar:
        before, after = fitted.test_ndcg(raw, bar), fitted.test_ndcg(stored, bar)
    if before is None or after is None:
        missed = "has a test target" if one == "user" else "of a test part has labels"
        rank_zero_info(f"Item vectors as {dtype}: the loss is unknown, since no {one} {missed}.")
        return None
    rank_zero_info(
        f"Item vectors as {dtype}: test NDCG@10 {after:.4f}, with float32 {before:.4f} ({after - before:+.4f})."
    )
    return {"float32": before, "stored": after}


def _lifetimes(fitted: Fitted, shown: FittedImpressions | None, max_age: float | None) -> Lifetimes | None:
    """When items can be recommended; None: always."""
    if shown is not None:
        return shown.lifetimes(max_age)
    if max_age is not None:
        raise ValueError(
            "max_age is an option for runs of impressions: a run of interactions is fitted and tested with its limit, "
            "data.max_age, and exported with it. Leave max_age out."
        )
    return fitted.data.lifetimes if isinstance(fitted.data, RecDataModule) else None


def _reads_text(tower: Any) -> bool:
    """Whether an item tower makes vectors of texts; a tower of fields needs one that holds text."""
    return hasattr(tower, "encode_texts") and (not hasattr(tower, "encode_items") or len(tower.text_fields) > 0)


def _fields_read(fitted: Fitted) -> list[str] | None:
    """The fields that the item tower reads, where it reads fields that the catalogue has; None: it reads texts."""
    tower: Any = fitted.module.item_tower
    if not hasattr(tower, "encode_items"):
        return None
    names = list(tower.fields)
    return names if any(name in fitted.data.view.fields for name in names) else None


def items_table(fitted: Fitted, lifetimes: Lifetimes | None) -> pa.Table:
    """One row an item: ``item_id``, ``text``, ``display``, ``interactions`` and ``field.NAME`` for each field.

    Where candidates are limited to what is alive, also ``born`` and ``dies``, in seconds since 1970; null for never.
    """
    catalogue = fitted.data.catalogue
    n = len(catalogue)
    columns: dict[str, Any] = {
        "item_id": pa.array(catalogue.ids[1:], pa.string()),
        "text": pa.array(catalogue.texts[1:], pa.large_string()),
        "display": pa.array([catalogue.display(row) for row in range(1, n)], pa.large_string()),
        "interactions": pa.array(fitted.module.train_counts[1:].cpu().numpy().astype(np.int64)),
    }
    if lifetimes is not None:
        for name, moments in ((BORN, lifetimes.born[1:]), (DIES, lifetimes.dies[1:])):
            columns[name] = pa.array(moments, pa.int64(), mask=moments == NEVER)
    table = catalogue.table
    if table is not None:
        arrow = table.with_format("arrow")[:]
        for name in arrow.column_names:
            if name != "item_id":
                column = arrow.column(name)
                rest = pa.nulls(n - 1 - len(column), column.type)
                columns[FIELD + name] = pa.chunked_array([*column.chunks, rest], type=column.type)
    return pa.table(columns)


def _strangers(fitted: Fitted) -> dict[str, Mapping[str, Any]]:
    """The profiles of users without any interaction, where they tell something."""
    assert isinstance(fitted.data, RecDataModule)
    maker, names = fitted.data.user_texts, fitted.data.profile_only
    if maker is None:
        return {}
    none = np.zeros(len(names), dtype=np.int64)
    return {name: maker.profiles[name] for name, text in zip(names, maker(none, none, names), strict=True) if text}


def _users(fitted: Fitted, strangers: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    assert isinstance(fitted.data, RecDataModule)
    data, histories = fitted.data, fitted.data.histories
    ids = data.user_ids[1:]
    first = int(histories.indptr[1])
    touched = data.touched
    maker = data.user_texts
    profiles = reviews = None
    if maker is not None:
        profiles = [maker.profiles.get(user, {}) for user in ids]
        if maker.reviews is not None:
            ends = histories.indptr
            reviews = [
                maker._newest_reviews(int(ends[row]), int(ends[row + 1])) for row in range(1, len(data.user_ids))
            ]
    return users_table(
        ids,
        (histories.indptr[1:] - first, histories.items[first:]),
        None if histories.times is None else histories.times[first:],
        None if touched is None else (touched.indptr[1:] - touched.indptr[1], touched.items[int(touched.indptr[1]) :]),
        profiles,
        reviews,
        strangers,
    )


def _template(fitted: Fitted) -> str | None:
    """The template that made the items' texts; where the run named none, all fields in the order of the table."""
    data = fitted.data
    template = data.default_template if data.template is None else data.template
    table = data.catalogue.table
    if template is None and table is not None:
        template = ". ".join("{" + name + "}" for name in table.column_names if name not in NO_TEXT) or None
    return None if template is None else Template(template).text
