import pytest
import torch

from lightning_rec.metrics import RatingMetrics


def test_hand_worked_and_merged():
    first, second = RatingMetrics(), RatingMetrics()
    first.update(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([5.0, 4.0, torch.nan]))
    second.update(torch.tensor([2.0]), torch.tensor([1.0]))
    first.merge_state(second)
    figures = first.compute()
    assert figures["rmse"].item() == pytest.approx((5 / 3) ** 0.5)
    assert figures["mae"].item() == pytest.approx(1.0)
    assert figures["ratings"].item() == 3


def test_against_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the test extra")
    g = torch.Generator().manual_seed(0)
    predicted, rating = torch.rand(200, generator=g) * 5, torch.rand(200, generator=g) * 5
    metric = RatingMetrics()
    for a, b in zip(predicted.split(33), rating.split(33), strict=True):
        metric.update(a, b)
    figures = metric.compute()
    assert figures["rmse"].item() == pytest.approx(sklearn_metrics.root_mean_squared_error(rating, predicted), rel=1e-5)
    assert figures["mae"].item() == pytest.approx(sklearn_metrics.mean_absolute_error(rating, predicted), rel=1e-5)


def test_no_ratings():
    metric = RatingMetrics()
    metric.update(torch.ones(2), torch.full((2,), torch.nan))
    figures = metric.compute()
    assert figures["ratings"] == 0
    assert torch.isnan(figures["rmse"])
    assert torch.isnan(figures["mae"])
