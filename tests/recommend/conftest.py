"""Fitted runs and artefacts of the configs in tests/configs, each made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_rec.cli import main
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export

TESTS = Path(__file__).parent.parent
SHOP = TESTS / "data" / "files" / "shop"


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_gpt2: str) -> Callable[..., Path]:
    """Fits a config of tests/configs for one epoch, and returns its ``last.ckpt``: ``run_of("id_sequence")``.

    Other text in the config is replaced by the keyword ``changes``.
    """
    done: dict[str, Path] = {}

    def fit(name: str, changes: dict[str, str] | None = None) -> Path:
        key = f"{name} {changes}"
        if key not in done:
            folder = tmp_path_factory.mktemp(name)
            text = (TESTS / "configs" / f"{name}.yaml").read_text()
            for old, new in (changes or {}).items():
                assert old in text, old
                text = text.replace(old, new)
            for word, value in (("SHOP", str(SHOP)), ("TINY_BERT", tiny_bert), ("TINY_GPT2", tiny_gpt2)):
                text = text.replace(word, value)
            (folder / "given.yaml").write_text(text)
            options = ["--trainer.default_root_dir", str(folder), "--trainer.max_epochs", "1"]
            main(["fit", "--config", str(folder / "given.yaml"), *options])
            done[key] = next(folder.rglob("last.ckpt"))
        return done[key]

    return fit


@pytest.fixture(scope="session")
def _exported(tmp_path_factory: pytest.TempPathFactory, run_of: Callable[..., Path]) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("artefacts") / name
            export(run_of(name), done[name], progress=False)
        return done[name]

    return get


@pytest.fixture
def artefact_of(_exported: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder with a copy of the artefact of a config, which the test may damage: ``artefact_of("text_pooled")``."""

    def copy(name: str) -> Path:
        folder = tmp_path / f"artefact_{name}"
        return folder if folder.exists() else Path(shutil.copytree(_exported(name), folder))

    return copy


@pytest.fixture
def artefact(artefact_of: Callable[[str], Path]) -> Artefact:
    """An opened artefact with a text tower, a recurrent user tower and a cosine score."""
    return Artefact.read(artefact_of("text_pooled"))
