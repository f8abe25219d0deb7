import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lightning_rec.objectives import Calibration, undo_sampling


def clicks(n=20000, a=0.7, b=-2.0, spread=3.0, shift=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=g) * spread + shift
    labels = (torch.rand(n, generator=g) < torch.sigmoid(a * scores + b)).float()
    return scores, labels


@pytest.mark.parametrize(
    ("spread", "shift", "a", "b"), [(3.0, 1.0, 0.7, -2.0), (0.02, 0.5, 50.0, -26.0), (400.0, 0.0, 0.01, -1.0)]
)
def test_equals_logistic_regression(spread, shift, a, b):
    scores, labels = clicks(a=a, b=b, spread=spread, shift=shift)
    calibration = Calibration()
    assert not calibration.fitted
    for x, y in zip(scores.split(777), labels.split(777), strict=True):
        calibration.update(x, y)
    assert calibration.fit()
    assert calibration.fitted
    mean, std = scores.mean().item(), scores.std().item()
    x = ((scores.double().numpy() - mean) / std)[:, None]
    wanted = LogisticRegression(C=np.inf, tol=1e-10).fit(x, labels.numpy())
    torch.testing.assert_close(
        calibration(scores), torch.tensor(wanted.predict_proba(x)[:, 1]).float(), atol=2e-4, rtol=5e-3
    )


def test_weights_stand_for_repetitions():
    scores, labels = clicks(500)
    weights = torch.randint(1, 5, (500,), generator=torch.Generator().manual_seed(1))
    one, other = Calibration(), Calibration()
    one.update(scores, labels, weights.float())
    other.update(scores.repeat_interleave(weights), labels.repeat_interleave(weights))
    assert one.fit()
    assert other.fit()
    torch.testing.assert_close(one.scale, other.scale)
    torch.testing.assert_close(one.offset, other.offset)


def test_the_order_and_the_cut_of_batches_change_nothing():
    scores, labels = clicks(3000)
    one, other = Calibration(), Calibration()
    one.update(scores.view(30, 100), labels.view(30, 100))
    for i in torch.randperm(3000, generator=torch.Generator().manual_seed(2)).split(7):
        other.update(scores[i], labels[i])
    assert torch.equal(one.sums.sums, other.sums.sums)
    # What two processes would add up.
    halves = [Calibration(), Calibration()]
    halves[0].update(scores[:1000], labels[:1000])
    halves[1].update(scores[1000:], labels[1000:])
    assert torch.equal(halves[0].sums.sums + halves[1].sums.sums, one.sums.sums)


def test_scores_that_are_worse_than_chance_give_the_rate():
    scores, labels = clicks(a=-1.0, b=0.0)
    calibration = Calibration()
    calibration.update(scores, labels)
    assert calibration.fit()
    assert calibration.scale == 0
    assert calibration(torch.tensor(3.0)).item() == pytest.approx(labels.mean().item(), abs=1e-3)


def test_separable_and_constant_scores_stay_finite():
    calibration = Calibration()
    calibration.update(torch.tensor([-1.0, -2.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert calibration.fit()
    assert calibration.scale > 0
    assert calibration.scale.isfinite()
    low, high = calibration(torch.tensor([-1.0, 1.0])).tolist()
    lower, higher = calibration(torch.tensor([-2.0, 2.0])).tolist()
    # Platt's targets are 1 / (2 + 2) and 3 / 4; the gradients towards them vanish.
    assert low + lower + high + higher == pytest.approx(2)
    assert (high - 0.75) + 2 * (higher - 0.75) == pytest.approx(0, abs=1e-5)
    calibration.reset()
    calibration.update(torch.full((8,), 0.3), torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1]))
    assert calibration.fit()
    assert calibration(torch.tensor(0.3)).item() == pytest.approx((2 * 3 / 4 + 6 / 8) / 8)


def test_what_has_no_label_or_no_score_is_left_out():
    nan = torch.nan
    calibration = Calibration()
    calibration.update(torch.tensor([nan, 5.0, torch.inf, -3.0]), torch.tensor([1.0, nan, 1.0, 0.0]))
    assert calibration.sums.compute()[1].sum(0).tolist() == [1, 1]
    assert calibration.fit()
    assert calibration.scale.isfinite()


def test_without_both_labels_nothing_is_fitted():
    calibration = Calibration()
    calibration.update(torch.zeros(0), torch.zeros(0))
    assert not calibration.fit()
    calibration.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    assert not calibration.fit()
    assert not calibration.fitted
    torch.testing.assert_close(calibration(torch.tensor(0.5)), torch.sigmoid(torch.tensor(0.5)))


def test_what_was_fitted_is_saved_and_the_sums_are_not():
    calibration = Calibration()
    calibration.update(*clicks(300))
    calibration.fit()
    state = calibration.state_dict()
    assert sorted(state) == ["is_fitted", "offset", "scale"]
    again = Calibration()
    again.load_state_dict(state)
    assert again.fitted
    scores = torch.linspace(-5, 5, 50)
    assert torch.equal(again(scores), calibration(scores))
    assert (calibration(scores).diff() >= 0).all()


def test_undo_sampling_by_hand():
    # 10 clicks in 1000; a tenth of the 990 non-clicks kept: 10 in 109.
    assert undo_sampling(torch.tensor(10 / 109), 0.1).item() == pytest.approx(0.01)
    assert undo_sampling(torch.tensor(0.3), 1.0).item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match="rate"):
        undo_sampling(torch.tensor(0.3), 0.0)
