import math

import pytest
import torch

from lightning_rec.objectives import RatingRegression


def test_hand_worked():
    objective = RatingRegression((1.0, 5.0))
    interest = torch.tensor([[0.0], [math.log(3.0)], [9.0]], requires_grad=True)
    candidates = torch.tensor([[7.0], [1.0]], requires_grad=True)
    # Sigmoids 0.5 and 0.75 stand for ratings 3 and 4; the third position has no rating.
    loss = objective(interest, candidates, torch.tensor([1, 1, 1]), rating=torch.tensor([5.0, 3.0, torch.nan]))
    assert loss.item() == pytest.approx((4 + 1) / 2)
    loss.backward()
    assert interest.grad[2].item() == 0
    assert torch.isfinite(interest.grad).all()
    assert candidates.grad[0].item() == 0
    assert objective.predict(torch.tensor([0.0, -100.0, 100.0])).tolist() == pytest.approx([3.0, 1.0, 5.0])


def test_gradcheck():
    interest = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target, rating = torch.tensor([0, 3, 3, 1, 2]), torch.tensor([1.0, 2.0, torch.nan, 5.0, 4.0], dtype=torch.float64)
    objective = RatingRegression((1.0, 5.0))
    assert torch.autograd.gradcheck(lambda x, w: objective(x, w, target, rating=rating), (interest, candidates))


@pytest.mark.parametrize("p", [0, 3])
def test_no_ratings_at_all(p):
    interest = torch.ones(p, 2, requires_grad=True)
    candidates = torch.ones(3, 2, requires_grad=True)
    loss = RatingRegression((0.0, 1.0))(
        interest, candidates, torch.zeros(p, dtype=torch.int64), rating=torch.full((p,), torch.nan)
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(interest.grad, torch.zeros(p, 2))


def test_no_positions_ignores_what_is_not_finite():
    candidates = torch.tensor([[torch.nan], [torch.inf]], requires_grad=True)
    loss = RatingRegression((0.0, 1.0))(
        torch.ones(1, 1), candidates, torch.tensor([0]), rating=torch.tensor([torch.nan])
    )
    assert loss.item() == 0


def test_where_the_range_comes_from():
    objective = RatingRegression()
    with pytest.raises(ValueError, match="range of the ratings is unknown"):
        objective.predict(torch.zeros(1))
    objective.configure(rating_range=(0.5, 5.0))
    assert objective.rating_range == (0.5, 5.0)
    given = RatingRegression((1.0, 10.0))
    given.configure(rating_range=(0.5, 5.0))
    assert given.rating_range == (1.0, 10.0)
    with pytest.raises(ValueError, match="below the highest"):
        RatingRegression((5.0, 5.0))


def test_ratings_are_needed():
    assert RatingRegression.needs_rating
    with pytest.raises(ValueError, match="needs ratings"):
        RatingRegression((1.0, 5.0))(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0]))


def test_float32_inside_autocast():
    interest, candidates = torch.randn(6, 4), torch.randn(5, 4)
    target, rating = torch.randint(0, 5, (6,)), torch.rand(6) * 4 + 1
    objective = RatingRegression((1.0, 5.0))
    wanted = objective(interest, candidates, target, rating=rating)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective(interest, candidates, target, rating=rating), wanted)
