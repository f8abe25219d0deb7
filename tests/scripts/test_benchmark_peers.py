"""Figures of the peers are those of our own metrics, on the split that our data module makes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_rec.metrics import RankingMetrics, RankingResult

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "tests" / "data" / "files" / "shop"
spec = importlib.util.spec_from_file_location("benchmark_peers", ROOT / "scripts" / "benchmark_peers.py")
assert spec is not None
assert spec.loader is not None
peers = importlib.util.module_from_spec(spec)
sys.modules["benchmark_peers"] = peers
spec.loader.exec_module(peers)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    text = (ROOT / "tests" / "configs" / "id_sequence.yaml").read_text().replace("SHOP", str(SHOP))
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


def test_figures_by_hand() -> None:
    events = [[], [5, 6, 7], [8, 9], [4, 3]]
    ranked = {1: [1, 2, 7], 2: [*range(20, 40), 9]}
    found = peers.figures(ranked, [[1, 2], [2, 1], [3, 1]], events)  # third place, place 21, and no list
    assert found == {"ndcg@10": pytest.approx(1 / math.log2(4) / 3), "recall@10": 1 / 3, "recall@50": 2 / 3}
    assert peers.figures({}, [], events) == dict.fromkeys(peers.METRICS, 0.0)


def test_the_split_is_ours_and_figures_are_those_of_our_metrics(config: Path) -> None:
    split = peers.read_split(config, ["--data.max_history", "7"])
    assert (split["max_history"], split["filter_seen"]) == (7, True)
    assert len(split["test"]) == len(split["validation"]) == 40
    for (user, first), (same, before) in zip(split["test"], split["validation"], strict=True):
        assert (user, first) == (same, before + 1)  # leave-one-out
        assert first == len(split["events"][user]) - 1
        assert split["train"][user] == before
    generator = np.random.default_rng(0)
    ranked = {user: (generator.permutation(30) + 1).tolist() for user, _ in split["test"]}
    places = [ranked[user].index(split["events"][user][first]) + 1 for user, first in split["test"]]
    ours = RankingMetrics(ks=(10,), names=("ndcg", "recall"))
    ours.update(RankingResult(torch.tensor(places)[:, None], torch.ones(40, 1, dtype=torch.long)))
    found = peers.figures(ranked, split["test"], split["events"])
    for name in ("ndcg@10", "recall@10"):
        assert found[name] == pytest.approx(float(ours.compute()[name]), abs=1e-6)


def test_the_best_on_validation_is_tested_and_nothing_else(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn(python: Path, split: Path, setting: dict[str, float]) -> dict[str, object]:
        assert json.loads(split.read_text())["test"]
        value = setting["dropout"] if setting["width"] == 64 else 0.1
        test = dict.fromkeys(peers.METRICS, value / 10 + setting["seed"] / 100)
        return {"validation": {"ndcg@10": value}, "test": test, "epoch": 2}

    monkeypatch.setattr(peers, "turn", turn)
    assert peers.main([str(config), "--rectools-python", sys.executable, "--peers", "SASRec", "--seeds", "0,1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "test (" in line] == [
        "SASRec, test (width 64, dropout 0.4, seeds 0,1): ndcg@10 0.0450 ± 0.0071, recall@10 0.0450 ± 0.0071, "
        "recall@50 0.0450 ± 0.0071"
    ]


def test_refusals(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        (["absent.yaml"], "There is no config absent.yaml"),
        ([str(config)], "--rectools-python is missing"),
        ([str(config), "--rectools-python", "python", "--peers", "GRU"], "There is no peer 'GRU'"),
    ):
        with pytest.raises(SystemExit):
            peers.main(given)
        assert said in capsys.readouterr().err
    text = yaml.safe_load(config.read_text())
    text["data"].setdefault("init_args", {})["split"] = "global_time"
    (tmp_path / "time.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(SystemExit, match="splits by global_time"):
        peers.read_split(tmp_path / "time.yaml", [])
