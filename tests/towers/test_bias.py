import numpy as np
import pytest
import torch

from lightning_rec.data.batch import CatalogueView, ItemBatch, UserBatch
from lightning_rec.objectives import RatingHead
from lightning_rec.towers import (
    BiasItemTower,
    BiasUserTower,
    IdItemTower,
    IdUserTower,
    LanguageUserTower,
    PooledUserTower,
    TextItemTower,
)

ITEMS, USERS = 7, 5
WHOLE = ItemBatch(torch.arange(ITEMS + 1), whole=True)


def view(cold=(), texts=()):
    counts = torch.full((ITEMS + 1,), 3)
    counts[[0, *cold]] = 0
    return CatalogueView(n_rows=ITEMS + 1, n_users=USERS + 1, counts=counts, texts=list(texts))


def users(rows, histories=None, texts=None):
    histories = [[1]] * len(rows) if histories is None else histories
    width = max(1, *map(len, histories))
    history = torch.tensor([row + [0] * (width - len(row)) for row in histories])
    return UserBatch(history, torch.tensor([len(row) for row in histories]), torch.tensor(rows), texts=texts)


def pair(catalogue=None, factors=0, item_content=None, user_content=None, **options):
    torch.manual_seed(0)
    item, user = BiasItemTower(factors, item_content), BiasUserTower(user_content, **options)
    catalogue = view() if catalogue is None else catalogue
    item.configure(catalogue)
    user.configure(catalogue, item)
    for tower in (item, user):
        tower.prepare(catalogue)
    return item, user


def scramble(*towers):
    with torch.no_grad():
        for tower in towers:
            for parameter in tower.parameters():
                parameter.normal_()
            for module in tower.modules():
                if isinstance(module, torch.nn.Embedding):
                    module.weight[0] = 0


def test_the_dot_product_is_biases_plus_factors():
    item, user = pair(factors=3)
    scramble(item, user)
    vectors = item(WHOLE)
    interest = user(users([2, 5]), vectors)
    assert vectors.shape == (ITEMS + 1, 5)
    assert interest.shape == (2, 1, 5)
    expected = user.bias.weight[[2, 5]] + item.bias.weight[:, 0] + user.table.weight[[2, 5]] @ item.table.weight.T
    assert torch.allclose(interest[:, 0] @ vectors.T, expected, atol=1e-6)
    rows = torch.tensor([0, 6, 2])
    assert torch.equal(item(ItemBatch(rows)), vectors[rows])
    assert user(users([1], [[1, 2, 3]]), vectors).shape == (1, 3, 5), "a vector a step, all alike"


def test_unknown_users_and_cold_items_have_no_bias_and_no_factors():
    item, user = pair(view(cold=[4]), factors=3)
    scramble(item, user)
    vectors = item(WHOLE)
    assert vectors[4].tolist() == [0, 0, 0, 0, 1]
    assert user(users([0]), vectors)[0, 0].tolist() == [0, 0, 0, 1, 0]
    assert user.knows(users([0, 3])).tolist() == [False, True]
    fresh = pair(factors=3)[1]
    assert not fresh.table.weight.any(), "a user without training ratings must stay at zero"


def als(u, i, rating, mean, penalty):
    """The bias model by alternating least squares, each step in closed form."""
    user, item = np.zeros(USERS + 1), np.zeros(ITEMS + 1)
    for _ in range(500):
        item = np.bincount(i, rating - mean - user[u], ITEMS + 1) / (penalty + np.bincount(i, minlength=ITEMS + 1))
        user = np.bincount(u, rating - mean - item[i], USERS + 1) / (penalty + np.bincount(u, minlength=USERS + 1))
    return user, item


@pytest.mark.parametrize("penalty", [2.0, 8.0])
def test_the_bias_model_is_that_of_alternating_least_squares(penalty):
    rng = np.random.default_rng(1)
    u, i = rng.integers(1, USERS + 1, 60), rng.integers(1, ITEMS + 1, 60)
    rating = np.clip(3.4 + rng.normal(0, 0.7, USERS + 1)[u] + rng.normal(0, 0.7, ITEMS + 1)[i], 1, 5)
    user_bias, item_bias = als(u, i, rating, rating.mean(), penalty)

    item, user = pair()
    head = RatingHead(bounds="none")
    head.configure(rating_mean=rating.mean())
    parameters = [*item.parameters(), *user.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.05, weight_decay=2 * penalty / len(rating))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    batch, target, stars = users(u.tolist()), torch.tensor(i) - 1, torch.tensor(rating, dtype=torch.float32)
    for _ in range(400):
        optimizer.zero_grad()
        vectors = item(WHOLE)
        head(user(batch, vectors)[:, 0], vectors[1:], target, rating=stars).backward()
        optimizer.step()
        schedule.step()
    assert item.bias.weight[1:, 0].tolist() == pytest.approx(item_bias[1:], abs=1e-3)
    assert user.bias.weight[1:, 0].tolist() == pytest.approx(user_bias[1:], abs=1e-3)
    with torch.no_grad():
        vectors = item(WHOLE)
        predicted = head.predict_pairs(user(batch, vectors)[:, 0], vectors[torch.tensor(i)])
    assert np.abs(predicted.numpy() - (rating.mean() + user_bias[u] + item_bias[i])).max() < 2e-3


def test_factors_find_a_taste_that_biases_cannot():
    """Half of the users love what the other half hates: the mean and the biases are the same for all."""
    u, i = np.divmod(np.arange(4 * 6), 6)
    rating = torch.tensor(3 + 2.0 * (-1.0) ** (u + i), dtype=torch.float32)
    errors = {}
    for factors in (0, 2):
        item, user = pair(factors=factors)
        head = RatingHead()
        head.configure(rating_range=(1.0, 5.0), rating_mean=3.0)
        optimizer = torch.optim.Adam([*item.parameters(), *user.parameters()], lr=0.05)
        batch, target = users((u + 1).tolist()), torch.tensor(i)
        for _ in range(200):
            optimizer.zero_grad()
            vectors = item(WHOLE)
            loss = head(user(batch, vectors)[:, 0], vectors[1:], target, rating=rating)
            loss.backward()
            optimizer.step()
        errors[factors] = loss.item()
    assert errors[0] == pytest.approx(4.0, abs=1e-3)
    assert errors[2] < 1e-3


def test_content_joins_biases_and_factors():
    item, user = pair(view(cold=[4]), 2, IdItemTower(dim=3, init_std=1.0), PooledUserTower("mean"))
    scramble(item, user)
    batch = users([1, 0], [[1, 2], [3]])
    vectors = item(WHOLE)
    content = item.content(WHOLE)
    interest = user(batch, vectors)
    assert interest.shape == (2, 2, 3 + 2 + 2)
    reading = user.content(batch, content)
    expected = (
        reading[0, 1] @ content[5]
        + item.bias.weight[5, 0]
        + item.content_bias(content[5])[0]
        + user.bias.weight[1, 0]
        + user.content_bias(reading[0, 1])[0]
        + user.table.weight[1] @ item.table.weight[5]
    )
    assert (interest[0, 1] @ vectors[5]).item() == pytest.approx(expected.item(), abs=1e-5)
    assert vectors[4, -2].item() == pytest.approx(item.content_bias(content[4]).item(), abs=1e-6)
    assert user.knows(users([0, 0], [[], [3]])).tolist() == [False, True]


def test_a_language_user_tower_shares_the_content_towers_language_model(tiny_bert):
    texts = ["", "red shoe", "blue boot", "film of war", "dog book", "old cat", "new city", "river song"]
    item, user = pair(view(texts=texts), 0, TextItemTower(tiny_bert, dim=8), LanguageUserTower("shared"), ids=False)
    assert not user.uses_ids
    assert user.content.encoder is item.content.encoder
    interest = user(users([0, 0], [[], [1]], texts=["red", "old river"]), item(WHOLE))
    assert interest.shape == (2, 1, 10)
    assert not torch.equal(interest[0], interest[1])
    assert not list(item.language_parameters())
    tuned, reader = pair(
        view(texts=texts), 0, TextItemTower(tiny_bert, dim=8, tune="full"), LanguageUserTower("shared")
    )
    assert list(tuned.language_parameters())
    assert not list(reader.language_parameters()), "a shared model's parameters are counted once"


@pytest.mark.parametrize("factors", [0, 3])
def test_a_new_item_is_encoded_by_its_text_as_a_cold_one_is(factors, tiny_bert):
    texts = ["", "red shoe", "blue boot", "film of war", "dog book", "old cat", "new city", "river song"]
    item, _ = pair(view(cold=[2, 5], texts=texts), factors, TextItemTower(tiny_bert, dim=8), PooledUserTower("mean"))
    scramble(item.content_bias, item.bias, item.content.projection)
    item.eval()
    found = item.encode_texts(["blue boot", "old cat", "a new book", "red shoe"])
    whole = item(WHOLE)
    assert found.shape == (4, 10 + factors)
    torch.testing.assert_close(found[:2], whole[[2, 5]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[3], whole[1]), "an item that was trained on has a bias of its own"
    assert not found.requires_grad
    for without in (pair()[0], pair(item_content=IdItemTower(), user_content=IdUserTower())[0]):
        assert not hasattr(without, "encode_texts")
    with pytest.raises(AttributeError, match="no attribute 'encode_text'"):
        _ = item.encode_text


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="BiasUserTower goes with BiasItemTower"):
        BiasUserTower().configure(view(), IdItemTower())
    with pytest.raises(ValueError, match="give both one, or neither"):
        pair(item_content=IdItemTower())
    with pytest.raises(ValueError, match="give both one, or neither"):
        pair(user_content=IdUserTower())
    with pytest.raises(ValueError, match="without ids knows nothing"):
        BiasUserTower(ids=False)
    with pytest.raises(ValueError, match="factors is"):
        BiasItemTower(-1)
    assert BiasUserTower(IdUserTower(), ids=False).uses_ids
