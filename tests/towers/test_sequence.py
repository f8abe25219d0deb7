"""Attention blocks: against torch's own encoder layer, and LiGR blocks against the formulas of their papers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_rec.towers.blocks import LigrBlock
from lightning_rec.towers.sequence import CausalBlock


def randomised(block):
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.eval()


def transformer(norm_first=True, activation="gelu", dropout=0.0):
    torch.manual_seed(0)
    return randomised(CausalBlock(8, 2, 12, dropout, 0.0, activation, norm_first))


def ligr(dropout=0.0):
    torch.manual_seed(0)
    return randomised(LigrBlock(8, 2, 12, dropout, 0.0))


def causal(t=5):
    return torch.zeros(t, t).masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_the_encoder_layer_of_torch(norm_first, activation):
    block, x = transformer(norm_first, activation), torch.randn(3, 5, 8, requires_grad=True)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation, batch_first=True, norm_first=norm_first)
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": block.qkv.weight,
            "self_attn.in_proj_bias": block.qkv.bias,
            "self_attn.out_proj.weight": block.out.weight,
            "self_attn.out_proj.bias": block.out.bias,
            "linear1.weight": block.expand.weight,
            "linear1.bias": block.expand.bias,
            "linear2.weight": block.contract.weight,
            "linear2.bias": block.contract.bias,
            "norm1.weight": block.attention_norm.weight,
            "norm1.bias": block.attention_norm.bias,
            "norm2.weight": block.feed_forward_norm.weight,
            "norm2.bias": block.feed_forward_norm.bias,
        }
    )
    wanted = layer(x, src_mask=causal(), is_causal=True)
    found = block(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(3, 5, 8)
    (one,) = torch.autograd.grad((found * weights).sum(), x)
    (other,) = torch.autograd.grad((wanted * weights).sum(), x)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def plain_attention(block, x, bias):
    """Softmax attention of one history ``(t, d)``, head by head."""
    q, k, v = F.linear(x, block.qkv.weight, block.qkv.bias).chunk(3, -1)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        heads.append((q[:, part] @ k[:, part].T / 2 + bias[head]).softmax(-1) @ v[:, part])
    return block.out(torch.cat(heads, -1))


def plain_ligr(block, x, bias):
    gate = torch.sigmoid(x @ block.attention_gate.weight.T + block.attention_gate.bias)
    x = x + plain_attention(block, block.attention_norm(x), bias) * gate
    y = block.feed_forward_norm(x)
    up, multiply = block.expand(y), block.multiply(y)
    swiglu = block.contract(up * torch.sigmoid(up) * multiply)
    return x + swiglu * torch.sigmoid(x @ block.feed_forward_gate.weight.T + block.feed_forward_gate.bias)


def plain_transformer(block, x, bias):
    x = x + plain_attention(block, block.attention_norm(x), bias)
    y = F.gelu(block.expand(block.feed_forward_norm(x)))
    return x + block.contract(y)


@pytest.mark.parametrize(("make", "plain"), [(ligr, plain_ligr), (transformer, plain_transformer)])
def test_blocks_with_and_without_a_bias_equal_the_formulas(make, plain):
    block, x = make(), torch.randn(3, 5, 8)
    torch.testing.assert_close(block(x)[1], plain(block, x[1], causal().expand(2, -1, -1)), atol=1e-5, rtol=1e-5)
    bias = (torch.randn(3, 2, 5, 5) + causal()).requires_grad_()
    found = block(x, bias)
    for number in range(3):
        torch.testing.assert_close(found[number], plain(block, x[number], bias[number]), atol=1e-5, rtol=1e-5)
    # the same for all histories, and its gradient
    shared = (torch.randn(1, 2, 5, 5) + causal()).requires_grad_()
    (one,) = torch.autograd.grad(block(x, shared).square().sum(), shared)
    wanted = torch.stack([plain(block, x[number], shared[0]) for number in range(3)])
    torch.testing.assert_close(block(x, shared), wanted, atol=1e-5, rtol=1e-5)
    (other,) = torch.autograd.grad(wanted.square().sum(), shared)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert bool(one[0, :, 3, :3].any())
    assert not one.isnan().any()


def test_the_default_keeps_the_fast_path(monkeypatch):
    asked = []
    attention = F.scaled_dot_product_attention

    def look(*arguments, **options):
        asked.append(options)
        return attention(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    block = transformer()
    block(torch.randn(2, 5, 8))
    block(torch.randn(2, 5, 8), causal().expand(1, 2, 5, 5))
    assert asked[0] == {"dropout_p": 0.0, "is_causal": True}
    assert asked[1].get("attn_mask") is not None
    assert "is_causal" not in asked[1]


def test_a_closed_gate_passes_its_input_through():
    block, x = ligr(), torch.randn(2, 3, 8)
    for gate in (block.attention_gate, block.feed_forward_gate):
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, -100)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("make", [ligr, transformer])
def test_dropout_in_training_only(make):
    block, x = make(dropout=0.5), torch.randn(2, 3, 8)
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.equal(block(x), block(x))
    block(x).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("make", [ligr, transformer])
def test_a_bias_under_bfloat16(make):
    block, x = make(), torch.randn(2, 5, 8)
    exact = block(x, causal().expand(1, 2, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block(x, causal().expand(1, 2, 5, 5))
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)
