"""Approximate indexes, through faiss: a graph (HNSW), and lists of compressed vectors (IVF-PQ).

What an index returns is scored again with the true vectors, so that scores are exact and only the choice of candidates
is approximate. How much that choice misses is measured when an index is built.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lightning_rec.recommend.index import ExactIndex, Index
from lightning_rec.recommend.types import IndexName, Request

if TYPE_CHECKING:
    from lightning_rec.recommend.artefact import Artefact
    from lightning_rec.recommend.catalogue_state import CatalogueState
    from lightning_rec.recommend.interests import InterestReader

#: Interest vectors that recall is measured on, and how many items of each.
_SAMPLE, _RECALL_AT = 500, 100
_SAMPLE_OF_READERS = 50  # where a language model reads users
#: A changed catalogue is searched beside the old index until so many rows, and so large a share of it, have changed.
_PATCHED_ROWS, _PATCHED_SHARE = 1000, 0.1
_MOSTLY_DEAD = 0.5
_SPARE = 32  # candidates beyond k in the first search
_ROUNDS = 3
_USERS = 256  # whose candidates are scored at once
_POINTS, _POINTS_AT_MOST = 39, 64  # training vectors of each centroid: faiss wants so many
_ROUNDS_OF_TRAINING = 10


def make_index(name: IndexName, **options: Any) -> Index:
    """Makes an empty index of a kind, which the recommender builds from its item vectors.

    Args:
        name: ``exact``, ``hnsw`` or ``ivfpq``.
        **options: arguments of :class:`HnswIndex` or :class:`IvfPqIndex`.

    Raises:
        ValueError: another name, or an option that the index does not have.
        ImportError: faiss is not installed.
    """
    kinds: dict[str, type[Index]] = {"exact": ExactIndex, "hnsw": HnswIndex, "ivfpq": IvfPqIndex}
    if name not in kinds:
        raise ValueError(f"There is no index {name!r}: choose one of {', '.join(kinds)}.")
    if name == "exact":
        if options:
            raise ValueError(f"The exact index has no options, but got {', '.join(sorted(options))}.")
        return ExactIndex()
    try:
        return kinds[name](**options)
    except TypeError as error:
        raise ValueError(f"The index {name!r} does not take these options ({error}).") from None


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'Approximate indexes need faiss, which is not installed: run `pip install "lightning_rec[index]"`, or '
            "take the exact index."
        ) from error
    return faiss


@torch.no_grad()
def interests_of_users(artefact: Artefact, reader: InterestReader, state: CatalogueState) -> Tensor:
    """Interests of users of the fitted data, drawn evenly, for :meth:`Index.measured_on`.

    Returns:
        ``(q, d)`` ready for the product; up to 500 of them, and of no user whom popularity answers.
    """
    users = artefact.users
    if users is None:
        return torch.zeros(0, artefact.manifest.dim)
    active = torch.from_numpy(users.indptr).diff().nonzero()[:, 0]
    limit = _SAMPLE_OF_READERS if artefact.reads_user_text else _SAMPLE
    drawn = active[torch.randperm(len(active), generator=torch.Generator().manual_seed(0))[:limit]]
    found = reader.read([Request(user=users.ids[place]) for place in drawn.tolist()], state) if len(drawn) else []
    vectors = [interest.vector for interest in found if interest.vector is not None]
    return torch.stack(vectors) if vectors else torch.zeros(0, artefact.manifest.dim)


class FaissIndex(Index):
    """What both approximate indexes share: exclusions, exact scores, changed catalogues, recall.

    ``build`` on a built index keeps it where few rows have changed: removed rows are left out of what it finds, and new
    and changed ones are scored beside it. With more changes it is built anew.

    Args:
        interests: ``(q, d)`` interest vectors, ready for the product, that recall is measured on; None: those of
            users of the artefact, and where there are none, drawn item vectors in their place.

    Attributes:
        recall: recall@100 against exact; None before an index is built, and where it is exact.
        vectors: ``(n, d)`` the item vectors.
    """

    exact = False
    _label = ""

    def __init__(self, interests: Tensor | None = None) -> None:
        _faiss()
        self.interests = interests
        self._given = interests is not None
        self.recall: float | None = None
        self.vectors = torch.zeros(1, 1)
        self._dead = torch.ones(1, dtype=torch.bool)
        self._base: Any = None
        self._rows = torch.zeros(0, dtype=torch.int64)  # the row of each vector in the base
        self._stale = torch.zeros(1, dtype=torch.bool)  # rows whose vector is another in the base, or not in it
        self._fresh = torch.zeros(0, dtype=torch.int64)  # living rows that are scored beside the base
        self._bad = self._dead  # rows that the base must not answer with

    # ------------------------------------------------------------------ of a kind

    @abstractmethod
    def _make(self, vectors: Tensor) -> Any:
        """A trained and filled faiss index of ``(m, d)`` vectors, or None for too few of them."""

    @abstractmethod
    def _find(self, interest: Tensor, fetch: int) -> Tensor:
        """``(b, fetch)`` positions in the base, -1 for none."""

    # ------------------------------------------------------------------ building

    def build(self, vectors: Tensor, dead: Tensor | None = None) -> Self:
        """See :class:`Index`. Says what recall@100 it has, unless it was kept."""
        new = copy.copy(self)
        new.vectors = vectors.detach().float()
        new._dead = torch.zeros(len(vectors), dtype=torch.bool) if dead is None else dead.clone()
        new._dead[0] = True
        if not (self._base is not None and new._patch(self)):
            new._build_base()
        new._bad = new._dead | new._stale
        return new

    def measured_on(self, interests: Callable[[], Tensor]) -> Self:
        """See :class:`Index`. Interests that the index was given are kept."""
        new = copy.copy(self)
        if not new._given:  # those of another artefact would not do
            new.interests = interests()
        return new

    def limited(self, vectors: Tensor, dead: Tensor) -> Index:
        """See :class:`Index`. The base is kept; where it would find mostly dead rows, the exact index answers."""
        dead = dead.clone()
        dead[0] = True
        if self.exact or float(dead[self._rows].float().mean()) > _MOSTLY_DEAD:
            return ExactIndex(self.vectors, dead)
        new = copy.copy(self)
        new._dead, new._bad = dead, dead | self._stale
        new._fresh = self._fresh[~dead[self._fresh]]
        return new

    def _patch(self, old: FaissIndex) -> bool:
        """Keeps the base of an earlier state; False where too much has changed."""
        n, before = len(self.vectors), len(old.vectors)
        if n < before or self.vectors.shape[1] != old.vectors.shape[1]:
            return False
        stale = torch.ones(n, dtype=torch.bool)
        stale[:before] = old._stale
        if self.vectors.data_ptr() != old.vectors.data_ptr():
            stale[:before] |= (self.vectors[:before] != old.vectors).any(1)
        fresh = stale & ~self._dead
        lost = int((stale | self._dead)[self._rows].sum())
        if int(fresh.sum()) + lost > max(_PATCHED_ROWS, _PATCHED_SHARE * len(self._rows)):
            return False
        self._stale, self._fresh = stale, fresh.nonzero()[:, 0]
        return True

    def _build_base(self) -> None:
        started = time.perf_counter()
        self._rows = (~self._dead).nonzero()[:, 0]
        self._stale = self._dead.clone()
        self._fresh = torch.zeros(0, dtype=torch.int64)
        self._base = self._make(self.vectors[self._rows]) if len(self._rows) else None
        self.exact = self._base is None
        self.recall, self._bad = None, self._dead
        if self.exact:
            return
        took = time.perf_counter() - started
        queries, what = self._queries()
        self.recall = self.recall_at(_RECALL_AT, queries)
        from lightning.pytorch.utilities import rank_zero_info  # Lightning takes seconds to import

        rank_zero_info(
            f"{self._label} over {len(self._rows):,} items of {self.vectors.shape[1]} features, built in {took:.1f} s: "
            f"recall@{min(_RECALL_AT, len(self._rows))} {self.recall:.4f} against exact, on {len(queries)} {what}."
        )

    def _queries(self) -> tuple[Tensor, str]:
        random = torch.Generator().manual_seed(0)
        if self.interests is not None and len(self.interests):
            chosen = torch.randperm(len(self.interests), generator=random)[:_SAMPLE]
            return self.interests[chosen].float(), "interest vectors"
        chosen = self._rows[torch.randperm(len(self._rows), generator=random)[:_SAMPLE]]
        return self.vectors[chosen], "drawn item vectors, for want of users"

    def recall_at(self, k: int, interests: Tensor) -> float:
        """The share of the ``k`` best items that is found.

        Args:
            k: how many; never more than there are.
            interests: ``(q, d)`` interest vectors.
        """
        wanted = ExactIndex(self.vectors, self._dead).search(interests, min(k, len(self._rows)))[1]
        found = self.search(interests, wanted.shape[1])[1]
        hits = [len(set(a) & set(b)) for a, b in zip(wanted.tolist(), found.tolist(), strict=True)]
        return sum(hits) / wanted.numel()

    # ------------------------------------------------------------------ searching

    @torch.inference_mode()
    def search(self, interest: Tensor, k: int, excluded: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Index`. Nobody gets fewer items than the exact index has for them."""
        k = min(k, len(self.vectors) - 1)
        b = len(interest)
        scores, rows = torch.full((b, k), -torch.inf), torch.zeros(b, k, dtype=torch.int64)
        waiting, fetch = torch.arange(b), self._first_fetch(k)
        for _ in range(_ROUNDS):
            # a search that returns a good part of all costs more than a full scan
            if self.exact or not len(waiting) or k == 0 or fetch > len(self._rows) // 2:
                break
            rest = []
            for part in waiting.split(_USERS):
                out = None if excluded is None else [excluded[user] for user in part.tolist()]
                scores[part], rows[part], enough = self._best(interest[part], k, fetch, out)
                rest.append(part[~enough])
            waiting, fetch = torch.cat(rest), 4 * fetch
        if len(waiting) and k:
            out = None if excluded is None else [excluded[user] for user in waiting.tolist()]
            scores[waiting], rows[waiting] = ExactIndex(self.vectors, self._dead).search(interest[waiting], k, out)
        return scores, rows

    def _first_fetch(self, k: int) -> int:
        return k + _SPARE

    def _best(
        self, interest: Tensor, k: int, fetch: int, excluded: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ``k`` best of ``fetch`` candidates, and for whom these are enough."""
        b, n = len(interest), len(self.vectors)
        places = self._find(interest, fetch)
        rows = self._rows[places.clamp_min(0)].masked_fill(places < 0, 0)
        out = self._bad[rows]
        found = torch.bmm(self.vectors[rows], interest[:, :, None])[:, :, 0]
        if len(self._fresh):
            rows = torch.cat([rows, self._fresh.expand(b, -1)], dim=1)
            out = torch.cat([out, out.new_zeros(b, len(self._fresh))], dim=1)
            found = torch.cat([found, interest @ self.vectors[self._fresh].t()], dim=1)
        if excluded is not None and any(len(part) for part in excluded):
            users = torch.arange(b)
            keys = torch.cat([part + user * n for user, part in enumerate(excluded)])
            out = out | torch.isin(rows + users[:, None] * n, keys)
        found = found.masked_fill(out, -torch.inf)
        # fresh rows do not count: they would hide that the base has not been searched far enough
        enough = (~out[:, : places.shape[1]]).sum(1) >= k
        best, at = found.topk(k, dim=1)
        return best, rows.gather(1, at).masked_fill(best == -torch.inf, 0), enough


class HnswIndex(FaissIndex):
    """A graph of near neighbours that is walked towards the best items.

    Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small
    World graphs", TPAMI 2020. The graph is made of inner products, not of distances: "Non-metric Similarity Graphs for
    Maximum Inner Product Search" (Morozov and Babenko, NeurIPS 2018) finds that better, and so do vectors of many
    lengths here (recall@100 of 0.98, and 0.31 by distances in one more feature).

    Args:
        m: neighbours of an item in the graph. More cost memory (about ``8 m`` bytes an item, beside a copy of the
            vectors) and find more.
        ef_construction: candidates that are held while the graph is built. More cost time and find more.
        ef_search: candidates that are held while it is searched, at least ``k``. More cost time and find more.
        interests: ``(q, d)`` interest vectors that recall is measured on; None: those of users of the artefact.
    """

    _label = "HNSW"

    def __init__(
        self, m: int = 32, ef_construction: int = 200, ef_search: int = 128, interests: Tensor | None = None
    ) -> None:
        if m < 2 or ef_construction < 1 or ef_search < 1:
            raise ValueError(
                f"HnswIndex needs m >= 2, ef_construction >= 1 and ef_search >= 1, but got m={m}, "
                f"ef_construction={ef_construction}, ef_search={ef_search}."
            )
        super().__init__(interests)
        self.m = m
        self.ef_construction = ef_construction
        self.ef_search = ef_search

    def _make(self, vectors: Tensor) -> Any:
        faiss = _faiss()
        base = faiss.IndexHNSWFlat(vectors.shape[1], self.m, faiss.METRIC_INNER_PRODUCT)
        base.hnsw.efConstruction = self.ef_construction
        base.add(vectors.contiguous().numpy())
        return base

    def _find(self, interest: Tensor, fetch: int) -> Tensor:
        # an argument of this search, not a setting of the index, which other threads search too
        options = _faiss().SearchParametersHNSW(efSearch=max(self.ef_search, fetch))
        return torch.from_numpy(self._base.search(interest.float().contiguous().numpy(), fetch, params=options)[1])


class IvfPqIndex(FaissIndex):
    """Lists of near items, in each of which vectors are compressed to a few bytes.

    Jégou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011. The index itself is small; the
    candidates that it finds are scored again with the true vectors, which the recommender holds in any case.

    Args:
        lists: number of lists; None: four times the root of the number of items, and few enough to be trained.
        m: bytes (of ``bits`` bits) of a vector, a divisor of its width; None: the largest up to a quarter of it.
        bits: bits of a part's code.
        probes: lists that are searched; None: one in 5, at least 8. More cost time and find more.
        rescore: candidates that are scored again for each one wanted.
        interests: ``(q, d)`` interest vectors that recall is measured on; None: those of users of the artefact.
    """

    _label = "IVF-PQ"

    def __init__(
        self,
        lists: int | None = None,
        m: int | None = None,
        bits: int = 8,
        probes: int | None = None,
        rescore: int = 4,
        interests: Tensor | None = None,
    ) -> None:
        if min(1 if value is None else value for value in (lists, m, probes, rescore)) < 1 or not 1 <= bits <= 12:
            raise ValueError(
                f"IvfPqIndex needs lists, m, probes and rescore of at least 1 and bits between 1 and 12, but got "
                f"lists={lists}, m={m}, bits={bits}, probes={probes}, rescore={rescore}."
            )
        super().__init__(interests)
        self.lists = lists
        self.m = m
        self.bits = bits
        self.probes = probes
        self.rescore = rescore

    def _make(self, vectors: Tensor) -> Any:
        faiss = _faiss()
        n, d = vectors.shape
        lists = self.lists or max(1, min(round(4 * math.sqrt(n)), n // _POINTS))
        parts = self.m or max(size for size in range(1, d + 1) if d % size == 0 and (size <= d / 4 or size == 1))
        if d % parts:
            raise ValueError(f"The vectors have {d} features, which m = {parts} does not divide: choose a divisor.")
        needed = _POINTS * max(lists, 2**self.bits)
        if n < needed:
            warnings.warn(
                f"IVF-PQ with {lists:,} lists and {self.bits} bits needs {needed:,} items to be trained, and there are "
                f"{n:,}: the exact index answers, which is fast for so few.",
                stacklevel=4,
            )
            return None
        base = faiss.IndexIVFPQ(faiss.IndexFlatIP(d), d, lists, parts, self.bits, faiss.METRIC_INNER_PRODUCT)
        for training in (base.cp, base.pq.cp):  # faiss's own 25 rounds over four times the points find no more
            training.niter, training.max_points_per_centroid = _ROUNDS_OF_TRAINING, _POINTS_AT_MOST
        dense = vectors.contiguous().numpy()
        base.train(dense)
        base.add(dense)
        return base

    def _first_fetch(self, k: int) -> int:
        return self.rescore * k + _SPARE

    def _find(self, interest: Tensor, fetch: int) -> Tensor:
        lists = self._base.nlist
        probes = min(lists, self.probes or max(8, lists // 5))
        options = _faiss().SearchParametersIVF(nprobe=probes)
        return torch.from_numpy(self._base.search(interest.float().contiguous().numpy(), fetch, params=options)[1])
