import math

import pytest
import torch
import torch.nn.functional as F

from lightning_rec.objectives import ClickBCE, Examination, ImpressionSoftmax

NAN = torch.nan
THETA = [1.0, 0.5, 0.25, 0.05]


def make(b=5, c=6, e=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(b, c, generator=g, dtype=dtype).requires_grad_()
    labels = (torch.rand(b, c, generator=g) < 0.4).to(dtype)
    labels[torch.rand(b, c, generator=g) < 0.2] = NAN
    labels[0] = 0  # nothing clicked
    labels[1] = 1  # all clicked
    labels[2] = NAN
    labels[3, :4] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    positions = torch.stack([torch.randperm(c, generator=g) for _ in range(b)])  # one of them unknown (0)
    extra = torch.randn(b, e, generator=g, dtype=dtype)
    extra[1, 1] = extra[3, 2] = -torch.inf
    extra[4] = -torch.inf
    weights = torch.where(labels == 0, 3.0, 1.0).to(dtype).masked_fill(labels.isnan(), 0)
    return scores, labels, positions, extra.requires_grad_(), weights


def theta_of(positions, values=THETA):
    return torch.tensor([1.0, *values, *[values[-1]] * 20], dtype=torch.float64)[positions]


def softmax_by_loops(scores, labels, smoothing=0.0, extra=None, inverse=None):
    losses, units = [], 0
    for i in range(len(scores)):
        rest = [scores[i, j] for j in range(scores.shape[1]) if labels[i, j] == 0]
        if extra is not None:
            rest += [x for x in extra[i] if x > -torch.inf]
        for j in range(scores.shape[1]):
            if labels[i, j] == 1 and rest:
                log_p = torch.log_softmax(torch.stack([scores[i, j], *rest]), 0)
                loss = -(1 - smoothing) * log_p[0] - smoothing * log_p.mean()
                losses.append(loss if inverse is None else loss * inverse[i, j])
                units += 1
    return torch.stack(losses).sum() / units, units


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("with_examination", [False, True])
def test_softmax_is_its_definition(smoothing, with_extra, with_examination):
    scores, labels, positions, extra, weights = make()
    extra = extra if with_extra else None
    examination = Examination(propensities=THETA, clip=10.0) if with_examination else None
    inverse = (1 / theta_of(positions)).clamp(max=10) if with_examination else None
    wanted, units = softmax_by_loops(scores, labels, smoothing, extra, inverse)
    objective = ImpressionSoftmax(smoothing, examination)
    loss = objective(scores, labels, weights=weights, positions=positions, extra=extra)
    torch.testing.assert_close(loss, wanted)
    inputs = (scores, extra) if with_extra else (scores,)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs))
    assert objective.units(labels, weights, extra) == units


def test_softmax_by_hand():
    scores = torch.tensor([[2.0, 1.0, 3.0, 5.0]]).log()
    labels = torch.tensor([[1.0, 0.0, 1.0, NAN]])
    # 2 of 2 + 1, and 3 of 3 + 1: the other click and the unlabelled candidate are in neither.
    wanted = -(math.log(2 / 3) + math.log(3 / 4)) / 2
    assert ImpressionSoftmax()(scores, labels).item() == pytest.approx(wanted)
    extra = torch.tensor([[5.0, 0.0]]).log()
    wanted = -(math.log(2 / 8) + math.log(3 / 9)) / 2
    assert ImpressionSoftmax()(scores, labels, extra=extra).item() == pytest.approx(wanted)
    # The same item twice, clicked once: labels decide.
    twice = torch.tensor([[0.5, 0.5]])
    assert ImpressionSoftmax()(twice, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(math.log(2))


def test_units_are_clicks_with_a_negative():
    labels = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, NAN], [0.0, 0.0, NAN], [NAN, NAN, NAN]])
    assert ImpressionSoftmax().units(labels) == 2
    extra = torch.tensor([[-torch.inf], [0.0], [0.0], [0.0]])
    assert ImpressionSoftmax().units(labels, extra=extra) == 4
    assert ClickBCE().units(labels) == 7
    weights = torch.tensor([[1.0, 1.0, 5.0], [1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert ImpressionSoftmax().units(labels, weights) == 2
    assert ClickBCE().units(labels, weights) == 13
    # A non-click that stands for none is no negative.
    assert ImpressionSoftmax().units(labels, weights * torch.tensor([1.0, 1.0, 0.0])) == 0


def test_clicks_count_by_the_clipped_inverse_of_given_propensities():
    scores, labels = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    given = torch.tensor([[0.5, NAN, 0.01]])
    losses = F.softplus(torch.tensor([1.0, -1.0]))
    loss = ImpressionSoftmax()(scores, labels, propensities=given)
    assert loss.item() == pytest.approx((2 * losses[0] + 10 * losses[1]).item() / 2)
    clipped = Examination(learn=False, clip=4.0)
    loss = ImpressionSoftmax(examination=clipped)(scores, labels, propensities=given)
    assert loss.item() == pytest.approx((2 * losses[0] + 4 * losses[1]).item() / 2)
    loss = ImpressionSoftmax(examination=clipped, self_normalised=True)(scores, labels, propensities=given)
    assert loss.item() == pytest.approx((2 * losses[0] + 4 * losses[1]).item() / 6)


def test_given_propensities_stand_above_places():
    scores, labels, positions, *_ = make()
    given = torch.full(labels.shape, NAN, dtype=torch.float64)
    given[3, 0] = 0.125
    objective = ImpressionSoftmax(examination=Examination(propensities=THETA))
    inverse = (1 / theta_of(positions)).clamp(max=10)
    inverse[3, 0] = 8
    loss = objective(scores, labels, positions=positions, propensities=given)
    torch.testing.assert_close(loss, softmax_by_loops(scores, labels, inverse=inverse)[0])


def test_dual_learning_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0]]).log().requires_grad_()
    labels, positions = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1, 3, 2]])
    examination = Examination(positions=3, propensities=[1.0, 0.5, 0.2], learn=True)
    loss = ImpressionSoftmax(examination=examination)(scores, labels, positions=positions)
    # click: weight 1 / 0.2, chance 2 of 6. Place: weight mean(1, 2, 3) / 2 = 1, chance 0.2 of 1.7.
    assert loss.item() == pytest.approx(-5 * math.log(2 / 6) - math.log(0.2 / 1.7), rel=1e-5)
    loss.backward()
    # Each model is weighted by the other, and not moved through the weights.
    torch.testing.assert_close(scores.grad, 5 * torch.tensor([[1 / 6, 2 / 6 - 1, 3 / 6]]))
    theta = torch.tensor([0.5, 0.2])
    of_log_theta = torch.tensor([0.5, 0.2]) / 1.7 - torch.tensor([0.0, 1.0])
    torch.testing.assert_close(examination.logits.grad, of_log_theta * (1 - theta))


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("how", ["plain", "model", "ipw"])
def test_clicks_are_their_definition(with_weights, how):
    scores, labels, positions, extra, weights = make()
    weights = weights if with_weights else None
    examination = None if how == "plain" else Examination(propensities=THETA)
    objective = ClickBCE(
        examination, positive_weight=2.0, extra_weight=0.5, correction="ipw" if how == "ipw" else "model"
    )
    loss = objective(scores, labels, weights=weights, positions=positions, extra=extra)
    total, units = 0.0, 0.0
    for i in range(len(scores)):
        for j in range(scores.shape[1]):
            if labels[i, j].isnan():
                continue
            p, y = torch.sigmoid(scores[i, j]), labels[i, j]
            theta = theta_of(positions)[i, j]
            if how == "model":
                p = p * theta
            w = 1.0 if weights is None else weights[i, j]
            click, rest = -p.log(), -(1 - p).log()
            if how == "ipw":
                inverse = (1 / theta).clamp(max=10)
                click = inverse * click + (1 - inverse) * rest
            total, units = total + w * (2 * y * click + (1 - y) * rest), units + w
        rest = [-(1 - torch.sigmoid(x)).log() for x in extra[i] if x > -torch.inf]
        if rest and (~labels[i].isnan()).any():
            total = total + 0.5 * torch.stack(rest).mean()
    torch.testing.assert_close(loss, total / units)
    wanted = torch.autograd.grad(total / units, (scores, extra))
    torch.testing.assert_close(torch.autograd.grad(loss, (scores, extra)), wanted)


def test_clicks_of_a_learned_examination_give_exact_gradients():
    scores, labels, positions, extra, weights = make(c=5)
    examination = Examination(positions=4).double()
    objective = ClickBCE(examination)
    inputs = (scores, extra, examination.logits)

    def loss(x, more, _):
        return objective(x, labels, weights=weights, positions=positions, extra=more)

    finite = extra.detach().clamp(min=-3).requires_grad_()
    assert torch.autograd.gradcheck(loss, (scores, finite, examination.logits))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss(*inputs), inputs))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_softmax_gradcheck(smoothing):
    scores, labels, positions, extra, _ = make(c=4)
    objective = ImpressionSoftmax(smoothing, Examination(propensities=THETA))
    finite = extra.detach().clamp(min=-3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, e: objective(x, labels, positions=positions, extra=e), (scores, finite))


def learners():
    return [
        ImpressionSoftmax(),
        ImpressionSoftmax(0.1, Examination(positions=4)),
        ClickBCE(),
        ClickBCE(Examination(positions=4)),
        ClickBCE(Examination(propensities=THETA), correction="ipw"),
    ]


@pytest.mark.parametrize("objective", learners(), ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_nothing_to_learn_is_zero_with_a_graph(objective, shape):
    scores = torch.full(shape, torch.inf).requires_grad_()
    labels, positions = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.int64)
    extra = torch.full((shape[0], 2), -torch.inf).requires_grad_()
    loss = objective(scores, labels, positions=positions, extra=extra)
    assert loss.item() == 0
    loss.backward()
    for x in (scores, extra, *objective.parameters()):
        assert (x.grad == 0).all()
    assert objective.units(labels) == 0


@pytest.mark.parametrize("objective", learners(), ids=lambda x: type(x).__name__)
def test_padding_may_hold_anything(objective):
    scores, labels, positions, extra, weights = make(dtype=torch.float32)
    extra = extra.detach()

    def run(x):
        x = x.detach().clone().requires_grad_()
        loss = objective(x, labels, weights=weights, positions=positions, extra=extra)
        return loss, torch.autograd.grad(loss, x)[0]

    wanted, grad = run(scores)
    for rubbish in (NAN, torch.inf, -torch.inf, 1e30):
        loss, again = run(scores.detach().masked_fill(labels.isnan(), rubbish))
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(again, grad)
    assert grad[labels.isnan()].eq(0).all()


@pytest.mark.parametrize("objective", learners(), ids=lambda x: type(x).__name__)
def test_large_scores_stay_finite(objective):
    scores = torch.tensor([[1e4, -1e4, 500.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    labels, positions = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]), torch.tensor([[1, 2, 3], [1, 2, 9]])
    loss = objective(scores, labels, positions=positions)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("objective", learners(), ids=lambda x: type(x).__name__)
def test_float32_under_autocast(objective):
    scores, labels, positions, _, _ = make(dtype=torch.float32)
    half = scores.detach().bfloat16().requires_grad_()
    wanted = objective(half.detach().float(), labels, positions=positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(half, labels, positions=positions)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert half.grad.isfinite().all()


def test_probabilities_take_the_weight_of_clicks_out():
    # 30 clicks in 100 of one item: the score of least loss, through `probability`, is the rate.
    labels = torch.cat([torch.ones(1, 30), torch.zeros(1, 70)], 1)
    objective = ClickBCE(positive_weight=3.0)
    score = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([score], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = objective(score.expand_as(labels), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert objective.probability(score).item() == pytest.approx(0.3, abs=1e-4)
    assert ImpressionSoftmax().probability(score) is None
    assert ClickBCE().probability(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match="label_smoothing"):
        ImpressionSoftmax(1.0)
    with pytest.raises(ValueError, match="positive_weight"):
        ClickBCE(positive_weight=0.0)
    with pytest.raises(ValueError, match="correction is"):
        ClickBCE(correction="both")
    with pytest.raises(ValueError, match="cannot learn"):
        ClickBCE(Examination(), correction="ipw")
    scores, labels, *_ = make()
    for objective in (ImpressionSoftmax(examination=Examination()), ClickBCE(Examination())):
        with pytest.raises(ValueError, match="at which place"):
            objective(scores, labels)
