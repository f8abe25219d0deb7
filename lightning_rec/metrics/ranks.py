"""Ranks of targets and lists of the best items, over the whole catalogue in chunks.

Scores are compared exactly. A float32 matrix product gives a last digit that depends on the shape of the operands, so
that two items with equal vectors may or may not tie, and another chunk size may give another figure. Here every vector
is rounded to as many bits (:data:`SIGNIFICANT_BITS` less half the logarithm of the width) as let a float64 product sum
without rounding: the score of a pair is then the same number whatever the chunk, the batch, the number of threads or
the device. The rounding is about as fine as float32 itself: 23 bits of the largest entry of a vector at width 128.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: A sum of d products of two b-bit whole numbers is exact in float64 when 2 b + log2(d) <= 53.
SIGNIFICANT_BITS = 53

# Up to this many targets a user, one comparison of the block with each is faster than sorting scores into bins.
_FEW_TARGETS = 12


class ScoreTable:
    """Item vectors made ready for exact scoring, once for an evaluation instead of once a batch.

    Args:
        items: ``(n, d)`` item vectors; row 0 is padding.
    """

    def __init__(self, items: Tensor) -> None:
        self.items = items
        self.exact = exact_operand(items)
        self.finite = bool(torch.isfinite(items).all())

    def to(self, device: torch.device | str) -> ScoreTable:
        """The same table on ``device``."""
        return ScoreTable(self.items.to(device))


class AliveWindows(NamedTuple):
    """When each item can be recommended, and the moment of each user's request.

    A user's request at time ``t`` finds the rows with ``born <= t <= dies`` alive; the others are neither ranked nor
    recommended. What is alive for whom is worked out chunk by chunk and never stored for all users and items.

    Attributes:
        born: ``(n,)`` int64 first moment of each catalogue row, in the unit of ``times``.
        dies: ``(n,)`` int64 last moment of each catalogue row.
        times: ``(b,)`` int64 time of each request.
    """

    born: Tensor
    dies: Tensor
    times: Tensor

    def of(self, users: Tensor) -> AliveWindows:
        """The same for the requests at positions ``users``."""
        return self._replace(times=self.times[users])

    def chunk(self, start: int, end: int) -> Tensor:
        """``(b, end - start)`` True where a row from ``start`` on is alive at the request."""
        times = self.times[:, None]
        return (self.born[start:end] <= times) & (times <= self.dies[start:end])

    def rows(self, rows: Tensor) -> Tensor:
        """``(b, m)`` True where the user's own ``(b, m)`` catalogue rows are alive at the request."""
        times = self.times[:, None]
        return (self.born[rows] <= times) & (times <= self.dies[rows])


class HistoryBonus(NamedTuple):
    """What is added to the scores of the items in each user's history; see ``lightning_rec.towers.score.Score``.

    Attributes:
        rows: ``(b, s)`` int64 catalogue rows, padded with 0; a row may stand there twice and counts once.
        value: what is added; a finite number, or ``(b, 1)`` of them, one a user.
    """

    rows: Tensor
    value: float | Tensor

    def of(self, users: Tensor) -> HistoryBonus:
        """The same for the users at positions ``users``."""
        value = self.value[users] if isinstance(self.value, Tensor) else self.value
        return HistoryBonus(self.rows[users], value)


class RanksAndTop(NamedTuple):
    """What :func:`rank_and_top` returns.

    Attributes:
        ranks: ``(b, m)`` int64 ranks of the targets.
        scores: ``(b, k)`` scores of the recommended items, ``-inf`` where there is none.
        rows: ``(b, k)`` int64 catalogue rows of the recommended items, 0 where there is none.
    """

    ranks: Tensor
    scores: Tensor
    rows: Tensor


def exact_operand(vectors: Tensor) -> Tensor:
    """Rounds each vector so that dot products of two such vectors are exact in float64.

    Args:
        vectors: ``(n, d)`` of any float type.

    Returns:
        ``(n, d)`` float64: whole multiples of a power of two that depends on the largest entry of the row.
    """
    bits = (SIGNIFICANT_BITS - math.ceil(math.log2(max(2, vectors.shape[1])))) // 2
    vectors = vectors.detach().double()
    highest = vectors.abs().amax(1, keepdim=True).nan_to_num(1.0, posinf=1.0)
    shift = bits - torch.frexp(highest).exponent
    step = torch.ldexp(torch.ones_like(highest), shift)
    return torch.round(vectors * step).div_(step)


def target_ranks(
    interest: Tensor,
    items: Tensor | ScoreTable,
    targets: Tensor,
    seen: Tensor | None = None,
    *,
    alive: AliveWindows | None = None,
    bonus: HistoryBonus | None = None,
    chunk_size: int = 8192,
) -> Tensor:
    """The rank of each target among all items of the catalogue, with seen items and those not alive taken out.

    Ties and NaN count against the model: an item that scores as high as a target, and is not itself a target, ranks
    before it, and so does an item whose score is NaN. Targets of one user with equal scores are placed one after
    another, in their order.

    Args:
        interest: ``(b, d)`` interest vectors.
        items: ``(n, d)`` vectors of all catalogue rows, or a :class:`ScoreTable` of them; row 0 is padding.
        targets: ``(b, m)`` catalogue rows, padded with 0.
        seen: ``(b, s)`` catalogue rows that are not recommended to each user, padded with 0, or None.
        alive: when each item can be recommended, and the time of each request. None: always.
        bonus: what is added to the scores of items in the history, or None.
        chunk_size: number of items that are scored at once; memory is ``b × chunk_size``, the result is the same.

    Returns:
        ``(b, m)`` int64, 1 is the top. 0 for padding and for a repeated target (its first place counts). ``n``, which
        is beyond the last place, for a target that can never be recommended: one that is itself in ``seen``, that is
        not alive at the request, or whose own score is not finite.
    """
    return rank_and_top(interest, items, targets, seen, 0, alive=alive, bonus=bonus, chunk_size=chunk_size).ranks


def top_k(
    interest: Tensor,
    items: Tensor | ScoreTable,
    k: int,
    seen: Tensor | None = None,
    *,
    alive: AliveWindows | None = None,
    bonus: HistoryBonus | None = None,
    chunk_size: int = 8192,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best items of each user, best first, of equal ones the lower row first.

    Args:
        interest: ``(b, d)`` interest vectors.
        items: ``(n, d)`` vectors of all catalogue rows, or a :class:`ScoreTable` of them; row 0 is padding.
        k: how many; more than the catalogue holds is clamped.
        seen: ``(b, s)`` catalogue rows that are not recommended to each user, padded with 0, or None.
        alive: when each item can be recommended, and the time of each request. None: always.
        bonus: what is added to the scores of items in the history, or None.
        chunk_size: number of items that are scored at once; memory is ``b × chunk_size``, the result is the same.

    Returns:
        ``(b, min(k, n - 1))`` float scores and int64 catalogue rows. Where a user has fewer items left, the score is
        ``-inf`` and the row 0. An item whose score is not finite is never returned.
    """
    result = rank_and_top(interest, items, None, seen, k, alive=alive, bonus=bonus, chunk_size=chunk_size)
    return result.scores, result.rows


@torch.no_grad()
def rank_and_top(
    interest: Tensor,
    items: Tensor | ScoreTable,
    targets: Tensor | None,
    seen: Tensor | None,
    k: int,
    *,
    alive: AliveWindows | None = None,
    bonus: HistoryBonus | None = None,
    chunk_size: int = 8192,
) -> RanksAndTop:
    """:func:`target_ranks` and :func:`top_k` in one walk over the catalogue; arguments as there.

    Args:
        interest: ``(b, d)``.
        items: ``(n, d)`` or a :class:`ScoreTable`.
        targets: ``(b, m)``, or None for no ranks (``m`` = 0).
        seen: ``(b, s)`` or None.
        k: 0 for no list.
        alive: when each item can be recommended, or None.
        bonus: what is added to the scores of items in the history, or None.
        chunk_size: items a chunk.
    """
    device, dtype = interest.device, torch.promote_types(interest.dtype, torch.float32)
    if device.type == "mps":  # it has no float64
        vectors = items.items if isinstance(items, ScoreTable) else items
        wanted, taken = (None if x is None else x.cpu() for x in (targets, seen))
        living = None if alive is None else AliveWindows(*(x.cpu() for x in alive))
        more = None if bonus is None else bonus._replace(rows=bonus.rows.cpu())
        result = rank_and_top(
            interest.cpu(), vectors.cpu(), wanted, taken, k, alive=living, bonus=more, chunk_size=chunk_size
        )
        return RanksAndTop(*(x.to(device) for x in result))
    with torch.autocast(device.type, enabled=False):
        table = items if isinstance(items, ScoreTable) else ScoreTable(items)
        users, n = exact_operand(interest), table.exact.shape[0]
        if targets is None:
            targets = torch.zeros(len(interest), 0, dtype=torch.int64, device=device)
        counter = _RankCounter(users, table, targets, seen, alive, bonus)
        best = _Best(len(interest), min(k, n - 1), device)
        finite = table.finite and bool(torch.isfinite(interest).all())
        chunk_size = max(1, min(chunk_size, n - 1))
        # The last column takes what a scatter must put somewhere without effect.
        block = users.new_empty(len(users) * (chunk_size + 1))
        for start in range(1, n, chunk_size):
            width = min(chunk_size, n - start)
            scores = block[: len(users) * (width + 1)].view(len(users), width + 1)
            torch.mm(users, table.exact[start : start + width].t(), out=scores[:, :width])
            scores[:, width] = -torch.inf
            if bonus is not None:
                outside = (bonus.rows < start) | (bonus.rows >= start + width)
                columns = torch.where(outside, width, bonus.rows - start)
                # a row that stands there twice writes the same number twice
                scores.scatter_(1, columns, scores.gather(1, columns) + bonus.value)
            if seen is not None:
                outside = (seen < start) | (seen >= start + width)
                scores.scatter_(1, torch.where(outside, width, seen - start), -torch.inf)
            if alive is not None:
                scores[:, :width].masked_fill_(~alive.chunk(start, start + width), -torch.inf)
            counter.add(scores)
            if best.k:
                if not finite:
                    scores.masked_fill_(~torch.isfinite(scores), -torch.inf)
                best.add(scores[:, :width], start)
        return RanksAndTop(counter.ranks(n), best.scores.to(dtype), best.rows)


class _RankCounter:
    """Counts, chunk by chunk, the items that a target does not beat."""

    def __init__(
        self,
        users: Tensor,
        table: ScoreTable,
        targets: Tensor,
        seen: Tensor | None,
        alive: AliveWindows | None,
        bonus: HistoryBonus | None,
    ) -> None:
        self.targets = targets
        self.scores = _pair_scores(users, table.exact, targets)
        if bonus is not None:
            self.scores = torch.where(_contains(bonus.rows, targets), self.scores + bonus.value, self.scores)
        m = targets.shape[1]
        before = torch.ones(m, m, dtype=torch.bool, device=targets.device).tril(-1)
        repeated = ((targets[:, :, None] == targets[:, None, :]) & before).any(2)
        self.asked = (targets > 0) & ~repeated
        self.possible = self.asked & torch.isfinite(self.scores)
        if seen is not None:
            self.possible &= ~_contains(seen, targets)
        if alive is not None:
            self.possible &= alive.rows(targets)
        self.not_beaten = torch.zeros_like(targets)
        self.sorted, self.order = self.scores.sort(1)

    def add(self, block: Tensor) -> None:
        """Counts the columns of ``block`` that are not below each target; taken-out items hold ``-inf``."""
        b, m = self.targets.shape
        if m <= _FEW_TARGETS:
            for j in range(m):
                # "Not below" rather than "at least", so that NaN counts.
                beaten = block < self.scores[:, j : j + 1]
                # Summing bytes into int32 is about twice as fast on a CPU as summing booleans into int64.
                self.not_beaten[:, j] += block.shape[1] - beaten.view(torch.uint8).sum(1, dtype=torch.int32)
            return
        # Bin i holds the scores that are not below exactly the i lowest targets; NaN sorts above them all.
        bins = torch.searchsorted(self.sorted, block, right=True)
        held = torch.zeros(b, m + 1, dtype=torch.int64, device=block.device)
        held.scatter_add_(1, bins, torch.ones_like(bins))
        above = held.flip(1).cumsum(1).flip(1)[:, 1:]
        self.not_beaten.scatter_add_(1, self.order, above)

    def ranks(self, n: int) -> Tensor:
        """``(b, m)`` ranks: the other items that are not beaten, then the targets in the order of their scores."""
        scores = torch.where(self.possible, self.scores, -torch.inf)
        ahead, here = scores[:, None, :], scores[:, :, None]
        other = self.possible[:, None, :]
        targets_not_beaten = ((ahead >= here) & other).sum(2)
        m = scores.shape[1]
        earlier = torch.ones(m, m, dtype=torch.bool, device=scores.device).tril(-1)
        targets_before = (((ahead > here) | ((ahead == here) & earlier)) & other).sum(2)
        ranks = 1 + self.not_beaten - targets_not_beaten + targets_before
        return torch.where(self.possible, ranks, n).masked_fill_(~self.asked, 0)


class _Best:
    """The best items so far of each user, best first, of equal ones the lower row first."""

    def __init__(self, users: int, k: int, device: torch.device) -> None:
        self.k = k
        self.scores = torch.full((users, k), -torch.inf, dtype=torch.float64, device=device)
        self.rows = torch.zeros(users, k, dtype=torch.int64, device=device)

    def add(self, block: Tensor, start: int) -> None:
        """Merges ``block``, whose columns are the catalogue rows from ``start`` on, above all rows so far."""
        k = min(self.k, block.shape[1])
        # One more than needed shows whether the last place is a tie, where `topk` takes any of the equal items.
        values, columns = block.topk(min(k + 1, block.shape[1]), dim=1)
        if values.shape[1] > k:
            last = values[:, k - 1]
            # What is no better than the list's last loses to it anyway: the list holds lower rows.
            unsure = ((last == values[:, k]) & (last > self.scores[:, -1])).nonzero()[:, 0]
            values, columns = values[:, :k], columns[:, :k]
            if len(unsure):
                ordered = block[unsure].sort(dim=1, descending=True, stable=True)
                values[unsure], columns[unsure] = ordered.values[:, :k], ordered.indices[:, :k]
        columns, by_row = columns.sort(1)
        scores = torch.cat([self.scores, values.gather(1, by_row)], 1)
        rows = torch.cat([self.rows, columns + start], 1)
        self.scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.scores = self.scores[:, : self.k]
        self.rows = rows.gather(1, order[:, : self.k]).masked_fill_(self.scores == -torch.inf, 0)


def _pair_scores(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """``(b, m)`` exact scores of each user's own targets, in blocks of users that bound the gathered vectors."""
    step = max(1, 2**22 // max(1, targets.shape[1] * items.shape[1]))
    parts = [
        torch.bmm(items[rows], vectors[:, :, None])[:, :, 0]
        for rows, vectors in zip(targets.split(step), users.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else users.new_zeros(targets.shape)


def _contains(rows: Tensor, wanted: Tensor) -> Tensor:
    """``(b, m)`` True where ``wanted`` is among the row's ``rows``; a loop, so that memory stays ``b × s``."""
    found = [(rows == wanted[:, j : j + 1]).any(1) for j in range(wanted.shape[1])]
    return torch.stack(found, 1) if found else torch.zeros_like(wanted, dtype=torch.bool)
