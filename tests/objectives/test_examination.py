import math

import pytest
import torch

from lightning_rec.objectives import Examination
from lightning_rec.objectives.examination import examined


def test_given_probabilities():
    examination = Examination(positions=5, propensities=[0.9, 0.5, 0.1])
    assert not examination.learn
    assert list(examination.parameters()) == []
    wanted = torch.tensor(
        [1.0, 0.9, 0.5, 0.1, 0.1, 0.1, 0.1]
    )  # unknown, three given, two beyond, and one past the last
    torch.testing.assert_close(examination(torch.tensor([0, 1, 2, 3, 4, 5, 99])), wanted)
    seen, missed = examination.log_terms(torch.tensor([[1], [0]]))
    torch.testing.assert_close(missed.exp(), 1 - seen.exp())


def test_learned_probabilities_start_at_the_discount_and_the_first_is_sure():
    examination = Examination(positions=4)
    assert examination.learn
    wanted = 1 / torch.log2(torch.tensor([2.0, 3.0, 4.0, 5.0, 5.0]))
    torch.testing.assert_close(examination(torch.tensor([1, 2, 3, 4, 7])), wanted)
    with torch.no_grad():
        examination.logits.fill_(50.0)
    assert examination(torch.tensor([0, 1, 2])).tolist() == [1, 1, 1]
    seen, missed = examination.log_terms(torch.tensor([0, 1, 2]))
    assert missed.tolist() == [-math.inf, -math.inf, -50.0]
    assert seen.isfinite().all()


def test_learned_from_given_ones():
    examination = Examination(positions=3, propensities=[0.8, 0.4], learn=True)
    torch.testing.assert_close(examination(torch.tensor([1, 2, 3])), torch.tensor([1.0, 0.5, 0.5]))
    flat = Examination(positions=2, propensities=[0.5, 0.5], learn=True)
    assert flat.logits.isfinite().all()


def test_weights_are_clipped_and_carry_no_gradient():
    examination = Examination(positions=3, propensities=[1.0, 0.5, 0.01], learn=True, clip=20.0)
    scores = torch.zeros(1, 3)
    look = examined(examination, torch.tensor([[1, 2, 3]]), None, scores)
    torch.testing.assert_close(look.inverse, torch.tensor([[1.0, 2.0, 20.0]]))
    assert not look.inverse.requires_grad
    assert look.log_seen.requires_grad


def test_probabilities_of_the_data_come_first():
    given = torch.tensor([[0.25, torch.nan, 0.0]])
    look = examined(Examination(propensities=[1.0, 0.5]), torch.tensor([[1, 2, 2]]), given, torch.zeros(1, 3))
    torch.testing.assert_close(look.log_seen.exp(), torch.tensor([[0.25, 0.5, 1e-6]]))
    assert examined(None, torch.tensor([[1]]), None, torch.zeros(1, 1)) is None


def test_saved_and_loaded():
    one, other = Examination(positions=4), Examination(positions=4)
    with torch.no_grad():
        one.logits.copy_(torch.tensor([1.0, 0.0, -1.0]))
    other.load_state_dict(one.state_dict())
    places = torch.arange(5)
    torch.testing.assert_close(other(places), one(places))
    # Given values are options, not weights.
    assert Examination(propensities=[1.0, 0.5]).state_dict() == {}


def test_errors():
    for options in (
        {"positions": 0},
        {"positions": 1},
        {"clip": 0.5},
        {"propensities": []},
        {"propensities": [1.0, 0]},
    ):
        with pytest.raises(ValueError):
            Examination(**options)
    with pytest.raises(ValueError, match="no `propensities`"):
        examined(Examination(learn=False), torch.tensor([[1]]), None, torch.zeros(1, 1))
