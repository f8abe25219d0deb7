"""Sums that are the same in any order of batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

#: Figures are added as whole numbers of this share; room for 10^10 of them at a size of 50.
UNIT = 2.0**24


def whole(values: Tensor) -> Tensor:
    """Finite float values as int64 numbers of ``1 / UNIT``."""
    return (values * UNIT).round().to(torch.int64)


def parts(sums: Tensor) -> Tensor:
    """Sums of :func:`whole` as float64, on the processor (not every device has float64)."""
    return sums.cpu().double() / UNIT
