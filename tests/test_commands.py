"""Every config of tests/configs goes through fit, resume, test and predict by the command line."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lightning_rec.cli import main

HERE = Path(__file__).parent
CONFIGS = sorted((HERE / "configs").glob("*.yaml"))
SHOP = HERE / "data" / "files" / "shop"
MIND = HERE / "data" / "files" / "mind"
NEWSROOM = HERE / "data" / "files" / "newsroom"
USERS = [f"u{number:03d}" for number in range(1, 41)]


@pytest.fixture
def config_of(tmp_path, request):
    """Fills in the folders that a config of tests/configs leaves open."""

    def fill(name: str) -> list[str]:
        text = (HERE / "configs" / f"{name}.yaml").read_text().replace("SHOP", str(SHOP)).replace("MIND", str(MIND))
        text = text.replace("NEWSROOM", str(NEWSROOM))
        for word, fixture in (("TINY_BERT", "tiny_bert"), ("TINY_GPT2", "tiny_gpt2")):
            if word in text:
                text = text.replace(word, str(request.getfixturevalue(fixture)))
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return ["--config", str(path), "--trainer.default_root_dir", str(tmp_path / "runs")]

    return fill


def newest_run(tmp_path: Path) -> Path:
    return max(
        (tmp_path / "runs" / "lightning_logs").glob("*/checkpoints"), key=lambda path: path.stat().st_mtime
    ).parent


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_fit_resume_test_predict(name, config_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_REC_CACHE", str(tmp_path / "cache"))
    config = config_of(name)
    main(["fit", *config, "--trainer.max_epochs", "1"])
    run = newest_run(tmp_path)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
    first = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)

    resumed = main(["fit", *config, "--ckpt_path", "last"])
    assert newest_run(tmp_path) == run, "a resumed run stays in its folder"
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed.trainer.current_epoch == 2
    if "popularity" not in name:
        assert last["global_step"] == 2 * first["global_step"] > 0
    assert set(last["state_dict"]) == set(first["state_dict"])

    command, stage = "test", "test"
    if name == "news_nrms":  # MIND's own test part has no labels
        with pytest.raises(SystemExit):
            main(["test", *config, "--ckpt_path", "best"])
        assert "no labelled impressions to test on" in capsys.readouterr().err
        command, stage = "validate", "val"
    main([command, *config, "--ckpt_path", "best"])
    result = json.loads((run / f"{command}_metrics.json").read_text())
    result["metrics"] = {figure.removeprefix(f"{stage}/"): value for figure, value in result["metrics"].items()}
    assert 0 <= result["metrics"]["ndcg@10"] <= 1
    assert (run / f"{command}_config.yaml").exists()
    predict = ["predict", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    (impressions if name.startswith("news_") else recommendations)(name, run, result, predict)


def recommendations(name, run, result, predict):
    """What a run over plain interactions leaves."""
    assert ("seen items kept" if name == "global_time" else "seen items filtered") in result["protocol"]
    if name == "rating":
        assert 0 < result["metrics"]["rmse"] < 4
    main(predict)
    table = pq.read_table(run / "predictions.parquet").to_pydict()
    if name == "fresh_news":
        assert "at most 24 hours old" in result["protocol"]
        clicks = [line.split(",") for line in (NEWSROOM / "clicks.csv").read_text().splitlines()[1:]]
        news = [line.split(",") for line in (NEWSROOM / "news.csv").read_text().splitlines()[1:]]
        born = {item: min(int(time) for _, other, time in clicks if other == item) for item in {c[1] for c in clicks}}
        born |= {row[0]: min(int(row[3]), born.get(row[0], 2**62)) for row in news if row[3]}
        newest = max(int(time) for *_, time in clicks)
        assert table["item_id"]
        assert all(newest - 24 * 3600 <= born[item] <= newest for item in table["item_id"])
        return
    assert list(dict.fromkeys(table["user_id"])) == USERS
    assert table["rank"][:10] == list(range(1, 11))
    assert set(table["item_id"]) <= {line.split(",")[0] for line in (SHOP / "items.csv").read_text().splitlines()[1:]}


def impressions(name, run, result, predict):
    """What a run over impressions leaves."""
    shown = [line.split("\t") for line in (MIND / "test" / "behaviors.tsv").read_text().splitlines()]
    for figure in ("auc", "mrr", "ndcg@5", "log_loss", "calibration_error", "popularity_share"):
        assert 0 <= result["metrics"][figure] < 10
    assert "candidates of each impression are ranked as they were shown" in result["protocol"]
    main(predict)
    table = pq.read_table(run / "predictions.parquet").to_pydict()
    main([*predict, "--predictions.format", "mind"])
    lines = (run / "prediction.txt").read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == [row[0] for row in shown]
    place = 0
    for line, (number, user, _, _, candidates) in zip(lines, shown, strict=True):
        ids = [
            candidate.rsplit("-", 1)[0] if candidate[-2:] in ("-0", "-1") else candidate
            for candidate in candidates.split()
        ]
        ranks = [int(rank) for rank in line.split(" ")[1].strip("[]").split(",")]
        assert sorted(ranks) == list(range(1, len(ids) + 1))
        rows = slice(place, place + len(ids))
        assert set(zip(table["impression_id"][rows], table["user_id"][rows], strict=True)) == {(number, user)}
        assert table["rank"][rows] == sorted(ranks)
        assert table["item_id"][rows] == [ids[ranks.index(rank)] for rank in sorted(ranks)]
        place += len(ids)
    assert place == len(table["rank"])


def test_a_resumed_run_with_a_relative_folder_knows_its_best_again(config_of, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    config = [*config_of("id_sequence")[:2], "--trainer.default_root_dir", "runs"]
    main(["fit", *config, "--trainer.max_epochs", "1"])
    main(["fit", *config, "--ckpt_path", "last"])
    # Lightning drops the best checkpoints of a run whose folder it does not recognise, with this warning
    assert not [warning for warning in recwarn if "dirpath has changed" in str(warning.message)]
