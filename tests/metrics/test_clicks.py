import math

import pytest
import torch
from sklearn.metrics import log_loss
from torchmetrics.classification import BinaryCalibrationError

from lightning_rec.metrics import ClickMetrics, ImpressionResult


def result(probabilities, labels, sizes=None):
    labels = torch.as_tensor(labels).float()
    sizes = torch.full((len(labels),), labels.shape[1]) if sizes is None else torch.as_tensor(sizes)
    p = None if probabilities is None else torch.as_tensor(probabilities).float()
    return ImpressionResult(torch.zeros_like(labels), labels, sizes, torch.ones_like(labels, dtype=torch.int64), p)


def measure(*results, **options):
    metric = ClickMetrics(**options)
    for x in results:
        metric.update(x)
    return {name: value.item() for name, value in metric.compute().items()}


def invent(b=300, c=8, seed=0, power=1.0):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(b, c, generator=g) ** power
    labels = (torch.rand(b, c, generator=g) < p**1.3).float()
    labels[torch.rand(b, c, generator=g) < 0.1] = torch.nan
    sizes = torch.randint(0, c + 1, (b,), generator=g)
    return result(p, labels.masked_fill(torch.arange(c) >= sizes[:, None], torch.nan), sizes)


def test_equals_scikit_learn_and_torchmetrics():
    x = invent()
    kept = ~x.labels.isnan()
    p, y = x.probabilities[kept], x.labels[kept].long()
    found = measure(x)
    assert found["labelled"] == len(y)
    loss = log_loss(y.numpy(), p.double().numpy())
    assert found["log_loss"] == pytest.approx(loss, abs=1e-6)
    rate = y.double().mean().item()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert found["normalised_entropy"] == pytest.approx(loss / entropy, abs=1e-6)
    assert found["click_rate"] == pytest.approx(rate, abs=1e-6)
    assert found["mean_prediction"] == pytest.approx(p.mean().item(), abs=1e-6)
    wanted = BinaryCalibrationError(n_bins=10, norm="l1")(p, y).item()
    assert found["calibration_error"] == pytest.approx(wanted, abs=1e-5)


def test_bins_of_equal_numbers_tell_small_predictions_apart():
    x = invent(b=4000, power=4.0, seed=1)
    # All below 0.1: one bin of equal width.
    x.probabilities = x.probabilities * 0.09
    x.labels = torch.where(x.labels.isnan(), x.labels, (torch.rand_like(x.labels) < 0.02).float())
    kept = ~x.labels.isnan()
    p, y = x.probabilities[kept], x.labels[kept]
    found = measure(x)
    assert found["calibration_error"] == pytest.approx((p.mean() - y.mean()).abs().item(), abs=1e-6)
    order = p.argsort()
    gaps = [(p[i].sum() - y[i].sum()).abs() for i in order.tensor_split(10)]
    assert found["adaptive_calibration_error"] == pytest.approx(sum(gaps).item() / len(p), abs=5e-4)
    assert found["adaptive_calibration_error"] > 2 * found["calibration_error"]


def test_by_hand():
    found = measure(result([[0.8, 0.4, 0.1, 0.9]], [[1, 0, 0, torch.nan]], [4]), bins=2)
    assert found["log_loss"] == pytest.approx(-(math.log(0.8) + math.log(0.6) + math.log(0.9)) / 3, abs=1e-6)
    # [0, 0.5): predicted 0.5, clicked 0; [0.5, 1]: predicted 0.8, clicked 1.
    assert found["calibration_error"] == pytest.approx((0.5 + 0.2) / 3, abs=1e-6)
    # The lowest alone: predicted 0.1, clicked 0; the others: predicted 1.2, clicked 1.
    assert found["adaptive_calibration_error"] == pytest.approx((0.1 + 0.2) / 3, abs=1e-6)
    assert found["click_rate"] == pytest.approx(1 / 3)


def test_the_click_rate_for_everything_has_entropy_one():
    x = result(torch.full((1, 4), 0.25), [[1, 0, 0, 0]])
    found = measure(x)
    assert found["normalised_entropy"] == pytest.approx(1, abs=1e-6)
    assert found["calibration_error"] == pytest.approx(0, abs=1e-6)


def test_sure_mistakes_and_no_numbers_stay_finite():
    found = measure(result([[0.0, 1.0, torch.nan, 2.0]], [[1, 0, 1, 0]]))
    assert found["log_loss"] == pytest.approx(-math.log(1e-7), rel=1e-2)
    assert found["mean_prediction"] == 0.5
    assert found["calibration_error"] == 1


def test_one_label_alone_has_no_entropy():
    found = measure(result([[0.5]], [[0.0]]))
    assert math.isnan(found["normalised_entropy"])
    assert found["log_loss"] == pytest.approx(math.log(2))


def test_nothing_is_reported_without_probabilities():
    assert measure(result(None, [[1, 0]])) == {}
    assert measure(result([[0.5]], [[torch.nan]])) == {}


def test_batches_change_nothing():
    x = invent()
    parts = [
        result(x.probabilities[rows], x.labels[rows], x.sizes[rows]) for rows in torch.arange(len(x.sizes)).split(11)
    ]
    assert measure(*parts) == measure(x)


def test_bins_are_checked():
    with pytest.raises(ValueError, match="bins"):
        ClickMetrics(0)
