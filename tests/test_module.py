"""The steps of training and evaluation: losses, columns of known items, float32, figures and fallbacks."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from torch import nn

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.data.readers import Files
from lightning_rec.gather import known_columns
from lightning_rec.metrics import RankingMetrics
from lightning_rec.objectives import RatingRegression
from lightning_rec.towers import IdItemTower, IdUserTower, PooledUserTower, SequenceUserTower, TextItemTower
from lightning_rec.towers.score import Cosine

SHOP = Path(__file__).parent / "data" / "files" / "shop"


def shop(**options):
    return EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")),
        **({"min_rating": 0, "batch_size": 10} | options),
    )


def trainer(folder, **options):
    seed_everything(0, verbose=False)
    chosen = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return Trainer(**(chosen | options))


# ---------------------------------------------------------------------- known items


def test_known_columns_by_hand():
    known = torch.tensor([[3, 9, 0], [0, 0, 0], [5, 7, 8]])
    rows = torch.tensor([9, 2, 8, 5])  # the candidates
    columns = known_columns(known, rows, 11, whole=False)
    assert [sorted(row[row >= 0].tolist()) for row in columns] == [[0], [], [2, 3]]
    assert columns.shape[1] == 2, "no wider than needed"


def test_known_columns_of_the_whole_catalogue():
    known = torch.tensor([[3, 1, 0]])
    assert known_columns(known, torch.arange(1, 6), 6, whole=True).tolist() == [[2, 0, -1]]


def test_known_columns_when_nothing_is_known():
    assert known_columns(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([1, 2]), 3, whole=False).shape == (2, 0)


@pytest.mark.parametrize("seed", range(5))
def test_known_columns_against_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(0, 20, (6, 5), generator=generator)
    rows = 1 + torch.randperm(19, generator=generator)[:8]
    columns = known_columns(known, rows, 20, whole=False)
    place = {row: column for column, row in enumerate(rows.tolist())}
    for found, items in zip(columns.tolist(), known.tolist(), strict=True):
        assert sorted(column for column in found if column >= 0) == sorted(place[i] for i in items if i in place)


# ---------------------------------------------------------------------- training


class Exploding(IdItemTower):
    """Gives infinity at the third step."""

    steps = 0

    def forward(self, items):
        vectors = super().forward(items)
        if self.training:
            self.steps += 1
            if self.steps == 3:
                return vectors * float("inf")
        return vectors


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    module = TwoTower(Exploding(4), PooledUserTower())
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 2 \(epoch 0, batch 2\)\. Lower lr"):
        trainer(tmp_path).fit(module, shop())


def test_the_loss_is_float32_under_bfloat16(tmp_path):
    module = TwoTower(IdItemTower(8, init_std=1.0), SequenceUserTower(blocks=1, heads=1, dropout=0.0), score=Cosine())
    kinds = []
    inner = module.objective.forward

    def look(interest, candidates, target, **rest):
        loss = inner(interest, candidates, target, **rest)
        kinds.append((interest.dtype, loss.dtype))
        return loss

    module.objective.forward = look
    data = shop()
    runner = trainer(tmp_path, precision="bf16-mixed", max_steps=2)
    runner.fit(module, data)
    assert {kind[1] for kind in kinds} == {torch.float32}
    assert runner.callback_metrics["train/loss"].dtype == torch.float32
    # against float32 the loss is off by no more than the inputs were rounded
    module._trainer = None
    data.trainer = None
    batch = next(iter(data.train_dataloader()))
    exact = module.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module.loss(batch)
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


def test_one_vector_a_history_is_supervised_by_what_follows_it():
    class Summary(PooledUserTower):
        def forward(self, users, items):
            interest = super().forward(users, items)
            return interest[torch.arange(len(interest)), users.lengths - 1][:, None]

    data = shop(supervision="random")
    data.setup()
    batch = next(iter(data.train_dataloader()))
    whole, summary = (TwoTower(IdItemTower(4, init_std=1.0), tower()) for tower in (PooledUserTower, Summary))
    for module in (whole, summary):
        torch.manual_seed(0)
        module.build(data.view)
    # the only supervised step of a random prefix is its last
    assert summary.loss(batch).item() == pytest.approx(whole.loss(batch).item(), rel=1e-5)


@pytest.mark.parametrize("reentry", [False, True], ids=["plain", "gradient checkpointing"])
def test_every_lora_matrix_receives_a_gradient(tiny_bert, reentry):
    import peft

    tower = TextItemTower(
        tiny_bert,
        dim=8,
        peft=peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False),
        gradient_checkpointing=reentry,
    )
    data = shop(candidates="batch")
    data.setup()
    module = TwoTower(tower, SequenceUserTower(blocks=1, heads=1))
    module.build(data.view)
    module.item_tower.prepare(data.view)
    module.train()
    module.loss(next(iter(data.train_dataloader()))).backward()
    matrices = {name: p for name, p in module.named_parameters() if "lora_" in name}
    assert len(matrices) == 8
    for name, matrix in matrices.items():
        assert matrix.grad is not None, name
        assert matrix.grad.abs().sum() > 0, name
    assert all(p.grad is None for name, p in module.named_parameters() if not p.requires_grad)


# ---------------------------------------------------------------------- evaluation


def test_chunks_change_no_figure(tmp_path):
    figures = []
    for chunk_size in (3, 8192):
        module = TwoTower(IdItemTower(4, init_std=1.0), PooledUserTower(), chunk_size=chunk_size)
        figures.append(trainer(tmp_path).test(module, shop(), verbose=False)[0])
    assert figures[0] == pytest.approx(figures[1], nan_ok=True)
    assert figures[0]["test/users"] == 40


def test_validation_leaves_no_sums_behind(tmp_path):
    module = TwoTower(IdItemTower(4), PooledUserTower(), metrics=[RankingMetrics(ks=[10])])
    runner = trainer(tmp_path, max_epochs=2)
    runner.fit(module, shop())
    assert runner.callback_metrics["val/users"] == 40, "once each, not once an epoch nor in the sanity check"


def test_towers_change_between_validations(tmp_path):
    # the encoded catalogue of one validation must not serve the next
    seen = []
    module = TwoTower(IdItemTower(4, init_std=1.0), PooledUserTower(), lr=0.5)
    inner = module.encode_catalogue
    module.encode_catalogue = lambda: seen.append(inner().clone()) or seen[-1]
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(module, shop(eval_batch_size=7))
    assert len(seen) == 2, "once a validation, however many batches"
    assert not torch.equal(seen[0], seen[1])


def test_rating_metrics_by_hand(tmp_path):
    module = TwoTower(IdItemTower(4, init_std=1.0), IdUserTower(init_std=1.0), RatingRegression())
    data = shop(rating_range=(1.0, 5.0))
    figures = trainer(tmp_path).test(module, data, verbose=False)[0]
    data.trainer = None
    errors = []
    items = module.item_tower.table.weight
    for batch in data.test_dataloader():
        for user, target, rating in zip(batch.users.users, batch.targets[:, 0], batch.ratings[:, 0], strict=True):
            if rating.isnan():
                continue
            dot = module.user_tower.table.weight[user] @ items[target]
            errors.append((1 + 4 * dot.sigmoid() - rating).item())
    errors = torch.tensor(errors, dtype=torch.float64)
    assert figures["test/rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-5)
    assert figures["test/mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-5)


def test_top_k_above_the_catalogue_is_clamped(tmp_path):
    module = TwoTower(IdItemTower(4, init_std=1.0), PooledUserTower(), top_k=1000)
    found = trainer(tmp_path).predict(module, shop(filter_seen=False))
    assert found[0]["rows"].shape[1] == 30
    assert all(sorted(rows) == list(range(1, 31)) for part in found for rows in part["rows"].tolist())


def test_metrics_of_one_s_own_are_named_after_their_class(tmp_path):
    from lightning_rec.metrics import RankingMetric

    class Answered(RankingMetric):
        def __init__(self):
            super().__init__()
            self.add_state("users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

        def update(self, result):
            self.users += len(result.ranks)

        def compute(self):
            return self.users

    module = TwoTower(IdItemTower(4), PooledUserTower(), metrics=[Answered()])
    assert trainer(tmp_path).test(module, shop(), verbose=False)[0] == {"test/answered": 40.0}


def test_no_metrics_at_all(tmp_path):
    module = TwoTower(IdItemTower(4), PooledUserTower(), metrics=[])
    assert trainer(tmp_path).test(module, shop(), verbose=False) == [{}]
    assert isinstance(module.val_metrics, nn.ModuleList)
