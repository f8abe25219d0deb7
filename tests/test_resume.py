"""A run that stops and goes on is the run that never stopped: the same batches, draws, losses and weights."""

from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.cli import main
from lightning_rec.data.readers import Files
from lightning_rec.towers import IdItemTower, SequenceUserTower

SHOP = Path(__file__).parent / "data" / "files" / "shop"
EPOCHS, STEPS = 3, 7  # 5 users a batch


class Recorder(Callback):
    """Keeps the loss and the users of every batch."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.users: dict[tuple[int, int], list[int]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        self.losses[number] = float(outputs["loss"])
        self.users[trainer.current_epoch, batch_idx] = batch.users.users.tolist()


def run(
    folder,
    ckpt_path=None,
    max_epochs=EPOCHS,
    max_steps=-1,
    workers=0,
    every_n=None,
    accumulate=1,
    validate=True,
    callbacks=(),
    **options,
):
    seed_everything(7, verbose=False)
    data = EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")),
        min_rating=0,
        max_history=4,
        batch_size=5,
        candidates="sampled",
        negatives=5,
        supervision="random",
        num_workers=workers,
    )
    module = TwoTower(
        IdItemTower(8),
        SequenceUserTower(blocks=1, heads=1, dropout=0.3),
        lr=0.01,
        warmup_steps=10,
        schedule="cosine",
    )
    recorder = Recorder()
    saver = ModelCheckpoint(
        folder / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=every_n, save_last=True
    )
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=[recorder, saver, *callbacks],
        max_epochs=max_epochs,
        max_steps=max_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.num_training_batches == STEPS
    return recorder, module, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return *run(folder, every_n=1), folder / "checkpoints"


def same_weights(one, other):
    for (name, left), right in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_an_epoch_has_every_user_once(whole):
    recorder = whole[0]
    everyone = [user for number in range(STEPS) for user in recorder.users[0, number]]
    assert len(everyone) == len(set(everyone)) > 30


@pytest.mark.parametrize("stop", [3, STEPS, STEPS + 1, 2 * STEPS - 1], ids=lambda step: f"step {step}")
def test_resume_goes_on_as_if_nothing_had_been(whole, stop, tmp_path):
    recorder, module, trainer, checkpoints = whole
    resumed, other, resumed_trainer = run(tmp_path, ckpt_path=str(checkpoints / f"step={stop}.ckpt"))
    assert resumed.users == {key: users for key, users in recorder.users.items() if key[0] * STEPS + key[1] >= stop}, (
        "no sample twice, none left out, in the same batches"
    )
    assert resumed.losses == {step: loss for step, loss in recorder.losses.items() if step >= stop}
    same_weights(module, other)
    assert resumed_trainer.global_step == trainer.global_step == EPOCHS * STEPS
    assert resumed_trainer.current_epoch == EPOCHS


def test_resume_with_workers(whole, tmp_path):
    # batches that workers have made in advance count only once they were trained on
    resumed, other, _ = run(tmp_path, ckpt_path=str(whole[3] / f"step={STEPS + 3}.ckpt"), workers=2)
    assert resumed.losses == {step: loss for step, loss in whole[0].losses.items() if step >= STEPS + 3}
    same_weights(whole[1], other)


def test_a_run_with_workers_is_resumed_without(whole, tmp_path):
    run(tmp_path, every_n=3, max_steps=3, workers=2)
    resumed, other, _ = run(tmp_path, ckpt_path=str(tmp_path / "checkpoints" / "step=3.ckpt"))
    assert resumed.losses == {step: loss for step, loss in whole[0].losses.items() if step >= 3}
    same_weights(whole[1], other)


def test_resume_twice(whole, tmp_path):
    first = str(whole[3] / "step=2.ckpt")
    run(tmp_path, ckpt_path=first, max_steps=5, every_n=1)
    resumed, other, _ = run(tmp_path, ckpt_path=str(tmp_path / "checkpoints" / "step=5.ckpt"))
    assert resumed.losses == {step: loss for step, loss in whole[0].losses.items() if step >= 5}
    same_weights(whole[1], other)


def test_resume_from_an_end_of_epoch_checkpoint_made_after_validation(whole, tmp_path):
    run(tmp_path, max_epochs=1)
    resumed, _, _ = run(tmp_path, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    # the stopped run knew of one epoch only, so that its cosine schedule differs in that epoch: look at batches
    assert list(resumed.losses) == list(range(STEPS, EPOCHS * STEPS))
    assert all(resumed.users[key] == whole[0].users[key] for key in resumed.users)


def test_resume_under_accumulation(tmp_path):
    recorder, module, _ = run(tmp_path / "whole", every_n=1, accumulate=3)
    # 7 batches: optimizer steps after 3, 6 and 7 of them
    resumed, other, trainer = run(
        tmp_path / "resumed", ckpt_path=str(tmp_path / "whole" / "checkpoints" / "step=2.ckpt"), accumulate=3
    )
    assert resumed.losses == {step: loss for step, loss in recorder.losses.items() if step >= 6}
    same_weights(module, other)
    assert trainer.global_step == 9


class EveryValidation(Callback):
    """Saves at each validation, wherever the run stands between two steps of the optimizer."""

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"batch={trainer.fit_loop.epoch_loop.total_batch_idx}")


def test_resume_between_two_steps_of_the_optimizer(tmp_path):
    options = {"accumulate": 3, "callbacks": [EveryValidation()], "val_check_interval": 2}
    recorder, module, _ = run(tmp_path, **options)
    pending = 0
    for file in sorted(tmp_path.glob("batch=*")):
        pending += "pending_gradients" in torch.load(file, weights_only=True)
        resumed, other, _ = run(tmp_path / "resumed", ckpt_path=str(file), **options | {"callbacks": []})
        done = int(file.name.split("=")[1]) + 1
        assert resumed.losses == {batch: loss for batch, loss in recorder.losses.items() if batch >= done}
        same_weights(module, other)
    assert pending == 6, "after 2 and 4 batches of each epoch, not after 6"


CONFIG = f"""
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower: {{class_path: lightning_rec.towers.IdItemTower, init_args: {{dim: 8}}}}
    user_tower: {{class_path: lightning_rec.towers.SequenceUserTower, init_args: {{blocks: 1, heads: 1, dropout: 0.3}}}}
data:
  class_path: lightning_rec.EcommerceDataModule
  init_args:
    reader:
      class_path: lightning_rec.data.readers.Files
      init_args: {{interactions: {SHOP}/interactions.csv, items: {SHOP}/items.csv}}
    batch_size: 5
    min_rating: 0
trainer: {{accelerator: cpu, enable_progress_bar: false, max_epochs: 2, enable_model_summary: false}}
"""


def test_command_line_resumes_in_the_middle_of_an_epoch(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    common = ["fit", "--config", str(config), "--checkpoint.every_n_train_steps", "1", "--checkpoint.monitor", "null"]
    whole = main([*common, "--trainer.default_root_dir", str(tmp_path / "whole")])
    place = ["--trainer.default_root_dir", str(tmp_path / "stopped")]
    stopped = main([*common, *place, "--trainer.max_steps", "5"])
    assert stopped.trainer.global_step == 5
    resumed = main([*common, *place, "--ckpt_path", "last"])
    assert resumed.trainer.global_step == whole.trainer.global_step == 14
    same_weights(whole.model, resumed.model)
    assert len(list((tmp_path / "stopped").rglob("last.ckpt"))) == 1, "a resumed run stays in its folder"
