"""The configs of MIND run on an invented log in its format, with a tiny language model in the place of MiniLM."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lightning_rec.cli import main

ROOT = Path(__file__).parent.parent
MIND = ROOT / "tests" / "data" / "files" / "mind"


@pytest.fixture
def mind_small(tmp_path):
    """A folder as MINDsmall unpacks, whose ids of items are those of the real one's format."""
    for part in ("train", "dev"):
        shutil.copytree(MIND / part, tmp_path / "mind" / f"MINDsmall_{part}")
    return tmp_path / "mind"


def options(folder, place, model=None):
    words = ["--data.path", str(folder), "--trainer.default_root_dir", str(place), "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false"]
    return words + ([] if model is None else ["--model.item_tower.language_model", model, "--trainer.max_epochs", "1"])


def test_lora_in_bfloat16_with_clipped_gradients(mind_small, tiny_bert, tmp_path, capsys):
    config = ["--config", str(ROOT / "configs/news/mind_small_lora.yaml")]
    precision = ["--trainer.precision", "bf16-mixed"]  # as on a device that has it
    main(["fit", *config, *options(mind_small, tmp_path / "run", tiny_bert), "--data.num_workers", "0", *precision])
    state = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["fused"] is False
    run = ["--ckpt_path", "best", "--trainer.default_root_dir", str(tmp_path / "run"), "--data.num_workers", "0"]
    main(["validate", *run])
    figures = json.loads(next(tmp_path.rglob("validate_metrics.json")).read_text())
    assert 0 <= figures["metrics"]["val/auc"] <= 1
    with pytest.raises(SystemExit):
        main(["predict", *run, "--predictions.format", "mind"])
    assert "There are no impressions to predict: the log has" in capsys.readouterr().err
    given = [
        "--data.reader",
        "lightning_rec.data.readers.Mind",
        "--data.reader.train",
        str(mind_small / "MINDsmall_train"),
    ]
    main(
        [
            "predict",
            *run,
            *given,
            "--data.reader.test",
            str(mind_small / "MINDsmall_dev"),
            "--predictions.format",
            "mind",
        ]
    )
    lines = next((tmp_path / "run").rglob("prediction*.txt")).read_text().splitlines()
    assert len(lines) == len((MIND / "dev" / "behaviors.tsv").read_text().splitlines())
    for line in lines:
        ranks = json.loads(line.split(" ", 1)[1])
        assert sorted(ranks) == list(range(1, len(ranks) + 1))


def test_a_sample_and_its_baselines(tiny_bert, tmp_path):
    config = ["--config", str(ROOT / "configs/news/mind_sample.yaml")]
    main(["fit", *config, *options(MIND / "train", tmp_path / "run", tiny_bert)])
    main(["test", "--ckpt_path", "best", "--trainer.default_root_dir", str(tmp_path / "run")])
    protocol = json.loads(next((tmp_path / "run").rglob("test_metrics.json")).read_text())["protocol"]
    assert "counts the clicks before its request, those of the measured part among them" in protocol
    config = ["--config", str(ROOT / "configs/news/mind_popularity.yaml"), "--data.split", "time"]
    for kind, known in (("recent", "past"), ("recent", "train"), ("total", "past"), ("random", "past")):
        place = tmp_path / f"{kind}-{known}"
        main(["test", *config, *options(MIND / "train", place), "--model.kind", kind, "--data.popularity_from", known])
        found = json.loads(next(place.rglob("test_metrics.json")).read_text())
        assert 0 <= found["metrics"]["test/auc"] <= 1
        assert ("clicks of the training part only" in found["protocol"]) == (known == "train")
