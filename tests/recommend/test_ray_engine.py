"""Answers by Ray Data against those of the local engine, on a Ray of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_rec.cli import main
from lightning_rec.recommend import Recommender, Request
from lightning_rec.recommend.files import read_rows, read_users
from lightning_rec.recommend.ray_engine import _groups, _lines, _rows, answer_with_ray
from lightning_rec.recommend.rows import answer_rows, wanted_by

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytest.importorskip("ray.data", reason="the extra ray is not installed")


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


def _same(wanted: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(wanted, found, strict=True):
        assert {"user": None} | ours | {"items": []} == {"user": None} | theirs | {"items": []}
        assert [item["id"] for item in ours["items"]] == [item["id"] for item in theirs["items"]]
        assert [item["score"] for item in theirs["items"]] == pytest.approx(
            [item["score"] for item in ours["items"]], abs=1e-5
        )


def test_the_same_answers_in_the_same_order(artefact_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = artefact_of("id_sequence")
    recommender = Recommender.load(folder)
    ids = recommender.artefact.ids
    users = recommender.users(40)
    rows: list[dict[str, Any]] = [{"user": users[n % len(users)], "k": 1 + n % 5} for n in range(600)]
    rows += [{"history": [ids[2], "nobody's"], "k": 3}, {"k": 2}, {"user": users[0], "where": {"categories": "tea"}}]
    source = tmp_path / "requests.parquet"
    names = ("user", "history", "k", "where")
    table = pa.Table.from_pylist([dict.fromkeys(names) | row for row in rows])
    pq.write_table(table, source, row_group_size=100)
    options = wanted_by(Request(k=7, exclude=["t01"]))
    before = ray.data.DataContext.get_current().execution_options.preserve_order
    _same(answer_rows(recommender, rows, options), list(answer_with_ray(folder, str(source), options, workers=2)))
    assert ray.data.DataContext.get_current().execution_options.preserve_order == before
    assert ray.is_initialized(), "a Ray that ran before runs on"


def test_lines_by_the_command_line(artefact_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = str(artefact_of("id_sequence"))
    source, local, cluster = (tmp_path / name for name in ("in.jsonl", "local.jsonl", "ray.jsonl"))
    # U+2028 ends no line; the last line is no UTF-8
    text = '\ufeff{"user": "u001"}\r\n  \n{"user": "a\u2028b", "k": 2}\n{"usr": 1}\n'
    source.write_bytes(text.encode() + b'{"user": "\xff"}\n')
    options = ["--input", str(source), "--on_bad_rows", "skip", "--k", "3", "--where.categories", "tea"]
    main(["recommend", folder, *options, "--output", str(local)])
    main(["recommend", folder, *options, "--output", str(cluster), "--engine", "ray"])
    rows = [[json.loads(line) for line in path.open(encoding="utf-8")] for path in (local, cluster)]
    _same(*rows)
    assert ["error" in row for row in rows[1]] == [False, False, True, True]


def test_what_the_workers_get(tmp_path: Path) -> None:
    users, table = tmp_path / "users.csv", tmp_path / "requests.parquet"
    users.write_text('user_id\nu003\n\n""\nu001\n')
    (part,) = _lines(read_users(str(users)))
    assert [json.loads(line) for line in _rows(part)] == [{"user": "u003"}, None, {"user": "u001"}]
    assert len(_lines(iter(['{"k": 1}'] * 5000))) == 2
    pq.write_table(pa.table({"k": range(1, 8)}), table, row_group_size=3)
    parts = _groups(str(tmp_path))
    assert [[row["k"] for row in _rows(part)] for part in parts] == [[1, 2, 3], [4, 5, 6], [7]]
    assert [row for part in parts for row in _rows(part)] == list(read_rows(str(tmp_path)))


def test_nothing_asked_is_nothing_answered(artefact_of: Callable[[str], Path], tmp_path: Path) -> None:
    empty, table = tmp_path / "empty.jsonl", tmp_path / "empty.parquet"
    empty.write_text("\n\n")
    pq.write_table(pa.table({"k": pa.array([], pa.int64())}), table)
    for source in (empty, table):
        assert list(answer_with_ray(artefact_of("id_sequence"), str(source), {})) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "with --input"),
        (["--input", "nothing.parquet"], "no file"),
        (["--users", "nothing.txt"], "no file"),
        (["--input", "nothing.parquet", "--workers", "0"], "workers is 0"),
    ],
)
def test_what_ray_cannot_read_is_said(
    artefact_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["recommend", str(artefact_of("id_sequence")), "--engine", "ray", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
