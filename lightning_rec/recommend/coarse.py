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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_rec.recommend.threads import one_thread

#: Users up to whom the first look is faster than a product in float32.
FEW_USERS = 8
#: Smaller catalogues lie in the processor's caches.
_SMALLEST = 2**22
#: Full scans after which a first look is prepared, unless somebody asks for it: who wants one answer gets no more.
_PATIENCE = 5
#: One row in so many that has changed since is scored in full every time; with more of them it is prepared anew.
_RENEWED = 128
#: A first look that leaves more than one row in so many is not worth it.
_WORTH = 16
_CHUNK = 2**12  # rows that fit in the processor's caches
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
        largest = vectors.abs().amax(1)
        if not bool(torch.isfinite(largest).all()):
            raise RuntimeError("Vectors that are not finite have no bounds.")
        scales = (largest.double() / _LEVELS).clamp_min(_TINY)
        self.norms, self.lost = vectors.new_empty(len(vectors)), vectors.new_empty(len(vectors))
        with warnings.catch_warnings():
            # tensors with a quantised dtype are to leave torch one day; then full scans answer
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            levels = torch.quantize_per_channel(vectors, scales, zeros, 0, torch.qint8)
        whole = levels.int_repr()
        for start in range(0, len(vectors), _CHUNK):
            some = slice(start, start + _CHUNK)
            rounded = whole[some] * scales[some, None]
            self.norms[some] = rounded.norm(dim=1).float()
            self.lost[some] = (vectors[some] - rounded).norm(dim=1).float()
        self._packed: Any = torch.ops.quantized.linear_prepack(levels, None)
        self._try(vectors)

    def _try(self, vectors: Tensor) -> None:
        """Looks whether torch rounds the input as is assumed here."""
        interest = vectors[:FEW_USERS] + 0.5 * vectors[-FEW_USERS:].flip(0)[: len(vectors[:FEW_USERS])]
        lower, upper = (bound[:, :_CHUNK] for bound in self.bounds(interest))
        exact = interest.double() @ vectors[:_CHUNK].double().t()
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

    def candidates(
        self, interest: Tensor, k: int, excluded: Sequence[Tensor | None], stale: Tensor, n: int
    ) -> list[Tensor] | None:
        """For each user the rows that may be among the ``k`` best, ascending; None where they are too many.

        Args:
            interest: ``(b, d)`` interest vectors.
            k: how many are wanted.
            excluded: rows that must not come, one or several tensors a user.
            stale: rows of which nothing is known: they may be among the best.
            n: number of rows; those that are more than this has vectors for are ``stale``.
        """
        lower, upper = self.bounds(interest)
        if lower.shape[1] < n:
            more = lower.new_zeros(len(lower), n - lower.shape[1])
            lower, upper = torch.cat([lower, more], dim=1), torch.cat([upper, more], dim=1)
        if len(stale):
            lower[:, stale], upper[:, stale] = -torch.inf, torch.inf
        lower[:, 0] = upper[:, 0] = -torch.inf
        for low, high, rows in zip(lower, upper, excluded, strict=True):
            if rows is not None and len(rows):
                low.index_fill_(0, rows, -torch.inf)
                high.index_fill_(0, rows, -torch.inf)
        least = lower.topk(k, dim=1).values[:, -1:]
        if not bool(torch.isfinite(least).all()):
            return None
        found = [row.nonzero()[:, 0] for row in upper >= least]
        return found if max(len(rows) for rows in found) <= n // _WORTH else None


class _Making:
    """A :class:`CoarseScan` that is being made in the background; the vectors are let go of when it is.

    Attributes:
        scan: None until it is made, and where it cannot be: full scans answer then as before.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.scan: CoarseScan | None = None
        # no daemon: Python's end would cut torch off within a computation, which ends the process by abort()
        self._thread = threading.Thread(target=self._make, args=(vectors,), name="coarse-scan")
        self._thread.start()

    @property
    def failed(self) -> bool:
        return not self._thread.is_alive() and self.scan is None

    @property
    def under_way(self) -> bool:
        return self._thread.is_alive() and self.scan is None

    def wait(self) -> None:
        self._thread.join()

    @torch.inference_mode()
    def _make(self, vectors: Tensor) -> None:
        with one_thread():  # requests go on
            try:
                self.scan = CoarseScan(vectors)
            except (RuntimeError, AttributeError):  # no such product here, or vectors that are not finite
                self.scan = None


@dataclass(frozen=True, eq=False)
class Look:
    """A first look that was made of the vectors of a catalogue, or of an earlier one.

    Attributes:
        making: holds it, sooner or later.
        stale: the rows whose vectors have changed or come since, ascending.
    """

    making: _Making
    stale: Tensor

    def candidates(self, interest: Tensor, k: int, excluded: Sequence[Tensor | None], n: int) -> list[Tensor] | None:
        """See :meth:`CoarseScan.candidates`."""
        scan = self.making.scan
        return None if scan is None else scan.candidates(interest, k, excluded, self.stale, n)


class Preparation:
    """The first look at the vectors of one catalogue: prepared in the background, and taken over by the next one.

    At most one is being made at a time, and an earlier one answers meanwhile: there are never more than two, however
    often the catalogue changes.

    Args:
        vectors: ``(n, d)`` item vectors.
        looks: those of an earlier catalogue, the newest last.
    """

    def __init__(self, vectors: Tensor, looks: Sequence[Look] = ()) -> None:
        self._vectors = vectors
        self._fits = vectors.numel() >= _SMALLEST and vectors.device.type == "cpu" and vectors.dtype == torch.float32
        self._left = _PATIENCE
        self._looks = list(looks)
        self._lock = threading.Lock()

    def following(self, vectors: Tensor) -> Preparation:
        """That of the next catalogue, most of whose vectors are the same: only the others are looked at in full.

        Args:
            vectors: ``(m, d)`` item vectors; a row keeps its number.
        """
        old = self._vectors
        if vectors is old:
            return self
        with self._lock:
            looks = [look for look in self._looks if not look.making.failed]
        if not looks or len(vectors) < len(old) or vectors.shape[1] != old.shape[1]:
            return Preparation(vectors)
        parts = zip(vectors[: len(old)].split(_CHUNK), old.split(_CHUNK), strict=True)
        # the largest difference of a row: a fifth of the time that asking for any takes
        changed = torch.cat([(new - before).abs_().amax(1) != 0 for new, before in parts]).nonzero()[:, 0]
        changed = torch.cat([changed, torch.arange(len(old), len(vectors))])
        return Preparation(vectors, [Look(look.making, torch.cat([look.stale, changed]).unique()) for look in looks])

    def scan(self) -> Look | None:
        """What is prepared; None: make a full scan, which is counted."""
        with self._lock:
            ready = [look for look in self._looks if look.making.scan is not None][-1:]
            if ready:
                self._looks = self._looks[self._looks.index(ready[0]) :]
                if len(ready[0].stale) > len(self._vectors) // _RENEWED:
                    self._begin()
                return ready[0]
            self._left -= 1
            if self._left == 0:
                self._begin()
            return None

    def begin(self) -> None:
        """Begins now, whatever the number of scans; where it does not pay, or has begun, nothing happens."""
        with self._lock:
            self._begin()

    def _begin(self) -> None:
        begun = any(look.making.under_way or not len(look.stale) for look in self._looks)
        if self._fits and not begun:
            none = torch.zeros(0, dtype=torch.int64)
            self._looks = [*self._looks[-1:], Look(_Making(self._vectors), none)]

    def wait(self) -> None:
        """Waits for what has begun."""
        for look in list(self._looks):
            look.making.wait()
