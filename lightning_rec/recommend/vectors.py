"""Item vectors on disk: whole, in half precision, or as whole numbers of eight bits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_rec.recommend.types import VectorType

VECTORS = "item_vectors.safetensors"
_LEVELS = 127


def pack(vectors: Tensor, dtype: VectorType) -> dict[str, Tensor]:
    """Vectors as they are stored.

    Args:
        vectors: ``(n, d)`` float32.
        dtype: ``int8`` stores the largest magnitude of each row over 127 as the row's scale.

    Returns:
        ``vectors``, and for int8 ``scales`` ``(n,)``.

    Raises:
        ValueError: vectors that are not finite, or too large for float16.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise ValueError("Some item vectors are not finite: the run has diverged. Export another checkpoint.")
    if dtype == "float32":
        return {"vectors": vectors.contiguous()}
    if dtype == "float16":
        half = vectors.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ValueError(
                f"The largest feature of the item vectors is {vectors.abs().max():.0f}, and float16 ends at 65504: "
                "store them as float32 or int8."
            )
        return {"vectors": half.contiguous()}
    scales = vectors.abs().amax(1) / _LEVELS
    levels = (vectors / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-_LEVELS, _LEVELS)
    return {"vectors": levels.to(torch.int8).contiguous(), "scales": scales.contiguous()}


def unpack(stored: dict[str, Tensor]) -> Tensor:
    """``(n, d)`` float32 vectors of what :func:`pack` returned."""
    vectors = stored["vectors"].float()
    return vectors * stored["scales"][:, None] if "scales" in stored else vectors


def write_vectors(folder: Path, vectors: Tensor, dtype: VectorType) -> Tensor:
    """Writes vectors into a folder, and returns them as they will be read."""
    stored = pack(vectors, dtype)
    save_file(stored, folder / VECTORS)
    return unpack(stored)


def read_vectors(folder: Path) -> Tensor:
    """``(n, d)`` float32 vectors."""
    return unpack(load_file(folder / VECTORS))
