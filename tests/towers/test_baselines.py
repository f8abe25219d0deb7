import pytest
import torch

from lightning_rec.data.batch import CatalogueView, ItemBatch, UserBatch
from lightning_rec.towers import (
    ConstantUserTower,
    IdItemTower,
    IdUserTower,
    PopularityItemTower,
    RecencyPopularityItemTower,
    parameter_summary,
)

CATALOGUE = CatalogueView(n_rows=4, n_users=3, counts=torch.tensor([0, 7, 0, 3]))
USERS = UserBatch(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), torch.tensor([2, 0]))
WHOLE = ItemBatch(torch.arange(4), whole=True)


def test_popularity_scores_are_counts():
    items, users = PopularityItemTower(), ConstantUserTower()
    items.configure(CATALOGUE)
    users.configure(CATALOGUE, items)
    vectors = items(WHOLE)
    interest = users(USERS, vectors)
    assert interest.shape == (2, 2, 1)
    assert (interest[1, 0] @ vectors.T).tolist() == [0, 7, 0, 3]
    assert items(ItemBatch(torch.tensor([0, 3]))).tolist() == [[0], [3]]
    assert parameter_summary(items)["total"] == 0


def test_popularity_is_that_of_the_checkpoint():
    items = PopularityItemTower()
    items.configure(CATALOGUE)
    loaded = PopularityItemTower()
    loaded.configure(CatalogueView(n_rows=4))
    loaded.load_state_dict(items.state_dict())
    loaded.prepare(CatalogueView(n_rows=4, counts=torch.tensor([0, 1, 1, 1])))
    assert torch.equal(loaded(WHOLE), items(WHOLE))
    late = PopularityItemTower()
    late.configure(CatalogueView(n_rows=4))
    late.prepare(CATALOGUE)
    assert torch.equal(late(WHOLE), items(WHOLE))


def test_matrix_factorisation():
    items, users = IdItemTower(8), IdUserTower(init_std=0.5)
    items.configure(CATALOGUE)
    users.configure(CATALOGUE, items)
    interest = users(USERS, items(WHOLE))
    assert interest.shape == (2, 2, 8)
    assert torch.equal(interest[0, 0], interest[0, 1])
    assert interest[0].any()
    assert not interest[1].any(), "an unknown user has a zero vector"
    interest.sum().backward()
    assert not users.table.weight.grad[0].any()


RECENT = CatalogueView(n_rows=4, counts=torch.tensor([0, 7, 0, 3]), recent_counts=torch.tensor([0, 0.5, 0, 2.25]))


def test_recency_popularity_scores_are_recent_counts():
    items, users = RecencyPopularityItemTower(), ConstantUserTower()
    items.configure(RECENT)
    users.configure(RECENT, items)
    vectors = items(WHOLE)
    assert (users(USERS, vectors)[1, 0] @ vectors.T).tolist() == [0, 0.5, 0, 2.25]
    assert items(ItemBatch(torch.tensor([0, 3]))).tolist() == [[0], [2.25]]
    assert parameter_summary(items)["total"] == 0


def test_recency_popularity_is_that_of_the_checkpoint():
    items = RecencyPopularityItemTower()
    items.configure(RECENT)
    loaded = RecencyPopularityItemTower()
    loaded.configure(CatalogueView(n_rows=4))
    loaded.load_state_dict(items.state_dict())
    loaded.prepare(CATALOGUE)  # its data has no times, which a fitted tower does not need
    loaded.prepare(CatalogueView(n_rows=4, recent_counts=torch.ones(4)))
    assert torch.equal(loaded(WHOLE), items(WHOLE))
    late = RecencyPopularityItemTower()
    late.configure(CATALOGUE)
    with pytest.raises(ValueError, match=r"needs the times.*PopularityItemTower"):
        late.prepare(CATALOGUE)
    late.prepare(RECENT)
    assert torch.equal(late(WHOLE), items(WHOLE))
