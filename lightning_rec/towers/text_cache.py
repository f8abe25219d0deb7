"""The disk cache of the vectors of a frozen language model.

A cached file is named by a hash of everything that its vectors depend on, so it never goes stale: another text, another
tokenizer or other weights are another name. Two processes may race for one file: each writes a file of its own and
renames it, which is atomic.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

#: Raise when the way vectors are made changes, so that old files are not found any more.
FORMAT_VERSION = 1
_KIND = "lightning_rec text vectors"


def default_cache_dir() -> Path:
    """``LIGHTNING_REC_CACHE`` from the environment, or ``~/.cache/lightning_rec``."""
    return Path(os.environ.get("LIGHTNING_REC_CACHE") or Path.home() / ".cache" / "lightning_rec").expanduser()


def hash_texts(texts: Iterable[str]) -> str:
    """A hash of texts and their order; the lengths keep ``["ab", "c"]`` and ``["a", "bc"]`` apart."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """A hash of the names and bytes of files. Size and time are not enough: a file can be rewritten in place."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


class VectorCache:
    """Text vectors on disk, a safetensors file a catalogue.

    Args:
        folder: where files lie; None: :func:`default_cache_dir`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = (Path(folder).expanduser() if folder else default_cache_dir()) / "text_vectors"

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}.safetensors"

    def read(self, key: str, rows: int, width: int) -> Tensor | None:
        """The cached ``(rows, width)`` float32 vectors, or None when there are none or the file is damaged."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                vectors = file.get_tensor("vectors")
            if metadata.get("kind") != _KIND or tuple(vectors.shape) != (rows, width):
                raise ValueError(f"it holds {tuple(vectors.shape)} where {(rows, width)} is due")
            if metadata.get("sha256") != _digest(vectors):
                raise ValueError("its contents do not match its checksum")
        except Exception as error:  # any damage has the same remedy: encode again
            warnings.warn(f"The cached text vectors in {path} are damaged ({error}); encoding again.", stacklevel=2)
            return None
        return vectors

    def write(self, key: str, vectors: Tensor) -> None:
        """Stores vectors. A full or read-only disk costs the cache, not the run."""
        temporary: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{key[:16]}-", suffix=".tmp")
            os.close(handle)
            metadata = {"kind": _KIND, "sha256": _digest(vectors)}
            save_file({"vectors": vectors.contiguous()}, temporary, metadata=metadata)
            os.replace(temporary, self.path(key))
        except OSError as error:
            warnings.warn(f"Could not store text vectors in {self.folder}: {error}. Going on without.", stacklevel=2)
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)


def _digest(vectors: Tensor) -> str:
    data = vectors.detach().to(torch.float32).contiguous().numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()
