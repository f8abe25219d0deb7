"""The reader of MIND's format, on the small invented data set and on files made on the spot."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from lightning_rec.data.readers import BadRowError, ImpressionReader, Mind, RawImpressions, ReadReport
from lightning_rec.data.readers.mind import judge, mind_times

FILES = Path(__file__).parent / "files" / "mind"
NEWS = 'N1\tnews\tlocal\tA "title\tText.\thttps://x\t[]\t[]\nN-2\tsports\tgolf\tOther\t\thttps://y\t\t\n'
ROW = "1\tU1\t11/13/2019 9:05:58 AM\tN1 N9\tN1-1 N-2-0\n"


def folder(path: Path, behaviors: str = ROW, news: str | None = NEWS) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "behaviors.tsv").write_bytes(behaviors.encode())
    if news is not None:
        (path / "news.tsv").write_bytes(news.encode())
    return str(path)


def seconds(*when: int) -> int:
    return int(datetime(*when, tzinfo=UTC).timestamp())  # type: ignore[arg-type, misc]  # year, month, ...


def test_one_folder(tmp_path: Path) -> None:
    reader = Mind(folder(tmp_path))
    assert isinstance(reader, ImpressionReader)
    raw = reader.read()
    assert isinstance(raw, RawImpressions)
    assert raw.impressions[:] == {
        "impression_id": ["1"], "user_id": ["U1"], "timestamp": [seconds(2019, 11, 13, 9, 5, 58)],
        "history": [["N1", "N9"]], "candidates": [["N1", "N-2"]], "labels": [[1, 0]],
    }  # fmt: skip
    assert raw.items is not None
    assert raw.items[:] == {
        "item_id": ["N1", "N-2"], "title": ['A "title', "Other"], "abstract": ["Text.", ""],
        "category": ["news", "sports"], "subcategory": ["local", "golf"], "entities": [[], []],
        "entity_names": [[], []],
    }  # fmt: skip
    assert raw.report.rows == {"impressions": 1, "items": 2}
    assert "1 of 2 events of histories (50.0%; 1 different ids)" in str(raw.report)
    assert reader.paths() == [str(tmp_path / "behaviors.tsv"), str(tmp_path / "news.tsv")]


def test_the_invented_data_set() -> None:
    raw = Mind(str(FILES)).read()
    rows = raw.impressions.to_list()
    assert Counter(row["part"] for row in rows) == {"train": 40, "validation": 15, "predict": 5}
    assert all((row["labels"] is None) == (row["part"] == "predict") for row in rows)
    assert all(len(row["labels"]) == len(row["candidates"]) for row in rows if row["labels"] is not None)
    clicks = [sum(row["labels"]) for row in rows if row["labels"] is not None]
    assert 0 in clicks
    assert any(sum(row["labels"] or [0]) == len(row["candidates"]) for row in rows)
    assert any(len(set(row["candidates"])) < len(row["candidates"]) for row in rows if row["part"] == "train")
    assert min(len(row["history"]) for row in rows) == 0
    assert max(len(row["history"]) for row in rows if row["part"] == "train") == 60
    assert raw.items is not None
    items = {row["item_id"]: row for row in raw.items.to_list()}
    assert len(items) == 24
    assert items["N9"]["abstract"] == ""
    assert items["N1"]["entities"] == ["Q900101", "Q900102"]
    assert items["N1"]["entity_names"] == ["Harbour Cup", "River Rowing Club"]
    assert not items["N7"]["abstract"].endswith("Updated.")  # the first row of an article is kept
    assert "1 rows of news.tsv give an article again with another text" in str(raw.report)
    assert "2 of 279 candidates" in str(raw.report)
    by_hand = [line.split("\t") for line in (FILES / "dev" / "behaviors.tsv").read_text().splitlines()]
    mine = [row for row in rows if row["part"] == "validation"]
    for (name, user, time, history, shown), row in zip(by_hand, mine, strict=True):
        assert (row["impression_id"], row["user_id"], row["history"]) == (name, user, history.split())
        pairs = [token.rsplit("-", 1) for token in shown.split()]
        assert [(item, int(label)) for item, label in pairs] == list(zip(row["candidates"], row["labels"], strict=True))
        assert row["timestamp"] == datetime.strptime(time + " +0000", "%m/%d/%Y %I:%M:%S %p %z").timestamp()


def test_parts_as_folders_archives_and_options(tmp_path: Path) -> None:
    expected = Mind(str(FILES)).read()
    for part, name in (("train", "MINDsmall_train"), ("dev", "MINDsmall_dev"), ("test", "MINDlarge_test")):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for file in ("behaviors.tsv", "news.tsv"):
                archive.write(FILES / part / file, file)
    shutil.copytree(FILES / "train", tmp_path / "MINDsmall_train")  # unpacked beside its archive: read once
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for path in sorted(FILES.rglob("*.tsv")):
            archive.write(path, path.relative_to(FILES.parent))
    named = Mind(
        train=str(FILES / "train"), validation=str(tmp_path / "MINDsmall_dev.zip"), test=str(tmp_path / "whole.zip")
    )
    whole = str(tmp_path / "whole.zip")
    for reader in (Mind(whole), named):
        raw = reader.read()
        assert raw.impressions[:] == expected.impressions[:]
        assert raw.items is not None
        assert expected.items is not None
        assert raw.items[:] == expected.items[:]
    (tmp_path / "whole.zip").unlink()
    assert Mind(str(tmp_path)).read().impressions[:] == expected.impressions[:]
    assert len(Mind(str(tmp_path)).paths()) == 6
    folder(tmp_path / "MINDlarge_train")
    with pytest.raises(ValueError, match="Several folders could be the train part"):
        Mind(str(tmp_path)).read()


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Give either path"):
        Mind().read()
    with pytest.raises(ValueError, match="Give either path"):
        Mind(str(FILES), train=str(FILES / "train")).read()
    with pytest.raises(FileNotFoundError, match="There is no folder or zip archive"):
        Mind(str(tmp_path / "none")).read()
    with pytest.raises(FileNotFoundError, match=r"holds no behaviors.tsv"):
        Mind(str(tmp_path)).read()
    with pytest.raises(FileNotFoundError, match=r"no news.tsv"):
        Mind(folder(tmp_path / "a", news=None)).read()
    with pytest.raises(ValueError, match="tells no part"):
        Mind(str(tmp_path)).read()
    with pytest.raises(ValueError, match=r"has no labels .* cannot serve as the train part"):
        Mind(train=str(FILES / "test")).read()


def test_an_unlabelled_folder_is_to_be_predicted(tmp_path: Path) -> None:
    raw = Mind(folder(tmp_path, "1\tU1\t11/13/2019 9:05:58 PM\t\tN1 N-2 N-1\n")).read()
    assert raw.impressions["part"][:] == ["predict"]
    assert raw.impressions["labels"][:] == [None]
    assert raw.impressions["candidates"][:] == [["N1", "N-2", "N-1"]]
    assert raw.impressions["history"][:] == [[]]
    assert "has no labels; its impressions can be ranked, but not tested" in str(raw.report)


def test_news_of_one_part_may_serve_all(tmp_path: Path) -> None:
    folder(tmp_path / "train")
    folder(tmp_path / "dev", news=None)
    raw = Mind(str(tmp_path)).read()
    assert raw.impressions["part"][:] == ["train", "validation"]
    assert raw.items is not None
    assert len(raw.items) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("2\tU1\t11/13/2019 9:05:58 AM\tN1\tN1-1 N3-2\n", "the label '2', which is neither 0 nor 1"),
        ("2\tU1\t11/13/2019 9:05:58 AM\tN1\tN1-2 N1-3\n", "the label '2', which is neither 0 nor 1"),
        ("2\tU1\t11/13/2019 9:05:58 AM\tN1\tN1-1 N3\n", "others, such as 'N3', have none"),
        ("2\tU1\t11/13/2019 9:05:58 AM\tN1\tN1-1 -0\n", "a candidate has a label and no id"),
        ("2\tU1\t11/13/2019 9:05:58 AM\tN1\t\n", "there is no candidate"),
        ("2\t\t11/13/2019 9:05:58 AM\tN1\tN1-1\n", "the user_id is empty"),
        ("2\tU1\t2/30/2019 9:05:58 AM\tN1\tN1-1\n", "'2/30/2019 9:05:58 AM' is no time"),
        ("2\tU1\t\tN1\tN1-1\n", "the time is empty"),
        ("2\tU1\t11/13/2019 9:05:58 AM\tN1-1\n", "4 fields separated by"),
    ],
)
def test_bad_rows(tmp_path: Path, row: str, reason: str) -> None:
    path = folder(tmp_path, ROW + row + ROW.replace("1\t", "3\t", 1))
    with pytest.raises(BadRowError, match=rf"behaviors.tsv, line 2: .*{reason}"):
        Mind(path).read()
    raw = Mind(path, on_bad_rows="skip").read()
    assert raw.impressions["impression_id"][:] == ["1", "3"]
    assert raw.report.n_skipped == 1
    assert raw.report.skipped[0].line == 2


def test_bad_rows_of_a_later_part_name_their_file(tmp_path: Path) -> None:
    folder(tmp_path / "train", ROW * 1)
    folder(tmp_path / "dev", ROW + ROW.replace("U1", " "))
    with pytest.raises(BadRowError, match=r"dev.behaviors.tsv, line 2: the user_id is empty"):
        Mind(str(tmp_path)).read()


def test_bad_articles(tmp_path: Path) -> None:
    path = folder(tmp_path, news=NEWS + "N3\ta\tb\tTitle\t\thttps://z\t{broken\t[]\n\ta\tb\tTitle\t\t\t\t\n")
    with pytest.raises(BadRowError, match=r"news.tsv, line 4: the article's id is empty"):
        Mind(path).read()
    raw = Mind(path, on_bad_rows="skip").read()
    assert [row.line for row in raw.report.skipped] == [4, 3]
    assert "no JSON list" in raw.report.skipped[1].reason
    assert raw.items is not None
    assert raw.items["item_id"][:] == ["N1", "N-2"]


def test_a_table_of_articles_may_end_earlier(tmp_path: Path) -> None:
    raw = Mind(folder(tmp_path, news="N1\tnews\tlocal\tTitle\nN-2\tnews\tlocal\tOther\n")).read()
    assert raw.items is not None
    assert raw.items[1]["title"] == "Other"
    assert raw.items[1]["abstract"] == ""
    with pytest.raises(ValueError, match="has 2 columns separated by tabs"):
        Mind(folder(tmp_path, news="N1\tnews\n")).read()


def test_exact_duplicates_are_dropped_and_repeats_are_not(tmp_path: Path) -> None:
    other = ROW.replace("N1-1", "N1-0")  # the same id, user and time, another list
    raw = Mind(folder(tmp_path, ROW + other + ROW + ROW.replace("1\t", "2\t", 1))).read()
    assert raw.report.n_duplicates == 1
    assert raw.impressions["impression_id"][:] == ["1", "1", "2"]
    assert raw.impressions["labels"][:] == [[1, 0], [0, 0], [1, 0]]


def test_encoding_and_line_ends(tmp_path: Path) -> None:
    raw = Mind(folder(tmp_path, ROW.replace("\n", "  \r\n"))).read()
    assert raw.impressions["candidates"][:] == [["N1", "N-2"]]
    (tmp_path / "news.tsv").write_bytes(NEWS.replace("Other", "Caf\xe9").encode("latin-1"))
    with pytest.raises(BadRowError, match=r"news.tsv, line 2: byte 0xe9"):
        Mind(str(tmp_path)).read()
    items = Mind(str(tmp_path), encoding="latin-1").read().items
    assert items is not None
    assert items[1]["title"] == "Caf\xe9"


@pytest.mark.parametrize(
    ("tokens", "known", "mainly", "labelled", "bad"),
    [
        (["N-0", "N2"], {"N-0", "N2"}, False, False, False),  # an id that ends in -0, as the articles know
        (["N-0", "N2"], set(), False, False, False),  # no article is known: like the rest of the file
        (["N1-0", "N2"], {"N1", "N2"}, False, True, True),  # a labelled candidate amid unlabelled ones
        (["N1-0", "N2-1"], {"N1"}, False, True, False),  # a labelled row in a file mostly without labels
        (["A-0", "A-1"], {"A-0", "A-1"}, True, False, False),
        (["A-0", "A-1"], set(), False, False, False),
        (["N1", "N2"], set(), True, False, False),  # an unlabelled row in a labelled file
        (["N-24", "N2"], {"N-24"}, True, False, False),
        (["N1-1.0"], {"N1"}, True, True, True),
    ],
)
def test_odd_rows(tokens: list[str], known: set[str], mainly: bool, labelled: bool, bad: bool) -> None:
    assert (judge(tokens, known, mainly)[0], bool(judge(tokens, known, mainly)[1])) == (labelled, bad)


def test_times() -> None:
    texts = ["11/9/2019 12:00:00 AM", "11/9/2019 12:30:01 PM", "2/29/2020 1:02:03 PM", "13/1/2019 1:00:00 AM", None]
    got, bad = mind_times(pa.chunked_array([texts[:2], texts[2:]], pa.string()), ReadReport())
    assert got.tolist() == [
        seconds(2019, 11, 9), seconds(2019, 11, 9, 12, 30, 1), seconds(2020, 2, 29, 13, 2, 3), 0, 0
    ]  # fmt: skip
    assert set(bad) == {3, 4}
    got, bad = mind_times(pa.chunked_array([["1573635958", "1573635959"]]), ReadReport())
    assert got.tolist() == [1573635958, 1573635959]
    assert not bad


def test_columns_in_the_wrong_order(tmp_path: Path) -> None:
    path = folder(tmp_path, "11/13/2019 9:05:58 AM\t1\tU1\tN1\tN1-1\n" * 3)
    with pytest.raises(ValueError, match=r"Most times of .* cannot be read"):
        Mind(path).read()


def test_the_real_sample() -> None:
    data = os.environ.get("LIGHTNING_REC_DATA")
    if not data or not (Path(data) / "news-mind-sample").is_dir():
        pytest.skip("LIGHTNING_REC_DATA names no folder that holds news-mind-sample")
    raw = Mind(str(Path(data) / "news-mind-sample")).read()
    assert raw.report.rows == {"impressions": 5000, "items": 2000}
    assert raw.report.n_skipped == raw.report.n_duplicates == 0
    lines = (Path(data) / "news-mind-sample" / "behaviors.tsv").read_text().splitlines()
    shown = [line.split("\t")[4].split() for line in lines]
    assert raw.impressions["candidates"][:] == [[token.rsplit("-", 1)[0] for token in row] for row in shown]
    assert raw.impressions["labels"][:] == [[int(token[-1]) for token in row] for row in shown]
    assert raw.impressions["history"][:] == [line.split("\t")[3].split() for line in lines]
