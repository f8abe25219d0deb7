"""Files of requests and of users are read as they stand; files of answers are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_rec.recommend.files import BATCH, batches, check_apart, open_rows, read_rows, read_users
from lightning_rec.recommend.rows import ANSWERS


def _written(path: Path, content: str | bytes | pa.Table) -> str:
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "users"),
    [
        ("u.txt", "001\n\n1\r\n1.0\n  \nA,B\n", ["001", "1", "1.0", "A,B"]),
        ("users", b"\xef\xbb\xbfana\nbo", ["ana", "bo"]),
        ("u.csv", 'age,user_id\n30,001\n31,"a,b"\n32,NA\n', ["001", "a,b", "NA"]),
        ("u.tsv", "user\tage\n001\t30\n", ["001"]),
        ("u.jsonl", '{"user_id": "001", "age": 3}\n\n{"user": 7}\n', ["001", "7"]),
        ("u.parquet", pa.table({"age": [1, 2], "user_id": ["001", "b"]}), ["001", "b"]),
        ("n.parquet", pa.table({"user_id": pa.array([7, None, 10**12], pa.int64())}), ["7", None, "1000000000000"]),
        ("empty.txt", "", []),
        ("empty.csv", "user_id\n", []),
        ("gap.csv", "user_id,age\n,3\nb,4\n", [None, "b"]),
        ("short.csv", "age,user_id\n3\n4,b\n", [None, "b"]),
    ],
)
def test_users(tmp_path: Path, name: str, content: Any, users: list[str | None]) -> None:
    found = list(read_users(_written(tmp_path / name, content)))
    assert found == [None if user is None else {"user": user} for user in users]


def test_what_is_no_id_stays_what_it_is(tmp_path: Path) -> None:
    table = pa.table({"user_id": [1.0, 2.5]})
    assert list(read_users(_written(tmp_path / "f.parquet", table))) == [{"user": 1.0}, {"user": 2.5}]
    lines = ["[1]\n", "{\n", '{"age": 3}\n', '{"user": true}\n']
    assert list(read_users(_written(tmp_path / "f.jsonl", "".join(lines)))) == ["[1]\n", "{\n", None, {"user": True}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("u.csv", "userid,age\na,1\n", r"has no column user_id .*it has: userid, age\. Rename userid"),
        ("u.parquet", pa.table({"age": [1]}), r"no column user_id .*Give a file with one id a line"),
        ("bad.parquet", "no table", r"bad\.parquet is no Parquet file"),
    ],
)
def test_a_table_without_users_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_users(_written(tmp_path / name, content)))


def test_rows(tmp_path: Path) -> None:
    text = '\ufeff{"k": 1}\n\n  \n{"text": "a\u2028b"}'  # U+2028 ends no line
    assert list(read_rows(_written(tmp_path / "in.jsonl", text))) == ['{"k": 1}\n', '{"text": "a\u2028b"}']
    maps = pa.array([[("categories", 2)], None], pa.map_(pa.string(), pa.int64()))
    table = pa.table({"user": ["a", None], "at_most": maps, "where": [{"c": "red", "d": None}, {"c": None, "d": None}]})
    rows = [{"user": "a", "at_most": {"categories": 2}, "where": {"c": "red"}}, {"where": {}}]
    assert list(read_rows(_written(tmp_path / "in.parquet", table))) == rows
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in (2, 1):
        _written(folder / f"part-{number}.parquet", pa.table({"k": [number]}))
    assert list(read_rows(str(folder))) == [{"k": 1}, {"k": 2}]


def test_missing_files_are_named(tmp_path: Path) -> None:
    for reader in (read_rows, read_users):
        for name in ("nothing.jsonl", "nothing.parquet"):
            with pytest.raises(FileNotFoundError, match=r"There is no file .*nothing"):
                list(reader(str(tmp_path / name)))
    for name in ("out.jsonl", "out.parquet"):
        with (
            pytest.raises(FileNotFoundError, match=r"no folder .*away to write out"),
            open_rows(str(tmp_path / "away" / name), ANSWERS),
        ):
            pass


def test_batches() -> None:
    assert [len(batch) for batch in batches(iter(range(2 * BATCH + 1)))] == [BATCH, BATCH, 1]
    assert list(batches(iter([]))) == []


def _answered(path: Path, fails: bool) -> None:
    with open_rows(str(path), ANSWERS) as write:
        write({"user": "a", "items": [{"id": "i", "score": 0.5, "text": "ä"}], "path": "towers"})
        if fails:
            raise ValueError("stop")


def test_answers_are_written(tmp_path: Path) -> None:
    item = {"id": "i", "score": 0.5, "text": "ä"}
    _answered(tmp_path / "out.jsonl", fails=False)
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["items"] == [item]
    _answered(tmp_path / "out.parquet", fails=False)
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert row == {"user": "a", "items": [item], "path": "towers", "unknown": None, "error": None}


def test_a_parquet_file_that_was_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    _answered(tmp_path / "out.parquet", fails=False)
    before = (tmp_path / "out.parquet").read_bytes()
    with pytest.raises(ValueError, match="stop"):
        _answered(tmp_path / "out.parquet", fails=True)
    assert (tmp_path / "out.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_nothing_is_written_over_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="name another file with --output"):
        check_apart(str(tmp_path / "a.jsonl"), str(tmp_path / "link.jsonl"))
    check_apart("-", "-")
    check_apart(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
