"""Putting a finished folder in its place, whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_rec.recommend.manifest import MANIFEST, ArtefactError, Manifest, files_below

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_output(output: Path) -> None:
    """Refuses a place whose content is not an earlier artefact, since it would be replaced.

    Raises:
        ArtefactError: naming what is there.
    """
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise ArtefactError(f"{output} exists and is no folder: name a new folder as output, or an artefact.")
    if not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise ArtefactError(f"{output} exists and is no artefact: name a new folder, or move away what is there.")
    manifest = Manifest.from_json((output / MANIFEST).read_bytes(), output / MANIFEST)
    foreign = sorted(set(files_below(output)) - set(manifest.digests))
    if foreign:
        raise ArtefactError(
            f"{output / foreign[0]} is no part of the artefact that lies there, and would be deleted with it: move it "
            "away, or name another folder."
        )


@contextmanager
def new_folder(output: Path, check: Callable[[Path], None] = check_output) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its place when the block ends without an error.

    A reader sees the old folder or the new one. After an error the old folder is whole, and the temporary one gone. A
    process that is killed may leave a hidden folder ``.NAME.XXXX.part`` beside ``output``; it may be deleted. Where the
    file system cannot exchange two folders (outside Linux, or on some network disks) the old one is moved aside for a
    moment, as ``.NAME.XXXX.part.old``: a process killed in just that moment leaves it there, to be renamed back.

    Args:
        output: the place; it may hold an earlier artefact.
        check: refuses a place whose content must not be replaced.
    """
    check(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        yield temporary
        _open_up(temporary)
        _sync(temporary)
        check(output)
        _replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange this is the old one


def _replace(new: Path, output: Path) -> None:
    if not output.exists():
        os.rename(new, output)
    elif not _exchange(new, output):
        aside = new.with_name(new.name + ".old")
        os.rename(output, aside)
        try:
            os.rename(new, output)
        except BaseException:
            os.rename(aside, output)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def _open_up(folder: Path) -> None:
    """Gives the folder and its files the rights of any new file: some libraries write for the owner alone."""
    probe = folder / ".probe"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for place, _, names in os.walk(folder):
        os.chmod(place, mode | (mode & 0o444) >> 2)  # who may read a folder may enter it
        for name in names:
            os.chmod(os.path.join(place, name), mode)


def _sync(folder: Path) -> None:
    """Writes a folder and all that is in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle of a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
