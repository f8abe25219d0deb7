"""Predictions in the order asked for with raw ids, and files written in one piece."""

import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from lightning_rec.callbacks import PredictionWriter, run_folder
from lightning_rec.callbacks.results import prediction_table, write_table

USERS = ["a", "Ünï", "c", "007"]
ITEMS = ["", "001", "1", "1.0", "鞋"]


def found(index, rows, fallback=None):
    rows = torch.tensor(rows)
    return {
        "index": torch.tensor(index),
        "rows": rows,
        "scores": torch.where(rows > 0, 10.0 - torch.arange(rows.shape[1]), -torch.inf),
        "fallback": torch.tensor(fallback or [False] * len(index)),
    }


def test_order_ids_and_ranks():
    table = prediction_table(
        found([2, 0, 3, 1], [[1, 2], [4, 3], [0, 0], [2, 0]], [True, False, False, False]), USERS, ITEMS
    )
    assert table.to_pylist() == [
        {"user_id": "a", "rank": 1, "item_id": "鞋", "score": 10.0, "source": "towers"},
        {"user_id": "a", "rank": 2, "item_id": "1.0", "score": 9.0, "source": "towers"},
        {"user_id": "Ünï", "rank": 1, "item_id": "1", "score": 10.0, "source": "towers"},
        {"user_id": "c", "rank": 1, "item_id": "001", "score": 10.0, "source": "popularity"},
        {"user_id": "c", "rank": 2, "item_id": "1", "score": 9.0, "source": "popularity"},
    ]


def test_nobody_was_asked_for():
    table = prediction_table({}, [], ITEMS)
    assert table.num_rows == 0
    assert table.column_names == ["user_id", "rank", "item_id", "score", "source"]
    assert table.schema == prediction_table(found([0], [[1]]), ["a"], ITEMS).schema


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_files_take_their_place_in_one_piece(tmp_path, format):
    table = prediction_table(found([0], [[4, 1]]), ["Ünï"], ITEMS)
    path = tmp_path / "deep" / "out"
    write_table(table, path, format)
    assert [file.name for file in path.parent.iterdir()] == ["out"]
    if format == "parquet":
        assert pq.read_table(path).equals(table)
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == table.to_pylist()
        assert "鞋" in lines[0], "as it is, not escaped"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    broken = SimpleNamespace(to_batches=lambda max_chunksize: [SimpleNamespace(to_pylist=lambda: [{"x": object()}])])
    with pytest.raises(TypeError):
        write_table(broken, path, "jsonl")
    assert path.read_text() == "old"


def test_batches_come_in_any_order(tmp_path):
    writer = PredictionWriter(path=str(tmp_path / "out.parquet"))
    data = SimpleNamespace(asked_users=USERS, catalogue=SimpleNamespace(ids=ITEMS))
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, datamodule=data)
    for _ in range(2):  # a second prediction starts anew
        writer.on_predict_start(trainer, None)
        for part in (found([3, 1], [[1], [2]]), found([0, 2], [[3], [4]])):
            writer.on_predict_batch_end(trainer, None, part, None, 0)
        writer.on_predict_end(trainer, None)
    assert pq.read_table(tmp_path / "out.parquet")["user_id"].to_pylist() == USERS


@pytest.mark.parametrize(
    ("command", "written", "ckpt", "expected"),
    [
        ("fit", "/runs/new/checkpoints", "/runs/old/checkpoints/last.ckpt", "/runs/new"),
        ("fit", "/runs/odd", None, "/runs/odd"),
        ("fit", None, None, "/logs"),
        ("test", "/ignored/checkpoints", "/runs/old/checkpoints/last.ckpt", "/runs/old"),
        ("test", "/ignored/checkpoints", "/elsewhere/a.ckpt", "/elsewhere"),
        ("test", "/ignored/checkpoints", None, "/logs"),
    ],
)
def test_the_folder_of_a_run(command, written, ckpt, expected):
    trainer = SimpleNamespace(
        log_dir="/logs",
        default_root_dir="/root",
        checkpoint_callback=SimpleNamespace(dirpath=written),
        state=SimpleNamespace(fn=command),
        ckpt_path=ckpt,
    )
    assert str(run_folder(trainer)) == expected
