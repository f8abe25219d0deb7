import math

import pytest
import torch
import torch.nn.functional as F

from lightning_rec.data.batch import CatalogueView, UserBatch
from lightning_rec.towers import IdItemTower, PooledUserTower, SequenceUserTower
from lightning_rec.towers.sequence import dropout

CATALOGUE = CatalogueView(n_rows=20, n_users=4)


def build(tower, dim=8):
    torch.manual_seed(0)
    items = IdItemTower(dim)
    items.configure(CATALOGUE)
    tower.configure(CATALOGUE, items)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tower.eval()


def batch(histories, width=None):
    width = width or max(len(history) for history in histories)
    return UserBatch(
        torch.tensor([history + [0] * (width - len(history)) for history in histories]),
        torch.tensor([len(history) for history in histories]),
        torch.zeros(len(histories), dtype=torch.long),
    )


TOWERS = {
    "sequence": lambda: SequenceUserTower(heads=2, max_length=10),
    "start-post-relu": lambda: SequenceUserTower(
        positions_from="start", norm="post", activation="relu", max_length=10, scale_items=True, input_norm=True
    ),
    "wide-no-positions": lambda: SequenceUserTower(positions_from="none", feed_forward=32, blocks=1, max_length=10),
    "mean": lambda: PooledUserTower("mean"),
    "attention": lambda: PooledUserTower("attention"),
    "fading": lambda: PooledUserTower("fading", fading=0.3),
    "gru": lambda: PooledUserTower("gru"),
}


@pytest.fixture(params=list(TOWERS))
def tower(request):
    return build(TOWERS[request.param]())


@pytest.fixture
def items():
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(1))


def test_a_later_event_never_changes_an_earlier_interest(tower, items):
    one = tower(batch([[1, 2, 3, 4, 5]]), items)
    for step in range(1, 5):
        changed = [1, 2, 3, 4, 5]
        changed[step] = 9
        other = tower(batch([changed]), items)
        torch.testing.assert_close(other[:, :step], one[:, :step])
        assert not torch.allclose(other[:, step:], one[:, step:])


def test_causality_by_gradient(tower, items):
    items.requires_grad_()
    interest = tower(batch([[1, 2, 3, 4]]), items)
    for step in range(4):
        (gradient,) = torch.autograd.grad(interest[0, step].sum(), items, retain_graph=True)
        reached = gradient.abs().sum(1) > 0
        assert not reached[[step + 2, 0]].any() if step < 3 else not reached[0]


def test_padding_never_matters(tower, items):
    short, long = [3, 1], [4, 5, 6, 7, 8]
    alone = tower(batch([short]), items)
    wide = tower(batch([short], width=9), items)
    beside = tower(batch([short, long]), items)
    torch.testing.assert_close(wide[:, :2], alone)
    torch.testing.assert_close(beside[:1, :2], alone)
    poisoned = items.clone()
    poisoned[0] = 100
    torch.testing.assert_close(tower(batch([short], width=9), poisoned)[:, :2], alone)
    torch.testing.assert_close(tower(batch([long]), items), beside[1:])


def test_no_history_no_interest(tower, items):
    interest = tower(batch([[], [1, 2]]), items)
    assert interest.shape == (2, 2, 8)
    assert not interest[0].any()
    assert interest[1].any()
    tower.train()
    tower(batch([[], [1, 2]]), items.requires_grad_()).sum().backward()
    assert items.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in tower.parameters())


def test_mean_by_hand():
    items = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 6.0]])
    tower = build(PooledUserTower("mean"), dim=2)
    assert tower(batch([[1, 2]]), items).tolist() == [[[1.0, 2.0], [2.0, 4.0]]]


def test_fading_by_hand(items):
    found = build(PooledUserTower("fading", fading=0.5))(batch([[1, 2, 3], [4]]), items)
    shares = torch.tensor([math.exp(-1.0), math.exp(-0.5), 1.0])
    torch.testing.assert_close(found[0, 2], (shares[:, None] * items[1:4]).sum(0) / shares.sum())
    torch.testing.assert_close(found[1, 0], items[4])
    same = build(PooledUserTower("fading", fading=0.0))(batch([[1, 2, 3]]), items)
    torch.testing.assert_close(same, build(PooledUserTower("mean"))(batch([[1, 2, 3]]), items))
    with pytest.raises(ValueError, match=r"fading is -1; it must be at least 0"):
        PooledUserTower("fading", fading=-1)


def test_attention_equals_the_plain_formula(items):
    tower = build(SequenceUserTower(blocks=1, heads=2, positions_from="none"))
    (block,) = tower.blocks
    x = tower.first_norm(items[[1, 2, 3]])
    q, k, v = block.qkv(block.attention_norm(x)).chunk(3, -1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[:, head] @ k[:, head].T / 2
        scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v[:, head])
    x = x + block.out(torch.cat(heads, -1))
    x = x + block.contract(F.gelu(block.expand(block.feed_forward_norm(x))))
    torch.testing.assert_close(tower(batch([[1, 2, 3]]), items)[0], tower.last_norm(x))


def test_positions_count_from_the_side_that_was_asked_for(items):
    tower = build(SequenceUserTower(max_length=4, positions_from="end"))
    users = batch([[1, 2, 3], [4]])
    table = tower.positions.weight
    torch.testing.assert_close(tower._positions(users)[0], table[[2, 1, 0]])
    torch.testing.assert_close(tower._positions(users)[1, 0], table[0])
    tower = build(SequenceUserTower(max_length=4, positions_from="start"))
    torch.testing.assert_close(tower._positions(users)[0], tower.positions.weight[:3])


def test_histories_that_are_too_long(items):
    tower = build(SequenceUserTower(max_length=3))
    assert tower(batch([[1, 2, 3]]), items).shape == (1, 3, 8)
    with pytest.raises(ValueError, match=r"history of 4 events.*user_tower.*max_length to at least 4.*max_history"):
        tower(batch([[1, 2, 3, 4]]), items)


def test_width_and_heads():
    with pytest.raises(ValueError, match=r"dim \(8\) is not divisible by the user tower's heads \(3\)"):
        build(SequenceUserTower(heads=3))
    with pytest.raises(ValueError, match="heads >= 1"):
        SequenceUserTower(heads=0)


def test_every_parameter_of_the_sequence_tower_learns(items):
    tower = build(SequenceUserTower(max_length=3, attention_dropout=0.1)).train()
    tower(batch([[1, 2, 3], [4, 5, 6]]), items).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_dropout_keeps_share_and_mean(rate):
    torch.manual_seed(0)
    x = torch.ones(301, 777, requires_grad=True)
    dropped = dropout(x, rate, True)
    assert abs((dropped == 0).float().mean().item() - rate) < 0.005
    assert abs(dropped.mean().item() - 1) < 0.01
    assert len(dropped.unique()) == 2
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, dropped.detach())
    # Neither rows nor columns nor neighbours share their draws.
    zeros = (dropped.detach() == 0).float()
    assert zeros.mean(0).std() < 2 * (rate * (1 - rate) / 301) ** 0.5
    assert abs(torch.corrcoef(torch.stack([zeros[:, :-1].flatten(), zeros[:, 1:].flatten()]))[0, 1]) < 0.01
    torch.manual_seed(0)
    assert torch.equal(dropout(x, rate, True), dropped)


def test_dropout_at_its_ends():
    x = torch.ones(5, 3)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert not dropout(x, 1.0, True).any()
    assert dropout(x.double(), 0.5, True).dtype == torch.float64
    assert dropout(torch.empty(0, 3), 0.5, True).shape == (0, 3)
