"""``--bf16 auto``: bfloat16 where the device has it, and a saved config that says what ran."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_rec import training_cli
from lightning_rec.cli import main
from lightning_rec.precision import has_bf16

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("native", "options", "ran"),
    [
        (True, ["--bf16", "auto"], "bf16-mixed"),
        (False, ["--bf16", "auto"], "32-true"),
        (True, ["--bf16", "auto", "--trainer.precision", "64-true"], "64-true"),
        (True, [], "32-true"),
    ],
)
def test_precision_follows_the_device_and_the_saved_config_says_it(native, options, ran, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training_cli, "has_bf16", lambda accelerator: asked.append(accelerator) or native)
    text = (HERE / "configs" / "id_sequence.yaml").read_text().replace("SHOP", str(HERE / "data" / "files" / "shop"))
    config = tmp_path / "config.yaml"
    config.write_text(text)
    fixed = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    cli = main(["fit", "--config", str(config), *fixed, *options])
    assert cli.trainer.precision == ran
    assert asked in ([], ["cpu"])
    (saved,) = tmp_path.rglob("version_*/config.yaml")
    said = yaml.safe_load(saved.read_text())
    assert said["trainer"]["precision"] == (ran if options else None)
    assert said["bf16"] == "none"
    # run again elsewhere, the saved config does the same
    monkeypatch.setattr(training_cli, "has_bf16", lambda accelerator: not native)
    assert main(["validate", "--config", str(saved.parent / "config.yaml")]).trainer.precision == ran


def test_a_device_that_is_not_there_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_bf16("cuda")
    assert not has_bf16("tpu")
    assert has_bf16("cpu") == has_bf16("auto")


def test_the_gpu_decides_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    emulated = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: emulated.append(including_emulation)
    )
    assert not has_bf16("auto")
    assert emulated == [False]
