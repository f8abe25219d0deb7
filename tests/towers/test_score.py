import math

import pytest
import torch
import torch.nn.functional as F

from lightning_rec.towers.score import Cosine, Dot


def test_dot_leaves_vectors_alone():
    vectors = torch.randn(3, 4)
    assert Dot().interest(vectors) is vectors
    assert Dot().items(vectors) is vectors


def test_cosine_is_the_cosine_over_the_temperature():
    interest, items = torch.randn(3, 2, 8), torch.randn(5, 8)
    score = Cosine(temperature=0.1)
    product = score.interest(interest) @ score.items(items).T
    expected = F.cosine_similarity(interest[:, :, None], items[None, None], dim=-1) / 0.1
    torch.testing.assert_close(product, expected)


def test_zero_vectors_score_zero():
    score = Cosine()
    assert not (score.interest(torch.zeros(1, 4)) @ score.items(torch.zeros(2, 4)).T).any()


@pytest.mark.parametrize(("start", "bounded"), [(-10.0, 1.0), (10.0, 0.01)])
def test_learned_temperature_stays_in_its_bounds(start, bounded):
    score = Cosine(temperature=0.5, learn=True)
    assert score.log_scale.requires_grad
    assert math.isclose(score.log_scale.exp().item(), 2.0, rel_tol=1e-6)
    with torch.no_grad():
        score.log_scale.fill_(start)
    length = score.interest(torch.tensor([[3.0, 4.0]])).norm()
    assert length.item() == pytest.approx(1 / bounded, rel=1e-5)
    length.backward()
    assert score.log_scale.grad > 0, "at a bound it can still move away from it"
    assert math.isclose(score.log_scale.exp().item(), 1 / bounded, rel_tol=1e-5)
    with torch.no_grad():
        score.log_scale.fill_(start)
    score.eval()
    assert score.interest(torch.tensor([[3.0, 4.0]])).norm().item() == pytest.approx(1 / bounded, rel=1e-5)
    assert score.log_scale.item() == start, "an evaluation changes no weight"


def test_a_fixed_temperature_is_not_trained():
    assert not Cosine(temperature=0.2).log_scale.requires_grad


def test_a_temperature_out_of_bounds_is_refused():
    with pytest.raises(ValueError, match=r"between 0\.01 and 1"):
        Cosine(temperature=2.0)
