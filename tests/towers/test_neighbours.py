import math

import pytest
import torch
import torch.nn.functional as F

from lightning_rec import TwoTower
from lightning_rec.data.batch import CatalogueView, ItemBatch, UserBatch
from lightning_rec.towers import (
    NeighbourItemTower,
    NeighbourUserTower,
    SequenceUserTower,
    TextIdItemTower,
    TextItemTower,
)

TEXTS = ["", "red shoe", "blue shoe", "old film", "new film", "space war", "love song", "big dog", "small cat"]
COUNTS = torch.tensor([0, 3, 1, 2, 0, 1, 4, 0, 1])  # rows 4 and 7 are cold
VIEW = CatalogueView(len(TEXTS), texts=TEXTS, counts=COUNTS)
WHOLE = ItemBatch(torch.arange(len(TEXTS)), whole=True)


def towers(tiny_bert, positions="absolute", **options):
    torch.manual_seed(0)
    item = NeighbourItemTower(language_model=tiny_bert, **({"dim": 8, "neighbour_dims": 6} | options))
    user_tower = NeighbourUserTower(blocks=1, heads=2, max_length=6, dropout=0.0, positions=positions)
    item.configure(VIEW)
    item.prepare(VIEW)
    user_tower.configure(VIEW, item)
    return item.eval(), user_tower.eval()


def users(*histories):
    width = max(map(len, histories))
    rows = [[*history, *[0] * (width - len(history))] for history in histories]
    lengths = torch.tensor([len(history) for history in histories])
    return UserBatch(torch.tensor(rows), lengths, torch.zeros(len(histories), dtype=torch.int64))


def directions(item):
    """Unit vectors of the texts, centred and rotated, by numpy-like steps of their own."""
    unit = F.normalize(item.encoder.encode(TEXTS, torch.device("cpu")), dim=-1).double()
    centred = unit - unit[1:].mean(0)
    _, spread, rows = torch.linalg.svd(centred[1:], full_matrices=False)
    axes = rows[: item.neighbour_dims]
    if item.neighbour_features == "whiten":
        variance = spread**2 / len(centred[1:])
        ridge = item.neighbour_eps * variance.sum() / centred.shape[1]  # a share of the mean variance
        axes = axes / (variance[: item.neighbour_dims, None] + ridge).sqrt()
    found = F.normalize(centred @ axes.T, dim=-1)
    found[0] = 0
    return found.float()


@torch.no_grad()
@pytest.mark.parametrize("features", ["centre", "whiten"])
def test_the_score_is_that_of_two_towers_and_the_weighted_cosines(tiny_bert, features):
    item, user = towers(tiny_bert, neighbour_features=features, neighbour_eps=0.5)
    item.bare.copy_(torch.tensor([0.15, 0.03]))  # 1.5 times the cosine, and 0.3 more, for the cold rows
    user.neighbours.copy_(torch.tensor([0.4, 0.2]))
    batch = users([1, 4, 0, 8], [3])  # the third event is masked
    items = item(WHOLE)
    interest = user(batch, items)
    assert items.shape == (9, 15)
    assert interest.shape == (2, 4, 15)
    scores = interest @ items.T

    plain = SequenceUserTower.forward(user, batch, items[:, :8]) @ items[:, :8].T
    unit, cold = directions(item), (COUNTS == 0).float()
    fading = math.exp(-math.log1p(math.exp(2.0)))  # e to the minus softplus(2)
    for row, history in enumerate([[1, 4, 0, 8], [3]]):
        for step in range(len(history)):
            shares = torch.tensor([fading ** (step - event) for event in range(step + 1)])
            near = 4 * (unit[history[: step + 1]] * (shares / shares.sum())[:, None]).sum(0)
            wanted = plain[row, step] + (unit @ near) * (1 + 0.5 * cold) + 0.3 * cold
            torch.testing.assert_close(scores[row, step, 1:], wanted[1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_step_sees_nothing_that_came_later(tiny_bert):
    item, user = towers(tiny_bert, positions="none")
    items = item(WHOLE)
    longer, shorter = user(users([1, 2, 3, 4], [5]), items), user(users([1, 2], [5]), items)
    torch.testing.assert_close(longer[0, :2], shorter[0])
    torch.testing.assert_close(longer[1, 0], shorter[1, 0])


@torch.no_grad()
def test_a_user_without_history_has_zeros(tiny_bert):
    item, user = towers(tiny_bert)
    assert not user(users([1, 2], []), item(WHOLE))[1].any()


@torch.no_grad()
def test_a_new_text_is_as_a_cold_item_of_the_catalogue(tiny_bert):
    item, _ = towers(tiny_bert, fusion="gate")
    item.bare.copy_(torch.tensor([0.2, -0.1]))
    torch.testing.assert_close(item.encode_texts([TEXTS[4], TEXTS[7]]), item(WHOLE)[[4, 7]], atol=1e-5, rtol=1e-5)
    some = ItemBatch(torch.tensor([0, 7, 2]))
    torch.testing.assert_close(item(some), item(WHOLE)[[0, 7, 2]])


def test_dropped_ids_teach_the_weight_and_the_offset_of_cold_items(tiny_bert):
    for share, learned in ((0.0, False), (0.5, True)):
        item, user = towers(tiny_bert, id_dropout=share)
        warm = ItemBatch(torch.tensor([0, 1, 2, 3, 5, 6, 8]))
        items = item.train()(warm)
        scores = user(users([1, 2, 3]), items)[0] @ items[1:].T
        F.cross_entropy(scores, torch.tensor([1, 2, 3])).backward()
        assert bool(item.bare.grad.any()) is learned
        assert user.neighbours.grad.all()


def test_what_is_read_stays_in_the_checkpoint_and_is_not_measured_again(tiny_bert):
    item, _ = towers(tiny_bert)
    state = item.state_dict()
    assert state["axes"].shape == (16, 6)
    assert "directions" not in state
    other = NeighbourItemTower(language_model=tiny_bert, dim=8, neighbour_dims=6)
    other.configure(VIEW)
    other.load_state_dict(state)
    other.prepare(CatalogueView(3, texts=["", "old film", "new dog"], counts=torch.tensor([0, 1, 1])))
    torch.testing.assert_close(other.directions[1], item.directions[3])


def test_errors_name_the_remedy(tiny_bert):
    with pytest.raises(ValueError, match=r"neighbour_dims is 17; it lies between 1 and the width, 16"):
        towers(tiny_bert, neighbour_dims=17)
    with pytest.raises(ValueError, match="tune is full: set tune to frozen"):
        towers(tiny_bert, tune="full", features="raw")
    for other in (TextItemTower, TextIdItemTower):
        module = TwoTower(other(language_model=tiny_bert, dim=8), NeighbourUserTower(blocks=1))
        with pytest.raises(ValueError, match=rf"the item tower is {other.__name__}: change .*or use SequenceUserTower"):
            module.build(VIEW)
