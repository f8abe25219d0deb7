"""A first look at the items in eight bits, which leaves out only what cannot be among the best.

A matrix–vector product reads every item vector from memory, and that is what it waits for. Items in int8 are a quarter
as many bytes. Their product with the interest, also rounded, is off by no more than a bound that is known for each
item, so that the exact scores of the few items which the bound cannot rule out give the same list as a full scan (as
the VA-file does with its approximations: Weber, Schek and Blott, VLDB 1998).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rec.recommend.threads import one_thread

#: Users up to whom the first look is faster than a product in float32.
FEW_USERS = 8
#: Smaller catalogues lie in the processor's caches.
_SMALLEST = 2**22
#: Full scans after which a first look is prepared: they have cost as much time as that takes.
_PATIENCE = 100
_LEVELS, _INPUT_LEVELS = 127, 127  # seven bits of the input: with eight, sums overflow on processors without VNNI
_TINY = 1e-30
_ROUNDING = 4e-6  # of float32 sums, relative to the lengths of the vectors


class CoarseScan:
    """Item vectors in int8, with bounds of what that loses.

    Args:
        vectors: ``(n, d)`` float32 item vectors, finite.

    Raises:
        RuntimeError: torch has no int8 product for this processor.
    """

    def __init__(self, vectors: Tensor) -> None:
        if torch.backends.quantized.engine == "none" or not hasattr(torch, "quantize_per_channel"):
            raise RuntimeError("Torch has no int8 product for this processor.")
        scales = (vectors.abs().amax(1).double() / _LEVELS).clamp_min(_TINY)
        self.norms, self.lost = vectors.new_empty(len(vectors)), vectors.new_empty(len(vectors))
        with warnings.catch_warnings():
            # tensors with a quantised dtype are to leave torch one day; then full scans answer
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            levels = torch.quantize_per_channel(vectors, scales, zeros, 0, torch.qint8)
        whole = levels.int_repr()
        for start in range(0, len(vectors), 2**16):
            some = slice(start, start + 2**16)
            rounded = whole[some] * scales[some, None]
            self.norms[some] = rounded.norm(dim=1).float()
            self.lost[some] = (vectors[some] - rounded).norm(dim=1).float()
        self._packed: Any = torch.ops.quantized.linear_prepack(levels, None)
        self._try(vectors)

    def _try(self, vectors: Tensor) -> None:
        """Looks whether torch rounds the input as is assumed here."""
        interest = vectors[:FEW_USERS] + 0.5 * vectors.flip(0)[:FEW_USERS]
        lower, upper = self.bounds(interest)
        exact = interest.double() @ vectors.double().t()
        if not bool(((lower <= exact) & (exact <= upper)).all()):
            raise RuntimeError("Torch's int8 product rounds otherwise than expected.")

    def bounds(self, interest: Tensor) -> tuple[Tensor, Tensor]:
        """``(b, n)`` lowest and highest possible scores of ``(b, d)`` interest vectors."""
        largest = interest.abs().amax(1, keepdim=True).clamp_min(_TINY)
        scaled = interest / largest
        low, high = scaled.min().clamp_max(0), scaled.max().clamp_min(0)
        step = (high - low) / _INPUT_LEVELS
        zero = torch.round(-low / step)
        rounded = ((torch.round(scaled / step) + zero).clamp(0, _INPUT_LEVELS) - zero) * step
        # one more step for an entry that falls on the other side of a half
        moved = ((scaled - rounded).norm(dim=1, keepdim=True) + step) * largest
        scores = torch.ops.quantized.linear_dynamic(scaled, self._packed, True).mul_(largest)
        length = interest.norm(dim=1, keepdim=True)
        slack = torch.addcmul(length * self.lost, moved + _ROUNDING * length, self.norms)
        return scores - slack, scores.add_(slack)

    def candidates(self, interest: Tensor, k: int, excluded: Sequence[Tensor | None]) -> list[Tensor] | None:
        """For each user the rows that may be among the ``k`` best; None where they are too many to be worth it.

        Args:
            interest: ``(b, d)`` interest vectors.
            k: how many are wanted.
            excluded: rows that must not come, one or several tensors a user.
        """
        lower, upper = self.bounds(interest)
        lower[:, 0] = upper[:, 0] = -torch.inf
        for low, high, rows in zip(lower, upper, excluded, strict=True):
            if rows is not None and len(rows):
                low.index_fill_(0, rows, -torch.inf)
                high.index_fill_(0, rows, -torch.inf)
        least = lower.topk(k, dim=1).values[:, -1:]
        if not bool(torch.isfinite(least).all()):
            return None
        found = [row.nonzero()[:, 0] for row in upper >= least]
        return found if max(len(rows) for rows in found) <= lower.shape[1] // 16 else None


class Preparation:
    """Prepares a :class:`CoarseScan` in the background, once full scans have cost as much as that will.

    Args:
        vectors: ``(n, d)`` item vectors.
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors
        fits = vectors.numel() >= _SMALLEST and vectors.device.type == "cpu" and vectors.dtype == torch.float32
        self._left = _PATIENCE if fits else -1
        self._thread: threading.Thread | None = None
        self._ready: CoarseScan | None = None

    def scan(self) -> CoarseScan | None:
        """What is prepared; None: make a full scan, which is counted."""
        if self._ready is None and self._left > 0:
            self._left -= 1  # two threads may count one scan together, which does no harm
            if self._left == 0:
                # no daemon: Python's end would cut torch off within a computation, which ends the process by abort()
                self._thread = threading.Thread(target=self._prepare, name="coarse-scan")
                self._thread.start()
        return self._ready

    def wait(self) -> None:
        """Waits for a preparation that has begun."""
        if self._thread is not None:
            self._thread.join()

    @torch.inference_mode()
    def _prepare(self) -> None:
        with one_thread():  # requests go on
            if not bool(torch.isfinite(self._vectors).all()):
                return
            try:
                self._ready = CoarseScan(self._vectors)
            except (RuntimeError, AttributeError):  # no such product here: full scans answer as before
                self._ready = None
