"""Finding the best items: the contract of an index, and the exact one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_rec.recommend.coarse import FEW_USERS, Preparation
from lightning_rec.recommend.threads import one_thread

_BLOCK = 128  # items whose highest score is looked at first
_ELEMENTS = 2**25  # scores held at once: 128 MiB


class Index(ABC):
    """Finds the items with the largest dot products.

    An index is built once for a catalogue and never changed: readers may use it from several threads.
    """

    #: False when an answer may lack items that a full scan would find.
    exact: bool = True

    @abstractmethod
    def build(self, vectors: Tensor, dead: Tensor | None = None) -> Index:
        """A new index of the same kind.

        Args:
            vectors: ``(n, d)`` item vectors; row 0 is padding.
            dead: ``(n,)`` True where a row must never come; None: only padding.
        """

    def measured_on(self, interests: Callable[[], Tensor]) -> Index:
        """The same kind of index, which measures what it misses on interests; an exact one misses nothing.

        Args:
            interests: gives ``(q, d)`` interest vectors, ready for the product; ``q`` may be 0.
        """
        return self

    def limited(self, vectors: Tensor, dead: Tensor) -> Index:
        """The same index, of which fewer rows may come, for as long as they do not.

        Args:
            vectors: ``(n, d)`` that it was built of.
            dead: ``(n,)`` True where a row must not come, those that never may among them.
        """
        return self.build(vectors, dead)

    def prepare(self) -> None:  # noqa: B027  # most have nothing to make beforehand
        """Makes now what would be made in the background after some searches."""

    @abstractmethod
    def search(self, interest: Tensor, k: int, excluded: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The best items of each of ``b`` users.

        Args:
            interest: ``(b, d)`` float32 interest vectors.
            k: how many, at least 1.
            excluded: for each user the rows that must not come, int64, any length; None: none.

        Returns:
            ``(b, k')`` scores, highest first, and rows; ``k' <= k`` is what the catalogue has at most. Where a user has
            fewer items left, the rest is ``-inf`` with row 0.
        """


class ExactIndex(Index):
    """One matrix product and a selection of the highest: nothing is missed.

    A few users at a time over a large catalogue are answered by a first look in eight bits, with the same answers, once
    that has been prepared in the background; see :mod:`lightning_rec.recommend.coarse`. An index that is built by
    another one takes over what that had prepared. Of equal scores the lower row comes first.

    Args:
        vectors: ``(n, d)`` item vectors, row 0 padding.
        dead: ``(n,)`` True where a row must never come, or None.
        preparation: the first look at these vectors; None: a new one.
    """

    def __init__(
        self, vectors: Tensor | None = None, dead: Tensor | None = None, preparation: Preparation | None = None
    ) -> None:
        self.vectors = torch.zeros(1, 1) if vectors is None else vectors
        self._dead = None if dead is None or not bool(dead.any()) else dead.nonzero()[:, 0]
        self.preparation = Preparation(self.vectors) if preparation is None else preparation

    def build(self, vectors: Tensor, dead: Tensor | None = None) -> ExactIndex:
        """See :class:`Index`."""
        return ExactIndex(vectors, dead, self.preparation.following(vectors))

    def prepare(self) -> None:
        """See :class:`Index`."""
        self.preparation.begin()
        self.preparation.wait()

    @torch.inference_mode()
    def search(self, interest: Tensor, k: int, excluded: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Index`."""
        n = self.vectors.shape[0]
        if 0 < interest.shape[0] <= FEW_USERS and k < n:
            found = self._few(interest, k, excluded)
            if found is not None:
                return found
        by_column = self.vectors.t()
        size = max(1, _ELEMENTS // max(n, 1))
        parts = []
        # one piece of memory for all parts: new pages would cost as much time as a third of the product
        held = torch.empty(min(size, interest.shape[0]), n, dtype=self.vectors.dtype)
        for start in range(0, interest.shape[0], size):
            some = interest[start : start + size]
            scores = torch.mm(some, by_column, out=held[: len(some)])
            if self._dead is not None:
                scores[:, self._dead] = -torch.inf
            mask(scores, None if excluded is None else excluded[start : start + size])
            parts.append(highest(scores, min(k, n - 1)))
        if not parts:
            return torch.zeros(0, min(k, n - 1)), torch.zeros(0, min(k, n - 1), dtype=torch.int64)
        if len(parts) == 1:
            return parts[0]
        return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])

    def _few(self, interest: Tensor, k: int, excluded: Sequence[Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The same by a first look in eight bits, or None where a full scan is better."""
        coarse = self.preparation.scan()
        if coarse is None or not bool(torch.isfinite(interest).all()):
            return None
        dead = [] if self._dead is None else [self._dead]
        given: list[list[Tensor]] = [[]] * len(interest) if excluded is None else [[rows] for rows in excluded]
        left_out = [torch.cat([*dead, *more]) if dead or more else None for more in given]
        parts = []
        with one_thread():
            candidates = coarse.candidates(interest, k, left_out, len(self.vectors))
            if candidates is None:
                return None
            for vector, rows in zip(interest, candidates, strict=True):
                scores, places = highest((self.vectors[rows] @ vector)[None], k)
                parts.append((scores, rows[places[0]][None]))
        return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def mask(scores: Tensor, excluded: Sequence[Tensor] | None) -> None:
    """Sets padding and each user's excluded rows of ``(b, n)`` scores to ``-inf``, in place."""
    scores[:, 0] = -torch.inf
    if excluded is None:
        return
    for row, rows in zip(scores, excluded, strict=True):
        if len(rows):
            row.index_fill_(0, rows, -torch.inf)


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of each row, sorted, equal ones by column; where they are ``-inf``, the column number is 0.

    For many users the maxima of blocks of items are looked at first: the ``k`` highest scores lie in the ``k`` blocks
    with the highest maxima, so only these are sorted. On a CPU that halves the time.

    Args:
        scores: ``(b, n)`` scores; not NaN.
        k: at most ``n``.

    Returns:
        ``(b, k)`` scores and int64 column numbers.
    """
    b, n = scores.shape
    blocks = n // _BLOCK
    taken = min(k + 1, n)  # one more shows whether the last one has equals that were left out
    if b < 8 or blocks < 4 * taken or scores.device.type != "cpu":
        found, columns = scores.topk(taken, dim=1)
    else:
        whole = scores[:, : blocks * _BLOCK].view(b, blocks, _BLOCK)
        chosen = whole.amax(2).topk(taken, dim=1).indices
        inside = whole.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).view(b, -1)
        tail = scores[:, blocks * _BLOCK :]
        found, places = torch.cat([inside, tail], dim=1).topk(taken, dim=1)
        in_tail = places >= inside.shape[1]
        block = chosen.gather(1, (places // _BLOCK).clamp_max(taken - 1))
        columns = torch.where(in_tail, places - inside.shape[1] + blocks * _BLOCK, block * _BLOCK + places % _BLOCK)
    equal = (found[:, 1:] == found[:, :-1]) & (found[:, 1:] > -torch.inf)
    if bool(equal.any()):
        if taken > k:
            for row in equal[:, -1].nonzero()[:, 0].tolist():
                columns[row] = _first(scores[row], found[row, -1], taken)
        columns = columns.sort(dim=1).values
        found, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, order)
    found, columns = found[:, :k], columns[:, :k]
    return found, columns.masked_fill(found == -torch.inf, 0)


def _first(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """The columns of the ``k`` highest scores, of which ``least`` is the last, and of its equals the first ones."""
    above = (scores > least).nonzero()[:, 0]
    return torch.cat([above, (scores == least).nonzero()[: k - len(above), 0]])
