"""Adapters in a run: AdaLoRA's ranks shrink, and a resumed run is the run that never stopped."""

from pathlib import Path

import peft
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModel

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.data.batch import CatalogueView
from lightning_rec.data.readers import Files
from lightning_rec.towers import AdaLoraConfig, BottleneckConfig, PooledUserTower, TextItemTower
from lightning_rec.towers.adalora import start_schedule

SHOP = Path(__file__).parents[1] / "data" / "files" / "shop"
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2),
    "bottleneck": lambda: BottleneckConfig(placement="houlsby", width=2),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2),
}


class Recorder(Callback):
    """Keeps the loss of every batch, and the ranks after it."""

    def __init__(self):
        self.losses, self.ranks = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.fit_loop.epoch_loop.total_batch_idx] = float(outputs["loss"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ranks[trainer.global_step] = ranks(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.ranks[trainer.global_step] = ranks(pl_module)


def ranks(module):
    return sum(int((p != 0).sum()) for name, p in module.named_parameters() if "lora_E" in name)


def run(folder, model, config, ckpt_path=None, accumulate=1, steps=8):
    seed_everything(7, verbose=False)
    data = EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")), min_rating=0, batch_size=10, candidates="batch"
    )
    module = TwoTower(TextItemTower(model, dim=8, peft=config()), PooledUserTower(), lr=0.01, language_lr=0.02)
    recorder = Recorder()
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=[recorder, saver],
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return recorder, module


@pytest.mark.parametrize(("name", "accumulate"), [("lora", 1), ("bottleneck", 1), ("adalora", 1), ("adalora", 2)])
def test_resume_goes_on_as_if_nothing_had_been(name, accumulate, tiny_bert, tmp_path):
    whole, module = run(tmp_path / "a", tiny_bert, ADAPTERS[name], accumulate=accumulate)
    resumed, other = run(tmp_path / "b", tiny_bert, ADAPTERS[name], str(tmp_path / "a/step=4.ckpt"), accumulate)
    assert resumed.losses
    assert resumed.losses == {number: whole.losses[number] for number in resumed.losses}
    assert list(other.state_dict()) == list(module.state_dict()), "nothing is wrapped twice"
    for key, value in module.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0, msg=key)
    if name == "adalora":
        # 2 layers, query and value: 4 matrices; all of them at 0 before the first step, 4 ranks each after it
        assert whole.ranks[1] == 16
        assert all(whole.ranks[step] >= whole.ranks[step + 1] for step in range(1, 7)), whole.ranks
        assert whole.ranks[6] == whole.ranks[8] == 8, "2 ranks a matrix from the final phase on"
        assert {step: resumed.ranks[step] for step in range(4, 9)} == {step: whole.ranks[step] for step in range(4, 9)}


def test_what_adalora_saves_has_the_ranks_that_are_left(tiny_gpt2, tmp_path):
    _, module = run(tmp_path / "run", tiny_gpt2, ADAPTERS["adalora"])
    encoder = module.item_tower.encoder.eval()
    expected = encoder.encode(["red shoe", "blue dog"])
    encoder.model.save_pretrained(tmp_path / "saved")
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_gpt2), tmp_path / "saved").eval()
    kept = [len(p) for name, p in plain.named_parameters() if "lora_E" in name]
    assert sum(kept) == 4, "2 layers with 2 ranks a matrix"
    encoder.model = plain
    torch.testing.assert_close(encoder.encode(["red shoe", "blue dog"]), expected, atol=1e-5, rtol=0)


def test_a_schedule_that_cannot_be(tiny_bert):
    tower = TextItemTower(tiny_bert, peft=AdaLoraConfig(init_r=4, target_r=2, tinit=5, tfinal=5))
    tower.configure(CatalogueView(n_rows=2, texts=["", "red"]))
    with pytest.raises(ValueError, match=r"the run has 10 steps.*tinit takes the first 5 and tfinal the last 5"):
        start_schedule(tower, 10)
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        start_schedule(tower, float("inf"))
