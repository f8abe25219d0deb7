"""The command line: what it takes, what it refuses and how it says so, and that it wins over a checkpoint."""

import inspect
import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import Callback, LightningDataModule

import lightning_rec
from lightning_rec import TwoTower, callbacks, metrics, objectives, towers
from lightning_rec.cli import main, quiet_wandb
from lightning_rec.cli_errors import class_parameters, readable, suggestion, user_error
from lightning_rec.data import readers
from lightning_rec.optim import keep_settings
from lightning_rec.run_files import resolve_checkpoint
from lightning_rec.towers import score

SHOP = Path(__file__).parent / "data" / "files" / "shop"
CONFIG = f"""
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower:
      class_path: lightning_rec.towers.IdItemTower
      init_args: {{dim: 8}}
    user_tower:
      class_path: lightning_rec.towers.SequenceUserTower
      init_args: {{blocks: 1, heads: 1}}
data:
  class_path: lightning_rec.EcommerceDataModule
  init_args:
    reader:
      class_path: lightning_rec.data.readers.Files
      init_args: {{interactions: {SHOP}/interactions.csv, items: {SHOP}/items.csv}}
    min_rating: 0
trainer: {{accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, max_epochs: 1}}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "shop.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run's folder."""
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "shop.yaml").write_text(CONFIG)
    main(["fit", "--config", str(folder / "shop.yaml"), "--trainer.default_root_dir", str(folder)])
    return next(folder.rglob("last.ckpt")).parent.parent


# ---------------------------------------------------------------------- misspelt names


MISSPELT = {
    "top level": ("data:", "datas: 1\ndata:", [], "Did you mean data?"),
    "top level with a class": ("model:", "modle: {class_path: x}\nmodel:", [], "Did you mean model?"),
    "trainer": ("max_epochs: 1", "max_epoch: 1", [], "Did you mean trainer.max_epochs?"),
    "model": ("    item_tower:", "    weight_decoy: 1\n    item_tower:", [], "Did you mean weight_decay?"),
    "tower": ("{dim: 8}", "{dimm: 8}", [], "Did you mean dim? lightning_rec.towers.IdItemTower takes: dim, init_std."),
    "data": ("min_rating: 0", "min_ratings: 0", [], "Did you mean min_rating?"),
    "reader": (
        "{interactions",
        "{interaction",
        [],
        "Did you mean interactions? lightning_rec.data.readers.Files takes",
    ),
    "class": ("towers.IdItemTower", "towers.IdItmTower", [], "Did you mean lightning_rec.towers.IdItemTower"),
    "module": ("lightning_rec.towers.Seq", "lightning_rec.tower.Seq", [], "lightning_rec.towers.SequenceUserTower"),
    "option of the trainer": ("", "", ["--trainer.max_epoch=3"], "Did you mean trainer.max_epochs?"),
    "option of the model": ("", "", ["--model.lrr=3"], "Did you mean lr?"),
    "option of a tower": ("", "", ["--model.init_args.item_tower.init_args.dimm=3"], "Did you mean dim?"),
    "option of the data": ("", "", ["--data.batchsize=3"], "Did you mean batch_size?"),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_key_is_named_with_a_suggestion(config, capsys, case):
    old, new, options, expected = MISSPELT[case]
    assert old in CONFIG
    config.write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), *options])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert expected in said
    assert len(said) < 2000, "the error is not buried under the usage of 200 options"


def test_suggestions_without_a_parser():
    assert suggestion("Subcommand 'fit' does not accept option 'trainr.max_epochs'", ["trainer.max_epochs"]) == (
        "Did you mean trainer.max_epochs?\n"
    )
    assert suggestion("unrecognized arguments: --zzzzz 3", ["trainer.max_epochs"]) == ""
    assert suggestion("something else", ["trainer.max_epochs"]) == ""
    unknown = "Problem with given class_path 'nowhere.Tower':\n Option 'dimm' is not accepted"
    assert suggestion(unknown, []) == ""


def test_arguments_that_a_class_passes_on_are_known():
    names = class_parameters("lightning_rec.towers.TextIdItemTower")
    assert {"fusion", "id_dropout", "language_model", "peft"} <= set(names)
    assert "options" not in names
    assert class_parameters("nowhere.Class") == []


def test_messages_are_cut_to_what_matters():
    message = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Subtypes: [a, b]\n  Errors:\n'
        "    - what matters\n    - Expected a <class 'NoneType'>\n  Given value type: <class 'dict'>\n"
        f"  Given value: {'x' * 200}"
    )
    assert readable(message) == 'Parser key "model":\n    - what matters'


# ---------------------------------------------------------------------- errors of the user, and bugs


def test_a_missing_file_ends_with_a_sentence(config, capsys, monkeypatch):
    config.write_text(CONFIG.replace(f"{SHOP}/interactions.csv", "/nowhere/log.csv"))
    monkeypatch.delenv("LIGHTNING_REC_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--config", str(config)])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "/nowhere/log.csv" in last
    monkeypatch.setenv("LIGHTNING_REC_DEBUG", "1")
    with pytest.raises((FileNotFoundError, ValueError), match=r"/nowhere/log\.csv"):
        main(["test", "--config", str(config)])


def test_a_wrong_value_ends_with_a_sentence(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--config", str(config), "--data.max_history", "0"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: max_history must be at least 1, but is 0."


def raised(function, *args):
    with pytest.raises(Exception) as info:
        function(*args)
    return info.value


def test_bugs_keep_their_traceback():
    assert user_error(raised(resolve_checkpoint, "nowhere.ckpt", None))
    # a ValueError that Python raised in a line of ours
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    assert not user_error(raised(keep_settings, [optimizer], [], []))
    assert not user_error(raised(int, "x"))
    # raised by a library below a function of ours
    assert not user_error(raised(lightning_rec.run_files.load_checkpoint, Path("nowhere.ckpt")))
    assert not user_error(ValueError("never raised"))


# ---------------------------------------------------------------------- checkpoints and the command line


def test_the_command_line_wins_without_a_config(fitted, capsys):
    file = str(fitted / "checkpoints" / "last.ckpt")
    cli = main(["test", "--ckpt_path", file, "--data.eval_batch_size", "7", "--model.top_k", "3"])
    assert cli.datamodule.eval_batch_size == 7
    assert cli.datamodule.min_rating == 0, "the rest is the run's"
    assert cli.model.top_k == 3
    assert cli.model.item_tower.dim == 8
    ran = yaml.safe_load((fitted / "test_config.yaml").read_text())
    assert ran["data"]["init_args"]["eval_batch_size"] == 7
    assert ran["model"]["init_args"]["top_k"] == 3
    assert ran["ckpt_path"] == file


def test_the_command_line_wins_with_a_config(fitted, config, tmp_path):
    out = tmp_path / "out.parquet"
    # the file is moved away from its run: there is no config.yaml beside it
    moved = shutil.copy(fitted / "checkpoints" / "last.ckpt", tmp_path / "moved.ckpt")
    options = ["--ckpt_path", str(moved), "--model.init_args.top_k", "2", "--predictions.path", str(out)]
    main(["predict", "--config", str(config), *options])
    assert pq.read_table(out)["rank"].to_pylist()[:4] == [1, 2, 1, 2]


def test_a_checkpoint_alone_says_what_it_needs(fitted, tmp_path):
    moved = shutil.copy(fitted / "checkpoints" / "last.ckpt", tmp_path / "moved.ckpt")
    cli = main(["test", "--ckpt_path", str(moved), "--trainer.accelerator", "cpu"])
    assert cli.model.item_tower.dim == 8
    there = json.loads((tmp_path / "test_metrics.json").read_text())["metrics"]
    assert there["test/users"] == 40


def test_a_run_of_the_command_line_loads_from_python(fitted):
    model = TwoTower.load_from_checkpoint(fitted / "checkpoints" / "last.ckpt", weights_only=True)
    assert model.n_rows == 31
    with torch.no_grad():
        assert model.encode_catalogue().shape == (31, 8)


def test_a_checkpoint_that_is_no_file(config, capsys, tmp_path):
    for wanted, sentence in (
        ("nowhere.ckpt", "nowhere.ckpt, which is no file"),
        ("best", "There is no last.ckpt below"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["test", "--config", str(config), "--ckpt_path", wanted, "--trainer.default_root_dir", str(tmp_path)])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


def test_resuming_with_other_settings(fitted, tmp_path):
    run = tmp_path / "runs" / "lightning_logs" / "version_0"
    shutil.copytree(fitted, run)
    place = ["--trainer.default_root_dir", str(tmp_path / "runs")]
    options = ["--model.lr", "0.5", "--early_stopping.patience", "3", "--trainer.max_epochs", "2"]
    cli = main(["fit", "--ckpt_path", "last", *place, *options])
    assert cli.trainer.current_epoch == 2
    assert cli.trainer.optimizers[0].param_groups[-1]["lr"] == 0.5
    assert cli.trainer.early_stopping_callback.patience == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["lr"] == 0.5


def test_the_command_line_stays_for_other_processes(fitted, monkeypatch, recwarn):
    # DDP starts its other processes with sys.argv
    line = ["lightning-rec", "test", "--ckpt_path", str(fitted / "checkpoints" / "last.ckpt")]
    monkeypatch.setattr("sys.argv", list(line))
    cli = main()
    assert sys.argv == line
    assert cli.model.item_tower.dim == 8
    assert not [warning for warning in recwarn if "args parameter" in str(warning.message)]


# ---------------------------------------------------------------------- help


def test_print_config_gives_a_config_that_runs(config, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--model.lr", "0.25", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["lr"] == 0.25
    assert printed["model"]["init_args"]["item_tower"]["init_args"] == {"dim": 8, "init_std": 0.02}
    assert printed["checkpoint"]["monitor"] == "val/ndcg@10"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--help"], ["fit", "validate", "test", "predict"]),
        (
            ["fit", "--model.help=lightning_rec.TwoTower"],
            ["--model.language_lr", "learning rate of pretrained language"],
        ),
        (["fit", "--data.help=lightning_rec.VideoDataModule"], ["--data.windows", "the newest are kept"]),
    ],
)
def test_help(args, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in expected:
        assert text in shown


def named_classes():
    rooms = (lightning_rec, towers, score, objectives, metrics, readers, callbacks)
    found = {cls for room in rooms for cls in vars(room).values() if isinstance(cls, type)}
    kinds = (torch.nn.Module, LightningDataModule, readers.Reader, Callback)
    concrete = (cls for cls in found if issubclass(cls, kinds) and not inspect.isabstract(cls))
    return sorted((cls for cls in concrete if cls.__module__.startswith("lightning_rec")), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", named_classes(), ids=lambda cls: cls.__name__)
def test_every_option_has_a_help_text(cls):
    parser = ArgumentParser()
    parser.add_class_arguments(cls, "x", fail_untyped=False)
    options = [action for action in parser._actions if action.dest.startswith("x.") and action.dest[2:3] != "_"]
    missing = [action.dest for action in options if not action.help or action.help.strip() in ("", "(default: null)")]
    assert not missing
    assert {action.dest[2:].split(".")[0] for action in options} >= set(
        class_parameters(f"{cls.__module__}.{cls.__name__}")
    )


# ---------------------------------------------------------------------- popularity and what prediction writes


def test_popularity_needs_no_checkpoint(tmp_path):
    config = Path(__file__).parent / "configs" / "popularity.yaml"
    path = tmp_path / "popularity.yaml"
    path.write_text(config.read_text().replace("SHOP", str(SHOP)))
    main(["test", "--config", str(path), "--trainer.default_root_dir", str(tmp_path)])
    figures = json.loads((tmp_path / "test_metrics.json").read_text())
    assert figures["metrics"]["test/users"] == 40
    assert figures["checkpoint"] == ""
    assert figures["protocol"].startswith("Leave-one-out")


LOG = """user_id,item_id,rating,timestamp
all,i1,5,1
all,i2,5,2
all,i3,5,3
all,i4,5,4
one,i2,5,5
two,i2,5,6
two,i3,5,7
bad,i2,1,8
"""


def test_unknown_users_are_answered_by_popularity(tmp_path, config):
    (tmp_path / "log.csv").write_text(LOG)
    (tmp_path / "users.txt").write_text("nobody\nall\nbad\none\n")
    reader = f"init_args: {{interactions: {tmp_path}/log.csv}}"
    text = CONFIG.replace(f"init_args: {{interactions: {SHOP}/interactions.csv, items: {SHOP}/items.csv}}", reader)
    config.write_text(text.replace("min_rating: 0", "min_rating: 3\n    unknown_items: add\n    min_events: 5"))
    out = tmp_path / "out.jsonl"
    output = ["--predictions.format", "jsonl", "--predictions.path", str(out)]
    place = ["--trainer.default_root_dir", str(tmp_path)]
    main(["predict", "--config", str(config), "--data.predict_users", str(tmp_path / "users.txt"), *output, *place])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(dict.fromkeys(row["user_id"] for row in rows)) == ["nobody", "bad", "one"], "in order; one has seen all"
    groups = {user: [row for row in rows if row["user_id"] == user] for user in ("nobody", "bad", "one")}
    assert [row["item_id"] for row in groups["nobody"]][:2] == ["i2", "i3"], "most popular first"
    assert {row["source"] for row in groups["nobody"] + groups["bad"]} == {"popularity"}
    assert {row["item_id"] for row in groups["bad"]} == {"i1", "i3", "i4"}, "what was disliked is not recommended"
    assert {row["source"] for row in groups["one"]} == {"towers"}
    assert {row["item_id"] for row in groups["one"]} == {"i1", "i3", "i4"}
    for group in groups.values():
        assert [row["rank"] for row in group] == list(range(1, len(group) + 1))
        assert [row["score"] for row in group] == sorted((row["score"] for row in group), reverse=True)


def test_without_a_key_wandb_is_offline(monkeypatch, tmp_path):
    environment = {"NETRC": str(tmp_path / "netrc")}
    monkeypatch.setattr("lightning_rec.cli.os.environ", environment)
    quiet_wandb()
    assert environment["WANDB_MODE"] == "offline"
    del environment["WANDB_MODE"]
    environment["WANDB_API_KEY"] = "k"
    quiet_wandb()
    assert "WANDB_MODE" not in environment
    del environment["WANDB_API_KEY"]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k")
    quiet_wandb()
    assert "WANDB_MODE" not in environment
