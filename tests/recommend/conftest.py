"""Fitted runs and artefacts of the configs in tests/configs, each made once a session."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml

from lightning_rec.cli import main
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.types import Answer

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


# ---------------------------------------------------------------------------------------------- impressions


def _part(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_rec.towers.{name}", "init_args": options}


def _news(**options: Any) -> dict[str, Any]:
    return _part("NewsItemTower", dim=16, category_dim=4, entity_dim=4, hidden=8, **options)


_MIND = TESTS / "data" / "files" / "mind"
_WORDS = {"dim": 8, "heads": 2, "head_dim": 4, "hidden": 8}
_LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["query", "value"]}}
_CONTEXT = {
    "age": _part("age.AgeBias", buckets=6, max_hours=48.0),
    "popularity": _part("age.PopularityBias", buckets=9, max_clicks=8.0),
}
_SEQUENCE = _part("SequenceUserTower", blocks=1, heads=2, max_length=8)
_TEXT = _part("TextItemTower", language_model="BERT", dim=16)
#: name -> item tower, user tower, further options of the model and of the data. BERT is the tiny language model.
_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "words_nrms": (_news(words=_WORDS), _part("NRMSUserTower", heads=2, hidden=8), _CONTEXT, {}),
    "frozen_sequence": (
        _news(language_model="BERT"),
        _SEQUENCE,
        {"popularity": _CONTEXT["popularity"]},
        {"popularity_from": "train"},
    ),
    "lora_lstur": (
        _news(language_model="BERT", peft=_LORA, entities=None),
        _part("LSTURUserTower"),
        {"age": _CONTEXT["age"], "language_lr": 0.01},
        {},
    ),
    "full_pooled": (
        _news(language_model="BERT", tune="full", categories=None),
        _part("PooledUserTower", pooling="mean"),
        {},
        {"unknown_items": "drop"},
    ),
    "text_cosine": (
        _TEXT,
        _part("PooledUserTower", pooling="gru"),
        _CONTEXT | {"score": _part("score.Cosine", temperature=0.1)},
        {},
    ),
    "ids_sequence": (_part("IdItemTower", dim=16), _SEQUENCE, {}, {}),
    "ids_ids": (_part("IdItemTower", dim=16, init_std=1.0), _part("IdUserTower", init_std=1.0), _CONTEXT, {}),
    "text_language": (
        _TEXT,
        _part("LanguageUserTower", language_model="BERT"),
        _CONTEXT,
        {"user_template": "Read {titles}", "user_titles": 4},
    ),
}


class Run(NamedTuple):
    """A fitted run and its artefact."""

    checkpoint: Path
    artefact: Path


class Line(NamedTuple):
    """A line of behaviors.tsv, read by hand."""

    id: str
    user: str
    time: int
    history: list[str]
    candidates: list[str]
    clicked: list[str]


class Newsroom:
    """Runs over the invented log of MIND's format, what they predict of its dev part, and their artefacts."""

    mind = _MIND
    words = _WORDS
    context = _CONTEXT
    part = staticmethod(_part)
    news = staticmethod(_news)

    def __init__(self, make_folder: Callable[[str], Path], bert: str) -> None:
        self._make_folder = make_folder
        self._bert = bert
        self._done: dict[str, Run] = {}

    def config(self, name: str, mind: Path = _MIND) -> dict[str, Any]:
        """The config of a run: parts train and dev, of which the newest training is the validation."""
        item, user, model, data = copy.deepcopy(_RUNS[name])
        reader = {"train": str(mind / "train"), "test": str(mind / "dev")}
        return {
            "model": {
                "class_path": "lightning_rec.ImpressionTwoTower",
                "init_args": {"item_tower": item, "user_tower": user, "lr": 0.05, **model},
            },
            "data": {
                "class_path": "lightning_rec.NewsImpressionDataModule",
                "init_args": {
                    "reader": {"class_path": "lightning_rec.data.readers.Mind", "init_args": reader},
                    "max_history": 8,
                    "negatives": 2,
                    "batch_size": 8,
                    **data,
                },
            },
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
        }

    def fit(self, folder: Path, config: dict[str, Any]) -> Path:
        """Fits a config; returns its ``last.ckpt``."""
        folder.mkdir(exist_ok=True)
        (folder / "given.yaml").write_text(yaml.safe_dump(config).replace("BERT", self._bert))
        main(["fit", "--config", str(folder / "given.yaml"), "--trainer.default_root_dir", str(folder)])
        return next(folder.rglob("last.ckpt"))

    def run(self, name: str) -> Run:
        """A run and its artefact, each made once."""
        if name not in self._done:
            folder = self._make_folder(name)
            checkpoint = self.fit(folder, self.config(name))
            export(checkpoint, folder / "artefact", progress=False)
            self._done[name] = Run(checkpoint, folder / "artefact")
        return self._done[name]

    @staticmethod
    def predicted(checkpoint: Path, path: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
        """By ``lightning-rec predict``: the rows of each impression, the best first."""
        main(["predict", "--ckpt_path", str(checkpoint), "--predictions.path", str(path), *options])
        found: dict[str, list[dict[str, Any]]] = {}
        for row in pq.read_table(path).to_pylist():
            found.setdefault(row["impression_id"], []).append(row)
        return found

    @staticmethod
    def lines(folder: Path) -> list[Line]:
        """The impressions of a part."""
        found = []
        for text in (folder / "behaviors.tsv").read_text(encoding="utf-8").splitlines():
            id_, user, time, history, shown = text.split("\t")
            moment = datetime.strptime(time, "%m/%d/%Y %I:%M:%S %p").replace(tzinfo=UTC)
            pairs = [word.rsplit("-", 1) for word in shown.split()]
            clicked = [name for name, label in pairs if label == "1"]
            names = [name for name, _ in pairs]
            found.append(Line(id_, user, int(moment.timestamp()), history.split(), names, clicked))
        return found

    def first_shown(self) -> dict[str, int]:
        """When each article was shown for the first time."""
        first: dict[str, int] = {}
        for line in [*self.lines(_MIND / "train"), *self.lines(_MIND / "dev")]:
            for id_ in line.candidates:
                first[id_] = min(line.time, first.get(id_, line.time))
        return first

    @staticmethod
    def assert_as_predicted(answer: Answer, rows: list[dict[str, Any]], what: str) -> None:
        """Scores, order and path are those that ``predict`` wrote of an impression."""
        wanted = {row["item_id"]: row["score"] for row in rows}
        found = {item.id: item.score for item in answer.items}
        assert found.keys() == wanted.keys(), what
        for id_, score in found.items():
            assert score == pytest.approx(wanted[id_], abs=2e-5), (what, id_)
        assert (answer.path == "popularity") == (rows[0]["source"] == "popularity"), what
        assert [item.score for item in answer.items] == sorted(found.values(), reverse=True)
        if all(after - before > 1e-4 for before, after in itertools.pairwise(sorted(wanted.values()))):
            assert [item.id for item in answer.items] == list(dict.fromkeys(row["item_id"] for row in rows)), what


@pytest.fixture(scope="session")
def newsroom(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str) -> Newsroom:
    """Runs of impressions."""
    return Newsroom(tmp_path_factory.mktemp, tiny_bert)
