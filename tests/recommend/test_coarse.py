"""The first look in eight bits changes no answer."""

from __future__ import annotations

import pytest
import torch

from lightning_rec.recommend import coarse
from lightning_rec.recommend.coarse import FEW_USERS, CoarseScan
from lightning_rec.recommend.index import ExactIndex


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any catalogue is worth a first look, after one full scan."""
    monkeypatch.setattr(coarse, "_SMALLEST", 0)
    monkeypatch.setattr(coarse, "_PATIENCE", 1)


def _ready(vectors: torch.Tensor, dead: torch.Tensor | None = None) -> ExactIndex:
    index = ExactIndex(vectors, dead)
    index.search(vectors[1:2], 1)
    index.preparation.wait()
    assert index.preparation.scan() is not None
    return index


def _catalogue(n: int, d: int, seed: int, spread: float = 0.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, d, generator=random)
    return vectors * torch.exp(spread * torch.randn(n, 1, generator=random))


@pytest.mark.parametrize("spread", [0.0, 1.5])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_bounds_hold_for_every_score(spread: float, shift: float) -> None:
    vectors = _catalogue(3000, 33, 1, spread)
    interest = _catalogue(8, 33, 2) * torch.logspace(-6, 6, 8)[:, None] + shift
    lower, upper = CoarseScan(vectors).bounds(interest)
    exact = interest.double() @ vectors.double().t()
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    tightness = (upper - lower).mean() / exact.std(dim=1).mean()
    assert tightness < 1  # bounds that hold always and say nothing would hold too


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("n", "d", "k", "b"), [(4000, 16, 10, 1), (6001, 64, 1, 8), (5000, 5, 25, 3)])
@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("with_excluded", [False, True])
def test_the_answers_of_a_full_scan(
    n: int, d: int, k: int, b: int, with_dead: bool, with_excluded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, interest = _catalogue(n, d, n, 0.3), _catalogue(b, d, k)
    scores = interest @ vectors.t()
    scores[:, 0] = -torch.inf
    best = scores.topk(3, dim=1).indices
    dead = torch.zeros(n, dtype=torch.bool)
    dead[best[:, 0]] = with_dead
    excluded = list(best[:, 1:]) if with_excluded else None
    index = _ready(vectors, dead)
    asked = []
    original = CoarseScan.candidates

    def spy(self, *args):  # type: ignore[no-untyped-def]
        asked.append(original(self, *args))
        return asked[-1]

    monkeypatch.setattr(CoarseScan, "candidates", spy)
    found_scores, found_rows = index.search(interest, k, excluded)
    assert asked[0] is not None  # it was the first look that answered
    assert all(k <= len(rows) < n / 10 for rows in asked[0])
    scores[:, dead] = -torch.inf
    for row, out in zip(scores, excluded or [], strict=False):
        row[out] = -torch.inf
    wanted_scores, wanted_rows = scores.topk(k, dim=1)
    assert torch.equal(found_rows, wanted_rows)
    torch.testing.assert_close(found_scores, wanted_scores, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("eager")
def test_where_it_cannot_help_the_full_scan_answers() -> None:
    vectors = torch.ones(3000, 8)  # all equal: nothing can be left out
    index = _ready(vectors)
    scores, rows = index.search(torch.ones(1, 8), 5)
    assert (scores == 8).all()
    assert len(set(rows[0].tolist())) == 5
    assert (index.search(torch.zeros(1, 8), 5)[0] == 0).all()
    few_left = [torch.arange(1, 2998)]
    scores, rows = index.search(torch.ones(1, 8), 5, few_left)
    assert rows[0].tolist() == [2998, 2999, 0, 0, 0] or sorted(rows[0].tolist()) == [0, 0, 0, 2998, 2999]


@pytest.mark.usefixtures("eager")
def test_nothing_is_prepared_for_what_is_not_finite_or_many_users() -> None:
    vectors = _catalogue(2000, 8, 3)
    index = ExactIndex(vectors)
    index.search(_catalogue(FEW_USERS + 1, 8, 4), 3)
    assert index.preparation._thread is None
    vectors[7, 0] = torch.inf
    broken = ExactIndex(vectors)
    broken.search(vectors[1:2], 1)
    broken.preparation.wait()
    assert broken.preparation.scan() is None


def test_small_catalogues_are_left_alone() -> None:
    index = ExactIndex(_catalogue(2000, 8, 3))
    for _ in range(2 * coarse._PATIENCE):
        index.search(index.vectors[1:2], 1)
    assert index.preparation._thread is None
