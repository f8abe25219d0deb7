import pytest
import torch
import torch.nn.functional as F

from lightning_rec.objectives import Repeats, Softmax


def make(p=23, c=17, d=5, b=4, k=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    interest = torch.randn(p, d, generator=g, dtype=dtype).requires_grad_()
    candidates = torch.randn(c, d, generator=g, dtype=dtype).requires_grad_()
    target = torch.randint(0, c, (p,), generator=g)
    owner = torch.randint(0, b, (p,), generator=g)
    known = torch.randint(-1, c, (b, k), generator=g)
    known[0] = -1
    log_q = torch.randn(c, generator=g, dtype=dtype)
    return interest, candidates, target, owner, known, log_q


def by_loops(interest, candidates, target, owner=None, known=None, log_q=None, smoothing=0.0):
    """The definition, a position and a candidate at a time."""
    losses = []
    for i in range(len(target)):
        t = int(target[i])
        taken = set() if known is None else {int(x) for x in known[owner[i]] if x >= 0} - {t}
        valid = [j for j in range(len(candidates)) if j not in taken]
        scores = [interest[i] @ candidates[j] - (0 if log_q is None else log_q[j]) for j in valid]
        log_p = torch.log_softmax(torch.stack(scores), 0)
        losses.append(-(1 - smoothing) * log_p[valid.index(t)] - smoothing * log_p.mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("chunk_size", [1, 5, 23, 100, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("with_known", [False, True])
@pytest.mark.parametrize("with_log_q", [False, True])
def test_loss_and_gradients_equal_the_plain_ones(chunk_size, smoothing, with_known, with_log_q):
    interest, candidates, target, owner, known, log_q = make()
    known, owner = (known, owner) if with_known else (None, None)
    log_q = log_q if with_log_q else None
    wanted = by_loops(interest, candidates, target, owner, known, log_q, smoothing)
    wanted_grads = torch.autograd.grad(wanted, (interest, candidates))
    loss = Softmax(smoothing, chunk_size=chunk_size)(
        interest, candidates, target, owner=owner, known=known, log_q=log_q
    )
    grads = torch.autograd.grad(loss, (interest, candidates))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grads, wanted_grads)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(smoothing):
    interest, candidates, target, owner, known, log_q = make(p=7, c=6, d=3)
    objective = Softmax(smoothing, chunk_size=3)

    def loss(x, w):
        return objective(x, w, target, owner=owner, known=known, log_q=log_q)

    assert torch.autograd.gradcheck(loss, (interest, candidates))


def test_equals_torch_cross_entropy_in_float32():
    interest, candidates, target, *_ = make(p=300, c=200, d=32, dtype=torch.float32)
    for smoothing in (0.0, 0.1):
        wanted = F.cross_entropy(interest @ candidates.T, target, label_smoothing=smoothing)
        torch.testing.assert_close(Softmax(smoothing, chunk_size=64)(interest, candidates, target), wanted)


def test_hand_worked():
    # Scores 0, log 2, log 3: probabilities 1/6, 2/6, 3/6.
    candidates = torch.tensor([[0.0], [2.0], [3.0]]).log().clamp(min=0)
    interest, target = torch.ones(1, 1), torch.tensor([1])
    loss = Softmax()(interest, candidates, target)
    assert loss.item() == pytest.approx(-torch.tensor(2 / 6).log().item())
    # Without column 2, another known positive: 2 / 3. The target stays although it is known.
    options = {"owner": torch.tensor([0]), "known": torch.tensor([[2, 1, -1]])}
    assert Softmax()(interest, candidates, target, **options).item() == pytest.approx(-torch.tensor(2 / 3).log().item())
    # log q lowers column 2 to a score of 0.
    log_q = torch.tensor([0.0, 0.0, 3.0]).clamp(min=1).log()
    assert Softmax()(interest, candidates, target, log_q=log_q).item() == pytest.approx(
        -torch.tensor(2 / 4).log().item()
    )


def test_switches_turn_off_correction_and_exclusion():
    interest, candidates, target, owner, known, log_q = make()
    plain = Softmax()(interest, candidates, target)
    objective = Softmax(correct_sampling=False, exclude_known=False)
    assert torch.equal(objective(interest, candidates, target, owner=owner, known=known, log_q=log_q), plain)


def test_smoothing_gives_nothing_to_excluded_candidates():
    interest, candidates, *_ = make(p=1, c=4)
    target = torch.tensor([0])
    loss = Softmax(0.4)(interest, candidates, target, owner=torch.tensor([0]), known=torch.tensor([[2, 2, 3, -1]]))
    (grad,) = torch.autograd.grad(loss, candidates)
    assert grad[2:].abs().max() == 0
    assert grad[:2].abs().min() > 0


def test_only_the_target_is_valid():
    interest, candidates, *_ = make(p=1, c=3)
    known = torch.tensor([[0, 1, 2]])
    loss = Softmax()(interest, candidates, torch.tensor([1]), owner=torch.tensor([0]), known=known)
    grads = torch.autograd.grad(loss, (interest, candidates))
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in grads)


def test_large_scores_neither_overflow_nor_vanish():
    interest = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    candidates = torch.tensor([[1.0], [0.9], [-1.0]], requires_grad=True)
    loss = Softmax()(interest, candidates, torch.tensor([1, 0]))
    wanted = F.cross_entropy(interest @ candidates.T, torch.tensor([1, 0]))
    torch.testing.assert_close(loss, wanted)
    assert loss.item() == pytest.approx((100 + 2000) / 2)
    # An excluded candidate far above the rest must not push them under the smallest float.
    loss = Softmax()(interest[:1], candidates, torch.tensor([2]), owner=torch.tensor([0]), known=torch.tensor([[0, 1]]))
    assert loss.item() == 0


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0, 5.0, 50.0])
def test_float32_is_as_exact_for_small_scores_as_for_large(scale):
    interest, candidates, target, owner, known, log_q = make(p=64, c=50, d=16)
    options = {"owner": owner, "known": known, "log_q": log_q}
    wide = [(scale * x).detach().requires_grad_() for x in (interest, candidates)]
    wanted = torch.autograd.grad(Softmax()(*wide, target, **options), wide)
    narrow = [x.detach().float().requires_grad_() for x in wide]
    found = torch.autograd.grad(Softmax()(*narrow, target, **options), narrow)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-5 * max(1.0, scale**2)


def test_no_positions():
    interest, candidates, target, *_ = make()
    loss = Softmax()(interest[:0], candidates, target[:0])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(candidates.grad, torch.zeros_like(candidates))


@pytest.mark.parametrize("which", [0, 1])
def test_one_input_alone_requires_grad(which):
    inputs = list(make()[:2])
    target = make()[2]
    wanted = torch.autograd.grad(Softmax()(*inputs, target), inputs)[which]
    inputs[1 - which] = inputs[1 - which].detach()
    (grad,) = torch.autograd.grad(Softmax()(*inputs, target), inputs[which])
    torch.testing.assert_close(grad, wanted)


def test_without_gradients():
    interest, candidates, target, *_ = make()
    wanted = Softmax()(interest, candidates, target)
    with torch.no_grad():
        loss = Softmax()(interest, candidates, target)
    assert not loss.requires_grad
    assert torch.equal(loss, wanted)
    assert not Softmax()(interest.detach(), candidates.detach(), target).requires_grad


def test_float32_inside_autocast():
    interest, candidates, target, *_ = make(dtype=torch.float32)
    wanted = Softmax()(interest, candidates, target)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Softmax()(interest, candidates, target)
        halved = Softmax()(interest.bfloat16(), candidates.bfloat16(), target)
    assert inside.dtype == halved.dtype == torch.float32
    assert torch.equal(inside, wanted)
    halved.backward()
    assert interest.grad.dtype == torch.float32


def test_gradients_accumulate_and_scale():
    interest, candidates, target, *_ = make()
    objective = Softmax(chunk_size=4)
    for _ in range(2):
        (0.5 * objective(interest, candidates, target)).backward()
    accumulated = interest.grad.clone(), candidates.grad.clone()
    once = torch.autograd.grad(objective(interest, candidates, target), (interest, candidates))
    torch.testing.assert_close(accumulated, once)
    # Twice in one graph, and backward twice through it.
    loss = objective(interest, candidates, target) + objective(interest, candidates, target)
    first = torch.autograd.grad(loss, interest, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, interest))


def test_nan_reaches_the_loss():
    interest, candidates, target, *_ = make()
    with torch.no_grad():
        interest[0, 0] = torch.nan
    assert torch.isnan(Softmax(chunk_size=2)(interest, candidates, target))


def test_never_holds_positions_times_candidates(monkeypatch):
    interest, candidates, target, owner, known, log_q = make(p=400, c=300)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.numel())
            return result

    with Watch():
        Softmax(0.1, chunk_size=10)(interest, candidates, target, owner=owner, known=known, log_q=log_q).backward()
    assert max(seen) <= 10 * 300


def test_known_without_owner_is_an_error():
    interest, candidates, target, _, known, _ = make()
    with pytest.raises(ValueError, match="`owner`"):
        Softmax()(interest, candidates, target, known=known)


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match="label_smoothing"):
        Softmax(label_smoothing=1.0)
    with pytest.raises(ValueError, match="chunk_size"):
        Softmax(chunk_size=0)


def with_repeats(interest, candidates, target, columns, value, smoothing=0.0):
    """The definition: the value is added once to each candidate of the position's history."""
    losses = []
    for i in range(len(target)):
        held = {int(x) for x in columns[i] if x >= 0}
        scores = [interest[i] @ row + (value if j in held else 0 * value) for j, row in enumerate(candidates)]
        log_p = torch.log_softmax(torch.stack(scores), 0)
        losses.append(-(1 - smoothing) * log_p[int(target[i])] - smoothing * log_p.mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("chunk_size", [1, 5, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("start", [-3.0, 0.0, 60.0])
def test_what_a_repeat_adds_and_its_gradient(chunk_size, smoothing, start):
    interest, candidates, target, *_ = make()
    columns = torch.randint(-1, 17, (23, 9), generator=torch.Generator().manual_seed(1))
    columns[0] = -1  # an empty history
    columns[1], columns[2, :4] = target[1], target[2]  # the target again, once and many times
    columns[3] = columns[3, 0].clamp(min=0)  # one item, nine times
    value = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    wanted = with_repeats(interest, candidates, target, columns, value, smoothing)
    loss = Softmax(smoothing, exclude_known=False, chunk_size=chunk_size)(
        interest, candidates, target, repeats=Repeats(columns, value)
    )
    torch.testing.assert_close(loss, wanted)
    leaves = (interest, candidates, value)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves))


def test_a_repeat_learns_alone_and_from_nothing():
    interest, candidates, target, *_ = make(dtype=torch.float32)
    value = torch.zeros((), requires_grad=True)
    columns = target[:, None].clone()
    objective = Softmax(exclude_known=False)
    loss = objective(interest.detach(), candidates.detach(), target, repeats=Repeats(columns, value))
    assert torch.autograd.grad(loss, value)[0] < 0  # every target is a repeat: the value must grow
    none = objective(interest[:0], candidates, target[:0], repeats=Repeats(columns[:0], value))
    assert torch.autograd.grad(none, value)[0] == 0
