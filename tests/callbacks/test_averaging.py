"""Averages of weights, by hand; what is validated, kept, resumed and tested with them."""

from pathlib import Path

import peft
import pytest
import torch
import yaml
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.callbacks import WeightAveraging
from lightning_rec.cli import main
from lightning_rec.data.readers import Files
from lightning_rec.towers import IdItemTower, PooledUserTower, SequenceUserTower, TextItemTower

HERE = Path(__file__).parent.parent
SHOP = HERE / "data" / "files" / "shop"
OVERLAYS = HERE.parent / "configs" / "overlay"
FEW = ["--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0"]


class Recorder(Callback):
    """The weights after every step, and those that validation sees."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.steps):
            self.steps.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking and batch_idx == 0:
            self.validated.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})


def fit(folder, averaging, item_tower=None, ckpt_path=None, epochs=2, **options):
    seed_everything(1, verbose=False)
    files = Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv"))
    data = EcommerceDataModule(files, min_rating=0, batch_size=8, candidates="batch")
    module = TwoTower(item_tower or IdItemTower(4), SequenceUserTower(blocks=1, heads=1), lr=0.05, language_lr=0.05)
    recorder = Recorder()
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=True)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        max_epochs=epochs,
        callbacks=[*([averaging] if averaging else []), recorder, saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, recorder, trainer


def averages(steps, decay, start=0, every=1):
    """The average after each step, by the definition."""
    found, mean, number = [], None, 0
    for step, weights in enumerate(steps):
        if step >= start and (step - start) % every == 0:
            if mean is None:
                mean = {name: value.double() for name, value in weights.items()}
            else:
                keep = number / (number + 1) if decay is None else min(decay, (1 + number) / (10 + number))
                mean = {name: keep * mean[name] + (1 - keep) * value.double() for name, value in weights.items()}
            number += 1
        found.append(mean or weights)
    return found


def close(one, other):
    for name, value in one.items():
        torch.testing.assert_close(value.double(), other[name].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("decay", "every", "start"), [(0.9, 1, 0), (None, 2, 3), (0.3, 3, 7)])
def test_averages_by_hand(tmp_path, decay, every, start):
    module, recorder, _ = fit(tmp_path, WeightAveraging(decay, every, start))
    assert len(recorder.steps) == 10
    wanted = averages(recorder.steps, decay, start, every)
    close(dict(module.named_parameters()), wanted[-1])
    for seen, step in zip(recorder.validated, (4, 9), strict=True):
        close(seen, wanted[step])
    for step in (5, 8, 10):
        kept = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        close({name: kept["state_dict"][name] for name in wanted[0]}, wanted[step - 1])
        current = kept.get("current_model_state")
        assert (current is None) == (step <= start), "nothing is kept twice before the average begins"
        if current is not None:
            close(current, recorder.steps[step - 1])


def test_training_is_the_same_as_without(tmp_path):
    steps = [fit(tmp_path, averaging, epochs=1)[1].steps for averaging in (None, WeightAveraging(0.9))]
    for one, other in zip(*steps, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_resumed_run_goes_on_with_both(tmp_path):
    options = {"accumulate_grad_batches": 2}
    whole, recorder, trainer = fit(tmp_path / "whole", WeightAveraging(0.8, 2), **options)
    stop = 3
    resumed, other, _ = fit(
        tmp_path / "resumed", WeightAveraging(0.8, 2), ckpt_path=tmp_path / "whole" / f"step={stop}.ckpt", **options
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for one, again in zip(recorder.steps[stop:], other.steps[-(trainer.global_step - stop) :], strict=True):
        assert all(torch.equal(value, again[name]) for name, value in one.items())


def test_a_run_without_averages_begins_one(tmp_path):
    fit(tmp_path, None, epochs=1)
    module, recorder, _ = fit(tmp_path, WeightAveraging(None), ckpt_path=tmp_path / "step=5.ckpt")
    close(dict(module.named_parameters()), averages(recorder.steps[-5:], None)[-1])


def towers(bert):
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"])
    return {"frozen": TextItemTower(bert, dim=8), "lora": TextItemTower(bert, dim=8, peft=lora)}


@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_text_towers_keep_only_what_was_trained(tmp_path, tiny_bert, kind):
    module, recorder, _ = fit(tmp_path, WeightAveraging(0.7), towers(tiny_bert)[kind], epochs=1)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(kept["current_model_state"]) == trained
    assert trained <= set(kept["state_dict"])
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert not frozen & set(kept["state_dict"])
    wanted = averages([{name: step[name] for name in trained} for step in recorder.steps], 0.7)
    close({name: kept["state_dict"][name] for name in trained}, wanted[-1])
    if kind == "frozen":
        assert kept["state_dict"]["item_tower.measured"], "buffers are those of the run"
    resumed, _, _ = fit(tmp_path, WeightAveraging(0.7), towers(tiny_bert)[kind], tmp_path / "step=2.ckpt", epochs=1)
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_shared_parameters_are_averaged_once(tmp_path):
    class Both(PooledUserTower):
        """Keeps the item tower's table under a second name."""

        def configure(self, catalogue, item_tower):
            super().configure(catalogue, item_tower)
            self.again = item_tower.table

    seed_everything(0, verbose=False)
    files = Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv"))
    module = TwoTower(IdItemTower(4), Both(), lr=0.1)
    averaging, recorder = WeightAveraging(0.5), Recorder()
    saver = ModelCheckpoint(tmp_path, filename="last", save_top_k=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, callbacks=[averaging, recorder, saver], **quiet)
    trainer.fit(module, EcommerceDataModule(files, min_rating=0, batch_size=8))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    wanted = averages(recorder.steps, 0.5)[-1]["item_tower.table.weight"]
    for name in ("item_tower.table.weight", "user_tower.again.weight"):
        close({name: state[name]}, {name: wanted})


def test_everything_against_overfitting_by_the_command_line(tmp_path, tiny_bert):
    text = (HERE / "configs" / "lora_batch.yaml").read_text().replace("SHOP", str(SHOP))
    text = text.replace("TINY_BERT", tiny_bert).replace("gradient_checkpointing: true", "max_tokens: 16")
    (tmp_path / "table.tsv").write_text("tea\tbrew\ngreen\tleafy\n")
    words = {"probability": 1.0, "delete": 0.3, "replace": 0.5, "table": str(tmp_path / "table.tsv")}
    config = yaml.safe_load(text)
    config["data"]["init_args"]["text_augmentation"] = words
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    overlays = [OVERLAYS / f"{name}.yaml" for name in ("weight_averaging", "adversarial", "history_augmentation")]
    options = [f"--config={path}" for path in (tmp_path / "c.yaml", *overlays)]
    fitted = main(["fit", *options, "--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "1", *FEW])
    assert fitted.trainer.callback_metrics["train/adversarial_loss"] > 0
    assert fitted.datamodule.history_augmentation.reorder == 0.2
    batch = next(iter(fitted.trainer.train_dataloader))
    assert any(word in text for text in batch.items.texts for word in ("brew", "leafy"))

    path = next(tmp_path.rglob("last.ckpt"))
    kept = torch.load(path, weights_only=True)
    assert kept["datamodule_hyper_parameters"]["text_augmentation"]["delete"] == 0.3
    averages, current = kept["state_dict"], kept["current_model_state"]
    assert all("lora_" in name for name in current if ".encoder." in name)
    assert any(not torch.equal(value, averages[name]) for name, value in current.items())
    # the checkpoint alone says all of it, and holds the average for whoever reads it
    tested = main(["test", "--ckpt_path", str(path), "--trainer.limit_test_batches", "1"])
    state = tested.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in averages.items())


def test_checkpoints_that_no_average_reaches_are_refused(tmp_path):
    averaging, saver = WeightAveraging(), ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[averaging, saver])
    with pytest.raises(ValueError, match=r"set checkpoint\.save_weights_only to false"):
        averaging.setup(trainer, TwoTower(IdItemTower(4), PooledUserTower()), "fit")


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"decay lies between 0 and 1, or is null for a plain mean; it is 1\.5"):
        WeightAveraging(1.5)
    with pytest.raises(ValueError, match=r"every_n_steps of at least 1"):
        WeightAveraging(every_n_steps=0)
