"""Rows of the table: options are chosen on validation before anything is tested; figures are means of seeds."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
assert spec is not None
assert spec.loader is not None
reproduce = importlib.util.module_from_spec(spec)
sys.modules["reproduce"] = reproduce
spec.loader.exec_module(reproduce)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Rows of one invented config, and the commands that are run: each leaves figures made of its options."""
    rows = {"shop": {"about": "A shop", "config": "shop.yaml", "seeds": 2, "grid": {"model.lr": [1, 3, 2]}}}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(rows))
    monkeypatch.setattr(reproduce, "ROWS", tmp_path / "rows.yaml")
    ran: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], **_: object) -> Done:
        ran.append(command[3:])
        value = dict(itertools.pairwise(command))
        place = Path(value["--trainer.default_root_dir"]) / "lightning_logs" / "version_0"
        place.mkdir(parents=True, exist_ok=True)
        lr, seed = float(value.get("--model.lr", 0)), int(value["--seed_everything"])
        figures = {"val/ndcg@10": lr, **dict.fromkeys(reproduce.METRICS, lr / 10 + seed / 100)}
        if command[3] != "fit":
            (place / f"{command[3]}_metrics.json").write_text(json.dumps({"metrics": figures}))
        return Done()

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    return ran


def test_the_grid_is_chosen_on_validation_alone(
    commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "shop",
        "--grid",
        "--folder",
        str(tmp_path / "runs"),
        "--data",
        "here",
        "--",
        "--trainer.max_epochs",
        "1",
    ]
    assert reproduce.main(arguments) == 0
    assert [command[0] for command in commands] == ["fit", "validate"] * 3 + ["test", "fit", "test"]
    tested = [command for command in commands if command[0] == "test"]
    assert all(command[command.index("--model.lr") + 1] == "3" for command in tested)
    assert all(command[-2:] == ["--ckpt_path", "best"] for command in commands if command[0] != "fit")
    assert all("--trainer.max_epochs" in command and "here" in command for command in commands)
    out = capsys.readouterr().out
    assert "| A shop (2 seeds) | `shop.yaml` | 0.3050 ± 0.0071 | 0.3050 ± 0.0071 | 0.3050 ± 0.0071 |" in out
    assert "Chosen: --model.lr 3" in out
    commands.clear()
    assert reproduce.main(arguments) == 0
    assert commands == []  # everything lies there already


def test_a_row_as_it_is_and_one_seed(
    commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main(["shop", "--seeds", "5", "--folder", str(tmp_path / "runs")]) == 0
    assert [command[0] for command in commands] == ["fit", "test"]
    assert "(1 seed) | `shop.yaml` | 0.0500 |" in capsys.readouterr().out


def test_a_row_with_options_and_an_ensemble_of_its_seeds(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "about": "All",
        "config": "shop.yaml",
        "options": {"data.fit_on": "train_validation", "checkpoint.monitor": None},
    }
    rows = {
        "shop": {**row, "checkpoint": "last", "ensemble": True, "seeds": 2, "beside": {"row": "text", "weight": 0.5}},
        "text": {"about": "Text", "config": "text.yaml"},
    }
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(rows, sort_keys=False))
    monkeypatch.setattr("lightning_rec.run_files.resolve_checkpoint", lambda name, root: f"{Path(root).name}/{name}")
    assert reproduce.main(["shop", "--folder", str(tmp_path / "runs")]) == 0
    assert [command[0] for command in commands] == ["fit", "test", "fit", "test", "test", "fit", "test", "test"]
    assert all(
        "--data.fit_on train_validation --checkpoint.monitor null" in " ".join(command) for command in commands[:5]
    )
    assert [command[-2:] for command in commands if command[0] == "test"] == [
        ["--ckpt_path", "last"],
        ["--ckpt_path", "last"],
        ["--model.checkpoints", '["seed=0/last", "seed=1/last"]'],
        ["--ckpt_path", "best"],
        ["--model.weights", "[1.0, 1.0, 1.0]"],  # the weight of 0.5 against the mean of two
    ]
    assert '["seed=0/last", "seed=1/last", "seed=0/best"]' in commands[-1]
    assert "| All (ensemble of 2 seeds) | `shop.yaml` | 0.0000 | 0.0000 | 0.0000 |" in capsys.readouterr().out


def test_a_failed_command_ends_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = reproduce.Runner("shop.yaml", tmp_path, [])

    class Failed:
        returncode = 1

    def fail(command: list[str], stdout: object, **_: object) -> Failed:
        stdout.write("no such data")  # type: ignore[attr-defined]
        return Failed()

    monkeypatch.setattr(reproduce.subprocess, "run", fail)
    with pytest.raises(SystemExit, match=r"no such data"):
        runner.figures({}, 0, "test")


def test_every_row_names_a_config_that_is_there() -> None:
    rows = reproduce.read_rows()
    assert all((ROOT / row["config"]).is_file() for row in rows.values())
    with pytest.raises(SystemExit):
        reproduce.main(["nothing"])
    assert reproduce.options_of({"a": True, "b": None, "c": "x"}) == ["--a", "true", "--b", "null", "--c", "x"]
