"""The last checkpoint is the last state of a run, whatever was best; patience is that of the config."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.callbacks.resumption import PatientStopping, RunCheckpoint
from lightning_rec.data.readers import Files
from lightning_rec.towers import IdItemTower, PooledUserTower

SHOP = Path(__file__).parents[1] / "data" / "files" / "shop"


@pytest.mark.parametrize("validate", [True, False])
def test_last_is_newer_than_best(tmp_path, validate):
    seed_everything(0, verbose=False)
    saver = RunCheckpoint(tmp_path, filename="best", monitor="val/falling", mode="max", save_last=True)
    module = TwoTower(IdItemTower(4), PooledUserTower())
    module.on_validation_epoch_end = lambda: module.log("val/falling", -float(module.current_epoch))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[saver],
        max_epochs=3,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if validate else 0,
    )
    trainer.fit(
        module, EcommerceDataModule(Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")), min_rating=0)
    )
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == trainer.global_step == 3
    assert last["epoch"] == 2
    if validate:
        assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 1
        (state,) = (value for name, value in last["callbacks"].items() if "Checkpoint" in name)
        assert Path(state["best_model_path"]).name == "best.ckpt"


def test_patience_is_that_of_the_config():
    before = PatientStopping("val/ndcg@10", patience=10)
    before.wait_count = 4
    after = PatientStopping("val/ndcg@10", patience=3)
    after.load_state_dict(before.state_dict())
    assert (after.patience, after.wait_count) == (3, 4)


def test_a_run_on_all_events_that_would_validate_now_and_then_is_saved(tmp_path, monkeypatch):
    """Lightning saves at the end of validation when that does not come every epoch; here it never comes."""
    saver = RunCheckpoint(tmp_path, monitor=None, save_last=True)
    saved = []
    monkeypatch.setattr(
        saver, "_save_last_checkpoint", lambda trainer, _: saved.append((trainer.current_epoch, trainer.global_step))
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[saver],
        max_epochs=3,
        check_val_every_n_epoch=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    reader = Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv"))
    module = TwoTower(IdItemTower(4), PooledUserTower())
    trainer.fit(module, EcommerceDataModule(reader, min_rating=0, fit_on="train_validation"))
    assert saved[:3] == [(0, 1), (1, 2), (2, 3)]  # after each epoch, and Lightning once more at the end of the fit
