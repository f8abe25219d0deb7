"""The mixture of experts against a loop over experts, and in a text tower."""

import pytest
import torch
from torch.nn.functional import softplus

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.towers import TextItemTower
from lightning_rec.towers.mixture import MixtureOfExperts

CATALOGUE = CatalogueView(n_rows=4, texts=["", "red shoe", "old film", "new song"])


def random_mixture(**options):
    torch.manual_seed(0)
    mixture = MixtureOfExperts(6, 4, experts=3, **options)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter)
    return mixture


def by_loop(mixture, x, noise=None):
    rows = []
    for number, row in enumerate(x):
        logits = [sum(row[i] * mixture.gate[i, e] for i in range(6)) for e in range(3)]
        if noise is not None:
            wide = [softplus(sum(row[i] * mixture.noise[i, e] for i in range(6))) + 0.01 for e in range(3)]
            logits = [one + noise[number, e] * wide[e] for e, one in enumerate(logits)]
        weights = torch.stack(logits).exp()
        weights = weights / weights.sum()
        rows.append(sum(weights[e] * (mixture.weight[e] @ (row - mixture.shift[e])) for e in range(3)))
    return torch.stack(rows)


def test_equals_a_loop_over_experts():
    mixture, x = random_mixture().eval(), torch.randn(5, 6)
    torch.testing.assert_close(mixture(x), by_loop(mixture, x), atol=1e-5, rtol=1e-5)


def test_noisy_gates_in_training_only():
    mixture, x = random_mixture(), torch.randn(5, 6)
    torch.manual_seed(3)
    noisy = mixture.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(noisy, by_loop(mixture, x, torch.randn(5, 3)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixture(x), mixture(x))
    mixture.eval()
    assert torch.equal(mixture(x), mixture(x))
    mixture.noisy = False
    torch.testing.assert_close(mixture.train()(x), mixture.eval()(x))


def test_every_parameter_learns_and_gradients_are_those_of_the_loop():
    mixture, x = random_mixture().double().eval(), torch.randn(5, 6, dtype=torch.float64)
    found = torch.autograd.grad(mixture(x).square().sum(), [mixture.shift, mixture.weight, mixture.gate])
    wanted = torch.autograd.grad(by_loop(mixture, x).square().sum(), [mixture.shift, mixture.weight, mixture.gate])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    mixture.train()(x).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in mixture.parameters())


def test_shapes_start_and_options():
    mixture = MixtureOfExperts(384, 32, experts=8, init_std=0.02).eval()
    x = torch.randn(200, 384)
    torch.testing.assert_close(mixture.gates(x), torch.full((200, 8), 1 / 8))
    assert 0.015 < mixture(x).std() < 0.025
    assert mixture(x[0]).shape == (32,)
    assert mixture(x[:0]).shape == (0, 32)
    one = MixtureOfExperts(6, 4, experts=1)
    torch.testing.assert_close(one(x[:3, :6]), x[:3, :6] @ one.weight[0].T)
    with pytest.raises(ValueError, match="experts is 0"):
        MixtureOfExperts(6, 4, experts=0)


def test_in_a_text_tower(tiny_bert):
    tower = TextItemTower(tiny_bert, dim=8, projection="moe", experts=3)
    tower.configure(CATALOGUE)
    tower.prepare(CATALOGUE)
    whole = ItemBatch(torch.arange(4), whole=True)
    tower.eval()
    assert torch.equal(tower(whole), tower(whole))
    torch.testing.assert_close(tower.encode_texts(["old film"]), tower(whole)[2:3], atol=1e-5, rtol=0)
    assert {name for name in tower.state_dict() if name.startswith("projection.")} == {
        f"projection.{name}" for name in ("shift", "weight", "gate", "noise")
    }
    tower.train()
    assert not torch.equal(tower(whole), tower(whole))
