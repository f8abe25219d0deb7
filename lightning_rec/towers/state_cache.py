"""Hidden states of a language model on disk, as arrays that are mapped into memory instead of read.

As with :class:`~lightning_rec.towers.text_cache.VectorCache`, a file is named by a hash of everything that it depends
on, and appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_rec.towers.text_cache import default_cache_dir

CacheDtype = Literal["float32", "float16"]
_HALF_MAX = 65504.0


def as_stored(states: Tensor, dtype: CacheDtype) -> Tensor:
    """States with the rounding that the cache gives them; what half precision cannot hold is cut to its largest."""
    if dtype == "float16":
        return states.float().clamp(-_HALF_MAX, _HALF_MAX).half()
    return states.float()


class StateCache:
    """Arrays on disk, a ``.npy`` file a key.

    Args:
        folder: where files lie; None: :func:`~lightning_rec.towers.text_cache.default_cache_dir`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = (Path(folder).expanduser() if folder else default_cache_dir()) / "hidden_states"

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}.npy"

    def read(self, key: str, shape: tuple[int, ...], dtype: CacheDtype) -> np.ndarray[Any, Any] | None:
        """The array, mapped copy-on-write; None when there is none or the file is damaged."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            array = np.load(path, mmap_mode="c", allow_pickle=False)
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise ValueError(f"it holds {array.dtype} {array.shape} where {dtype} {shape} is due")
        except (OSError, ValueError) as error:
            warnings.warn(f"The cached hidden states in {path} are damaged ({error}); made again.", stacklevel=2)
            return None
        return array

    def get(
        self,
        key: str,
        shape: tuple[int, ...],
        dtype: CacheDtype,
        fill: Callable[[np.ndarray[Any, Any]], None],
    ) -> np.ndarray[Any, Any]:
        """The array of a key, made and stored when it is not there. Without room on disk it stays in memory.

        Args:
            key: names everything that the array depends on.
            shape: its shape.
            dtype: its type.
            fill: writes every value into the array that it is given.
        """
        found = self.read(key, shape, dtype)
        if found is not None:
            return found
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not size:
            return np.zeros(shape, dtype)  # nothing cannot be mapped
        temporary: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < size + (1 << 20):  # a mapped file on a full disk would end the process, not raise
                raise OSError(f"{size:,} bytes are needed and {free:,} are free")
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{key[:16]}-", suffix=".tmp")
            os.close(handle)
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(dtype), shape=shape)
        except OSError as error:
            warnings.warn(f"Could not store hidden states in {self.folder}: {error}. Kept in memory.", stacklevel=2)
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)
            memory = np.empty(shape, dtype)
            fill(memory)
            return memory
        try:
            fill(array)
            array.flush()
            del array
            os.replace(temporary, self.path(key))
        except BaseException:
            os.unlink(temporary)
            raise
        stored = self.read(key, shape, dtype)
        if stored is None:
            raise OSError(f"The hidden states just written to {self.path(key)} cannot be read again.")
        return stored


def rows_of(array: np.ndarray[Any, Any], places: Tensor) -> Tensor:
    """``array[places]`` as a float32 tensor on the device of ``places``; only those rows are read."""
    return torch.from_numpy(array[places.cpu().numpy()]).to(places.device).float()
