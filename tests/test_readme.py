"""The README's code blocks are run as they stand, on the invented shop of tests/data."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_rec.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def named(text: str) -> str:
    """The file name in a block's first line."""
    return re.match(r"# (\S+)", text)[1]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ lightning-rec ")]
    return [shlex.split(line)[2:] for line in lines]


def test_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    for name in ("shop", "mind"):
        shutil.copytree(ROOT / "tests/data/files" / name, tmp_path / name)
    for text in (*blocks("yaml"), *blocks("python")):
        (tmp_path / named(text)).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_REC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    fitted = ["fit", "test", "predict"]
    for command in commands():
        main([*command, *(["--trainer.accelerator", "cpu"] if command[0] in (*fitted, "validate") else [])])
    ran = [command[0] for command in commands()]
    assert ran == [*fitted, "export", "recommend", "recommend", "explain", "fit", "validate", "predict", "fit"]
    assert "is recommended because" in capsys.readouterr().out
    predictions = next((tmp_path / "runs/shop").rglob("predictions.jsonl")).read_text().splitlines()
    assert {json.loads(line)["user_id"] for line in predictions} == {f"u{number:03d}" for number in range(1, 41)}
    shown = (tmp_path / "mind/test/behaviors.tsv").read_text(encoding="utf-8").splitlines()
    ranked = next((tmp_path / "runs/news").rglob("prediction.txt")).read_text().splitlines()
    assert [line.split(" ")[0] for line in ranked] == [line.split("\t")[0] for line in shown]


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"`((?:lightning_rec|configs|scripts|tests)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^(scripts/\S+\.sh)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert (ROOT / command).stat().st_mode & 0o100, f"{command} can be run"


@pytest.mark.slow
def test_quickstart():
    command = [ROOT / "scripts/quickstart.sh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ndcg@10" in done.stdout
