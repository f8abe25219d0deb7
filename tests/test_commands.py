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
USERS = [f"u{number:03d}" for number in range(1, 41)]


@pytest.fixture
def config_of(tmp_path, request):
    """Fills in the folders that a config of tests/configs leaves open."""

    def fill(name: str) -> list[str]:
        text = (HERE / "configs" / f"{name}.yaml").read_text().replace("SHOP", str(SHOP))
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
def test_fit_resume_test_predict(name, config_of, tmp_path, monkeypatch):
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
    if name != "popularity":
        assert last["global_step"] == 2 * first["global_step"] > 0
    assert set(last["state_dict"]) == set(first["state_dict"])

    main(["test", *config, "--ckpt_path", "best"])
    result = json.loads((run / "test_metrics.json").read_text())
    assert 0 <= result["metrics"]["test/ndcg@10"] <= 1
    assert ("seen items kept" if name == "global_time" else "seen items filtered") in result["protocol"]
    assert (run / "test_config.yaml").exists()

    main(["predict", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")])
    table = pq.read_table(run / "predictions.parquet").to_pydict()
    assert list(dict.fromkeys(table["user_id"])) == USERS
    assert table["rank"][:10] == list(range(1, 11))
    assert set(table["item_id"]) <= {line.split(",")[0] for line in (SHOP / "items.csv").read_text().splitlines()[1:]}
    if name == "rating":
        assert 0 < result["metrics"]["test/rmse"] < 4


def test_a_resumed_run_with_a_relative_folder_knows_its_best_again(config_of, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    config = [*config_of("id_sequence")[:2], "--trainer.default_root_dir", "runs"]
    main(["fit", *config, "--trainer.max_epochs", "1"])
    main(["fit", *config, "--ckpt_path", "last"])
    # Lightning drops the best checkpoints of a run whose folder it does not recognise, with this warning
    assert not [warning for warning in recwarn if "dirpath has changed" in str(warning.message)]
