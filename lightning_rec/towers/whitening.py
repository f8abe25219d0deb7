"""Whitening: text vectors made to have mean 0 and no correlation, so that their cosine and distance say more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: Directions whose variance is below this share of the largest, or of the mean square, are rounding, not text.
_NOTHING, _ROUNDING = 1e-10, 1e-12


class Whitening(nn.Module):
    """An affine map that gives the catalogue's text vectors mean 0 and the identity as covariance.

    Su et al., "Whitening Sentence Representations for Better Semantics and Faster Retrieval", 2021 (arXiv:2103.15316),
    used for recommendation by UniSRec (Hou et al., "Towards Universal Sequence Representation Learning for Recommender
    Systems", KDD 2022). Vectors of a language model lie in a narrow cone, a few directions of which hold most of the
    variance; whitening gives all directions the same.

    The statistics are buffers in float64, part of the checkpoint: what comes later is seen as training saw the
    catalogue. A direction in which the catalogue does not vary at all is dropped, not blown up.

    Args:
        width: width of the vectors.
        dims: keep so many directions, those with the most variance; None: all.
        eps: ridge, as a share of the mean variance, that is added to the variance of every direction before its root
            divides it; so the smallest ones, which are mostly noise, grow less. 0: exact whitening.

    Attributes:
        mean: ``(width,)`` mean of the catalogue.
        matrix: ``(width, dims)`` what centred vectors are multiplied by.

    Raises:
        ValueError: when ``dims`` or ``eps`` is out of range.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, dims: int | None = None, eps: float = 0.0) -> None:
        super().__init__()
        if dims is not None and not 1 <= dims <= width:
            raise ValueError(
                f"whiten_dims is {dims}, but the vectors have {width} features: keep 1 to {width} of them."
            )
        if not eps >= 0:
            raise ValueError(f"whiten_eps is {eps}; it must be at least 0.")
        self.dims = dims or width
        self.eps = eps
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("matrix", torch.eye(width, dtype=torch.float64)[:, : self.dims].clone())

    @torch.no_grad()
    def measure(self, vectors: Tensor) -> None:
        """Takes the statistics of ``(n, width)`` vectors, in float64."""
        self.measure_parts(lambda: [vectors])

    @torch.no_grad()
    def measure_parts(self, parts: Callable[[], Iterable[Tensor]]) -> None:
        """The same of vectors that come in parts, such as those that do not fit into memory together.

        Args:
            parts: gives the parts, ``(n, width)`` each, from the first to the last. It is called twice: the mean must
                be known before what lies around it is summed, or large sums would lose what is small.
        """

        def exact() -> Iterator[Tensor]:
            return (part.detach().to(self.mean.device, torch.float64) for part in parts())

        count, total, squares = 0, torch.zeros_like(self.mean), 0.0
        for part in exact():
            count, total, squares = count + len(part), total + part.sum(0), squares + float(part.square().sum())
        mean = total / count
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        for part in exact():
            centred = part - mean
            covariance += centred.t() @ centred
        variance, directions = torch.linalg.eigh(covariance / count)
        variance, directions = variance.flip(0), directions.flip(1)  # the most variance first
        # The sign of a direction is arbitrary; this one is the same on every machine.
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)
        real = (variance > _NOTHING * variance[0]) & (variance > _ROUNDING * squares / (count * len(mean)))
        ridge = self.eps * variance.clamp_min(0).mean()
        scale = torch.where(real, (variance.clamp_min(0) + ridge).clamp_min(1e-300).rsqrt(), 0.0)
        self.mean.copy_(mean)
        self.matrix.copy_((directions * scale)[:, : self.dims])

    def forward(self, vectors: Tensor) -> Tensor:
        """``(n, width)`` vectors to ``(n, dims)`` whitened ones of the same type."""
        exact = vectors.to(self.mean.device, torch.float64)
        return ((exact - self.mean) @ self.matrix).to(vectors.device, vectors.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A run in half precision halves its buffers; the root of a small variance would not survive that. A device
        # without float64 (Apple's) leaves the statistics on the CPU.
        device = fn(torch.empty(0, device=self.mean.device)).device
        if device.type != "mps":
            self.mean, self.matrix = self.mean.to(device), self.matrix.to(device)
        return self

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"width={len(self.mean)}, dims={self.dims}, eps={self.eps}"
