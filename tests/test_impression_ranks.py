"""Impressions on two processes over gloo are those of one: steps, figures, calibration and predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_rec.cli import main

MIND = Path(__file__).parent / "data" / "files" / "mind"
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--trainer.num_nodes", "1"]
CONFIG = """
model:
  class_path: lightning_rec.ImpressionTwoTower
  init_args:
    item_tower:
      class_path: lightning_rec.towers.NewsItemTower
      init_args:
        dim: 16
        words: {dim: 8, encoder: mean, dropout: 0.0}
        category_dim: 4
        entity_dim: 4
        dropout: 0.0
    user_tower: {class_path: lightning_rec.towers.NRMSUserTower, init_args: {heads: 2, hidden: 8, dropout: 0.0}}
    objective: OBJECTIVE
    # AdamW would make whole steps of the rounding left where a gradient is nought, as that of a bias of keys
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
    age: lightning_rec.towers.age.AgeBias
data:
  class_path: lightning_rec.NewsImpressionDataModule
  init_args: {path: MIND, candidates: whole, max_history: 8, eval_batch_size: 4}
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


def _last(folder: Path) -> Path:
    return next(folder.rglob("last.ckpt"))


@pytest.mark.parametrize("objective", ["ClickBCE", "ImpressionSoftmax"])
def test_two_ranks_are_one(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_REC_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "config.yaml"
    text = CONFIG.replace("OBJECTIVE", f"lightning_rec.objectives.{objective}").replace("MIND", str(MIND))
    config.write_text(text)
    folders = {}
    for name, devices, size in (("one", [], 1000), ("two", TWO, 500)):
        folders[name] = tmp_path / name
        place = ["--config", str(config), "--trainer.default_root_dir", str(folders[name])]
        main(["fit", *place, "--data.batch_size", str(size), *devices])
    # one step an epoch holds all impressions either way, so that the mean of its units is the same
    one, two = (torch.load(_last(folder), weights_only=True)["state_dict"] for folder in folders.values())
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-4, msg=name)

    found = []
    for number, devices in enumerate(([], TWO)):
        main(["validate", "--ckpt_path", str(_last(folders["one"])), *devices])
        path = next(folders["one"].rglob("validate_metrics.json"))
        out = tmp_path / f"prediction{number}.txt"
        predict = ["predict", "--ckpt_path", str(_last(folders["one"])), "--predictions.path", str(out)]
        main([*predict, "--predictions.format", "mind", *devices])
        found.append((json.loads(path.read_text())["metrics"], out.read_text()))
        path.unlink()
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6, nan_ok=True)
    shown = (MIND / "dev" / "behaviors.tsv").read_text(encoding="utf-8").splitlines()
    assert found[1][0]["val/impressions"] + found[1][0]["val/impressions_skipped"] == len(shown)
