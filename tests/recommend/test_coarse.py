"""The first look in eight bits changes no answer."""

from __future__ import annotations

import gc
import random
import threading
import weakref

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
    assert not index.preparation._looks
    vectors[7, 0] = torch.inf
    broken = ExactIndex(vectors)
    broken.search(vectors[1:2], 1)
    broken.preparation.wait()
    assert broken.preparation.scan() is None


def test_small_catalogues_are_left_alone() -> None:
    index = ExactIndex(_catalogue(2000, 8, 3))
    for _ in range(2 * coarse._PATIENCE):
        index.search(index.vectors[1:2], 1)
    index.prepare()
    assert not index.preparation._looks


def test_who_wants_a_few_answers_does_not_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "_SMALLEST", 0)
    index = ExactIndex(_catalogue(2000, 8, 3))
    for _ in range(coarse._PATIENCE - 1):
        index.search(index.vectors[1:2], 1)
    assert not index.preparation._looks
    index.search(index.vectors[1:2], 1)
    assert len(index.preparation._looks) == 1
    index.preparation.wait()
    assert index.preparation.scan() is not None
    asked = ExactIndex(_catalogue(2000, 8, 3))
    asked.prepare()
    assert asked.preparation.scan() is not None, "the service asks for it before the first search"


# ---------------------------------------------------------------------- catalogues that change


def _whole(random: random.Random, n: int, d: int) -> torch.Tensor:
    """Vectors of whole numbers, whose scores are exact in float32, many of them several times."""
    drawn = torch.tensor([[random.randint(-30, 30) for _ in range(d)] for _ in range(max(1, n // 2))])
    return drawn[torch.tensor([random.randrange(len(drawn)) for _ in range(n)])].float()


def _by_sorting(
    vectors: torch.Tensor, dead: torch.Tensor, interest: torch.Tensor, k: int, excluded: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (interest.double() @ vectors.double().t()).float()
    scores[:, dead] = -torch.inf
    for row, out in zip(scores, excluded, strict=True):
        row[out] = -torch.inf
    scores, rows = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], rows[:, :k].masked_fill(scores[:, :k] == -torch.inf, 0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("seed", range(6))
def test_changed_catalogues_have_the_answers_of_a_sort_ties_included(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are added, changed and removed at random; each answer is that of all scores, sorted stably."""
    random_, d = random.Random(seed), random.Random(seed).choice([4, 16])
    monkeypatch.setattr(coarse, "_RENEWED", random_.choice([40, 200]))
    vectors = torch.cat([torch.zeros(1, d), _whole(random_, 1500, d)])
    dead = torch.zeros(len(vectors), dtype=torch.bool)
    dead[0] = True
    index = _ready(vectors, dead)
    original, looked, begun = CoarseScan.candidates, [], [index.preparation._looks[0].making]

    def spy(self, *args):  # type: ignore[no-untyped-def]
        looked.append(original(self, *args))
        return looked[-1]

    monkeypatch.setattr(CoarseScan, "candidates", spy)
    for _ in range(25):
        kind = random_.choice(["add", "update", "remove", "nothing"])
        if kind == "add":
            more = _whole(random_, random_.choice([1, 3, 60]), d)
            vectors = torch.cat([vectors, more])
            dead = torch.cat([dead, torch.zeros(len(more), dtype=torch.bool)])
        elif kind == "update":
            vectors, rows = vectors.clone(), torch.tensor(random_.sample(range(1, len(vectors)), 5))
            vectors[rows] = random_.choice([_whole(random_, 5, d), vectors[1:6].clone()])
        elif kind == "remove":
            dead = dead.clone()
            dead[random_.sample(range(1, len(vectors)), 20)] = True
        index = index.build(vectors, dead)
        less = dead | (torch.rand(len(vectors), generator=torch.Generator().manual_seed(seed)) < 0.3)
        b, k = random_.choice([1, 2, FEW_USERS, FEW_USERS + 3]), random_.choice([1, 10, 50])
        interest = _whole(random_, b, d)
        excluded = [
            torch.tensor(random_.sample(range(1, len(vectors)), random_.choice([0, 30]))).long() for _ in interest
        ]
        for one, out in ((index, dead), (index.limited(vectors, less), less)):
            assert one.preparation is index.preparation, "the same vectors"
            scores, rows = one.search(interest, k, excluded)
            wanted_scores, wanted_rows = _by_sorting(vectors, out, interest, k, excluded)
            assert torch.equal(scores, wanted_scores)
            assert torch.equal(rows, wanted_rows)
        if random_.random() < 0.5:
            index.preparation.wait()
        begun.extend(look.making for look in index.preparation._looks if look.making not in begun)
        assert len(index.preparation._looks) <= 2
        assert sum(look.making.under_way for look in index.preparation._looks) <= 1
    assert len(begun) > 1, "it was prepared anew"
    assert sum(rows is not None for rows in looked) > 8, "the first look answered"


@pytest.mark.usefixtures("eager")
def test_a_removal_keeps_what_is_prepared_and_a_few_changes_too() -> None:
    vectors = _catalogue(3000, 8, 5)
    index = _ready(vectors)
    making = index.preparation._looks[0].making
    dead = torch.zeros(3000, dtype=torch.bool)
    dead[5] = True
    assert index.build(vectors, dead).preparation is index.preparation
    changed = torch.cat([vectors, vectors[:4] + 1])
    changed[[9, 7]] += 1
    next_ = index.build(changed).build(changed.clone())
    look = next_.preparation.scan()
    assert look is not None
    assert look.making is making
    assert look.stale.tolist() == [7, 9, 3000, 3001, 3002, 3003]
    assert next_.build(_catalogue(3004, 9, 1)).preparation.scan() is None, "other vectors altogether"
    assert next_.build(_catalogue(30, 8, 1)).preparation.scan() is None


@pytest.mark.usefixtures("eager")
def test_the_old_one_answers_while_one_is_prepared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many changes in a short time prepare one at a time, and none keeps the vectors of an earlier catalogue."""
    index = _ready(_catalogue(3000, 8, 5))
    making, leave = index.preparation._looks[0].making, threading.Event()
    original = CoarseScan.__init__

    def slow(self, vectors):  # type: ignore[no-untyped-def]
        assert leave.wait(10)
        original(self, vectors)

    monkeypatch.setattr(CoarseScan, "__init__", slow)
    earlier = []
    for _ in range(5):
        earlier.append(weakref.ref(index.vectors))
        index = index.build(torch.cat([index.vectors, _catalogue(40, 8, 6)]))
        found = index.search(index.vectors[-1:], 5)
        torch.testing.assert_close(found[0], (index.vectors[-1:] @ index.vectors.t()).topk(5).values)
        looks = index.preparation._looks
        assert looks[0].making is making, "it goes on answering"
        assert len(looks) == 2
    assert looks[1].stale.tolist() == list(range(3040, 3200)), "what changed since it was begun"
    leave.set()
    index.preparation.wait()
    index.search(index.vectors[-1:], 5)
    index.preparation.wait()
    assert index.preparation.scan() is not None
    assert [len(look.stale) for look in index.preparation._looks] == [0]
    del looks
    gc.collect()
    assert [vectors() for vectors in earlier] == [None] * 5
