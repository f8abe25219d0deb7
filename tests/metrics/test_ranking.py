import math

import numpy as np
import pytest
import torch

from lightning_rec.metrics import RankingMetrics, RankingResult, popularity_thirds

NAMES = ("hr", "recall", "precision", "ndcg", "mrr", "map")


def by_loops(ranks, k):
    """Every figure from its definition, user by user."""
    figures = {name: [] for name in NAMES}
    for row in ranks.tolist():
        places = sorted(r for r in row if r > 0)
        if not places:
            continue
        hits = [r for r in places if r <= k]
        ideal = sum(1 / math.log2(1 + i) for i in range(1, min(len(places), k) + 1))
        figures["hr"].append(float(bool(hits)))
        figures["recall"].append(len(hits) / len(places))
        figures["precision"].append(len(hits) / k)
        figures["ndcg"].append(sum(1 / math.log2(1 + r) for r in hits) / ideal)
        figures["mrr"].append(1 / hits[0] if hits else 0.0)
        figures["map"].append(sum((i + 1) / r for i, r in enumerate(hits)) / min(len(places), k))
    return {name: sum(values) / len(values) for name, values in figures.items()}, len(figures["hr"])


def random_ranks(seed, b=40, n=30, m=6):
    """Distinct ranks in random order, some of them padding."""
    g = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(n, generator=g)[:m] + 1 for _ in range(b)])
    return ranks.masked_fill(torch.rand(b, m, generator=g) < 0.4, 0)


def result_of(ranks, **options):
    return RankingResult(ranks=ranks, targets=(ranks > 0).long(), **options)


@pytest.mark.parametrize("seed", range(3))
def test_against_loops(seed):
    ranks = random_ranks(seed)
    metric = RankingMetrics(ks=(1, 5, 10, 50))
    for part in ranks.split(7):
        metric.update(result_of(part))
    figures = metric.compute()
    for k in (1, 5, 10, 50):
        wanted, users = by_loops(ranks, k)
        assert figures["users"].item() == users
        for name in NAMES:
            assert figures[f"{name}@{k}"].item() == pytest.approx(wanted[name], abs=1e-6)


def test_hand_worked():
    # Targets at places 1 and 4, and a third that is a miss; a user whose one target is at place 2; a user without any.
    metric = RankingMetrics(ks=(3, 5))
    metric.update(result_of(torch.tensor([[4, 1, 99], [0, 2, 0], [0, 0, 0]])))
    figures = {name: round(value.item(), 6) for name, value in metric.compute().items()}
    ideal = 1 + 1 / math.log2(3) + 0.5
    assert figures == {
        "hr@3": 1.0,
        "hr@5": 1.0,
        "recall@3": round((1 / 3 + 1) / 2, 6),
        "recall@5": round((2 / 3 + 1) / 2, 6),
        "precision@3": round((1 / 3 + 1 / 3) / 2, 6),
        "precision@5": round((2 / 5 + 1 / 5) / 2, 6),
        "ndcg@3": round((1 / ideal + 1 / math.log2(3)) / 2, 6),
        "ndcg@5": round(((1 + 1 / math.log2(5)) / ideal + 1 / math.log2(3)) / 2, 6),
        "mrr@3": 0.75,
        "mrr@5": 0.75,
        "map@3": round((1 / 3 + 1 / 2) / 2, 6),
        "map@5": round(((1 + 2 / 4) / 3 + 1 / 2) / 2, 6),
        "users": 2.0,
    }


def test_constant_scores_hit_nothing():
    from lightning_rec.metrics import target_ranks

    ranks = target_ranks(torch.ones(8, 2), torch.ones(101, 2), torch.arange(1, 9)[:, None])
    metric = RankingMetrics(ks=(1, 10))
    metric.update(result_of(ranks))
    figures = metric.compute()
    assert figures["hr@1"] == figures["ndcg@10"] == 0


def test_cutoff_above_the_catalogue_is_clamped():
    # Four items; rank 5 = the row count stands for a target that cannot be recommended, which is no hit at any k.
    ranks = torch.tensor([[2, 5], [4, 0]])
    clamped, four = RankingMetrics(ks=(50,)), RankingMetrics(ks=(4,))
    clamped.update(result_of(ranks, n_items=4))
    four.update(result_of(ranks))
    assert {k.replace("@50", "@4"): v for k, v in clamped.compute().items()} == four.compute()
    by_counts = RankingMetrics(ks=(50,))
    by_counts.update(result_of(ranks, counts=torch.zeros(5)))
    assert by_counts.compute() == clamped.compute()


def test_two_states_merge_into_one_to_the_last_digit():
    ranks = random_ranks(7, b=100)
    whole = RankingMetrics(ks=(5, 10))
    whole.update(result_of(ranks))
    parts = [RankingMetrics(ks=(5, 10)) for _ in range(3)]
    for metric, part in zip(parts, (ranks[:13], ranks[13:80], ranks[80:]), strict=True):
        metric.update(result_of(part))
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2])
    assert parts[0].compute() == whole.compute()


def test_no_users():
    metric = RankingMetrics(slices=("cold",))
    options = {"counts": torch.ones(4)}
    metric.update(result_of(torch.zeros(3, 2, dtype=torch.int64), **options))
    metric.update(result_of(torch.zeros(3, 0, dtype=torch.int64), **options))
    metric.update(result_of(torch.zeros(0, 2, dtype=torch.int64), **options))
    figures = metric.compute()
    assert figures["users"] == figures["cold/users"] == 0
    assert torch.isnan(figures["ndcg@10"])
    assert "cold/ndcg@10" not in figures


def test_reset_starts_again():
    metric = RankingMetrics()
    metric.update(result_of(torch.tensor([[1]])))
    metric.reset()
    metric.update(result_of(torch.tensor([[99]])))
    assert metric.compute()["hr@10"] == 0
    assert metric.compute()["users"] == 1


def test_ndcg_against_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the test extra")
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(30.0), (20, 1)), axis=1)
    relevant = (rng.random((20, 30)) < 0.15).astype(float)
    relevant[:, 0] = 1
    order = (-scores).argsort(1).argsort(1) + 1
    ranks = torch.tensor(order * relevant).long()
    for k in (1, 5, 10):
        metric = RankingMetrics(ks=(k,), names=("ndcg",))
        metric.update(result_of(ranks))
        wanted = sklearn_metrics.ndcg_score(relevant, scores, k=k)
        assert metric.compute()[f"ndcg@{k}"].item() == pytest.approx(wanted, abs=1e-6)


def test_against_trec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec-eval-terrier is in the test extra")
    ranks = random_ranks(11, b=30, n=30)
    ranks = ranks[(ranks > 0).any(1)]
    relevant, run = {}, {}
    for u, row in enumerate(ranks.tolist()):
        places = [r for r in row if r > 0]
        relevant[str(u)] = {f"d{r}": 1 for r in places}
        run[str(u)] = {f"d{r}": float(100 - r) for r in range(1, 31)}
    judged = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.5,10", "recall.5,10", "P.5,10", "success.5,10"})
    found = judged.evaluate(run)
    metric = RankingMetrics(ks=(5, 10))
    metric.update(result_of(ranks))
    figures = metric.compute()
    for ours, theirs in (("ndcg", "ndcg_cut"), ("recall", "recall"), ("precision", "P"), ("hr", "success")):
        for k in (5, 10):
            wanted = np.mean([values[f"{theirs}_{k}"] for values in found.values()])
            assert figures[f"{ours}@{k}"].item() == pytest.approx(wanted, abs=1e-6)
    # trec_eval divides average precision by all relevant items, which is ours when k is not below their number.
    whole = RankingMetrics(ks=(30,), names=("map", "mrr"))
    whole.update(result_of(ranks))
    judged = pytrec_eval.RelevanceEvaluator(relevant, {"map", "recip_rank"}).evaluate(run)
    for ours, theirs in (("map", "map"), ("mrr", "recip_rank")):
        wanted = np.mean([values[theirs] for values in judged.values()])
        assert whole.compute()[f"{ours}@30"].item() == pytest.approx(wanted, abs=1e-6)


def test_popularity_thirds_by_hand():
    # Counts 6, 3, 3, 2, 2, 1, 1, 0 make 18: the item with 6 is a third; the two with 3 the next; the rest the last.
    counts = torch.tensor([0, 3, 1, 6, 2, 0, 3, 2, 1])
    assert popularity_thirds(counts).tolist() == [2, 1, 2, 0, 2, 2, 1, 2, 2]
    # Equal counts share a slice.
    assert popularity_thirds(torch.tensor([0, 5, 5, 5, 5])).tolist() == [2, 0, 0, 0, 0]
    assert popularity_thirds(torch.zeros(3)).tolist() == [2, 2, 2]
    # One item with nearly everything is the head; what comes after it has passed two thirds.
    assert popularity_thirds(torch.tensor([0, 90, 5, 5])).tolist() == [2, 0, 2, 2]


def test_slices():
    counts = torch.tensor([0, 6, 3, 3, 2, 2, 2, 0])
    slices = ("cold", "warm", "head", "torso", "tail")
    metric = RankingMetrics(ks=(10,), slices=slices)
    targets = torch.tensor([[1, 2, 7], [7, 0, 0], [4, 5, 1]])
    ranks = torch.tensor([[1, 12, 2], [20, 0, 0], [5, 6, 11]])
    metric.update(RankingResult(ranks, targets, counts=counts, n_items=100))
    figures = metric.compute()
    member = {
        "cold": {7},
        "warm": {1, 2, 3, 4, 5, 6},
        "head": {1},
        "torso": {2, 3},
        "tail": {4, 5, 6, 7},
    }
    for name, rows in member.items():
        inside = torch.tensor([[int(t) in rows for t in row] for row in targets])
        wanted, users = by_loops(ranks * inside, 10)
        assert figures[f"{name}/users"].item() == users
        for figure in NAMES:
            assert figures[f"{name}/{figure}@10"].item() == pytest.approx(wanted[figure], abs=1e-6)
    assert figures["users"] == 3
    assert figures["cold/users"] == 2


def test_what_is_unknown_is_an_error():
    with pytest.raises(ValueError, match="no figure 'auc'"):
        RankingMetrics(names=("auc",))
    with pytest.raises(ValueError, match="no slice 'new'"):
        RankingMetrics(slices=("new",))
    with pytest.raises(ValueError, match="cut-offs"):
        RankingMetrics(ks=(0, 10))
    with pytest.raises(ValueError, match="training interactions"):
        RankingMetrics(slices=("cold",)).update(result_of(torch.tensor([[1]])))
