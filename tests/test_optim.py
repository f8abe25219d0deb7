"""Parameter groups and schedules, by hand; any torch optimizer and scheduler by name."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.data.readers import Files
from lightning_rec.optim import parameter_groups, scheduler, warm_up
from lightning_rec.towers import IdItemTower, SequenceUserTower, TextItemTower

SHOP = Path(__file__).parent / "data" / "files" / "shop"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.language = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        self.head = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.temperature = nn.Parameter(torch.tensor(0.1))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_groups_by_language_and_decay():
    model = Small()
    groups = {
        group["name"]: group
        for group in parameter_groups(model, model.language.parameters(), 1e-3, 1e-5, weight_decay=0.1)
    }
    assert set(groups) == {"towers", "towers_no_decay", "language", "language_no_decay"}
    assert {id(p) for p in groups["language"]["params"]} == {id(model.language[0].weight)}
    assert len(groups["language_no_decay"]["params"]) == 3, "a bias, and scale and shift of the norm"
    assert {id(p) for p in groups["towers"]["params"]} == {id(model.head.weight)}
    assert {id(p) for p in groups["towers_no_decay"]["params"]} == {
        id(p) for p in (model.head.bias, model.norm.weight, model.norm.bias, model.temperature)
    }
    assert [groups[name]["lr"] for name in ("towers", "towers_no_decay")] == [1e-3, 1e-3]
    assert [groups[name]["lr"] for name in ("language", "language_no_decay")] == [1e-5, 1e-5]
    assert groups["towers"]["weight_decay"] == groups["language"]["weight_decay"] == 0.1
    assert groups["towers_no_decay"]["weight_decay"] == groups["language_no_decay"]["weight_decay"] == 0.0


def test_a_named_optimizer_keeps_its_own_settings():
    model = Small()
    for group in parameter_groups(model, model.language.parameters(), None, 1e-5, None):
        assert ("lr" in group) == group["name"].startswith("language")
        assert group.get("weight_decay") == (0.0 if "no_decay" in group["name"] else None)


def test_a_shared_parameter_is_in_one_group():
    model = Small()
    model.twin = model.language[0]
    groups = parameter_groups(model, model.language.parameters(), 1e-3, 1e-5, 0.1)
    names = [id(p) for group in groups for p in group["params"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", [1 / 4, 2 / 4, 3 / 4, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1 / 4, 2 / 4, 3 / 4, 1, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2), 0]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    # three steps of warm-up, then four to the end at step 7; beyond it nothing rises again
    factor = warm_up(schedule, 3, 7)
    assert [factor(step) for step in range(8)] == pytest.approx(expected)
    assert factor(20) == pytest.approx(expected[-1])
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    steps = scheduler(optimizer, schedule, 3, 7)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    assert rates == pytest.approx([2 * value for value in expected])


def test_no_warm_up_starts_at_the_full_rate():
    assert warm_up("cosine", 0, 10)(0) == 1.0


def test_a_decaying_schedule_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"schedule: cosine needs an end: set trainer\.max_epochs or"):
        warm_up("cosine", 0, math.inf)
    assert warm_up("constant", 0, math.inf)(5) == 1.0


# ---------------------------------------------------------------------- in a run


def shop(**options):
    return EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")), min_rating=0, batch_size=20, **options
    )


def fit(module, folder, data=None, ckpt_path=None, callbacks=(), **options):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **({"limit_val_batches": 0} | options),
    )
    trainer.fit(module, data or shop(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def towers():
    return IdItemTower(4), SequenceUserTower(blocks=1, heads=1)


def test_adamw_by_default(tmp_path, tiny_bert):
    module = TwoTower(
        TextItemTower(tiny_bert, dim=4, tune="full"), SequenceUserTower(blocks=1, heads=1), lr=0.01, language_lr=1e-4
    )
    trainer = fit(module, tmp_path, shop(candidates="batch"), max_steps=1)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name["language"]["lr"] == 1e-4
    assert by_name["towers"]["lr"] == 0.01
    language = {id(p) for p in module.item_tower.encoder.parameters()}
    assert {id(p) for name in ("language", "language_no_decay") for p in by_name[name]["params"]} == language
    trained = [p for p in module.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


def test_cosine_ends_at_zero_with_the_run(tmp_path):
    module = TwoTower(*towers(), lr=0.5, warmup_steps=1, schedule="cosine")
    rates = []
    module.on_train_batch_end = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    trainer = fit(module, tmp_path, max_epochs=2)
    assert trainer.global_step == 4
    # after each step, the rate of the next; the last one has come down to 0
    assert rates == pytest.approx([0.5, 0.5 * 0.75, 0.5 * 0.25, 0.0], abs=1e-9)


def test_named_optimizer_and_scheduler(tmp_path):
    module = TwoTower(
        *towers(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    )
    trainer = fit(module, tmp_path, max_epochs=2)
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025), "once an epoch"


def test_a_scheduler_that_counts_steps_is_stepped_once_a_step(tmp_path):
    module = TwoTower(
        *towers(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=4),
    )
    trainer = fit(module, tmp_path, max_epochs=2)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


@pytest.mark.parametrize(("mode", "falls"), [("min", True), ("max", False)])
def test_a_scheduler_that_waits_for_a_figure(tmp_path, mode, falls):
    module = TwoTower(
        *towers(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(
            optimizer, monitor="val/mine", mode=mode, factor=0.5, patience=0
        ),
    )
    module.validation_step = lambda *_: module.log("val/mine", 1.0 + module.current_epoch, batch_size=1)
    trainer = fit(module, tmp_path, max_epochs=3, limit_val_batches=1, num_sanity_val_steps=0)
    assert (trainer.optimizers[0].param_groups[0]["lr"] < 0.1) == falls


def test_a_scheduler_that_does_not_say_for_what_it_waits(tmp_path):
    module = TwoTower(*towers(), lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match=r"does not say which figure.*lightning\.pytorch\.cli\.ReduceLROnPlateau"):
        fit(module, tmp_path, max_epochs=1)


def test_adafactor(tmp_path):
    module = TwoTower(*towers(), optimizer=lambda groups: transformers.Adafactor(groups, lr=0.01, relative_step=False))
    before = None
    trainer = fit(module, tmp_path, max_steps=2)
    assert type(trainer.optimizers[0]) is transformers.Adafactor
    assert before is None
    assert torch.isfinite(module.item_tower.table.weight).all()


def test_a_resumed_run_has_the_settings_of_its_own_config(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(TwoTower(*towers(), lr=0.5, weight_decay=0.1, warmup_steps=3), tmp_path, max_epochs=2, callbacks=[saver])
    module = TwoTower(*towers(), lr=0.2, weight_decay=0.3, warmup_steps=3)
    trainer = fit(module, tmp_path, max_epochs=2, ckpt_path=str(tmp_path / "step=2.ckpt"))
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert trainer.global_step == 4
    assert groups["towers"]["lr"] == pytest.approx(0.2)
    assert groups["towers"]["weight_decay"] == 0.3
    assert groups["towers_no_decay"]["weight_decay"] == 0.0
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4, "the place in the schedule is the checkpoint's"
