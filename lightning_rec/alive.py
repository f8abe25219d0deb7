"""Between the data and the ranking: what is alive when the users of a batch ask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rec.data.batch import Batch
from lightning_rec.data.freshness import Lifetimes
from lightning_rec.metrics import AliveWindows


def alive_windows(datamodule: Any, batch: Batch, users: Tensor | None = None) -> AliveWindows | None:
    """The lives of the items and the moments of the requests, where the data limits candidates to what is alive.

    Args:
        datamodule: of the run, or None.
        batch: of evaluation or prediction.
        users: ``(u,)`` positions of the users in the batch; None for all.

    Returns:
        What ``rank_and_top`` takes; None where every item is a candidate.
    """
    lifetimes: Lifetimes | None = getattr(datamodule, "lifetimes", None)
    if lifetimes is None or batch.times is None:
        return None
    born, dies = lifetimes.on(batch.times.device)
    return AliveWindows(born, dies, batch.times if users is None else batch.times[users])
