"""On a log with planted interests a fitted model comes close to the generating one, and never past it by a leak."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_rec.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from simulate_impressions import write
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("simulated")
    write(folder)
    return folder


def test_the_generating_auc_is_that_of_its_clicks(log: Path) -> None:
    """Drawn again, the clicks of an impression agree with the chances as often as the file says."""
    from simulate_impressions import World, auc

    world = World(users=300, articles=400)
    rows = list(world.impressions(4000, 12, 40))[3400:]
    redrawn = np.random.default_rng(7)
    found = [auc(row["chances"], redrawn.random(12) < row["chances"]) for row in rows for _ in range(5)]
    truth = json.loads((log / "truth.json").read_text())["auc"]["test"]
    assert np.mean([value for value in found if value is not None]) == pytest.approx(truth, abs=0.01)


def test_words_and_clicks_find_the_planted_interests(log: Path, tmp_path: Path) -> None:
    options = ["--data.path", str(log), "--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    quiet = ["--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", str(ROOT / "configs/news/simulated.yaml"), *options, *quiet])
    main(["test", "--ckpt_path", "best", "--trainer.default_root_dir", str(tmp_path), *quiet])
    metrics = json.loads(next(tmp_path.rglob("test_metrics.json")).read_text())["metrics"]
    truth = json.loads((log / "truth.json").read_text())["auc"]["test"]
    assert truth - 0.02 < metrics["test/auc"] < truth + 0.005
