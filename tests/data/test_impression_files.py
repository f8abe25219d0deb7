"""The generic reader of impressions, in both layouts and every format."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_rec.data.readers import BadRowError, ImpressionFiles, RawImpressions

START = 1573600000
WIDE: list[dict[str, Any]] = [
    {"impression_id": "1", "user_id": "u1", "timestamp": START, "candidates": ["a", "b-1", "a"], "labels": [1, 0, 0],
     "history": ["x", "a"], "positions": [1, 2, 3], "propensities": [0.9, 0.5, 0.25], "dwell": [3.5, None, None]},
    {"impression_id": "2", "user_id": "u2", "timestamp": START + 60, "candidates": ["b-1"], "labels": None,
     "history": [], "positions": None, "propensities": None, "dwell": None},
]  # fmt: skip
TEXT = (
    "impression_id,user_id,timestamp,candidates,labels,history,positions,propensities,dwell\n"
    f"1,u1,{START},a b-1 a,1 0 0,x a,1 2 3,0.9 0.5 0.25,3.5 nan nan\n"
    f"2,u2,{START + 60},b-1,,,,,\n"
)
LONG = (
    "impression,user,time,article_id,clicked,position,propensity,read_time\n"
    f"1,u1,{START},a,1,1,0.9,3.5\n"
    f"1,u1,{START + 1},b-1,0,2,0.5,\n"
    f"2,u2,{START + 60},b-1,,,,\n"
    f"1,u1,{START + 2},a,0,3,0.25,\n"
)


def write(path: Path, content: str | list[dict[str, Any]]) -> str:
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content, encoding="utf-8")
    return str(path)


def plain(raw: RawImpressions) -> list[dict[str, Any]]:
    """Rows with None for NaN, so that they can be compared."""
    rows = raw.impressions.to_list()
    for row in rows:
        if row.get("dwell"):
            row["dwell"] = [None if math.isnan(value) else value for value in row["dwell"]]
    return rows


def test_json_lines_shards_and_compression(tmp_path: Path) -> None:
    assert plain(ImpressionFiles(write(tmp_path / "log.jsonl", WIDE)).read()) == WIDE
    assert plain(ImpressionFiles(write(tmp_path / "log.json", json.dumps(WIDE, indent=1))).read()) == WIDE
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, row in enumerate(WIDE):
        (shards / f"{number}.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    reader = ImpressionFiles(str(shards))
    assert plain(reader.read()) == WIDE
    assert len(reader.paths()) == 2


@pytest.mark.parametrize("large", [False, True])
def test_parquet(tmp_path: Path, large: bool) -> None:
    table = pa.Table.from_pylist(WIDE)
    if large:
        place = table.column_names.index("candidates")
        table = table.set_column(place, "candidates", table["candidates"].cast(pa.large_list(pa.large_string())))
    pq.write_table(table, tmp_path / "log.parquet")
    assert plain(ImpressionFiles(str(tmp_path / "log.parquet")).read()) == WIDE


def test_text_tables(tmp_path: Path) -> None:
    assert plain(ImpressionFiles(write(tmp_path / "log.csv", TEXT)).read()) == WIDE
    assert plain(ImpressionFiles(write(tmp_path / "log.tsv", TEXT.replace(",", "\t"))).read()) == WIDE
    bars = TEXT.replace("a b-1 a", "a|b-1|a").replace("1 0 0", "1|0|0").replace("x a", "x|a")
    bars = bars.replace("1 2 3", "1|2|3").replace("0.9 0.5 0.25", "0.9|0.5|0.25").replace("3.5 nan nan", "3.5|nan|nan")
    reader = ImpressionFiles(write(tmp_path / "bars.csv", bars), list_separator="|", delimiter=",")
    assert plain(reader.read()) == WIDE
    brackets = TEXT.replace("a b-1 a", "\"['a', 'b-1', 'a']\"").replace("1 0 0", '"[1, 0, 0]"')
    assert plain(ImpressionFiles(write(tmp_path / "brackets.csv", brackets)).read()) == WIDE


def test_a_row_a_candidate(tmp_path: Path) -> None:
    raw = ImpressionFiles(write(tmp_path / "log.csv", LONG)).read()
    expected = [{name: value for name, value in row.items() if name != "history"} for row in WIDE]
    assert plain(raw) == expected
    assert raw.report.n_duplicates == 0
    table = [dict(zip(LONG.split("\n")[0].split(","), line.split(","), strict=True)) for line in LONG.split()[1:]]
    assert plain(ImpressionFiles(write(tmp_path / "log.jsonl", table)).read()) == expected


def test_candidates_without_ids_are_grouped_by_user_and_time(tmp_path: Path) -> None:
    text = f"user,time,item,label\nu,{START},a,1\nv,{START},c,0\nu,{START},b,0\nu,{START + 1},a,0\nu,{START},a,1\n"
    raw = ImpressionFiles(write(tmp_path / "log.csv", text)).read()
    assert raw.impressions[:] == {
        "user_id": ["u", "v", "u"], "timestamp": [START, START, START + 1], "candidates": [["a", "b"], ["c"], ["a"]],
        "labels": [[1, 0], [0], [0]],
    }  # fmt: skip
    assert raw.report.n_duplicates == 1
    with pytest.raises(ValueError, match="nothing tells which rows are one impression"):
        ImpressionFiles(write(tmp_path / "bare.csv", "user,item,label\nu,a,1\n")).read()


def test_shards_of_candidates_name_their_lines(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", f"impression_id,user,time,item,label\n1,u,{START},a,1\n2,u,{START},b,0\n")
    second = write(tmp_path / "b.csv", f"impression_id,user,time,item,label\n3,u,{START},a,1\n3,u,{START},b,\n")
    with pytest.raises(BadRowError, match=r"b.csv, line 2: some candidates have a label and others have none"):
        ImpressionFiles([first, second]).read()
    third = write(tmp_path / "c.csv", f"impression_id,user,time,item,label\n2,v,{START},a,1\n4,u,{START},b,1\n")
    raw = ImpressionFiles([first, second, third], on_bad_rows="skip").read()
    assert raw.impressions["impression_id"][:] == ["1", "4"]
    reasons = [(Path(row.file).name, row.line, row.reason) for row in raw.report.skipped]
    assert reasons == [
        ("a.csv", 3, "the rows of this impression_id have more than one user_id"),
        ("b.csv", 2, "some candidates have a label and others have none"),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [1, 0]}, "there are 3 candidates but 2 labels"),
        ({"labels": [1, 2, 0]}, "the label 2 is neither 0 nor 1"),
        ({"labels": [1, 0.5, 0]}, "the label 0.5 is neither 0 nor 1"),
        ({"labels": [1, math.nan, 0]}, "a label is empty"),
        ({"labels": [1, None, 0]}, "a label is empty"),
        ({"labels": [1, "no", 0]}, "the label 'no' is no number"),
        ({"candidates": []}, "there is no candidate"),
        ({"candidates": None}, "there is no candidate"),
        ({"candidates": ["a", None, "b"]}, "the id of a candidate is empty"),
        ({"candidates": ["a", " ", "b"]}, "the id of a candidate is empty"),
        ({"history": ["a", None]}, "an id in the history is empty"),
        ({"positions": [1, 2]}, "there are 3 candidates but 2 positions"),
        ({"positions": [0, 1, 2]}, "the position 0 is no place on a page"),
        ({"positions": [1.5, 1, 2]}, "the position 1.5 is no place on a page"),
        ({"propensities": [0.5, 0, 1]}, "the propensity 0 is no probability"),
        ({"propensities": [0.5, 1.5, 1]}, "the propensity 1.5 is no probability"),
        ({"dwell": [-1, 0, 0]}, "the dwell time -1 is no time"),
        ({"user_id": ""}, "the user_id is empty"),
        ({"timestamp": None}, "the timestamp is empty"),
        ({"part": "later"}, "the part 'later' is none of"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    rows = [row | {"part": "train"} for row in WIDE]
    bad = rows[0] | {"impression_id": "3"} | change
    if "candidates" in change and change["candidates"] in ([], None):
        bad |= dict.fromkeys(("labels", "positions", "propensities", "dwell"))
    path = write(tmp_path / "log.jsonl", [rows[0], bad, rows[1]])
    with pytest.raises(BadRowError, match=rf"log.jsonl, line 2: {reason}"):
        ImpressionFiles(path).read()
    raw = ImpressionFiles(path, on_bad_rows="skip").read()
    assert plain(raw) == rows
    assert raw.report.n_skipped == 1


def test_labels_may_be_true_and_false_or_the_clicked_ids(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"user_id": 7, "items": [1, 2, 1], "clicked": [1]},
        {"user_id": 8, "items": [1], "clicked": []},
        {"user_id": 8, "items": [2]},
    ]
    raw = ImpressionFiles(write(tmp_path / "a.jsonl", rows)).read()
    assert raw.impressions[:] == {
        "user_id": ["7", "8", "8"], "candidates": [["1", "2", "1"], ["1"], ["2"]], "labels": [[1, 0, 1], [0], None],
    }  # fmt: skip
    rows[0]["clicked"] = [3]
    with pytest.raises(BadRowError, match=r"line 1: the clicked item '3' is not among the candidates"):
        ImpressionFiles(write(tmp_path / "b.jsonl", rows)).read()
    rows = [{"user_id": "u", "candidates": ["a", "b"], "labels": [True, False]}]
    assert ImpressionFiles(write(tmp_path / "c.jsonl", rows)).read().impressions["labels"][:] == [[1, 0]]


def test_columns_are_mapped(tmp_path: Path) -> None:
    text = f"who;when;what;hit\nu;{START};a b;0 1\n"
    columns: dict[str, Any] = {"user_id": "who", "timestamp": "when", "candidates": "what", "labels": "hit"}
    raw = ImpressionFiles(write(tmp_path / "log.csv", text), columns=columns).read()
    assert raw.impressions[0] == {"user_id": "u", "timestamp": START, "candidates": ["a", "b"], "labels": [0, 1]}
    numbers: dict[str, Any] = {"user_id": 0, "timestamp": 1, "candidates": 2, "labels": 3}
    bare = write(tmp_path / "bare.csv", text.split("\n")[1] + "\n")
    assert ImpressionFiles(bare, columns=numbers).read().impressions[0] == raw.impressions[0]
    with pytest.raises(ValueError, match="columns maps `labels` to `hits`, but the file has no such column"):
        ImpressionFiles(str(tmp_path / "log.csv"), columns=columns | {"labels": "hits"}).read()
    with pytest.raises(ValueError, match="there is no field `click` in the wide layout"):
        ImpressionFiles(str(tmp_path / "log.csv"), columns=columns | {"click": "hit"}).read()
    with pytest.raises(ValueError, match="no column looks like `user_id`"):
        ImpressionFiles(str(tmp_path / "log.csv")).read()
    left_out: dict[str, Any] = {"labels": None, "history": None, "dwell": None, "positions": None}
    raw = ImpressionFiles(write(tmp_path / "all.jsonl", WIDE), columns=left_out).read()
    assert raw.impressions.column_names == ["impression_id", "user_id", "timestamp", "candidates", "propensities"]


def test_times_in_any_writing(tmp_path: Path) -> None:
    for number, times in enumerate(
        (["1573600000000", "1573600060000"], ["2019-11-12T23:06:40Z", "2019-11-13 00:07:40+01:00"])
    ):
        rows = [row | {"timestamp": time} for row, time in zip(WIDE, times, strict=True)]
        assert plain(ImpressionFiles(write(tmp_path / f"{number}.jsonl", rows)).read()) == WIDE
    rows = [row | {"timestamp": time} for row, time in zip(WIDE, ("2019-11-12", "1573600060"), strict=True)]
    with pytest.raises(ValueError, match="The timestamps are mixed"):
        ImpressionFiles(write(tmp_path / "mixed.jsonl", rows)).read()


def test_exact_duplicates(tmp_path: Path) -> None:
    other = WIDE[0] | {"labels": [0, 0, 0]}
    raw = ImpressionFiles(write(tmp_path / "log.jsonl", [*WIDE, WIDE[0], other])).read()
    assert plain(raw) == [*WIDE, other]
    assert raw.report.n_duplicates == 1
    events = [{"user_id": "u", "candidates": ["a"], "labels": [1]}] * 2  # without ids and times: two impressions
    assert len(ImpressionFiles(write(tmp_path / "bare.jsonl", events)).read().impressions) == 2


def test_items_and_users(tmp_path: Path) -> None:
    items = write(tmp_path / "items.jsonl", [
        {"id": "a", "title": "A", "published": "2019-11-12T00:00:00Z", "tags": ["x", "y"]},
        {"id": "c", "title": "C", "published": "", "tags": []},
    ])  # fmt: skip
    users = write(tmp_path / "users.csv", "user_id,city\nu1,Bergen\n")
    log = write(tmp_path / "log.jsonl", WIDE)
    raw = ImpressionFiles(log, items, users).read()
    assert raw.items is not None
    assert raw.users is not None
    assert raw.items[:] == {
        "item_id": ["a", "c"], "title": ["A", "C"], "published": [1573516800, None], "tags": [["x", "y"], []]
    }  # fmt: skip
    assert raw.users[:] == {"user_id": ["u1"], "city": ["Bergen"]}
    assert raw.report.rows == {"impressions": 2, "items": 2, "users": 1}
    assert "2 of 4 candidates (50.0%; 1 different ids) and 1 of 2 events of histories" in str(raw.report)
    assert len(raw.source_digest) == 64
    write(tmp_path / "items.jsonl", [{"id": "a", "published": "2019-11-12"}, {"id": "b", "published": "soon"}])
    with pytest.raises(BadRowError, match=r"items.jsonl, line 2: published: 'soon' is no timestamp"):
        ImpressionFiles(log, items).read()


def test_two_layouts_are_not_mixed(tmp_path: Path) -> None:
    wide, long = write(tmp_path / "a.csv", TEXT), write(tmp_path / "b.csv", LONG)
    with pytest.raises(ValueError, match=r"a row an impression and .* a row a candidate"):
        ImpressionFiles([wide, long]).read()


def test_feedback_and_parts(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u", "candidates": ["a"], "labels": [0], "feedback": "Not for me", "split": "dev"},
        {"user_id": "v", "candidates": ["a"], "labels": [1], "split": "Train"},
    ]
    raw = ImpressionFiles(write(tmp_path / "log.jsonl", rows)).read()
    assert raw.impressions["feedback"][:] == ["Not for me", ""]
    assert raw.impressions["part"][:] == ["validation", "train"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are no impressions"):
        ImpressionFiles(write(tmp_path / "log.csv", TEXT.split("\n")[0] + "\n")).read()
    with pytest.raises(ValueError, match="is empty"):
        ImpressionFiles(write(tmp_path / "empty.jsonl", "")).read()
