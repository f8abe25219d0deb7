"""What is known of an item that one user clicked, where it stands as a negative of the others in the same step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rec.data.batch import Batch

#: Hours that ages in float32 may be off.
_ROUNDING = 1 / 60


def at_clicks(batch: Batch, places: Tensor, quantity: Tensor | None, reduce: Literal["amin", "amax"]) -> Tensor | None:
    """``(e,)`` a quantity of items of the table when they were clicked, reduced where that happened more than once."""
    shown = batch.impressions
    assert shown is not None
    assert batch.items is not None
    if quantity is None:
        return None
    at = (shown.labels == 1) & ~quantity.isnan()
    start = torch.inf if reduce == "amin" else -torch.inf
    found = torch.full((len(batch.items),), start, dtype=quantity.dtype, device=quantity.device)
    found = found.scatter_reduce(0, shown.candidates[at], quantity[at], reduce)[places]
    return torch.where(found.isinf(), torch.nan, found)


def unborn_at(batch: Batch, places: Tensor) -> Tensor | None:
    """``(b, e)`` True where an item of the table was not yet there at a request; None without times."""
    shown = batch.impressions
    assert shown is not None
    if shown.times is None or shown.ages is None or not len(shown):
        return None
    hours = (shown.times - shown.times.min()).float() / 3600  # small numbers, for float32
    born = at_clicks(batch, places, hours[:, None] - shown.ages, "amin")
    return None if born is None else born > hours[:, None] + _ROUNDING  # never true of NaN
