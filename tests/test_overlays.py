"""Each overlay of configs/overlay stacks on a config with a second --config, and does what it says."""

import io
import json
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer, seed_everything

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.cli import main
from lightning_rec.data.readers import Files
from lightning_rec.towers import IdItemTower, SequenceUserTower

HERE = Path(__file__).parent
SHOP = HERE / "data" / "files" / "shop"
OVERLAYS = HERE.parent / "configs" / "overlay"


@pytest.fixture
def base(tmp_path, tiny_bert, monkeypatch):
    """The options of a config with a frozen text tower, and a working directory of its own."""
    monkeypatch.chdir(tmp_path)

    def fill(name="text_pooled", *overlays):
        text = (
            (HERE / "configs" / f"{name}.yaml").read_text().replace("SHOP", str(SHOP)).replace("TINY_BERT", tiny_bert)
        )
        (tmp_path / f"{name}.yaml").write_text(text)
        options = ["--config", str(tmp_path / f"{name}.yaml")]
        for overlay in overlays:
            options += ["--config", str(OVERLAYS / f"{overlay}.yaml")]
        return options

    return fill


def merged(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *options, "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


def test_all_overlays_are_tested():
    names = {path.stem for path in OVERLAYS.glob("*.yaml")}
    told = {"accumulate", "ddp", "fsdp", "gradient_checkpointing", "lora", "mixed_precision", "tensorboard", "wandb"}
    assert names == told | {"adversarial", "history_augmentation", "weight_averaging"}  # callbacks/test_averaging.py


def test_training_overlays_stack(base, capsys):
    config = merged(
        base("text_pooled", "lora", "gradient_checkpointing", "mixed_precision", "accumulate", "ddp"), capsys
    )
    model, tower = config["model"]["init_args"], config["model"]["init_args"]["item_tower"]["init_args"]
    assert tower["peft"]["class_path"].endswith("LoraConfig")
    assert tower["peft"]["init_args"]["r"] == 8
    assert tower["gradient_checkpointing"] is True
    assert tower["dim"] == 16, "what the overlays do not say stays"
    assert model["user_tower"]["init_args"]["pooling"] == "gru"
    assert model["language_lr"] == 5e-4
    assert config["data"]["init_args"]["candidates"] == "batch"
    trainer = config["trainer"]
    assert (trainer["precision"], trainer["accumulate_grad_batches"], trainer["strategy"]) == ("bf16-mixed", 4, "ddp")
    assert trainer["max_epochs"] == 2


def test_logging_overlays_and_fsdp_stack(base, capsys):
    config = merged(base("id_sequence", "fsdp", "tensorboard", "wandb"), capsys)
    assert config["trainer"]["strategy"]["class_path"].endswith("FSDPStrategy")
    assert config["trainer"]["strategy"]["init_args"]["state_dict_type"] == "full"
    assert config["trainer"]["logger"]["class_path"].endswith("WandbLogger"), "the last one says"
    names = [callback["class_path"].rsplit(".", 1)[1] for callback in config["trainer"]["callbacks"]]
    assert names == ["ExampleTable", "LearningRates"] * 2


def test_lora_with_checkpointing_in_bfloat16(base, tmp_path):
    overlays = ("lora", "gradient_checkpointing", "mixed_precision", "accumulate")
    cli = main(["fit", *base("text_pooled", *overlays), "--trainer.max_epochs", "1", "--data.batch_size", "8"])
    names = [name for name, _ in cli.model.named_parameters() if "lora_" in name]
    assert len(names) == 8
    # B starts at zero and has moved: it, and through it A, had a gradient
    moved = {name for name in names if "lora_B" in name and cli.model.get_parameter(name).abs().sum() > 0}
    assert len(moved) == 4
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert cli.trainer.callback_metrics["train/loss"].dtype == torch.float32
    assert cli.trainer.global_step == 2, "five batches, four a step"


# ---------------------------------------------------------------------- W&B


def written(content):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB whose ends cut records, after 7 bytes."""
    place, parts = 7, []
    while place + 7 <= len(content):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if kind == 0:
            place += left
            continue
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def records(folder):
    """Config, history and run ids of the offline runs below a folder, as they were written.

    A process of W&B writes them, and may be busy with it for a while after a run has ended.
    """
    from wandb.proto import wandb_internal_pb2

    def read(path):
        found = []
        for data in written(path.read_bytes()):
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(data)
        return found

    def whole(path):
        for _ in range(600):
            found = read(path)
            if any(record.WhichOneof("record_type") == "exit" for record in found):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{path} has no end")

    def name(item):
        return item.key or "/".join(item.nested_key)

    config, history, ids = [], [], []
    for path in sorted(Path(folder).rglob("run-*.wandb")):
        for record in whole(path):
            config += [name(item) for item in [*record.config.update, *record.run.config.update]]
            if record.run.run_id:
                ids.append(record.run.run_id)
            if record.history.item:
                history.append({name(item): json.loads(item.value_json) for item in record.history.item})
    return config, history, ids


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """No key, no login, nobody at the keyboard."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdin", closed)


def test_wandb_offline(base, no_account, tmp_path):
    wandb = pytest.importorskip("wandb")
    place = ["--trainer.log_every_n_steps", "1", "--data.batch_size", "8", "--trainer.accumulate_grad_batches", "2"]
    options = [*base("id_sequence", "wandb"), *place]
    first = main(["fit", *options])
    wandb.finish()
    steps = first.trainer.global_step
    assert steps == 6
    (run,) = (tmp_path / "runs" / "lightning_rec").iterdir()
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["batch_size"] == 8
    config, history, ids = records(tmp_path / "runs")
    assert {"model", "data", "trainer"} <= set(config)
    assert config.count("model") == 1, "once"
    figures = [row for row in history if "train/loss" in row]
    assert len(figures) == steps, "the loss of each step once, not of each batch"
    tables = [row["examples/path"] for row in history if "examples/path" in row]
    assert len(tables) == 2, "once a validation"
    table = next(Path(tmp_path, "runs").rglob("examples_*.table.json")).read_text()
    titles = [line.split(",")[1] for line in (SHOP / "items.csv").read_text().splitlines()[1:]]
    assert sum(title in table for title in titles) > 5
    for column in ("user", "history", "recommended", "target"):
        assert f'"{column}"' in table

    main(["fit", *options, "--ckpt_path", "last", "--trainer.default_root_dir", "runs", "--trainer.max_epochs", "3"])
    wandb.finish()
    _, history, ids = records(tmp_path / "runs")
    assert len(set(ids)) == 1, "a resumed run goes on in its own W&B run"
    for name in ("train/loss", "val/ndcg@10", "examples/path", "lr/towers"):
        moments = [row["trainer/global_step"] for row in history if name in row]
        assert moments, name
        assert moments == sorted(set(moments)), f"{name} once at each of its steps, which only rise"
    assert sum("train/loss" in row for row in history) == 9
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"epoch_002-step_9.ckpt", "last.ckpt"}, "a resumed run knows its own checkpoints"


def test_tensorboard(base, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    options = base("id_sequence", "tensorboard")
    main(["fit", *options, "--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "1"])
    run = tmp_path / "runs" / "tensorboard" / "version_0"
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    written = b"".join(path.read_bytes() for path in run.glob("events.out.tfevents*"))
    for name in (b"train/loss", b"val/ndcg@10", b"examples", b"recommended"):
        assert name in written


# ---------------------------------------------------------------------- what accumulation does


def gradient_steps(batch_size, accumulate, folder):
    seed_everything(0, verbose=False)
    data = EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")),
        min_rating=0,
        batch_size=batch_size,
        supervision="last",  # one target a user, so that batches weigh what they hold
    )
    module = TwoTower(
        IdItemTower(4, init_std=1.0),
        SequenceUserTower(blocks=1, heads=1, dropout=0.0),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
    )
    seen = []
    module.on_train_batch_end = lambda outputs, batch, number: seen.append(
        (batch.users.users.tolist(), outputs["loss"])
    )
    found = []
    inner = module.on_before_optimizer_step

    def look(optimizer):
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
        inner(optimizer)

    module.on_before_optimizer_step = look
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        limit_train_batches=4 if accumulate > 1 else 1.0,
    )
    trainer.fit(module, data)
    return trainer, module, data, seen, found


def test_the_gradient_of_accumulated_batches_is_their_mean(tmp_path):
    trainer, module, data, seen, found = gradient_steps(5, 4, tmp_path)
    assert trainer.global_step == 1 == len(found)
    assert len(seen) == 4
    # the learning rate is 0, so that the batches can be asked again
    module.zero_grad()
    module.train()
    module._trainer = None
    losses = []
    data.trainer = None
    for batch, _ in zip(data.train_dataloader(), range(4), strict=False):
        loss = module.loss(batch)
        (loss / 4).backward()
        losses.append(loss.item())
    for name, gradient in found[0].items():
        torch.testing.assert_close(module.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(sum(losses) / 4, rel=1e-5)
