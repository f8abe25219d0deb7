"""Finding the best and the last checkpoint and their config, wherever the folder has been moved to."""

import os
import shutil

import pytest
import torch
import yaml

from lightning_rec.run_files import checkpoint_config, load_checkpoint, resolve_checkpoint


def run(root, name, best="epoch_000.ckpt", age=0, **extra):
    folder = root / "lightning_logs" / name / "checkpoints"
    folder.mkdir(parents=True)
    state = {"ModelCheckpoint{'monitor': 'val/ndcg@10'}": {"best_model_path": f"/elsewhere/{best}"}} if best else {}
    content = {"callbacks": state, **extra}
    for file in ("epoch_000.ckpt", "last.ckpt"):
        torch.save(content, folder / file)
    moment = 1_700_000_000 - age
    os.utime(folder / "last.ckpt", (moment, moment))
    return folder


def test_last_is_that_of_the_newest_run(tmp_path):
    run(tmp_path, "version_9", age=100)
    newest = run(tmp_path, "version_0")
    run(tmp_path, "version_3", age=50)
    assert resolve_checkpoint("last", str(tmp_path)) == newest / "last.ckpt"


def test_best_is_found_by_name_where_its_run_lies(tmp_path):
    folder = run(tmp_path / "old", "version_0")
    assert resolve_checkpoint("best", str(tmp_path / "old")) == folder / "epoch_000.ckpt"
    shutil.move(tmp_path / "old", tmp_path / "new")
    found = resolve_checkpoint("best", str(tmp_path / "new"))
    assert found == tmp_path / "new" / "lightning_logs" / "version_0" / "checkpoints" / "epoch_000.ckpt"


def test_the_working_directory_is_looked_through(tmp_path, monkeypatch):
    folder = run(tmp_path, "version_0")
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("last", None).resolve() == folder / "last.ckpt"


def test_a_file_is_taken_as_it_is(tmp_path):
    folder = run(tmp_path, "version_0")
    assert resolve_checkpoint(str(folder / "epoch_000.ckpt"), None) == folder / "epoch_000.ckpt"


@pytest.mark.parametrize("wanted", ["best", "last"])
def test_nothing_found(tmp_path, wanted):
    with pytest.raises(FileNotFoundError, match=f"no last.ckpt below .*so ckpt_path: {wanted} means nothing. Run fit"):
        resolve_checkpoint(wanted, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt, which is no file"):
        resolve_checkpoint("best.ckpt", str(tmp_path))


def test_best_that_was_deleted_or_never_named(tmp_path):
    folder = run(tmp_path, "version_0")
    (folder / "epoch_000.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="names no best checkpoint that still exists"):
        resolve_checkpoint("best", str(tmp_path))
    run(tmp_path / "other", "version_0", best=None)
    with pytest.raises(FileNotFoundError, match="names no best checkpoint"):
        resolve_checkpoint("best", str(tmp_path / "other"))


def test_config_beside_the_run(tmp_path):
    folder = run(tmp_path, "version_0")
    (folder.parent / "config.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "a.B"}, "ckpt_path": "old.ckpt"})
    )
    assert checkpoint_config(folder / "last.ckpt") == {"model": {"class_path": "a.B"}}, "not the one it resumed from"


def test_config_out_of_the_checkpoint(tmp_path):
    folder = run(
        tmp_path,
        "version_0",
        hyper_parameters={"_class_path": "lightning_rec.TwoTower", "_instantiator": "x", "lr": 0.5},
        datamodule_hyper_parameters={"batch_size": 3},
    )
    config = checkpoint_config(folder / "last.ckpt")
    assert config == {"model": {"class_path": "lightning_rec.TwoTower", "init_args": {"lr": 0.5}}}


def test_a_pickle_is_not_executed(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"callbacks": Surprise()}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        load_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "executed").exists()
