"""The generic reader, on small invented files in every form."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_rec.data.readers import BadRowError, Files

LOG = "userId,movieId,rating,timestamp\nann,001,4.5,847434881\nbob,1,3,847434882\nann,1.0,,847434883\n"
ROWS = {
    "user_id": ["ann", "bob", "ann"],
    "item_id": ["001", "1", "1.0"],
    "timestamp": [847434881, 847434882, 847434883],
}


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def check_log(path: str | list[str], **options: object) -> None:
    got = Files(path, **options).read().interactions[:]  # type: ignore[arg-type]  # options vary by test
    assert {name: got[name] for name in ROWS} == ROWS
    assert got["rating"][:2] == [4.5, 3.0]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", "::"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_delimiter_is_found(tmp_path: Path, delimiter: str, end: str) -> None:
    check_log(write(tmp_path, "log.txt", LOG.replace(",", delimiter).replace("\n", end)))


@pytest.mark.parametrize("name", ["log.csv.gz", "log.csv.bz2", "log.csv.xz", "log.zip", "misnamed.csv"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "csv": gzip.compress}
    path = tmp_path / name
    if name.endswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data/log.csv", LOG)
            archive.writestr("README.md", "About.")
    else:
        path.write_bytes(compress[path.suffix[1:]](LOG.encode()))
    check_log(str(path))
    assert list(tmp_path.iterdir()) == [path]  # nothing is extracted


def test_a_damaged_archive_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"log.csv.gz is damaged"):
        Files(write(tmp_path, "log.csv.gz", gzip.compress(LOG.encode() * 99)[:60])).read()


@pytest.mark.parametrize("name", ["../evil.csv", "/evil.csv", "a/../../evil.csv", "C:\\evil.csv"])
def test_archive_names_that_escape_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, LOG)
    with pytest.raises(ValueError, match="would escape its folder"):
        Files(str(path)).read()


def test_shards_globs_folders_lists_and_members(tmp_path: Path) -> None:
    head, *rows = LOG.splitlines(keepends=True)
    (tmp_path / "log").mkdir()
    for number in (2, 0, 1):
        write(tmp_path / "log", f"part-{number}.csv", head + rows[number])
    write(tmp_path / "log", "_SUCCESS", "")
    check_log(str(tmp_path / "log"))
    check_log(str(tmp_path / "log" / "part-*.csv"))
    check_log([str(tmp_path / "log" / f"part-{number}.csv") for number in range(3)])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a/log.csv", LOG)
        archive.writestr("a/films.csv", "movieId,title\n1,One\n")
    check_log(str(tmp_path / "all.zip" / "a" / "log.csv"))


def test_shards_with_other_columns_name_the_file(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", LOG)
    write(tmp_path, "b.csv", "userId,moveeId\nann,1\n")
    with pytest.raises(ValueError, match=r"b\.csv: no column looks like `item_id`.*`userId`, `moveeId`"):
        Files(str(tmp_path)).read()


@pytest.mark.parametrize("array", [False, True])
def test_json_lines_and_arrays(tmp_path: Path, array: bool) -> None:
    records = [
        {"user": "ann", "item": 5863, "stars": 4, "time": 847434881},
        {"user": "bob", "item": None, "stars": 5, "time": 847434882},
        {"user": "bob", "item": "001", "time": 847434883, "extra": [1]},
    ]
    text = json.dumps(records, indent=1) if array else "\n".join(map(json.dumps, records))
    path = write(tmp_path, "log.json", text)
    with pytest.raises(BadRowError, match=rf"line {8 if array else 2}: the item_id is empty"):
        Files(path).read()
    got = Files(path, on_bad_rows="skip").read().interactions[:]
    assert got["item_id"] == ["5863", "001"]
    assert got["rating"][0] == 4


def test_a_broken_json_line_is_a_bad_row(tmp_path: Path) -> None:
    path = write(
        tmp_path, "log.jsonl", '{"user": "a", "item": "x"}\n{"user": "a", "it\n[1]\n{"user": "b", "item": "y"}\n'
    )
    with pytest.raises(BadRowError, match="line 2: the line is no JSON"):
        Files(path).read()
    raw = Files(path, on_bad_rows="skip").read()
    assert raw.interactions["item_id"][:] == ["x", "y"]
    assert [row.line for row in raw.report.skipped] == [2, 3]


def test_parquet_with_typed_columns(tmp_path: Path) -> None:
    stamps = pa.array([847434881, 847434882, 847434883], pa.timestamp("s"))
    table = pa.table({"user": [1, 2, 3], "item": [5863.0, None, 7.0], "rating": [1.0, 2.0, 3.5], "time": stamps})
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(BadRowError, match="row 2: the item_id is empty"):
        Files(str(tmp_path / "log.parquet")).read()
    got = Files(str(tmp_path / "log.parquet"), on_bad_rows="skip").read().interactions[:]
    assert got == {
        "user_id": ["1", "3"], "item_id": ["5863", "7"], "rating": [1.0, 3.5], "timestamp": [847434881, 847434883],
    }  # fmt: skip
    ids = pa.table({"user": ["a"] * 2, "item": pa.array([5863, 5864])})
    pq.write_table(ids, tmp_path / "ids.parquet")
    assert Files(str(tmp_path / "ids.parquet")).read().interactions["item_id"][:] == ["5863", "5864"]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    check_log(write(tmp_path, "log.csv", "\ufeff" + LOG))
    record = '\ufeff{"user": "a", "item": "x"}\n'
    assert len(Files(write(tmp_path, "log.jsonl", record)).read().interactions) == 1


def test_a_bad_byte_names_line_offset_and_option(tmp_path: Path) -> None:
    films = b"movieId,title\n1,One\n2,Caf\xe9\n3,Three\n"
    log, items = write(tmp_path, "log.csv", LOG), write(tmp_path, "films.csv", films)
    with pytest.raises(BadRowError, match=r"films.csv, line 3: byte 0xe9 at offset 25 .* encoding option"):
        Files(log, items).read()
    raw = Files(log, items, on_bad_rows="skip").read()
    assert raw.items is not None
    assert raw.items["title"][:] == ["One", "Three"]
    assert raw.report.skipped[0].line == 3
    latin = Files(log, items, encoding="latin-1").read().items
    assert latin is not None
    assert latin["title"][1] == "Café"
    assert films[25] == 0xE9


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, "log.csv", LOG.replace("ann", "änn").encode(encoding))
    assert Files(path, encoding=encoding).read().interactions["user_id"][0] == "änn"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_titles_that_look_missing_stay(tmp_path: Path, suffix: str) -> None:
    titles = ["null", "NA", "None", "nan", "N/A", "#N/A", "", "true", "3.0"]
    log = write(tmp_path, "log.csv", LOG)
    delimiter = "\t" if suffix == "tsv" else ","
    text = f"item{delimiter}title\n" + "".join(f"{i}{delimiter}{title}\n" for i, title in enumerate(titles))
    if suffix == "jsonl":
        text = "".join(json.dumps({"item": i, "title": title}) + "\n" for i, title in enumerate(titles))
    items = Files(log, write(tmp_path, f"items.{suffix}", text)).read().items
    assert items is not None
    assert items["title"][:] == titles


def test_tab_separated_text_has_no_quotes_and_ends_at_line_feeds(tmp_path: Path) -> None:
    titles = ['An "unclosed quote', '"Opened', "bare\rreturn", "a\u2028b\x0bc\x85d", 'say ""hi""']
    text = "item\ttitle\tgenre\n" + "".join(f"{i}\t{title}\tg\n" for i, title in enumerate(titles))
    raw = Files(write(tmp_path, "log.csv", LOG), write(tmp_path, "items.tsv", text)).read()
    assert raw.items is not None
    assert raw.items["title"][:] == titles
    assert raw.items["genre"][:] == ["g"] * 5


def test_csv_quotes(tmp_path: Path) -> None:
    titles = ["One, two", 'a "b" c', "line one\nline two\n\nline four", "windows\r\nend", "plain"]
    cells = ['"' + title.replace('"', '""') + '"' for title in titles[:4]] + ["plain"]
    text = "item,title,year\n" + "".join(f"{i},{cell},1999\n" for i, cell in enumerate(cells)) + '\nx,5" nail,2000\n'
    raw = Files(write(tmp_path, "log.csv", LOG), write(tmp_path, "items.csv", text)).read()
    assert raw.items is not None
    assert raw.items["title"][:] == [*titles, '5" nail']
    bad = text + "y,z\n"
    with pytest.raises(BadRowError, match=r"items.csv, line 13: 2 fields separated by ',', but 3 columns"):
        Files(write(tmp_path, "log.csv", LOG), write(tmp_path, "items.csv", bad)).read()


def test_an_unclosed_quote_in_csv_names_the_line_where_it_opens(tmp_path: Path) -> None:
    log = write(tmp_path, "log.csv", LOG)
    text = 'item,title\n1,One\n2,"two\nlines"\n3,"Never closed\n4,Four\n5,Five\n'
    path = write(tmp_path, "items.csv", text)
    with pytest.raises(BadRowError, match=r"items.csv, line 5: a quote opens here and is never closed"):
        Files(log, path).read()
    raw = Files(log, path, on_bad_rows="skip").read()
    assert raw.items is not None
    assert raw.items["item_id"][:] == ["1", "2", "4", "5"]
    assert raw.report.skipped[0].line == 5
    path = write(tmp_path, "items.csv", 'item,title\n1,"One\n2,Two\n3,"Three"\n4,Four\n')
    with pytest.raises(BadRowError, match=r"line 2: a quote opens here and is closed at the wrong place, on line 4"):
        Files(log, path).read()
    raw = Files(log, path, on_bad_rows="skip").read()
    assert raw.items is not None
    assert raw.items["title"][:] == ["Two", "Three", "Four"]
    quotes = Files(log, path, quoted=False).read().items
    assert quotes is not None
    assert quotes["title"][0] == '"One'


def test_empty_files_and_headers_alone(tmp_path: Path) -> None:
    for name in ("log.csv", "log.jsonl"):
        for content in ("", "\n\n"):
            with pytest.raises(ValueError, match=f"{name} is empty"):
                Files(write(tmp_path, name, content)).read()
    with pytest.raises(ValueError, match="There are no interactions in"):
        Files(write(tmp_path, "log.csv", "userId,itemId\n")).read()
    items = Files(write(tmp_path, "log.csv", LOG), write(tmp_path, "items.csv", "itemId,title\n")).read().items
    assert items is not None
    assert len(items) == 0


def test_missing_columns_and_files_help(tmp_path: Path) -> None:
    path = write(tmp_path, "log.csv", LOG)
    with pytest.raises(ValueError, match=r"`moveId`.*Did you mean `movieId`\?.*`userId`, `movieId`, `rating`"):
        Files(path, interaction_columns={"item_id": "moveId"}).read()
    with pytest.raises(FileNotFoundError, match=r"Did you mean log.csv\?"):
        Files(str(tmp_path / "logs.csv")).read()
    with pytest.raises(ValueError, match="item_columns maps `title`"):
        Files(path, path, item_columns={"title": "name"}).read()


def test_mapping_headerless_files_and_own_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "log.txt", "7\tann\tview\n8\tbob\tbuy\n")
    columns = {"user_id": 1, "item_id": 0, "event": 2}
    got = Files(path, interaction_columns=columns).read().interactions[:]  # type: ignore[arg-type]  # dict is invariant
    assert got == {"user_id": ["ann", "bob"], "item_id": ["7", "8"], "event": ["view", "buy"]}


def test_a_first_row_of_long_text_is_no_header(tmp_path: Path) -> None:
    title = "A title that is far too long for the name of a column, as any reader of it can see"
    items = write(tmp_path, "news.tsv", f"N1\tnews\t{title}\nN2\tsport\tGoal\n")
    log = write(tmp_path, "log.csv", "ann,N1\nbob,N2\n")
    with pytest.raises(ValueError, match="set header: false and give its number"):
        Files(log).read()
    raw = Files(
        log, items, interaction_columns={"user_id": 0, "item_id": 1}, item_columns={"item_id": 0, "title": 2}
    ).read()
    assert raw.items is not None
    assert raw.items["title"][:] == [title, "Goal"]
    assert raw.items.column_names == ["item_id", "title", "1"]
    assert len(raw.interactions) == 2


def test_json_fields_that_appear_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_rec.data.readers.structured._BLOCK", 2)
    records = [{"item": str(i)} | ({"tags": ["x"]} if i > 4 else {"title": f"t{i}"}) for i in range(7)]
    items = write(tmp_path, "items.jsonl", "\n".join(map(json.dumps, records)))
    got = Files(write(tmp_path, "log.csv", LOG), items).read().items
    assert got is not None
    assert got["title"][:] == ["t0", "t1", "t2", "t3", "t4", "", ""]
    assert got["tags"][:] == [[]] * 5 + [["x"]] * 2


def test_atomic_headers_and_users(tmp_path: Path) -> None:
    log = write(tmp_path, "d.inter", "user_id:token\titem_id:token\trating:float\n1\t2\t3\n")
    users = write(tmp_path, "d.user", "user_id:token\tage:token\n1\t30\n")
    raw = Files(log, users=users).read()
    assert raw.users is not None
    assert raw.users[0] == {"user_id": "1", "age": "30"}
    assert raw.interactions[0] == {"user_id": "1", "item_id": "2", "rating": 3.0}


def test_item_tables_are_merged_and_the_first_filled_value_wins(tmp_path: Path) -> None:
    log = write(
        tmp_path, "log.csv", ",article_id,title,email\n0,1430.0,log title,ann\n1,1431.0,other,bob\n2,1430.0,x,bob\n"
    )
    articles = write(
        tmp_path, "articles.csv", "article_id,doc_full_name,body\n1430,Real title,\n1432,Cold,text\n1430,No,late\n"
    )
    raw = Files(log, [articles, log], item_columns={"title": ["doc_full_name", "title"]}, integer_ids=True).read()
    assert raw.items is not None
    assert raw.items[:] == {
        "item_id": ["1430", "1432", "1431"],
        "title": ["Real title", "Cold", "other"],
        "body": ["late", "text", ""],
    }
    assert raw.interactions["user_id"][:] == ["ann", "bob", "bob"]
    assert "`email`" in str(raw.report)


def test_interactions_with_unknown_items_are_kept(tmp_path: Path) -> None:
    raw = Files(write(tmp_path, "log.csv", LOG), write(tmp_path, "items.csv", "item,title\n1,One\nnew,Cold\n")).read()
    assert len(raw.interactions) == 3
    assert raw.items is not None
    assert raw.items["item_id"][:] == ["1", "new"]


def test_lists_and_numbers_in_item_fields(tmp_path: Path) -> None:
    records = [{"item": "a", "tags": ["x", "y"], "price": 3.0}, {"item": "b", "tags": "z", "price": 2.5}, {"item": "c"}]
    items = write(tmp_path, "items.jsonl", "\n".join(map(json.dumps, records)))
    got = Files(write(tmp_path, "log.csv", LOG), items).read().items
    assert got is not None
    assert got[:] == {"item_id": ["a", "b", "c"], "tags": [["x", "y"], ["z"], []], "price": ["3", "2.5", ""]}


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    one = Files(write(tmp_path, "a.csv", LOG)).read()
    same = Files(write(tmp_path, "b.csv", LOG)).read()
    other = Files(write(tmp_path, "c.csv", LOG.replace("4.5", "4"))).read()
    assert one.source_digest == same.source_digest != other.source_digest
    assert Files(str(tmp_path / "a.csv")).paths() == [str(tmp_path / "a.csv")]


def test_line_numbers_are_exact_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_rec.data.readers.sources._BLOCK", 64)
    rows = [f"u{i},i{i},{847434881 + i}" for i in range(300)]
    rows[200] = "u,i,odd"
    rows[250] = '"u\nv",i,847434881'
    rows[260] = "u,i"
    raw = Files(write(tmp_path, "log.csv", "user,item,time\n" + "\n".join(rows)), on_bad_rows="skip").read()
    assert [row.line for row in raw.report.skipped] == [263, 202]
    assert len(raw.interactions) == 298
    assert raw.interactions["user_id"][249] == "u\nv"


def test_a_list_as_an_id_is_a_bad_row(tmp_path):
    rows = [
        {"user_id": "a", "item_id": "x", "rating": 3},
        {"user_id": "a", "item_id": ["y", "z"], "rating": 4},
        {"user_id": "b", "item_id": ["y"], "rating": "1e400"},
        {"user_id": "b", "item_id": "x", "rating": None},
    ]
    path = write(tmp_path, "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadRowError, match=r"log\.jsonl, line 2: the item_id is a list of 2 values, y, z"):
        Files(path).read()
    found = Files(path, on_bad_rows="skip").read()
    assert [(row.line, row.reason) for row in found.report.skipped] == [
        (2, "the item_id is a list of 2 values, y, z"),
        (3, "the rating '1e400' is too large a number"),
    ]
    assert found.interactions["item_id"][:] == ["x", "x"]


def test_a_table_that_is_separated_by_spaces_is_told_its_delimiter(tmp_path):
    path = write(tmp_path, "log.txt", "user_id item_id\na x\na y\n")
    with pytest.raises(ValueError, match=r"Its one column is `user_id item_id`; if that is several, set delimiter"):
        Files(path).read()
    assert Files(path, delimiter=" ").read().interactions["item_id"][:] == ["x", "y"]
