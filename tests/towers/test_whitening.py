"""Whitening: against numpy, and in the life of a text tower."""

import copy

import numpy as np
import peft
import pytest
import torch

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.towers import TextItemTower
from lightning_rec.towers.whitening import Whitening

WORDS = ["red", "blue", "dog", "cat", "war", "love", "old", "new"]
CATALOGUE = CatalogueView(n_rows=65, texts=["", *(f"{one} {other}" for one in WORDS for other in WORDS)])


def vectors(n=300, width=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=random) * torch.tensor([5.0, 3, 1, 0.5, 0.1, 0.01])[:width]
    return torch.randn(n, width, generator=random) @ mixing + 7


def covariance(x):
    return np.cov(x.double().numpy().T, bias=True)


def tower(model, **options):
    torch.manual_seed(0)
    made = TextItemTower(model, **({"dim": 8, "features": "whiten"} | options))
    made.configure(CATALOGUE)
    made.prepare(CATALOGUE)
    return made.eval()


def test_mean_zero_and_identity_covariance():
    x = vectors()
    whitening = Whitening(6)
    whitening.measure(x)
    out = whitening(x)
    assert out.dtype == torch.float32
    assert out.mean(0).abs().max() < 1e-4
    np.testing.assert_allclose(covariance(out), np.eye(6), atol=1e-4)


def test_equals_the_singular_value_decomposition_of_the_paper():
    x = vectors()
    exact = x.double().numpy()
    u, s, _ = np.linalg.svd(np.cov(exact.T, bias=True))
    wanted = (exact - exact.mean(0)) @ (u @ np.diag(s**-0.5))[:, :3]
    whitening = Whitening(6, dims=3)
    whitening.measure(x)
    found = whitening(x).numpy()
    sign = np.sign((found * wanted).sum(0))  # a direction may point either way
    np.testing.assert_allclose(found, wanted * sign, atol=1e-4)


def test_the_ridge_by_hand():
    # variances 4 and 0, mean 2: a ridge of half the mean adds 1
    x = torch.tensor([[1.0, 5.0], [-3.0, 5.0]])
    whitening = Whitening(2, eps=0.5)
    whitening.measure(x)
    torch.testing.assert_close(whitening(x), torch.tensor([[2 / 5**0.5, 0.0], [-2 / 5**0.5, 0.0]]))


def test_directions_do_not_depend_on_an_arbitrary_sign():
    whitening, other = Whitening(6), Whitening(6)
    whitening.measure(vectors())
    other.measure(vectors().flip(0))  # the same statistics, summed in another order
    torch.testing.assert_close(whitening.matrix, other.matrix, rtol=1e-4, atol=1e-4)
    largest = whitening.matrix.gather(0, whitening.matrix.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_what_does_not_vary_is_dropped_and_not_blown_up(n):
    whitening = Whitening(6)
    x = vectors(n)
    whitening.measure(x)
    assert whitening(x).isfinite().all()
    assert int((whitening.matrix.abs().sum(0) > 0).sum()) == n - 1
    # something unlike the few texts that were measured stays of the size of the others
    assert whitening(vectors(50, seed=1)).abs().max() < 1e4
    same = vectors(1).expand(7, -1) / 3
    whitening.measure(same)
    assert not whitening(same).any()


def test_options_out_of_range():
    for options, message in [({"dims": 7}, r"whiten_dims is 7.*6 features"), ({"dims": 0}, "whiten_dims is 0")]:
        with pytest.raises(ValueError, match=message):
            Whitening(6, **options)
    with pytest.raises(ValueError, match="whiten_eps is -1"):
        Whitening(6, eps=-1)


def test_statistics_stay_in_float64_whatever_the_precision():
    whitening = Whitening(6)
    whitening.measure(vectors())
    before = whitening.matrix.clone()
    for changed in (whitening.half(), whitening.bfloat16(), whitening.float(), whitening.to(torch.float16)):
        assert changed.matrix.dtype == changed.mean.dtype == torch.float64
        assert torch.equal(changed.matrix, before)
    assert whitening(vectors().half()).dtype == torch.float16
    assert set(whitening.state_dict()) == {"mean", "matrix"}


# ---------------------------------------------------------------------- in a text tower


def test_the_catalogue_of_a_tower_is_white(tiny_bert):
    white = tower(tiny_bert, whiten_dims=5)
    np.testing.assert_allclose(covariance(white.vectors[1:]), np.eye(5), atol=1e-3)
    plain = tower(tiny_bert, features="raw")
    wanted = Whitening(16, 5)
    wanted.measure(plain.vectors[1:])
    torch.testing.assert_close(white.vectors, wanted(plain.vectors))
    assert white.projection.in_features == 5


@pytest.mark.parametrize("options", [{}, {"whiten_dims": 4, "whiten_eps": 0.01}, {"projection": "moe"}])
def test_a_text_has_the_same_vector_in_the_catalogue_and_new(tiny_bert, options):
    white = tower(tiny_bert, **options)
    whole = white(ItemBatch(torch.arange(65), whole=True))
    torch.testing.assert_close(white.encode_texts(list(CATALOGUE.texts[1:9])), whole[1:9], atol=1e-5, rtol=1e-4)


def test_statistics_travel_in_the_checkpoint(tiny_bert):
    white = tower(tiny_bert)
    state = copy.deepcopy(white.state_dict())
    assert set(state) == {"whitening.mean", "whitening.matrix", "measured", "projection.weight", "projection.bias"}
    shop = CatalogueView(n_rows=3, texts=["", "big river", "red dog"])
    moved = TextItemTower(tiny_bert, dim=8, features="whiten")
    moved.configure(shop)
    moved.load_state_dict(state)
    moved.prepare(shop)
    row = list(CATALOGUE.texts).index("red dog")
    whole = white(ItemBatch(torch.arange(65), whole=True))
    torch.testing.assert_close(moved.eval()(ItemBatch(torch.arange(3), whole=True))[2], whole[row])


def test_widths_and_refusals(tiny_bert):
    assert tower(tiny_bert, projection="none", dim=None, whiten_dims=3).dim == 3
    with pytest.raises(ValueError, match="width, 3, but dim is 8"):
        tower(tiny_bert, projection="none", whiten_dims=3)
    for options in ({"tune": "full"}, {"peft": peft.LoraConfig(r=2)}):
        with pytest.raises(ValueError, match=r"features is whiten, but the language model is tuned.*features to raw"):
            tower(tiny_bert, **options)
