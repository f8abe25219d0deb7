import math
from collections import Counter
from itertools import combinations

import pytest
import torch

from lightning_rec.metrics import ImpressionResult, ImpressionTop

COUNTS = torch.tensor([0, 7, 3, 0, 1, 5])
GROUPS = torch.tensor([0, 1, 1, 2, 0, 3])


def result(scores, rows, sizes=None, counts=None, groups=None):
    scores, rows = torch.as_tensor(scores).float(), torch.as_tensor(rows)
    sizes = torch.full((len(scores),), scores.shape[1]) if sizes is None else torch.as_tensor(sizes)
    return ImpressionResult(scores, torch.full_like(scores, torch.nan), sizes, rows, counts=counts, groups=groups)


def measure(*results, configured=False, **options):
    metric = ImpressionTop(**options)
    if configured:
        metric.configure(len(COUNTS), COUNTS, GROUPS)
    for x in results:
        metric.update(x)
    return {name: value.item() for name, value in metric.compute().items()}


def test_by_hand():
    found = measure(result([[1.0, 4.0, 3.0, 2.0, 0.0]], [[4, 1, 2, 3, 5]]), configured=True, k=3)
    # 1, 2 and 3, of categories 1, 1 and 2.
    assert found["category_share@3"] == pytest.approx(2 / 3)
    assert found["category_entropy@3"] == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)))
    assert found["category_diversity@3"] == pytest.approx(2 / 3)
    assert found["popularity@3"] == pytest.approx((math.log(8) + math.log(4) + math.log(1)) / 3)
    assert found["novelty@3"] == pytest.approx((math.log2(16 / 7) + math.log2(16 / 3) + 4) / 3)


def by_loops(x, k):
    found = {"category_share": [], "category_entropy": [], "category_diversity": [], "popularity": [], "novelty": []}
    for scores, rows, size in zip(x.scores.tolist(), x.rows.tolist(), x.sizes.tolist(), strict=True):
        top = [rows[i] for i in sorted(range(size), key=lambda i: (-scores[i], i))[:k]]
        groups = [g for g in GROUPS[top].tolist() if g]
        if groups:
            shares = [n / len(groups) for n in Counter(groups).values()]
            found["category_share"].append(len(shares) / len(groups))
            found["category_entropy"].append(-sum(p * math.log2(p) for p in shares))
        if len(groups) > 1:
            pairs = [a != b for a, b in combinations(groups, 2)]
            found["category_diversity"].append(sum(pairs) / len(pairs))
        if top:
            clicks = COUNTS[top].tolist()
            found["popularity"].append(sum(math.log1p(n) for n in clicks) / len(top))
            found["novelty"].append(sum(math.log2(16 / max(1, n)) for n in clicks) / len(top))
    return {f"{name}@{k}": sum(values) / len(values) for name, values in found.items() if values}


@pytest.mark.parametrize("k", [1, 2, 4, 20])
def test_equals_loops_in_batches_of_any_size(k):
    g = torch.Generator().manual_seed(k)
    scores = torch.randn(60, 7, generator=g).round(decimals=1)
    rows, sizes = torch.randint(1, 6, (60, 7), generator=g), torch.randint(0, 8, (60,), generator=g)
    rows = rows.masked_fill(torch.arange(7) >= sizes[:, None], 0)
    scores = scores.masked_fill(rows == 0, 50.0)
    x = result(scores, rows, sizes, COUNTS, GROUPS)
    found = measure(x, k=k)
    assert found == pytest.approx(by_loops(x, k), abs=1e-6)
    parts = [result(scores[i], rows[i], sizes[i], COUNTS, GROUPS) for i in torch.arange(60).split(13)]
    assert measure(*parts, k=k) == found


def test_padding_ties_and_no_numbers():
    nan = torch.nan
    # Of equal scores the first shown is the better; NaN is the worst; padding is never looked at.
    found = measure(result([[nan, 0.5, 0.5, 9.0]], [[1, 3, 5, 0]], [3]), configured=True, k=1)
    assert found["popularity@1"] == 0
    found = measure(result([[nan, -torch.inf, 9.0]], [[3, 3, 0]], [2]), configured=True, k=2)
    assert found["popularity@2"] == 0
    assert found["category_diversity@2"] == 0


def test_what_is_unknown_is_not_reported():
    x = result([[1.0, 2.0]], [[1, 2]])
    assert measure(x) == {}
    x.counts = COUNTS
    assert set(measure(x)) == {"popularity@10", "novelty@10"}
    x.counts, x.groups = None, torch.zeros(6, dtype=torch.int64)
    assert measure(x) == {}


def test_no_impressions():
    assert measure(result(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)), configured=True) == {}
    assert measure(result(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64)), configured=True) == {}


def test_k_is_checked():
    with pytest.raises(ValueError, match="k is 0"):
        ImpressionTop(0)
