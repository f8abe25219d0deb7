import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score, roc_auc_score

from lightning_rec.metrics import ImpressionRanking, ImpressionResult

NAN = torch.nan


def result(scores, labels, sizes=None):
    scores, labels = torch.as_tensor(scores).float(), torch.as_tensor(labels).float()
    sizes = torch.full((len(scores),), scores.shape[1]) if sizes is None else torch.as_tensor(sizes)
    return ImpressionResult(scores, labels, sizes, torch.ones_like(scores, dtype=torch.int64))


def measure(*results, **options):
    metric = ImpressionRanking(**options)
    for x in results:
        metric.update(x)
    return {name: value.item() for name, value in metric.compute().items()}


def invent(b=200, c=12, seed=0, ties=False, unlabelled=True):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(b, c, generator=g)
    if ties:
        scores = (scores * 1.5).round()
    labels = (torch.rand(b, c, generator=g) < 0.3).float()
    sizes = torch.randint(0, c + 1, (b,), generator=g)
    if unlabelled:
        labels[torch.rand(b, c, generator=g) < 0.1] = NAN
    padding = torch.arange(c) >= sizes[:, None]
    return result(scores.masked_fill(padding, 99.0), labels.masked_fill(padding, NAN), sizes)


def lists(x):
    """Scores and labels of the labelled candidates of the impressions that can be measured."""
    for scores, labels in zip(x.scores.double().numpy(), x.labels.numpy(), strict=True):
        kept = ~np.isnan(labels)
        if 0 < labels[kept].sum() < kept.sum():
            yield scores[kept], labels[kept]


# As in MIND's evaluation script.
def dcg_score(y_true, y_score, k):
    order = np.argsort(y_score)[::-1]
    gains = 2 ** np.take(y_true, order[:k]) - 1
    return np.sum(gains / np.log2(np.arange(len(gains)) + 2))


def mrr_score(y_true, y_score):
    y_true = np.take(y_true, np.argsort(y_score)[::-1])
    return np.sum(y_true / (np.arange(len(y_true)) + 1)) / np.sum(y_true)


def test_equals_scikit_learn_and_the_script_of_mind():
    x = invent()
    pairs = list(lists(x))
    found = measure(x)
    assert found["impressions"] == len(pairs)
    assert found["impressions_skipped"] == len(x.scores) - len(pairs)
    assert found["auc"] == pytest.approx(np.mean([roc_auc_score(y, s) for s, y in pairs]), abs=1e-6)
    assert found["mrr"] == pytest.approx(np.mean([mrr_score(y, s) for s, y in pairs]), abs=1e-6)
    for k in (5, 10):
        by_script = np.mean([dcg_score(y, s, k) / dcg_score(y, y, k) for s, y in pairs])
        by_sklearn = np.mean([ndcg_score([y], [s], k=k) for s, y in pairs])
        assert by_script == pytest.approx(by_sklearn)
        assert found[f"ndcg@{k}"] == pytest.approx(by_script, abs=1e-6)


def test_ties_are_a_half_in_auc_and_lost_in_the_others():
    x = invent(ties=True, seed=3)
    pairs = list(lists(x))
    found = measure(x)
    assert found["auc"] == pytest.approx(np.mean([roc_auc_score(y, s) for s, y in pairs]), abs=1e-6)
    # A little taken off the clicks puts them behind what they are tied with.
    pairs = [(s - 1e-6 * y + 1e-9 * np.arange(len(s)), y) for s, y in pairs]
    assert found["mrr"] == pytest.approx(np.mean([mrr_score(y, s) for s, y in pairs]), abs=1e-6)
    assert found["ndcg@5"] == pytest.approx(np.mean([ndcg_score([y], [s], k=5) for s, y in pairs]), abs=1e-6)


def test_by_hand():
    # Ranks of the clicks: 1 and 3 of 4. Pairs: 2 + 1 of 4.
    found = measure(result([[4.0, 3.0, 2.0, 1.0]], [[1, 0, 1, 0]]), ks=(1, 2, 5))
    assert found["auc"] == pytest.approx(3 / 4)
    assert found["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["ndcg@1"] == pytest.approx(1)
    assert found["ndcg@2"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert found["ndcg@5"] == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))


def test_constant_scores_earn_no_credit():
    found = measure(result([[0.5] * 5], [[1, 0, 0, 0, 0]]))
    assert found["auc"] == 0.5
    assert found["mrr"] == pytest.approx(1 / 5)
    assert found["ndcg@5"] == pytest.approx(1 / math.log2(6))
    many = measure(result([[0.0] * 12], [[1] + [0] * 11]))
    assert many["ndcg@10"] == 0


@pytest.mark.parametrize("bad", [NAN, -torch.inf])
def test_scores_that_are_no_numbers(bad):
    found = measure(result([[bad, 1.0, 2.0]], [[1, 0, 0]]))
    assert (found["auc"], found["mrr"]) == (0, pytest.approx(1 / 3))
    # A non-click without a number stands before everything; with minus infinity it stands last.
    found = measure(result([[5.0, bad]], [[1, 0]]))
    assert found["auc"] == (0 if math.isnan(bad) else 1)
    # A click at minus infinity still stands before padding and what is unlabelled.
    found = measure(result([[-torch.inf, 1.0, 9.0, 9.0]], [[1, 0, NAN, NAN]], [3]))
    assert found["mrr"] == 0.5


def test_batches_and_processes_change_nothing():
    x = invent(ties=True)

    def part(rows):
        return result(x.scores[rows], x.labels[rows], x.sizes[rows])

    whole = measure(x)
    assert measure(*[part(rows) for rows in torch.arange(len(x.scores)).split(7)]) == whole
    narrow = part(x.sizes <= 4)
    narrow = result(narrow.scores[:, :4], narrow.labels[:, :4], narrow.sizes)
    assert measure(narrow, part(x.sizes > 4)) == whole
    a, b = ImpressionRanking(), ImpressionRanking()
    a.update(part(slice(0, 50)))
    b.update(part(slice(50, None)))
    a.totals, a.impressions, a.skipped = a.totals + b.totals, a.impressions + b.impressions, a.skipped + b.skipped
    assert {name: value.item() for name, value in a.compute().items()} == whole


def test_what_cannot_be_measured_is_counted():
    found = measure(result([[1.0, 2.0]] * 4, [[1, 1], [0, 0], [NAN, NAN], [1, NAN]], [2, 2, 2, 2]))
    assert (found["impressions"], found["impressions_skipped"]) == (0, 4)
    assert all(math.isnan(found[name]) for name in ("auc", "mrr", "ndcg@5", "ndcg@10"))
    found = measure(result(torch.zeros(2, 0), torch.zeros(2, 0)), result(torch.zeros(0, 3), torch.zeros(0, 3)))
    assert (found["impressions"], found["impressions_skipped"]) == (0, 2)


def test_order_of_candidates_changes_nothing():
    x = invent(ties=True, seed=5)
    turned = torch.arange(x.scores.shape[1]).expand_as(x.scores)
    turned = torch.where(turned < x.sizes[:, None], x.sizes[:, None] - 1 - turned, turned)
    y = result(x.scores.gather(1, turned), x.labels.gather(1, turned), x.sizes)
    assert measure(x) == measure(y)


def test_cut_offs_are_checked():
    for ks in ((), (0,)):
        with pytest.raises(ValueError, match="cut-offs"):
            ImpressionRanking(ks)
