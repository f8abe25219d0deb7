"""The alignment of text and id vectors: the loss by loops, and how it reaches the loss of a step."""

import copy
import math

import pytest
import torch

from lightning_rec import TwoTower
from lightning_rec.data.batch import Batch, CatalogueView, ItemBatch, UserBatch
from lightning_rec.towers import IdItemTower, PooledUserTower, TextIdItemTower
from lightning_rec.towers.fusion import Alignment

CATALOGUE = CatalogueView(
    n_rows=7,
    texts=["", "red shoe", "old film", "new song", "big dog", "river", "war"],
    counts=torch.tensor([0, 3, 2, 0, 1, 4, 2]),
)
WHOLE = ItemBatch(torch.arange(7), whole=True)


def by_loop(text, ids, temperature):
    def cosine(a, b):
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) / temperature

    n, total = len(text), 0.0
    for i in range(n):
        forwards = [cosine(text[i], ids[j]) for j in range(n)]
        backwards = [cosine(text[j], ids[i]) for j in range(n)]
        for row in (forwards, backwards):
            total -= row[i] - math.log(sum(math.exp(value) for value in row))
    return total / (2 * n)


def tower(model, **options):
    torch.manual_seed(0)
    made = TextIdItemTower(
        "sum", **({"language_model": model, "dim": 8, "id_init_std": 1.0, "init_std": 1.0} | options)
    )
    made.configure(CATALOGUE)
    made.prepare(CATALOGUE)
    return made.train()


def test_equals_two_loops():
    torch.manual_seed(0)
    text, ids = torch.randn(5, 4), torch.randn(5, 4)
    assert Alignment(1.0, 0.3)(text, ids).item() == pytest.approx(by_loop(text, ids, 0.3), rel=1e-5)


def test_it_falls_when_both_come_together():
    torch.manual_seed(0)
    text, ids = torch.randn(6, 4), torch.randn(6, 4, requires_grad=True)
    losses = []
    for _ in range(200):
        loss = Alignment(1.0, 0.1)(text, ids)
        (gradient,) = torch.autograd.grad(loss, ids)
        losses.append(loss.item())
        ids = (ids - gradient).detach().requires_grad_()
    assert losses[-1] < 0.1 * losses[0]
    cosines = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(ids, dim=1).T
    assert torch.equal(cosines.argmax(0), torch.arange(6))
    assert torch.equal(cosines.argmax(1), torch.arange(6))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_items_teach_nothing(n):
    text, ids = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4, requires_grad=True)
    loss = Alignment(1.0)(text, ids)
    loss.backward()
    assert loss.item() == 0
    assert not text.grad.any()


def test_options_out_of_range():
    for options, message in [
        ({"weight": -1.0}, "alignment is -1"),
        ({"weight": 1.0, "temperature": 0.0}, "alignment_temperature is 0"),
        ({"weight": 1.0, "most": 1}, "most is 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Alignment(**options)


def test_a_step_takes_part_with_the_items_that_were_trained_on(tiny_bert):
    made = tower(tiny_bert, alignment=0.5, alignment_temperature=0.2)
    assert made.auxiliary_loss() is None
    made(WHOLE)
    warm = [1, 2, 4, 5, 6]
    text = made._project(made.vectors)[warm].detach()
    wanted = 0.5 * by_loop(text, made.table.weight[warm].detach(), 0.2)
    assert made.auxiliary_loss().item() == pytest.approx(wanted, rel=1e-4)
    assert made.auxiliary_loss() is None, "asked for once"
    made(ItemBatch(torch.tensor([0, 5, 3, 1])))
    wanted = 0.5 * by_loop(made._project(made.vectors)[[5, 1]].detach(), made.table.weight[[5, 1]].detach(), 0.2)
    loss = made.auxiliary_loss()
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    loss.backward()
    assert made.table.weight.grad.abs().sum(1).nonzero()[:, 0].tolist() == [1, 5]
    assert made.projection.weight.grad.any()


def test_evaluation_keeps_nothing_and_a_copy_leaves_the_step_behind(tiny_bert):
    made = tower(tiny_bert, alignment=1.0)
    made.eval()(WHOLE)
    assert made.auxiliary_loss() is None
    made.train()(WHOLE)
    assert copy.deepcopy(made).auxiliary_loss() is None
    assert made.auxiliary_loss() is not None
    plain = tower(tiny_bert)
    plain(WHOLE)
    assert plain.auxiliary_loss() is None
    assert set(plain.state_dict()) == set(made.state_dict())


def test_many_items_are_drawn_from():
    torch.manual_seed(0)
    alignment = Alignment(2.0, 0.5, most=3)
    text, ids = torch.randn(50, 4), torch.randn(50, 4)
    usable = torch.arange(50) % 2 == 1
    seen = set()
    for _ in range(40):
        alignment.keep(text, ids, usable)
        kept = alignment._kept[0]
        assert len(kept) == 3
        rows = [int((text == row).all(1).nonzero()) for row in kept]
        seen |= set(rows)
        assert alignment.take().item() == pytest.approx(2 * by_loop(text[rows], ids[rows], 0.5), rel=1e-4)
    assert seen <= set(range(1, 50, 2))
    assert len(seen) > 20


def batch():
    users = UserBatch(torch.tensor([[1, 2], [4, 0]]), torch.tensor([2, 1]), torch.zeros(2, dtype=torch.int64))
    targets = torch.tensor([[2, 5], [6, 0]])
    return Batch(users, items=WHOLE, targets=targets, n_candidates=6, known=torch.zeros(2, 0, dtype=torch.int64))


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_two_tower_adds_it_to_the_objective(tiny_bert, weight):
    module = TwoTower(tower(tiny_bert, alignment=weight), PooledUserTower())
    module.build(CATALOGUE)
    module.item_tower.prepare(CATALOGUE)
    module.train()
    found = module.loss(batch())
    made = module.item_tower
    plain = TwoTower(tower(tiny_bert), PooledUserTower())
    plain.build(CATALOGUE)
    plain.item_tower.load_state_dict(made.state_dict())
    plain.item_tower.prepare(CATALOGUE)
    objective = plain.train().loss(batch())
    warm = [1, 2, 4, 5, 6]
    aligned = by_loop(made._project(made.vectors)[warm].detach(), made.table.weight[warm].detach(), 0.1)
    assert found.item() == pytest.approx(objective.item() + weight * aligned, rel=1e-4)


class Shrinking(IdItemTower):
    """An item tower of a user's own that asks for small vectors."""

    def forward(self, items):
        vectors = super().forward(items)
        self.size = vectors.square().sum() if self.training else None
        return vectors

    def auxiliary_loss(self):
        return 10 * self.size


def test_a_tower_of_ones_own_may_add_to_the_loss():
    torch.manual_seed(0)
    module = TwoTower(Shrinking(4, init_std=0.5), PooledUserTower())
    module.build(CATALOGUE)
    module.train()
    loss = module.loss(batch())
    size = module.item_tower.table.weight.detach().square().sum()
    assert loss.item() == pytest.approx(10 * size.item() + math.log(6), abs=1.0)
    loss.backward()
    assert module.item_tower.table.weight.grad[3].any(), "an item that is nowhere in the step is pulled too"
