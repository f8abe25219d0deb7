"""Ranked impressions in the order of the files, and MIND's submission format read back."""

import re
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from lightning_rec.callbacks import PredictionWriter
from lightning_rec.callbacks.impression_results import impression_table, submission, without_padding

IMPRESSIONS = ["17", "003", "17", "9"]  # ids need not be distinct
USERS = ["U1", "Ünï", "U1", "U4"]
ITEMS = ["", "N1", "N2", "N3", "鞋"]


def part(index, rows, scores, fallback=None):
    width = max((len(row) for row in rows), default=0)
    return {
        "index": torch.tensor(index),
        "sizes": torch.tensor([len(row) for row in rows]),
        "rows": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "scores": torch.tensor([row + [99.0] * (width - len(row)) for row in scores]),
        "fallback": torch.tensor(fallback or [False] * len(index)),
    }


PARTS = [
    part([3, 1], [[4, 4, 1], [2, 3]], [[1.0, 1.0, 2.0], [0.5, 0.7]], [True, False]),
    part([0, 2], [[1], []], [[-3.0], []]),
]


def joined():
    flat = [without_padding(one) for one in PARTS]
    return {name: torch.cat([one[name] for one in flat]) for name in flat[0]}


def test_ranks_by_hand():
    table = impression_table(joined(), IMPRESSIONS, USERS, ITEMS)
    names = ["impression_id", "user_id", "rank", "item_id", "score", "source"]
    assert [tuple(row[name] for name in names) for row in table.to_pylist()] == [
        ("17", "U1", 1, "N1", -3.0, "towers"),
        ("003", "Ünï", 1, "N3", pytest.approx(0.7), "towers"),
        ("003", "Ünï", 2, "N2", 0.5, "towers"),
        ("9", "U4", 1, "N1", 2.0, "popularity"),
        ("9", "U4", 2, "鞋", 1.0, "popularity"),
        ("9", "U4", 3, "鞋", 1.0, "popularity"),
    ]
    assert table.schema == impression_table({}, [], [], ITEMS).schema


def test_submission_by_hand():
    lines = list(submission(joined(), IMPRESSIONS))
    # ties go by the place in the file; an impression without candidates keeps its line
    assert lines == ["17 [1]\n", "003 [2,1]\n", "17 []\n", "9 [2,3,1]\n"]
    assert list(submission({}, [])) == []


@pytest.mark.parametrize("seed", range(5))
def test_submission_against_sorting(seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 30, (12,), generator=draw).tolist()
    scores = [torch.randint(0, 9, (size,), generator=draw).float().tolist() for size in sizes]
    order = torch.randperm(12, generator=draw).tolist()
    found = without_padding(part(order, [[1] * sizes[i] for i in order], [scores[i] for i in order]))
    for number, line in enumerate(submission(found, [f"i{number}" for number in range(12)])):
        name, ranks = re.fullmatch(r"(\S+) \[([\d,]*)\]\n", line).groups()
        assert name == f"i{number}"
        best_first = sorted(range(sizes[number]), key=lambda place: -scores[number][place])
        expected = {place: rank for rank, place in enumerate(best_first, 1)}
        assert [int(rank) for rank in ranks.split(",") if rank] == [expected[place] for place in range(sizes[number])]


MODULE = SimpleNamespace(answers_impressions=True)


@pytest.mark.parametrize("format", ["parquet", "mind"])
def test_batches_come_in_any_order(tmp_path, format):
    writer = PredictionWriter(path=str(tmp_path / "out"), format=format)
    data = SimpleNamespace(asked_impressions=IMPRESSIONS, asked_users=USERS, catalogue=SimpleNamespace(ids=ITEMS))
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, datamodule=data)
    for _ in range(2):  # a second prediction starts anew
        writer.on_predict_start(trainer, MODULE)
        for outputs in PARTS:
            writer.on_predict_batch_end(trainer, MODULE, outputs, None, 0)
        writer.on_predict_end(trainer, MODULE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if format == "mind":
        assert (tmp_path / "out").read_bytes() == b"17 [1]\n003 [2,1]\n17 []\n9 [2,3,1]\n"
    else:
        assert pq.read_table(tmp_path / "out")["impression_id"].to_pylist() == ["17", "003", "003", "9", "9", "9"]


def test_recommendations_have_no_submission_format():
    with pytest.raises(ValueError, match=r"predictions\.format: mind ranks the candidates of impressions"):
        PredictionWriter(format="mind").on_predict_start(None, SimpleNamespace())
