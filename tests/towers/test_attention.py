import math

import pytest
import torch

from lightning_rec.towers.attention import AdditiveAttention, MultiHeadSelfAttention, masked_softmax

MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False], [False, True, True]])


@pytest.fixture
def x():
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_additive_attention_equals_the_plain_formula(x):
    pool = AdditiveAttention(6, 5)
    pooled = pool(x, MASK)
    for row in range(4):
        real = [x[row, step] for step in range(3) if MASK[row, step]]
        scores = [(pool.query.weight[0] @ torch.tanh(pool.hidden.weight @ v + pool.hidden.bias)).item() for v in real]
        total = sum(math.exp(score) for score in scores)
        expected = sum((math.exp(s) / total * v for s, v in zip(scores, real, strict=True)), torch.zeros(6))
        torch.testing.assert_close(pooled[row], expected)
    assert not pooled[2].any()
    torch.testing.assert_close(pooled[1], x[1, 0])


def test_self_attention_equals_the_plain_formula(x):
    attention = MultiHeadSelfAttention(6, heads=2)
    mixed = attention(x, MASK)
    q, k, v = (attention.qkv(x)).chunk(3, -1)
    for row in range(4):
        real = MASK[row].nonzero()[:, 0]
        heads = []
        for head in (slice(0, 3), slice(3, 6)):
            scores = q[row, real][:, head] @ k[row, real][:, head].T / 3**0.5
            heads.append(scores.softmax(-1) @ v[row, real][:, head])
        torch.testing.assert_close(mixed[row, real], torch.cat(heads, -1))
        assert not mixed[row, ~MASK[row]].any()
    torch.testing.assert_close(attention(x, MASK.new_ones(4, 3)), attention(x))


@pytest.mark.parametrize("layer", [AdditiveAttention(6, 5), MultiHeadSelfAttention(6, 3, head_dim=4)])
def test_padding_is_never_looked_at_and_gradients_are_finite(layer, x):
    out = layer(x, MASK)
    poisoned = torch.where(MASK[..., None], x, 1e4)
    torch.testing.assert_close(layer(poisoned, MASK), out)
    wide, wide_mask = torch.cat([x, 7 * torch.ones(4, 2, 6)], 1), torch.cat([MASK, torch.zeros(4, 2).bool()], 1)
    widened = layer(wide, wide_mask)
    torch.testing.assert_close(widened if widened.ndim == 2 else widened[:, :3], out)
    x.requires_grad_()
    layer(x, MASK).square().sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[~MASK].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_order_does_not_matter(x):
    order = torch.tensor([2, 0, 1])
    pool, attention = AdditiveAttention(6, 5), MultiHeadSelfAttention(6, 2)
    torch.testing.assert_close(pool(x[:, order], MASK[:, order]), pool(x, MASK))
    torch.testing.assert_close(attention(x[:, order], MASK[:, order]), attention(x, MASK)[:, order])


def test_nothing_at_all():
    assert AdditiveAttention(6)(torch.zeros(2, 0, 6), torch.zeros(2, 0).bool()).tolist() == [[0.0] * 6] * 2
    assert MultiHeadSelfAttention(6, 2)(torch.zeros(2, 0, 6), torch.zeros(2, 0).bool()).shape == (2, 0, 6)
    assert AdditiveAttention(6)(torch.zeros(0, 3, 6), torch.zeros(0, 3).bool()).shape == (0, 6)


def test_half_precision(x):
    with torch.autocast("cpu", torch.bfloat16):
        for layer in (AdditiveAttention(6, 5), MultiHeadSelfAttention(6, 2)):
            assert layer(x, MASK).isfinite().all()


def test_masked_softmax_by_hand():
    weights = masked_softmax(torch.tensor([[0.0, math.log(3), 9.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75, 0.0]]))


def test_heads_must_divide():
    with pytest.raises(ValueError, match="choose heads among the divisors of 6"):
        MultiHeadSelfAttention(6, 4)
    assert MultiHeadSelfAttention(6, 4, head_dim=2).width == 8
