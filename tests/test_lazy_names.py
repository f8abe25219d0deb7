"""Packages import what they name when it is asked for, and commands over an artefact import no more than they need."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_rec
from lightning_rec.cli import main

HERE = Path(__file__).parent
SHOP = HERE / "data" / "files" / "shop"
LAZY = tuple(f"lightning_rec{room}" for room in ("", ".data", ".pretraining", ".recommend", ".towers"))
#: Packages that take seconds to import.
HEAVY = ("lightning", "wandb", "datasets", "transformers", "peft", "torchmetrics")


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_and_python_see_the_same_names(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    named = {
        alias.name: f"{node.module}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(named) == sorted(module.__all__)
    for name, home in named.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
        assert name in dir(module)


def test_modules_and_unknown_names() -> None:
    assert lightning_rec.towers is sys.modules["lightning_rec.towers"]
    with pytest.raises(AttributeError, match="module 'lightning_rec' has no attribute 'TwoTowers'"):
        _ = lightning_rec.TwoTowers
    with pytest.raises(ImportError, match="cannot import name 'Towers'"):
        exec("from lightning_rec.towers import Towers")


def _loaded(code: str, *args: str) -> list[str]:
    """Which of the heavy packages a new process has imported after some code."""
    told = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{told}", *args], capture_output=True, text=True, check=False, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    text = (HERE / "configs" / "id_sequence.yaml").read_text().replace("SHOP", str(SHOP))
    (folder / "given.yaml").write_text(text)
    options = ["--trainer.default_root_dir", str(folder), "--trainer.max_epochs", "1"]
    main(["fit", "--config", str(folder / "given.yaml"), *options])
    main(["export", "--ckpt_path", str(next(folder.rglob("last.ckpt"))), "--output", str(folder / "artefact")])
    return str(folder / "artefact")


def test_answers_of_id_towers_need_no_training_library(artefact: str) -> None:
    code = """
import sys
from lightning_rec.recommend import Recommender, Request
answer = Recommender.load(sys.argv[1]).recommend(Request(user="u001", k=3))
assert answer.path == "towers" and len(answer.items) == 3
from lightning_rec.cli import main
main(["explain", sys.argv[1], answer.items[0].id, "--user", "u001"])
"""
    assert _loaded(code, artefact) == []


def test_help_needs_not_even_torch() -> None:
    code = """
import sys
from lightning_rec.cli import main
for command in ("export", "recommend", "explain", "serve"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
assert "torch" not in sys.modules
"""
    assert _loaded(code) == []


def test_the_service_needs_no_training_library(artefact: str) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    code = """
import sys
from lightning_rec.serve.app import create_app
from lightning_rec.serve.settings import Settings
create_app(sys.argv[1], Settings(store="memory:"))
"""
    assert _loaded(code, artefact) == []
