"""Towers, an objective, a metric and a data module of a user's own file, from a folder outside the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lightning_rec.cli import main

SHOP = Path(__file__).parent / "data" / "files" / "shop"

CODE = '''
"""What a user wrote."""

import numpy as np
import torch
from torch import nn

from lightning_rec import EcommerceDataModule, ItemTower, UserTower
from lightning_rec.metrics import RankingMetric
from lightning_rec.objectives import Objective


class HashedItemTower(ItemTower):
    """Items share a small table of vectors.

    Args:
        dim: width.
        buckets: number of vectors.
    """

    def __init__(self, dim: int = 8, buckets: int = 7) -> None:
        super().__init__()
        self.dim = dim
        self.buckets = buckets

    def configure(self, catalogue):
        self.table = nn.Embedding(self.buckets, self.dim)

    def forward(self, items):
        return self.table(items.rows % self.buckets)


class NewestUserTower(UserTower):
    """The interest is the newest item."""

    def forward(self, users, items):
        return items[users.history]


class Hinge(Objective):
    """Every candidate a margin below the target.

    Args:
        margin: the margin.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, interest, candidates, target, *, owner=None, known=None, log_q=None, rating=None):
        scores = interest @ candidates.T
        gap = self.margin - scores.gather(1, target[:, None]) + scores
        return gap.clamp(min=0).mean()


class WorstRank(RankingMetric):
    """The largest rank of any target."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("worst", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, result):
        self.worst = torch.maximum(self.worst, result.ranks.max())

    def compute(self):
        return {"worst_rank": self.worst.float()}


class OddShop(EcommerceDataModule):
    """Only interactions of items whose id ends in an odd digit are positive."""

    def positive(self, interactions):
        return np.array([item[-1] in "13579" for item in interactions["item_id"]])
'''

CONFIG = f"""
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower: {{class_path: mine.parts.HashedItemTower, init_args: {{buckets: 5}}}}
    user_tower: {{class_path: mine.parts.NewestUserTower}}
    objective: {{class_path: mine.parts.Hinge, init_args: {{margin: 0.5}}}}
    metrics:
      - class_path: mine.parts.WorstRank
      - class_path: lightning_rec.metrics.RankingMetrics
        init_args: {{ks: [10]}}
data:
  class_path: mine.parts.OddShop
  init_args:
    reader:
      class_path: lightning_rec.data.readers.Files
      init_args: {{interactions: {SHOP}/interactions.csv, items: {SHOP}/items.csv}}
trainer: {{accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, max_epochs: 1}}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder, with a package of two files."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "parts.py").write_text(CODE)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name == "mine" or name.startswith("mine.")]:
        del sys.modules[name]


def test_parts_of_ones_own_go_through_every_command(project):
    cli = main(["fit", "--config", "mine.yaml"])
    assert type(cli.model.item_tower).__name__ == "HashedItemTower"
    assert cli.model.item_tower.table.num_embeddings == 5
    assert cli.model.objective.margin == 0.5
    positive = {cli.datamodule.catalogue.ids[row] for row in cli.datamodule.histories.items.tolist()}
    assert positive
    assert all(item[-1] in "13579" for item in positive)
    last = next(project.rglob("last.ckpt"))
    main(["test", "--ckpt_path", str(last)])
    figures = json.loads((last.parent.parent / "test_metrics.json").read_text())["metrics"]
    assert 1 <= figures["test/worst_rank"] <= 30
    assert "test/ndcg@10" in figures
    main(["predict", "--ckpt_path", str(last), "--predictions.path", "out.parquet"])
    table = pq.read_table("out.parquet")
    assert set(table["rank"].to_pylist()) == set(range(1, 11))


def test_a_misspelt_option_of_ones_own_class(project, capsys):
    (project / "mine.yaml").write_text(CONFIG.replace("buckets: 5", "bucket: 5"))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "mine.yaml"])
    assert stopped.value.code == 2
    assert "Did you mean buckets? mine.parts.HashedItemTower takes: dim, buckets." in capsys.readouterr().err


def test_the_console_script_finds_the_working_directory(project):
    script = Path(sys.executable).with_name("lightning-rec")
    if not script.is_file():
        pytest.skip("the package is not installed with its console script")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [script, "test", "--config", "mine.yaml"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "test/worst_rank" in done.stdout
    assert (project / "test_metrics.json").is_file()
