"""What is added to the scores of causal attention: how many events back, and how long ago.

Step ``t`` of a history asks about step ``s``, which is not later. Both biases read only what is known once event ``t``
has happened: the distance ``t - s``, and the time of event ``t`` minus that of event ``s``. The time of the request, or
of the item to be found, is never used: in training it is the time of the target, which nobody knows beforehand.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_rec.data.batch import UserBatch

#: A bucket of gaps ends at 1.35 times the end of the bucket before.
_LOG_WIDTH = 0.301


class DistanceBias(nn.Module):
    """A learned number for each head and each distance in events, added to the scores of attention.

    The relative position bias of T5 (Raffel et al., "Exploring the Limits of Transfer Learning", JMLR 2020): one table
    for all blocks. All numbers are 0 before training.

    Args:
        heads: number of attention heads.
        max_length: longest history, in events.
        buckets: None: a number for each distance. Else T5's buckets: half of them for one distance each, the others
            for ever more distances, growing with the logarithm up to ``max_length``.

    Raises:
        ValueError: when there are too few buckets.
    """

    bucket: Tensor

    def __init__(self, heads: int, max_length: int, buckets: int | None = None) -> None:
        super().__init__()
        if buckets is not None and buckets < 2:
            raise ValueError(f"relative_buckets is {buckets}; it must be at least 2, or null for one a distance.")
        distances = torch.arange(max_length)
        bucket = distances if buckets is None else distance_buckets(distances, buckets, max_length)
        # made of the options, so no part of a checkpoint
        self.register_buffer("bucket", bucket, persistent=False)
        self.table = nn.Parameter(torch.zeros(max_length if buckets is None else buckets, heads))

    def forward(self, t: int) -> Tensor:
        """``(heads, t, t)``: ``[h, i, j]`` is for step ``i`` that asks about step ``j``; later steps: as the same."""
        steps = torch.arange(t, device=self.table.device)
        back = (steps[:, None] - steps).clamp_min(0)
        return F.embedding(self.bucket[back], self.table).permute(2, 0, 1)


def distance_buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """T5's bucket of each distance, looking back only.

    Args:
        distances: distances in events, not negative.
        buckets: number of buckets.
        max_distance: from here on all is one bucket.
    """
    exact = buckets // 2
    if max_distance <= exact:
        return distances.clamp_max(buckets - 1)
    share = (distances.clamp_min(1).double() / exact).log() / math.log(max_distance / exact)
    far = exact + (share * (buckets - exact)).long()
    return torch.where(distances < exact, distances, far.clamp_max(buckets - 1))


class TimeGapBias(nn.Module):
    """A learned number for each head and each bucket of the time between two events, added to the scores of attention.

    Time intervals in attention are TiSASRec's (Li et al., "Time Interval Aware Self-Attention for Sequential
    Recommendation", WSDM 2020); the form, a bias of buckets of equal width in ``log(seconds)``, is that of HSTU (Zhai
    et al., "Actions Speak Louder than Words", ICML 2024). Unlike HSTU's code, which takes the time of the next event,
    the gap ends at the event that asks. One table for all blocks; all numbers are 0 before training.

    A time of 0 stands for an unknown one: a gap from or to it adds nothing. So a history without times is answered as
    one without this bias.

    Args:
        heads: number of attention heads.
        buckets: number of buckets: bucket ``k`` begins at ``exp(0.301 k)`` seconds, so that 64 of them reach five
            years. Longer gaps fall into the last.

    Raises:
        ValueError: when there is no bucket.
    """

    starts: Tensor

    def __init__(self, heads: int, buckets: int = 64) -> None:
        super().__init__()
        if not 1 <= buckets <= 128:
            raise ValueError(f"time_buckets is {buckets}; it must be between 1 and 128.")
        # whole seconds: the least gap of each bucket but the first, so that no bucket depends on rounding
        starts = [math.ceil(math.exp(_LOG_WIDTH * k)) for k in range(1, buckets)]
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.int64), persistent=False)
        self.table = nn.Parameter(torch.zeros(buckets, heads))

    def buckets(self, times: Tensor) -> Tensor:
        """``(b, t, t)`` the bucket of each pair of ``(b, t)`` times; one past the last where a time is unknown."""
        gap = (times[:, :, None] - times[:, None, :]).clamp_min(0)
        found = torch.bucketize(gap, self.starts, right=True)
        known = times != 0
        return torch.where(known[:, :, None] & known[:, None, :], found, len(self.table))

    def forward(self, times: Tensor) -> Tensor:
        """``(b, heads, t, t)`` of ``(b, t)`` int64 seconds: ``[u, h, i, j]`` is for ``i`` asking about ``j``."""
        table = F.pad(self.table, (0, 0, 0, 1))  # unknown: 0
        buckets = self.buckets(times)
        found = _Lookup.apply(table, buckets) if table.device.type == "cpu" else F.embedding(buckets, table)
        return found.permute(0, 3, 1, 2)


class _Lookup(torch.autograd.Function):
    """``F.embedding`` of a narrow table: its backward pass is several times faster on a CPU as sums by bucket."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return F.embedding(index, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        index = index.flatten()
        columns = [torch.bincount(index, column.flatten(), ctx.rows) for column in grad.unbind(-1)]
        return torch.stack(columns, -1).to(grad.dtype), None


class AttentionBias(nn.Module):
    """The sum of the biases that are asked for, and the mask that keeps attention causal.

    Args:
        heads: number of attention heads.
        max_length: longest history, in events.
        relative: add a :class:`DistanceBias`.
        relative_buckets: its number of buckets; None: one a distance.
        time: add a :class:`TimeGapBias`.
        time_buckets: its number of buckets.
    """

    def __init__(
        self,
        heads: int,
        max_length: int,
        relative: bool = True,
        relative_buckets: int | None = None,
        time: bool = False,
        time_buckets: int = 64,
    ) -> None:
        super().__init__()
        self.distance = DistanceBias(heads, max_length, relative_buckets) if relative else None
        self.time = TimeGapBias(heads, time_buckets) if time else None

    def forward(self, users: UserBatch) -> Tensor:
        """What is added to the scores.

        Args:
            users: ``b`` users with histories of ``t`` events, right-padded.

        Returns:
            ``(b, heads, t, t)`` or, without times, ``(1, heads, t, t)``; minus infinity for steps that come later.

        Raises:
            ValueError: when times are needed and the data has none.
        """
        t = users.history.shape[1]
        parts = []
        if self.distance is not None:
            parts.append(self.distance(t)[None])
        if self.time is not None:
            if users.times is None:
                raise ValueError(
                    "The user tower's time_bias needs the times of events, and the data has none: map the column of "
                    "times in the data module, or set model.user_tower.init_args.time_bias to false."
                )
            parts.append(self.time(users.times))
        later = torch.ones(t, t, dtype=torch.bool, device=users.history.device).triu(1)
        return sum(parts[1:], start=parts[0]).masked_fill(later, float("-inf"))
