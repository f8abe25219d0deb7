import math
from collections import Counter

import pytest
import torch

from lightning_rec.metrics import BeyondAccuracy, RankingResult


def result_of(recommended, counts=None, n_items=None):
    none = torch.zeros(len(recommended), 0, dtype=torch.int64)
    return RankingResult(none, none, recommended=recommended, counts=counts, n_items=n_items)


def test_hand_worked():
    counts = torch.tensor([0, 4, 2, 2, 0])
    metric = BeyondAccuracy(k=2)
    # The third column is beyond k, and 0 is padding.
    metric.update(result_of(torch.tensor([[1, 2, 3], [1, 4, 2], [1, 0, 0]]), counts))
    figures = metric.compute()
    assert figures["coverage@2"].item() == pytest.approx(3 / 4)
    # -log2 of 1/2 three times, of 1/4 once, and of 1/8 for the item without interactions.
    assert figures["novelty@2"].item() == pytest.approx((3 * 1 + 2 + 3) / 5)
    # Exposures 0, 1, 1, 3.
    assert figures["gini@2"].item() == pytest.approx((-3 * 0 - 1 * 1 + 1 * 1 + 3 * 3) / (4 * 5))


def test_against_loops_and_in_parts():
    g = torch.Generator().manual_seed(0)
    n = 50
    counts = torch.randint(1, 30, (n + 1,), generator=g)
    counts[0] = 0
    lists = torch.stack([torch.randperm(n, generator=g)[:5] + 1 for _ in range(40)]) % 30 + 1
    metrics = [BeyondAccuracy(5) for _ in range(2)]
    for metric, part in zip(metrics, (lists[:11], lists[11:]), strict=True):
        metric.configure(n + 1, counts)
        metric.update(result_of(part))
    metrics[0].merge_state(metrics[1])
    figures = metrics[0].compute()
    shown = Counter(lists.flatten().tolist())
    x = [shown.get(row, 0) for row in range(1, n + 1)]
    novelty = sum(-math.log2(counts[row] / counts.sum()) for row in lists.flatten()) / lists.numel()
    gini = sum(abs(a - b) for a in x for b in x) / (2 * n * sum(x))
    assert figures["coverage@5"].item() == pytest.approx(len(shown) / n)
    assert figures["novelty@5"].item() == pytest.approx(novelty, rel=1e-5)
    assert figures["gini@5"].item() == pytest.approx(gini, rel=1e-5)


def test_equal_exposure_and_one_for_all():
    even, one = BeyondAccuracy(1), BeyondAccuracy(1)
    even.update(result_of(torch.arange(1, 11)[:, None], n_items=10))
    one.update(result_of(torch.ones(10, 1, dtype=torch.int64), n_items=10))
    assert even.compute()["gini@1"].item() == pytest.approx(0)
    assert one.compute()["gini@1"].item() == pytest.approx(0.9)
    assert "novelty@1" not in even.compute()


def test_configured_without_a_batch_still_merges():
    idle, busy = BeyondAccuracy(1), BeyondAccuracy(1)
    for metric in (idle, busy):
        metric.configure(4, torch.tensor([0, 1, 1, 2]))
    assert idle.exposures.shape == busy.exposures.shape == (4,)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert torch.isnan(idle.compute()["novelty@1"])
    busy.update(result_of(torch.tensor([[3]])))
    busy.merge_state(idle)
    assert busy.compute()["novelty@1"] == 1
    busy.reset()
    assert busy.exposures.tolist() == [0, 0, 0, 0]


def test_what_is_missing_is_an_error():
    none = torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="recommended rows"):
        BeyondAccuracy().update(RankingResult(none, none, n_items=3))
    with pytest.raises(ValueError, match="number of items"):
        BeyondAccuracy().update(result_of(torch.tensor([[1]])))
    with pytest.raises(ValueError, match="at least 1"):
        BeyondAccuracy(k=0)
