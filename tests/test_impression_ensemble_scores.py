"""The mean of the normalised scores of impressions, worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rec import ImpressionEnsemble
from lightning_rec.data import Batch, ImpressionBatch, UserBatch
from lightning_rec.impression_ensemble import normalised


class Fixed(nn.Module):
    """Gives every impression the scores that it was told."""

    def __init__(self, scores, known=True, chance=None):
        super().__init__()
        self.scores = torch.tensor(scores)
        self.known = torch.full((len(scores),), known) if isinstance(known, bool) else torch.tensor(known)
        self.chance = chance

    def candidate_scores(self, batch):
        return self.scores, self.known

    def probabilities(self, scores):
        return None if self.chance is None else torch.full_like(scores, self.chance)


def fixed(*members, sizes, **options):
    ensemble = ImpressionEnsemble(["run"] * len(members), **options)
    ensemble.members, ensemble.windows = nn.ModuleList(members), [None] * len(members)
    ensemble.train_counts = torch.arange(20)
    width = members[0].scores.shape[1]
    rows = 10 + torch.arange(width).expand(len(sizes), width)
    nobody = UserBatch(
        torch.zeros(len(sizes), 1).long(), torch.zeros(len(sizes)).long(), torch.zeros(len(sizes)).long()
    )
    shown = ImpressionBatch(rows, torch.tensor(sizes))
    return ensemble, Batch(users=nobody, index=torch.arange(len(sizes)), impressions=shown)


def test_two_members_by_hand():
    # means 2 and 20, deviations sqrt(2 / 3) and sqrt(200 / 3): -1, 0, 1 and 1, -1, 0 times sqrt(3 / 2)
    left, right = Fixed([[1.0, 2.0, 3.0]]), Fixed([[30.0, 10.0, 20.0]])
    ensemble, batch = fixed(left, right, sizes=[3])
    scores = ensemble.predict_step(batch, 0)["scores"]
    assert scores[0].tolist() == pytest.approx([0.0, -(1.5**0.5) / 2, 1.5**0.5 / 2])
    ensemble.weights = [3.0, 1.0]
    scores = ensemble.predict_step(batch, 0)["scores"]
    assert scores[0].tolist() == pytest.approx([-(1.5**0.5) / 2, -(1.5**0.5) / 4, 1.5**0.5 * 3 / 4])
    ensemble.normalise, ensemble.weights = "min_max", [1.0, 1.0]  # 0, .5, 1 and 1, 0, .5
    assert ensemble.predict_step(batch, 0)["scores"][0].tolist() == [0.5, 0.25, 0.75]
    ensemble.normalise = "none"
    assert ensemble.predict_step(batch, 0)["scores"][0].tolist() == [15.5, 6.0, 11.5]


@pytest.mark.parametrize("how", ["z_score", "min_max"])
def test_ties_one_candidate_and_constant_scores(how):
    scores = torch.tensor([[5.0, 5.0, 5.0], [7.0, 9.0, 9.0], [2.0, 0.1, 0.2], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True, False, False], [False] * 3])
    found = normalised(scores, mask, how)
    assert found[[0, 2, 3]].eq(0).all(), "equal scores, an only candidate and none have nothing to say"
    assert found[1, 1] == found[1, 2] > found[1, 0]
    rounding = torch.tensor([[1.0, 1.0 + 2**-23, 1.0]])
    assert normalised(rounding, torch.ones(1, 3, dtype=torch.bool), how).eq(0).all()


@pytest.mark.parametrize("how", ["z_score", "min_max", "none"])
def test_padding_and_its_values_change_no_bit(how):
    draw = torch.Generator().manual_seed(0)
    for size in range(1, 40):
        scores = torch.randn(1, size, generator=draw) * 100
        alone = normalised(scores, torch.ones(1, size, dtype=torch.bool), how)
        wide = torch.cat([scores, torch.tensor([[torch.nan, torch.inf, 1e30, -torch.inf] * 17])], 1)
        padded = normalised(wide, torch.arange(wide.shape[1])[None] < size, how)
        assert torch.equal(padded[:, :size], alone)
        assert padded[:, size:].eq(0).all()


@pytest.mark.parametrize("how", ["z_score", "min_max"])
def test_one_run_keeps_every_difference_of_its_scores(how):
    """A float32 mean would swallow what tells small scores apart."""
    scores = torch.tensor([[1e-6, 1.0000001e-6, 1.0000002e-6, 10.0, 20.0]])
    assert len(scores.unique()) == 5
    found = normalised(scores, torch.ones(1, 5, dtype=torch.bool), how)
    assert (found.diff() > 0).all()


def test_users_whom_some_or_none_know():
    scores = [[1.0, 2.0, 3.0]] * 3
    left = Fixed(scores, known=[True, False, False], chance=0.2)
    right = Fixed([[3.0, 2.0, 1.0]] * 3, known=[True, True, False], chance=0.6)
    ensemble, batch = fixed(left, right, sizes=[3, 3, 3], weights=[3.0, 1.0])
    found = ensemble.predict_step(batch, 0)
    high = 1.5**0.5
    assert found["scores"][0].tolist() == pytest.approx([-high / 2, 0, high / 2])
    assert found["scores"][1].tolist() == pytest.approx([high, 0, -high]), "the other answers alone"
    assert found["scores"][2].tolist() == [10, 11, 12], "popularity in training"
    assert found["fallback"].tolist() == [False, False, True]
    chances = ensemble.probabilities(found["scores"])
    assert chances[:, 0].tolist() == pytest.approx([0.3, 0.6, 0.3])


def test_without_the_probabilities_of_one_there_are_none_but_its_weight_is_0():
    scores = [[1.0, 2.0]]
    ensemble, batch = fixed(Fixed(scores, chance=0.5), Fixed(scores), sizes=[2])
    ensemble.candidate_scores(batch)
    assert ensemble.probabilities(torch.zeros(1, 2)) is None
    ensemble.weights = [1.0, 0.0]
    ensemble.candidate_scores(batch)
    assert ensemble.probabilities(torch.zeros(1, 2)).tolist() == [[0.5, 0.5]]


def test_deviations_are_those_of_numpy_for_every_number_of_candidates():
    draw = np.random.default_rng(0)
    for size in range(1, 70):
        scores = draw.normal(3, 5, (4, size)).astype(np.float32)
        found = normalised(torch.from_numpy(scores), torch.ones(4, size, dtype=torch.bool), "z_score").numpy()
        exact = scores.astype(np.float64)
        wanted = (exact - exact.mean(1, keepdims=True)) / np.maximum(exact.std(1, keepdims=True), 1e-12)
        np.testing.assert_allclose(found, wanted if size > 1 else 0 * exact, rtol=1e-9, atol=1e-12)
