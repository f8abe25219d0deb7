"""A run of impressions as an artefact: its answers are those of ``predict``, without the log and at any moment."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_rec.cli import main
from lightning_rec.impression_baselines import ImpressionPopularity
from lightning_rec.recommend.artefact import Artefact, ArtefactError
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import _check, open_run
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.types import Request

ADS = Path(__file__).parent.parent / "data" / "files" / "ads"
RUNS = (
    "words_nrms",
    "frozen_sequence",
    "lora_lstur",
    "full_pooled",
    "text_cosine",
    "ids_sequence",
    "ids_ids",
    "text_language",
)
HOUR = 3600


@pytest.mark.parametrize("name", RUNS)
def test_answers_are_those_of_predict(name: str, newsroom: Any, tmp_path: Path) -> None:
    run = newsroom.run(name)
    rows = newsroom.predicted(run.checkpoint, tmp_path / "out.parquet")
    recommender = Recommender.load(run.artefact)
    lines = newsroom.lines(newsroom.mind / "dev")
    assert len(rows) == len(lines) > 10
    paths = set()
    for line in lines:
        request = Request(user=line.user, history=line.history, candidates=line.candidates, k=100)
        answer = recommender.recommend(request, now=line.time)
        newsroom.assert_as_predicted(answer, rows[line.id], f"{name}, impression {line.id}")
        assert answer.unknown == [] or name == "full_pooled"  # which drops what news.tsv lacks
        paths.add(answer.path)
    assert "towers" in paths
    assert "popularity" in paths or name == "lora_lstur", "U12 has no history, and is new"
    # the same by a batch at one moment, and by the score of each item
    some = [line for line in lines if line.history][:4]
    recommender.now = some[0].time
    asked = [Request(user=line.user, history=line.history, candidates=line.candidates, k=100) for line in some]
    for request, answer in zip(asked, recommender.recommend(asked), strict=True):
        ids = [item.id for item in answer.items]
        if answer.path == "towers":
            torch.testing.assert_close(
                recommender.score(request, ids), torch.tensor([item.score for item in answer.items])
            )


def test_the_moment_counts(newsroom: Any) -> None:
    context = Artefact.read(newsroom.run("words_nrms").artefact).context
    assert context is not None
    assert context.age is not None
    assert context.popularity is not None
    assert context.age.bias.abs().max() > 0.01
    assert context.popularity.bias.abs().max() > 0.01
    recommender = Recommender.load(newsroom.run("words_nrms").artefact)
    line = newsroom.lines(newsroom.mind / "dev")[0]
    request = Request(history=line.history, k=100)
    first, later = (recommender.recommend(request, now=moment) for moment in (line.time, line.time + 30 * HOUR))
    assert {item.id: item.score for item in first.items} != {item.id: item.score for item in later.items}


def test_training_clicks_alone_where_the_run_counts_those(newsroom: Any) -> None:
    protocol = Artefact.read(newsroom.run("frozen_sequence").artefact).manifest.protocol
    start = int(datetime(2019, 11, 12, 20, 29, 18, tzinfo=UTC).timestamp())
    assert "validation is the training part from 2019-11-12T20:29:18Z on" in protocol
    newest = max(line.time for line in newsroom.lines(newsroom.mind / "train") if line.clicked and line.time < start)
    assert f"the last of {datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M:%S} UTC" in protocol


# ---------------------------------------------------------------------------------------------- the log


def test_users_are_stored_as_the_log_leaves_them(newsroom: Any) -> None:
    artefact = Artefact.read(newsroom.run("lora_lstur").artefact)
    assert artefact.users is not None
    trained = {line.user for line in newsroom.lines(newsroom.mind / "train")}
    log = sorted(
        (line for folder in ("train", "dev") for line in newsroom.lines(newsroom.mind / folder)),
        key=lambda line: line.time,
    )
    longer = 0
    for user in {line.user for line in log}:
        mine = [line for line in log if line.user == user]
        history = list(mine[-1].history)
        clicks = [id_ for line in mine for id_ in line.clicked if id_ not in mine[-1].history]
        found = [event.item for event in artefact.users.history(user, 1000)]
        assert found == history + clicks
        longer += bool(clicks)
        assert (artefact.users.tower_row(user) > 0) == (user in trained), user
        assert artefact.users.row(user) > 0
    assert longer > 3
    assert {line.user for line in log} - trained
    assert set(artefact.users.ids) == {line.user for line in log}


@pytest.mark.parametrize(
    ("item", "user"),
    [
        (("TextItemTower", {"language_model": "BERT", "dim": 16}), ("LanguageUserTower", {"language_model": "BERT"})),
        (("IdItemTower", {"dim": 16}), ("PooledUserTower", {"pooling": "gru"})),
        (("IdItemTower", {"dim": 16}), ("LSTURUserTower", {"mode": "con"})),
    ],
    ids=["texts of users", "clicks", "ids of users"],
)
def test_who_is_known_by_id_is_answered_as_predict_would_after_the_log(
    item: tuple[str, dict[str, Any]], user: tuple[str, dict[str, Any]], newsroom: Any, tmp_path: Path, tiny_bert: str
) -> None:
    """The log is exported; predict then sees one more impression of each user, after all others."""
    shutil.copytree(ADS, tmp_path / "ads")
    rows = list(csv.DictReader((ADS / "displays.csv").open()))
    users = sorted({row["user_id"] for row in rows})
    ads = [row["item_id"] for row in csv.DictReader((ADS / "ads.csv").open())]
    moment = max(int(row["timestamp"]) for row in rows) + 3 * HOUR
    # what users wrote stands in the log, whatever the invented one has
    for number, row in enumerate(rows):
        row["feedback"] = f"old red {number} <b>boot</b>" if number % 3 == 0 else ""
    texts = {"user_template": "{profile}. {titles}. {feedback}", "user_titles": 3}
    options = texts if user[0] == "LanguageUserTower" else {}

    def write(folder: Path, extra: list[dict[str, str]]) -> None:
        with (folder / "displays.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows([*rows, *extra])

    write(tmp_path / "ads", [])
    config = {
        "model": {
            "class_path": "lightning_rec.ImpressionTwoTower",
            "init_args": {
                "item_tower": newsroom.part(item[0], **item[1]),
                "user_tower": newsroom.part(user[0], **user[1]),
            }
            | {"lr": 0.05, **newsroom.context},
        },
        "data": {
            "class_path": "lightning_rec.AdsDataModule",
            "init_args": {"path": str(tmp_path / "ads"), "max_history": 5, "batch_size": 16, **options},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    checkpoint = newsroom.fit(tmp_path, config)
    export(checkpoint, tmp_path / "artefact", progress=False)
    recommender = Recommender.load(tmp_path / "artefact", now=moment)
    stored = recommender.artefact.users
    assert stored is not None
    for name in users:  # all clicks, each with its time, in the order of time
        clicks = sorted(int(row["timestamp"]) for row in rows if row["user_id"] == name and row["label"] == "1")
        events = stored.history(name, 1000)
        assert [event.time for event in events] == clicks

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "ads", again)
    extra = [
        {"impression_id": f"new-{name}", "user_id": name, "timestamp": str(moment), "item_id": id_, "label": ""}
        | {"position": "1", "feedback": ""}
        for name in users
        for id_ in ads[:6]
    ]
    write(again, extra)
    found = newsroom.predicted(checkpoint, tmp_path / "out.parquet", "--data.path", str(again))
    assert set(found) >= {f"new-{name}" for name in users}
    sources = set()
    for name in users:
        answer = recommender.recommend(Request(user=name, candidates=ads[:6], k=6))
        newsroom.assert_as_predicted(answer, found[f"new-{name}"], name)
        sources.add(answer.path)
    assert "towers" in sources


def test_an_article_that_the_catalogue_lacks_is_one_without_text(newsroom: Any, tmp_path: Path) -> None:
    """As where predict meets an id in a history that no news.tsv has."""
    dev = tmp_path / "dev"
    shutil.copytree(newsroom.mind / "dev", dev)
    lines = newsroom.lines(newsroom.mind / "dev")
    texts = (dev / "behaviors.tsv").read_text(encoding="utf-8").splitlines()
    (dev / "behaviors.tsv").write_text(
        "".join("\t".join([*text.split("\t")[:3], f"{text.split(chr(9))[3]} N7777 N8888".strip(), text.split("\t")[4]])
                + "\n" for text in texts),
        encoding="utf-8",
    )  # fmt: skip
    for name in ("words_nrms", "frozen_sequence", "lora_lstur", "text_cosine", "text_language", "full_pooled"):
        run = newsroom.run(name)
        found = newsroom.predicted(run.checkpoint, tmp_path / f"{name}.parquet", "--data.reader.test", str(dev))
        recommender = Recommender.load(run.artefact)
        assert (recommender.artefact.unknown is None) == (name == "full_pooled"), "which was told to drop them"
        for line in lines:
            history = [*line.history, "N7777", "N8888"]
            request = Request(user=line.user, history=history, candidates=line.candidates, k=100)
            answer = recommender.recommend(request, now=line.time)
            newsroom.assert_as_predicted(answer, found[line.id], f"{name}, impression {line.id}")
            assert answer.unknown[-2:] == ["N7777", "N8888"] or name == "full_pooled"
    # with text tower and words, words count where nothing that is read has a name
    recommender = Recommender.load(newsroom.run("words_nrms").artefact, now=lines[0].time)
    spoken = recommender.recommend(Request(history=["N7777"], text="a new song of love", k=3))
    assert spoken.path == "text"
    assert [item.score for item in spoken.items] == pytest.approx(
        [item.score for item in recommender.recommend(Request(text="a new song of love", k=3)).items], abs=1e-6
    )
    # several requests at once: each reads its own
    mixed = [
        Request(history=["N1", "N7777"], k=4),
        Request(text="big game", k=4),
        Request(history=["N2", "N3"], k=4),
        Request(history=["N8888"], k=4),
        Request(k=4),
    ]
    for request, answer in zip(mixed, recommender.recommend(mixed), strict=True):
        alone = recommender.recommend(request)
        assert [item.score for item in answer.items] == pytest.approx([item.score for item in alone.items], abs=1e-6)
        assert (answer.path, answer.unknown) == (alone.path, alone.unknown)


# ---------------------------------------------------------------------------------------------- one folder


def test_without_the_log_the_run_and_files_of_vectors(newsroom: Any, tmp_path: Path, tiny_bert: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    shutil.copytree(newsroom.mind, there / "mind")
    shutil.copytree(tiny_bert, there / "bert")
    names = [f"Q{number}" for number in (900101, 900102, 900201, 900202, 900301, 900302)]
    (there / "entities.vec").write_text("".join(f"{name}\t0.{at}\t-0.5\t0.25\t1\n" for at, name in enumerate(names)))
    words = "the new old big film game song river city love"
    (there / "glove.txt").write_text("".join(f"{word} 0.{at} 1 -1 0.5\n" for at, word in enumerate(words.split())))
    towers = {
        "words": newsroom.news(
            words={**newsroom.words, "dim": 4, "vectors": str(there / "glove.txt"), "tune": False},
            entity_vectors=[str(there / "entities.vec")],
            tune_entities=False,
        ),
        "bert": newsroom.news(language_model=str(there / "bert"), entity_vectors=str(there / "entities.vec")),
    }
    before = {}
    line = newsroom.lines(newsroom.mind / "dev")[0]
    request = Request(history=line.history, candidates=line.candidates, k=100)
    for name, tower in towers.items():
        config = newsroom.config("words_nrms", there / "mind")
        config["model"]["init_args"]["item_tower"] = tower
        checkpoint = newsroom.fit(there / f"run_{name}", config)
        export(checkpoint, there / f"artefact_{name}", progress=False)
        rows = newsroom.predicted(checkpoint, there / "out.parquet")[line.id]
        recommender = Recommender.load(there / f"artefact_{name}")
        newsroom.assert_as_predicted(recommender.recommend(request, now=line.time), rows, name)
        text = recommender.artefact.encode_texts(["the new river", "snow"])
        torch.testing.assert_close(text, open_run(checkpoint).module.item_tower.encode_texts(["the new river", "snow"]))
        before[name] = (recommender.recommend(request, now=line.time), text)
        shutil.move(there / f"artefact_{name}", tmp_path / name)
    shutil.rmtree(there)
    for name in towers:
        recommender = Recommender.load(tmp_path / name)
        assert recommender.recommend(request, now=line.time) == before[name][0]
        assert torch.equal(recommender.artefact.encode_texts(["the new river", "snow"]), before[name][1])
        assert str(tmp_path) not in (tmp_path / name / "manifest.json").read_text()
        (tmp_path / name / "context.safetensors").unlink()
        with pytest.raises(ArtefactError, match=r"context\.safetensors is missing"):
            Recommender.load(tmp_path / name)


def test_small_vectors_test_metrics_and_no_users(
    newsroom: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = newsroom.run("text_cosine")
    main(["test", "--ckpt_path", str(run.checkpoint)])
    result = run.checkpoint.parent.parent / "test_metrics.json"
    metrics = json.loads(result.read_text())["metrics"]
    for dtype in ("float16", "int8"):
        manifest = export(run.checkpoint, tmp_path / dtype, vectors=dtype, users=False, progress=False)  # type: ignore[arg-type]
        assert manifest.metrics == pytest.approx({name: value for name, value in metrics.items() if value == value})
        loss = manifest.vector_loss
        assert loss is not None
        assert loss["float32"] == pytest.approx(metrics["test/ndcg@10"], abs=1e-6)
        assert loss["stored"] == pytest.approx(loss["float32"], abs=0.1)
        assert f"Item vectors as {dtype}: test NDCG@10 {loss['stored']:.4f}, with float32" in caplog.text
        recommender = Recommender.load(tmp_path / dtype, now=1573600000)
        assert recommender.artefact.users is None
        assert len(recommender.recommend(Request(history=["N1", "N2"], k=4)).items) == 4
    result.unlink()


def test_a_loss_that_nobody_can_tell(newsroom: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = newsroom.config("words_nrms")
    config["data"]["init_args"]["reader"]["init_args"] = {
        "train": str(newsroom.mind / "train"),
        "validation": str(newsroom.mind / "dev"),
    }
    checkpoint = newsroom.fit(tmp_path, config)
    assert export(checkpoint, tmp_path / "out", vectors="int8", progress=False).vector_loss is None
    assert "the loss is unknown, since no impression of a test part has labels" in caplog.text


def test_smaller_language_models_of_text_towers(newsroom: Any, tmp_path: Path) -> None:
    run = newsroom.run("text_cosine")
    export(run.checkpoint, tmp_path / "small", keep_layers=1, quantise=True, progress=False)
    steps = Artefact.read(tmp_path / "small").manifest.parts["language_model"]["compression"]
    assert [step["after"]["ndcg@10"] is not None for step in steps] == [True, True]


def test_onnx_of_the_user_tower(newsroom: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    export(newsroom.run("words_nrms").checkpoint, tmp_path / "out", onnx=True, progress=False)
    assert (tmp_path / "out" / "onnx" / "user_tower.onnx").is_file()
    assert "(NewsItemTower) is more than a language model that reads one text: it has no file" in caplog.text


# ---------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_exported_says_why(newsroom: Any, tmp_path: Path) -> None:
    config = newsroom.config("words_nrms")
    config["model"]["init_args"]["user_tower"] = newsroom.part("CandidateAttentionUserTower", hidden=8)
    checkpoint = newsroom.fit(tmp_path, config)
    with pytest.raises(ArtefactError, match=r"CandidateAttentionUserTower cannot be exported: .*depends on the cand"):
        export(checkpoint, tmp_path / "out", progress=False)
    data = open_run(newsroom.run("words_nrms").checkpoint).data
    with pytest.raises(ArtefactError, match=r"ImpressionPopularity cannot be exported: it scores candidates in a way"):
        _check(ImpressionPopularity(), data)
    with pytest.raises(ArtefactError, match=r"BoringModel over NewsImpressionDataModule cannot be exported"):
        _check(BoringModel(), data)
    lora = newsroom.run("lora_lstur").checkpoint
    with pytest.raises(ValueError, match=r"keep_layers and quantise .* NewsItemTower is no TextItemTower"):
        export(lora, tmp_path / "out", quantise=True, progress=False)
    with pytest.raises(ValueError, match=r"cannot be merged into its language model: leave merge out"):
        export(lora, tmp_path / "out", merge=True, progress=False)
    with pytest.raises(ValueError, match=r"max_age is 0: it is a number of hours above 0"):
        export(lora, tmp_path / "out", max_age=0, progress=False)
    assert not (tmp_path / "out").exists()


def test_max_age_is_the_datas_in_runs_of_interactions(run_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fitted and tested with its limit, data\.max_age"):
        export(run_of("id_sequence"), tmp_path / "out", max_age=48, progress=False)


@pytest.mark.parametrize("name", ["mind_sample", "mind_small_lora"])
def test_the_configs_of_news(name: str, newsroom: Any, tmp_path: Path, tiny_bert: str) -> None:
    """Their age and popularity are a part of the scores of the artefact."""
    folder = newsroom.mind / "train" if name == "mind_sample" else tmp_path / "mind"
    if name == "mind_small_lora":
        for part in ("train", "dev"):
            shutil.copytree(newsroom.mind / part, folder / f"MINDsmall_{part}")
    config = Path(__file__).parent.parent.parent / "configs" / "news" / f"{name}.yaml"
    words = f"--trainer.default_root_dir {tmp_path / 'run'} --trainer.max_epochs 1 --trainer.accelerator cpu"
    words += f" --data.path {folder} --model.item_tower.language_model {tiny_bert} --data.num_workers 0"
    main(["fit", "--config", str(config), *words.split()])
    main(["export", "best", str(tmp_path / "out"), "--root_dir", str(tmp_path / "run"), "--progress", "false"])
    alone = Path(shutil.copy(next(tmp_path.rglob("last.ckpt")), tmp_path))
    export(alone, tmp_path / "alone", progress=False)  # the checkpoint itself says how it was made
    for place in ("out", "alone"):
        recommender = Recommender.load(tmp_path / place, now=1573600000)
        context = recommender.artefact.context
        assert context is not None
        assert context.clicks is not None
        assert (context.age is None, context.popularity is None) == (False, False)
        assert context.clicks.half_life == (6 if name == "mind_sample" else 24) * HOUR
        assert recommender.recommend(Request(user="U1", k=3)).path == "towers"
