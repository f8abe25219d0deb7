import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from lightning_rec.metrics import RatingMetrics
from lightning_rec.objectives import Objective, RatingHead, RatingRegression


def head(mean_rating=3.5, dim=3, **options):
    made = RatingHead(**options)
    made.configure(n_items=9, rating_range=(1.0, 5.0), rating_mean=mean_rating, dim=dim)
    return made


def test_hand_worked():
    made = head(dim=1)
    interest = torch.tensor([[0.5], [2.0], [9.0]], requires_grad=True)
    candidates = torch.tensor([[7.0], [1.0]], requires_grad=True)
    # 4.0 and 5.5 (not clipped in training) against 3 and 5; the third position has no rating.
    loss = made(interest, candidates, torch.tensor([1, 1, 1]), rating=torch.tensor([3.0, 5.0, torch.nan]))
    assert loss.item() == pytest.approx((1 + 0.25) / 2)
    loss.backward()
    assert interest.grad[:, 0].tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert candidates.grad[0].item() == 0
    assert made.predict_pairs(interest, torch.ones(3, 1)).tolist() == [4.0, 5.0, 5.0]
    assert made.predict(torch.tensor([[0.5, -9.0]])).tolist() == [[4.0, 1.0]]


def test_bounds():
    interest, items = torch.tensor([[0.0], [-9.0], [9.0]]), torch.ones(3, 1)
    assert head(dim=1, bounds="none").predict_pairs(interest, items).tolist() == [3.5, -5.5, 12.5]
    assert head(dim=1, bounds="clip").predict_pairs(interest, items).tolist() == [3.5, 1.0, 5.0]
    bounded = head(dim=1, bounds="sigmoid").predict_pairs(interest, items)
    assert bounded[0].item() == pytest.approx(3.5), "a sum of 0 stands for the mean"
    share = math.log((3.5 - 1) / (5 - 3.5))
    assert bounded[1].item() == pytest.approx(1 + 4 / (1 + math.exp(9 - share)), rel=1e-4)
    assert ((bounded > 1) & (bounded < 5)).all()
    middle = head(dim=1, bounds="sigmoid", mean=False).predict_pairs(interest, items)
    assert middle.tolist() == pytest.approx(RatingRegression((1.0, 5.0)).predict(interest[:, 0]).tolist())
    # every training rating is the highest: the mean lies at the end of the range, the loss stays finite
    assert head(5.0, dim=1, bounds="sigmoid").predict_pairs(interest, items).isfinite().all()


def test_without_dot_and_network_it_is_the_global_mean():
    made = head(dot=False)
    assert made.predict_pairs(torch.randn(4, 3), torch.randn(4, 3)).tolist() == [3.5] * 4
    assert made.predict(torch.randn(2, 2)).tolist() == [[3.5, 3.5]] * 2
    assert not list(made.parameters())
    interest = torch.randn(2, 3, requires_grad=True)
    loss = made(interest, torch.randn(4, 3), torch.tensor([0, 1]), rating=torch.tensor([3.0, 4.5]))
    assert loss.item() == pytest.approx((0.25 + 1) / 2)
    loss.backward()
    assert not interest.grad.any(), "the towers learn nothing, and training runs all the same"


def test_the_network_starts_silent_and_reads_user_item_and_their_product():
    torch.manual_seed(0)
    made = head(hidden=4).double()
    interest, items = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    plain = head(bounds="clip").double().predict_pairs(interest, items)
    assert torch.allclose(made.predict_pairs(interest, items), plain)
    with torch.no_grad():
        made.network[-1].weight.normal_(std=0.1)
    first, _, _, last = made.network
    hidden = torch.nn.functional.gelu(torch.cat([interest, items, interest * items], 1) @ first.weight.T + first.bias)
    expected = 3.5 + (interest * items).sum(1) + (hidden @ last.weight.T + last.bias)[:, 0]
    assert torch.allclose(made.predict_pairs(interest, items), expected.clamp(1, 5))
    with pytest.raises(ValueError, match="call predict_pairs"):
        made.predict(torch.zeros(2))


@pytest.mark.parametrize("options", [{}, {"hidden": 4}, {"bounds": "sigmoid"}, {"hidden": 4, "dot": False}])
def test_gradcheck(options):
    torch.manual_seed(0)
    made = head(**options).double()
    if made.network is not None:
        torch.nn.init.normal_(made.network[-1].weight, std=0.5)
    interest = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target, rating = torch.tensor([0, 3, 3, 1, 2]), torch.tensor([1.0, 2.0, torch.nan, 5.0, 4.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: made(x, w, target, rating=rating), (interest, candidates))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    made = head(hidden=8, dropout=0.5)
    torch.nn.init.normal_(made.network[-1].weight)
    interest, items = torch.randn(6, 3), torch.randn(6, 3)
    assert not torch.equal(made.predict_pairs(interest, items), made.predict_pairs(interest, items))
    made.eval()
    assert torch.equal(made.predict_pairs(interest, items), made.predict_pairs(interest, items))


def test_no_rated_position_teaches_nothing_but_reaches_every_parameter():
    made = head(hidden=4)
    interest = torch.randn(2, 3, requires_grad=True)
    loss = made(interest, torch.randn(4, 3), torch.tensor([0, 1]), rating=torch.full((2,), torch.nan))
    loss.backward()
    assert loss.item() == 0
    assert interest.grad.abs().sum() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in made.parameters())
    assert made(interest[:0], torch.randn(4, 3), torch.zeros(0, dtype=torch.int64), rating=torch.zeros(0)).item() == 0


def test_half_precision_is_widened_inside_autocast():
    made = head(hidden=4)
    interest, candidates = torch.randn(3, 3), torch.randn(4, 3)
    target, rating = torch.tensor([0, 3, 1]), torch.tensor([1.0, 2.0, 5.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made(interest, candidates, target, rating=rating)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(made(interest, candidates, target, rating=rating).item())
    assert made.predict_pairs(interest.bfloat16(), candidates[:3].bfloat16()).dtype == torch.float32


def test_a_checkpoint_brings_the_mean_along():
    fitted, fresh = head(hidden=2), RatingHead(hidden=2, rating_range=(1, 5))
    fresh.configure(n_items=3, dim=3)
    fresh.load_state_dict(fitted.state_dict())
    assert fresh.rating_mean.item() == 3.5
    given = RatingHead(rating_range=(0, 10))
    given.configure(rating_range=(1.0, 5.0), rating_mean=3.0)
    assert given.rating_range == (0.0, 10.0), "a range given to the constructor wins over the data's"


def test_what_is_missing_is_named():
    vectors = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="mean of the training ratings is unknown"):
        RatingHead(bounds="none").predict_pairs(vectors, vectors)
    with pytest.raises(ValueError, match="range of the ratings is unknown"):
        RatingHead(mean=False).predict_pairs(vectors, vectors)
    with pytest.raises(ValueError, match="RatingHead needs ratings"):
        head()(vectors, vectors, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="width of the vectors"):
        RatingHead(hidden=3).configure()


@pytest.mark.parametrize(
    "options", [{"hidden": -1}, {"dropout": 1.0}, {"bounds": "soft"}, {"rating_range": (5.0, 1.0)}]
)
def test_impossible_options(options):
    with pytest.raises(ValueError, match=r"hidden is|dropout is|bounds is|lowest rating"):
        RatingHead(**options)


def test_any_objective_rates_pairs_by_its_dot_product():
    class Doubled(Objective):
        def predict(self, dot):
            return 2 * dot

        def forward(self, *arguments, **options):
            raise NotImplementedError

    interest, items = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert Doubled().predict_pairs(interest, items).tolist() == [22.0]


def test_errors_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    metric = RatingMetrics()
    predicted, given = rng.uniform(1, 5, 1000), rng.integers(1, 6, 1000).astype(float)
    for part in np.array_split(np.arange(1000), 7):
        metric.update(torch.tensor(predicted[part]), torch.tensor(given[part]))
    metric.update(torch.tensor([3.0]), torch.tensor([torch.nan]))
    found = metric.compute()
    assert found["rmse"].item() == pytest.approx(root_mean_squared_error(given, predicted), rel=1e-5)
    assert found["mae"].item() == pytest.approx(mean_absolute_error(given, predicted), rel=1e-5)
    assert found["ratings"].item() == 1000
