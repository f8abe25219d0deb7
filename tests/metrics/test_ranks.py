import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lightning_rec.metrics import ScoreTable, rank_and_top, target_ranks, top_k
from lightning_rec.metrics.ranks import AliveWindows, HistoryBonus, exact_operand


def by_loops(interest, items, targets, seen, k, alive=None, bonus=None):
    """The definition, one user and one item at a time, with scores as Python floats."""
    n = len(items)
    ranks, lists, values = [], [], []
    for u in range(len(interest)):
        score = [float((interest[u].double() * items[row].double()).sum()) for row in range(n)]
        for row in set() if bonus is None else set(bonus.rows[u].tolist()):
            score[row] += bonus.value
        taken = set() if seen is None else set(seen[u].tolist())
        if alive is not None:
            now, born, dies = int(alive.times[u]), alive.born.tolist(), alive.dies.tolist()
            taken |= {row for row in range(n) if now < born[row] or now > dies[row]}
        left = [row for row in range(1, n) if row not in taken]
        wanted = [t for t in dict.fromkeys(targets[u].tolist()) if t in left]
        others = [row for row in left if row not in wanted]
        ordered = sorted(wanted, key=lambda t: -score[t])  # stable: equal targets keep their order
        row_ranks, met = [], set()
        for t in targets[u].tolist():
            if t == 0 or t in met:
                row_ranks.append(0)
            elif t not in left:
                row_ranks.append(n)
            else:
                ahead = sum(not score[row] < score[t] for row in others)
                row_ranks.append(1 + ahead + ordered.index(t))
            met.add(t)
        ranks.append(row_ranks)
        best = sorted(left, key=lambda row: (-score[row], row))[:k]
        lists.append(best + [0] * (min(k, n - 1) - len(best)))
        values.append([score[row] for row in best] + [-torch.inf] * (min(k, n - 1) - len(best)))
    shape = (len(interest), -1)
    return torch.tensor(ranks).view(shape), torch.tensor(lists).view(shape), torch.tensor(values).view(shape)


def tied_case(seed, b=9, n=40, d=3, m=3, s=6, levels=2):
    """Small whole numbers: scores are exact in any precision, and many of them are equal."""
    g = torch.Generator().manual_seed(seed)
    interest = torch.randint(-levels, levels + 1, (b, d), generator=g).float()
    items = torch.randint(-levels, levels + 1, (n, d), generator=g).float()
    targets = torch.randint(0, n, (b, m), generator=g)
    seen = torch.randint(0, n, (b, s), generator=g)
    return interest, items, targets, seen


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 39, 1000])
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize("with_seen", [False, True])
def test_against_loops_with_many_ties(chunk_size, m, with_seen):
    for seed in range(5):
        interest, items, targets, seen = tied_case(seed, m=m)
        seen = seen if with_seen else None
        ranks, lists, values = by_loops(interest, items, targets, seen, 8)
        result = rank_and_top(interest, items, targets, seen, 8, chunk_size=chunk_size)
        assert torch.equal(result.ranks, ranks)
        assert torch.equal(result.rows, lists)
        assert torch.equal(result.scores, values.float())
        assert torch.equal(target_ranks(interest, items, targets, seen, chunk_size=chunk_size), ranks)
        assert torch.equal(top_k(interest, items, 8, seen, chunk_size=chunk_size)[1], lists)


def windows(seed, b, n, moments=12):
    """Births, deaths and requests at few moments, so that many fall on the very edge of a life."""
    g = torch.Generator().manual_seed(seed + 100)
    born = torch.randint(0, moments, (n,), generator=g)
    dies = born + torch.randint(-1, moments // 2, (n,), generator=g)  # some are never alive
    born[::7], dies[::5] = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).max
    return AliveWindows(born, dies, torch.randint(0, moments + 3, (b,), generator=g))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 39, 1000])
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize("with_seen", [False, True])
def test_what_is_not_alive_is_as_if_it_were_not_there(chunk_size, m, with_seen):
    for seed in range(5):
        interest, items, targets, seen = tied_case(seed, m=m)
        seen, alive = seen if with_seen else None, windows(seed, len(interest), len(items))
        ranks, lists, values = by_loops(interest, items, targets, seen, 8, alive)
        result = rank_and_top(interest, items, targets, seen, 8, alive=alive, chunk_size=chunk_size)
        assert torch.equal(result.ranks, ranks)
        assert torch.equal(result.rows, lists)
        assert torch.equal(result.scores, values.float())
        assert torch.equal(target_ranks(interest, items, targets, seen, alive=alive, chunk_size=chunk_size), ranks)
        assert torch.equal(top_k(interest, items, 8, seen, alive=alive, chunk_size=chunk_size)[1], lists)


def test_a_request_finds_what_is_born_by_then_and_not_yet_dead():
    items = torch.tensor([[0.0], [9.0], [5.0], [7.0]])
    alive = AliveWindows(torch.tensor([9, 10, 10, 12]), torch.tensor([0, 11, 99, 99]), torch.tensor([9, 10, 11, 12]))
    interest, targets = torch.ones(4, 1), torch.tensor([[2]] * 4)
    result = rank_and_top(interest, items, targets, None, 3, alive=alive)
    assert result.rows.tolist() == [[0, 0, 0], [1, 2, 0], [1, 2, 0], [3, 2, 0]]
    assert result.ranks.tolist() == [[4], [2], [2], [2]]
    part = torch.tensor([3, 0])
    again = rank_and_top(interest[part], items, targets[part], None, 3, alive=alive.of(part))
    assert again.rows.tolist() == [[3, 2, 0], [0, 0, 0]]


def test_windows_that_are_always_open_change_nothing():
    interest, items, targets, seen = tied_case(1)
    always = AliveWindows(torch.zeros(40, dtype=torch.int64), torch.full((40,), 9), torch.full((9,), 5))
    wanted = rank_and_top(interest, items, targets, seen, 5)
    for chunk_size in (3, 100):
        result = rank_and_top(interest, items, targets, seen, 5, alive=always, chunk_size=chunk_size)
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


def test_an_article_with_a_nan_score_that_is_not_alive_costs_nothing():
    items = torch.tensor([[0.0], [torch.nan], [1.0], [2.0]])
    alive = AliveWindows(torch.tensor([0, 5, 0, 0]), torch.tensor([9, 9, 9, 9]), torch.tensor([4, 5]))
    assert target_ranks(torch.ones(2, 1), items, torch.tensor([[2], [2]]), alive=alive).tolist() == [[2], [3]]


def test_hand_worked():
    # Scores of rows 1..5 for the first user: 5, 4, 4, 3, 1; the second user likes the opposite.
    items = torch.tensor([[9.0], [5.0], [4.0], [4.0], [3.0], [1.0]])
    interest = torch.tensor([[1.0], [-1.0]])
    targets = torch.tensor([[3, 5, 0], [4, 1, 4]])
    # User 1: row 3 after row 1 and after row 2, which ties with it; row 5 last.
    # User 2: order is 5, 4, {2, 3}, 1; the repeated target is not counted again.
    assert target_ranks(interest, items, targets).tolist() == [[3, 5, 0], [2, 5, 0]]
    # Row 1 is seen by the first user; the second has seen its target, row 1: beyond the last place.
    seen = torch.tensor([[1, 0], [1, 5]])
    assert target_ranks(interest, items, targets, seen).tolist() == [[2, 4, 0], [1, 6, 0]]
    scores, rows = top_k(interest, items, 3, seen)
    assert rows.tolist() == [[2, 3, 4], [4, 2, 3]]
    assert scores.tolist() == [[4.0, 4.0, 3.0], [-3.0, -4.0, -4.0]]


def test_constant_scores_earn_no_credit():
    interest, items = torch.ones(3, 4), torch.ones(21, 4)
    assert target_ranks(interest, items, torch.tensor([[1], [7], [20]])).tolist() == [[20]] * 3
    # Several targets: all other items first, then the targets one after another.
    assert target_ranks(interest[:1], items, torch.tensor([[3, 1, 2]])).tolist() == [[18, 19, 20]]
    for chunk_size in (1, 6, 100):
        assert top_k(interest, items, 4, chunk_size=chunk_size)[1].tolist() == [[1, 2, 3, 4]] * 3


def test_equal_vectors_tie_exactly_whatever_the_shape():
    g = torch.Generator().manual_seed(3)
    items = torch.randn(301, 96, generator=g)
    items[1:301] = items[1:4].repeat(100, 1)[torch.randperm(300, generator=g)]
    interest = torch.randn(50, 96, generator=g)
    targets = torch.randint(1, 301, (50, 1), generator=g)
    ranks = target_ranks(interest, items, targets)
    assert ((ranks % 100) == 0).all()  # a hundred items share each vector, and the target is the last of them
    for chunk_size in (37, 128, 299):
        for users in (7, 50):
            parts = [
                target_ranks(interest[i : i + users], items, targets[i : i + users], chunk_size=chunk_size)
                for i in range(0, 50, users)
            ]
            assert torch.equal(torch.cat(parts), ranks)


@pytest.mark.parametrize("d", [1, 7, 128, 1000])
def test_scores_are_the_same_number_in_any_order(d):
    g = torch.Generator().manual_seed(d)
    x = exact_operand(torch.randn(20, d, generator=g) * torch.logspace(-20, 20, 20)[:, None])
    w = exact_operand(torch.randn(30, d, generator=g) * torch.logspace(-5, 5, d))
    order = torch.randperm(d, generator=g)
    wanted = x @ w.T
    assert torch.equal(x[:, order] @ w[:, order].T, wanted)
    assert torch.equal(torch.stack([(x * row).sum(1) for row in w], 1), wanted)


def test_rounding_is_about_as_fine_as_float32():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 128, generator=g)
    error = (exact_operand(x) - x.double()).abs().amax(1) / x.abs().amax(1)
    assert error.max() < 2.0**-22
    assert torch.equal(exact_operand(torch.zeros(2, 3)), torch.zeros(2, 3, dtype=torch.float64))
    whole = torch.tensor([[1.0, -3.0, 1000.0]])
    assert torch.equal(exact_operand(whole), whole.double())


def test_more_than_the_catalogue_holds():
    interest, items = torch.ones(2, 1), torch.tensor([[0.0], [1.0], [3.0], [2.0]])
    seen = torch.tensor([[2, 3, 0], [1, 2, 3]])
    scores, rows = top_k(interest, items, 10, seen, chunk_size=2)
    assert rows.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert scores.tolist() == [[1.0, -torch.inf, -torch.inf], [-torch.inf] * 3]


@pytest.mark.parametrize("chunk_size", [1, 2, 10])
@pytest.mark.parametrize("m", [1, 16])
def test_nan_counts_against_the_model(chunk_size, m):
    items = torch.tensor([[0.0], [1.0], [torch.nan], [3.0], [torch.inf]])
    interest = torch.tensor([[1.0], [torch.nan]])
    targets = torch.zeros(2, m, dtype=torch.int64)
    targets[:, 0] = 3
    # NaN and infinity rank before a target; when everything is NaN the target is a miss.
    result = rank_and_top(interest, items, targets, None, 4, chunk_size=chunk_size)
    assert result.ranks[:, 0].tolist() == [3, 5]
    assert result.rows.tolist() == [[3, 1, 0, 0], [0, 0, 0, 0]]
    # A target whose own score is NaN is a miss.
    targets[:, 0] = 2
    assert target_ranks(interest, items, targets, chunk_size=chunk_size)[:, 0].tolist() == [5, 5]


def test_nothing_to_rank():
    items = torch.randn(5, 2)
    none = rank_and_top(torch.zeros(0, 2), items, torch.zeros(0, 3, dtype=torch.int64), None, 2)
    assert none.ranks.shape == (0, 3)
    assert none.rows.shape == (0, 2)
    result = rank_and_top(torch.ones(2, 2), items, torch.zeros(2, 0, dtype=torch.int64), None, 0)
    assert result.ranks.shape == (2, 0)
    assert result.rows.shape == (2, 0)
    padding_alone = torch.zeros(1, 2)
    assert target_ranks(torch.ones(1, 2), padding_alone, torch.tensor([[0]])).tolist() == [[0]]
    assert top_k(torch.ones(1, 2), padding_alone, 3)[1].shape == (1, 0)


def test_half_precision_and_a_table_made_once():
    interest, items, targets, seen = tied_case(0)
    wanted = rank_and_top(interest, items, targets, seen, 5)
    table = ScoreTable(items)
    with torch.autocast("cpu", torch.bfloat16):
        result = rank_and_top(interest.bfloat16(), table, targets, seen, 5)
    assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
    assert result.scores.dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux reports it, in KiB")
def test_memory_does_not_hold_users_times_items():
    # In a process of its own, since the peak of this one may be high already. All scores would take 2,000 × 20,000 × 8
    # bytes = 305 MiB in one batch; a chunk of 1,000 items takes 15 MiB. The file is loaded without its package, whose
    # imports take longer than the ranking.
    code = """
        import importlib.util, resource, sys, torch
        spec = importlib.util.spec_from_file_location("ranks", sys.argv[1])
        sys.modules["ranks"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        ScoreTable, rank_and_top = module.ScoreTable, module.rank_and_top
        torch.set_num_threads(1)
        interest, items = torch.randn(2000, 16), ScoreTable(torch.randn(20001, 16))
        born = torch.randint(0, 900, (20001,))
        alive = module.AliveWindows(born, born + 100, torch.randint(0, 999, (2000,)))
        targets, seen = torch.randint(1, 20001, (2000, 1)), torch.randint(0, 20001, (2000, 10))
        few = alive.of(torch.arange(10))
        rank_and_top(interest[:10], items, targets[:10], seen[:10], 10, alive=few, chunk_size=1000)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        rank_and_top(interest, items, targets, seen, 10, alive=alive, chunk_size=1000)
        print((peak() - before) / 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), exact_operand.__code__.co_filename]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert float(done.stdout) < 100


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize("value", [-4.0, 2.0])
def test_a_bonus_for_the_history_against_loops(chunk_size, m, value):
    for seed in range(5):
        interest, items, targets, seen = tied_case(seed, m=m)
        history = torch.randint(0, len(items), (len(interest), 8), generator=torch.Generator().manual_seed(seed))
        history[:, 1], history[:, 2] = history[:, 0], targets[:, 0]  # a row twice, and a target
        bonus = HistoryBonus(history, value)
        wanted = by_loops(interest, items, targets, seen[:, :2], 5, bonus=bonus)
        found = rank_and_top(interest, items, targets, seen[:, :2], 5, bonus=bonus, chunk_size=chunk_size)
        torch.testing.assert_close(found.ranks, wanted[0])
        torch.testing.assert_close(found.rows, wanted[1])
        torch.testing.assert_close(found.scores.double(), wanted[2].double())
        half = bonus.of(torch.tensor([1, 3]))
        part = target_ranks(interest[[1, 3]], items, targets[[1, 3]], seen[[1, 3], :2], bonus=half)
        torch.testing.assert_close(part, found.ranks[[1, 3]])
