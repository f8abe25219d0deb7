import math

import pytest
import torch
import torch.nn.functional as F

from lightning_rec.objectives import BCE, BPR


def make(p=19, c=13, d=4, b=3, k=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    interest = torch.randn(p, d, generator=g, dtype=dtype).requires_grad_()
    candidates = torch.randn(c, d, generator=g, dtype=dtype).requires_grad_()
    target = torch.randint(0, c, (p,), generator=g)
    owner = torch.randint(0, b, (p,), generator=g)
    known = torch.randint(-1, c, (b, k), generator=g)
    return interest, candidates, target, owner, known


def negatives_of(i, target, owner, known, c):
    taken = {int(target[i])} | ({int(x) for x in known[owner[i]]} if known is not None else set())
    return [j for j in range(c) if j not in taken]


def bpr_by_loops(interest, candidates, target, owner, known):
    losses = []
    for i in range(len(target)):
        positive = interest[i] @ candidates[target[i]]
        rest = negatives_of(i, target, owner, known, len(candidates))
        losses.append(torch.stack([-F.logsigmoid(positive - interest[i] @ candidates[j]) for j in rest]).mean())
    return torch.stack(losses).mean()


def bce_by_loops(interest, candidates, target, owner, known, t=0.0, n_items=None):
    losses = []
    for i in range(len(target)):
        rest = negatives_of(i, target, owner, known, len(candidates))
        alpha = len(rest) / (n_items - 1) if t else 1.0
        beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
        loss = -beta * F.logsigmoid(interest[i] @ candidates[target[i]])
        for j in rest:
            loss = loss - F.logsigmoid(-(interest[i] @ candidates[j]))
        losses.append(loss / (1 + len(rest)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("with_known", [False, True])
@pytest.mark.parametrize(
    ("objective", "by_loops"),
    [
        (BPR(), bpr_by_loops),
        (BCE(), bce_by_loops),
        (BCE(gbce_t=0.75), lambda *args: bce_by_loops(*args, t=0.75, n_items=40)),
    ],
    ids=["bpr", "bce", "gbce"],
)
def test_loss_and_gradients_equal_the_plain_ones(objective, by_loops, chunk_size, with_known):
    interest, candidates, target, owner, known = make()
    known, owner = (known, owner) if with_known else (None, None)
    objective.chunk_size = chunk_size
    objective.configure(n_items=40)
    wanted = by_loops(interest, candidates, target, owner, known)
    loss = objective(interest, candidates, target, owner=owner, known=known)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (interest, candidates)), torch.autograd.grad(wanted, (interest, candidates))
    )


def test_bpr_hand_worked():
    interest, candidates = torch.ones(1, 1), torch.tensor([[2.0], [1.0], [3.0]])
    loss = BPR()(interest, candidates, torch.tensor([0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2)


def test_bce_hand_worked():
    interest, candidates = torch.ones(1, 1), torch.tensor([[2.0], [1.0]])
    loss = BCE()(interest, candidates, torch.tensor([0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2)
    # One negative of eleven items: alpha = 0.1; t = 1 gives beta = alpha.
    calibrated = BCE(gbce_t=1.0)
    calibrated.configure(n_items=11)
    loss = calibrated(interest, candidates, torch.tensor([0]))
    assert loss.item() == pytest.approx((0.1 * math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2)


def test_gbce_over_the_whole_catalogue_is_bce():
    interest, candidates, target, *_ = make()
    calibrated = BCE(gbce_t=0.9)
    calibrated.configure(n_items=len(candidates))
    torch.testing.assert_close(calibrated(interest, candidates, target), BCE()(interest, candidates, target))


@pytest.mark.parametrize("objective", [BPR(), BCE()])
def test_nothing_to_compare_with(objective):
    interest, candidates, target, *_ = make(c=1)
    loss = objective(interest, candidates, torch.zeros_like(target))
    loss.backward()
    assert torch.isfinite(loss)
    empty = objective(interest[:0], candidates, target[:0])
    empty.backward()
    assert empty.item() == 0


@pytest.mark.parametrize("objective", [BPR(chunk_size=5), BCE(chunk_size=5)])
def test_float32_inside_autocast(objective):
    interest, candidates, target, *_ = make(dtype=torch.float32)
    wanted = objective(interest, candidates, target)
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective(interest, candidates, target)
    grads = torch.autograd.grad(inside, (interest, candidates))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, (interest, candidates)))


def test_gbce_without_the_number_of_items_is_an_error():
    interest, candidates, target, *_ = make()
    with pytest.raises(ValueError, match="number of items"):
        BCE(gbce_t=0.5)(interest, candidates, target)
    with pytest.raises(ValueError, match="gbce_t"):
        BCE(gbce_t=1.5)
