"""MovieLens, Amazon, sequence files and hub data sets, on small invented files in their forms."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from lightning_rec.data.readers import AmazonReviews, BadRowError, HubDataset, MovieLens, RawData, SequenceFiles
from lightning_rec.data.readers.movielens import GENRES_100K, OCCUPATIONS_1M, clean_title

FILM = {"item_id": "1", "title": "The Lantern", "year": "1995", "genres": ["Action", "War"]}


def folder(tmp_path: Path, **files: str) -> str:
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text, encoding="latin-1")
    return str(tmp_path)


def flags(*genres: str) -> str:
    return "|".join("1" if genre in genres else "0" for genre in GENRES_100K)


def check(raw: RawData) -> None:
    assert raw.interactions[:] == {
        "user_id": ["7", "8"], "item_id": ["1", "2"], "rating": [4.0, 3.0], "timestamp": [881250949, 891717742],
    }  # fmt: skip
    assert raw.items is not None
    assert raw.items[0] == FILM


@pytest.mark.parametrize(
    ("text", "title", "year"),
    [
        ("Matrix, The (1999)", "The Matrix", "1999"),
        ("Toy Story (1995)", "Toy Story", "1995"),
        ("City of Lost Children, The (Cité des enfants perdus, La) (1995)",
         "The City of Lost Children (La Cité des enfants perdus)", "1995"),
        ("Avventura, L' (1960)", "L'Avventura", "1960"),
        ("Crow, The: Wicked Prayer (2005)", "The Crow: Wicked Prayer", "2005"),
        ("Strange (a.k.a. Gates, The) (1980)", "Strange (a.k.a. The Gates)", "1980"),
        ("Mystery, Alaska (1999)", "Mystery, Alaska", "1999"),
        ("Babylon 5", "Babylon 5", ""),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", "1968"),
        ("1984 (1984) ", "1984", "1984"),
        ("Series (2006-2007)", "Series", "2006"),
        ("", "", ""),
    ],
)  # fmt: skip
def test_titles(text: str, title: str, year: str) -> None:
    assert clean_title(text) == (title, year)


def test_movielens_100k_original(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        u__data="7\t1\t4\t881250949\n8\t2\t3\t891717742\n",
        u__item=f'1|Lantern, The (1995)|01-Jan-1995||http://x|{flags("War", "Action")}\n2|"Caf\xe9|||| {flags()}\n',
        u__user="7|24|M|technician|00711\n8|53|F|other|T8H1N\n",
    )
    raw = MovieLens(path).read()
    check(raw)
    assert raw.items is not None
    assert raw.users is not None
    assert raw.items[1] == {"item_id": "2", "title": '"Caf\xe9', "year": "", "genres": []}
    assert raw.users[0] == {"user_id": "7", "age": "24", "gender": "male", "occupation": "technician", "zip": "00711"}
    archive = tmp_path / "ml-100k.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        for name in ("u.data", "u.item", "u.user"):
            stream.write(tmp_path / name, f"ml-100k/{name}")
    check(MovieLens(str(archive)).read())


def test_movielens_100k_atomic(tmp_path: Path) -> None:
    log = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t1\t4\t881250949\n8\t2\t3\t891717742\n"
    films = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    films += "1\tLantern, The\t1995\tAction War\n2\tX\t\tunknown\n"
    people = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n7\t24\tM\ttechnician\t85711\n"
    for name, text in (("ml-100k.inter", log), ("ml-100k.item", films), ("ml-100k.user", people)):
        (tmp_path / name).write_text(text)
    raw = MovieLens(str(tmp_path)).read()
    check(raw)
    assert raw.items is not None
    assert raw.users is not None
    assert raw.items[1] == {"item_id": "2", "title": "X", "year": "", "genres": []}
    assert raw.users[0]["zip"] == "85711"


def test_movielens_1m(tmp_path: Path) -> None:
    films = "1::Lantern, The (1995)::Action|War\n2::Mis\xe9rables, Les (1998)::Drama\n"
    path = folder(
        tmp_path,
        ratings__dat="7::1::4::881250949\n8::2::3::891717742\n",
        movies__dat=films,
        users__dat="7::F::1::10::48067\n8::M::56::99::02460\n",
    )
    raw = MovieLens(path).read()
    check(raw)
    assert raw.items is not None
    assert raw.users is not None
    assert raw.items[1]["title"] == "Les Mis\xe9rables"
    first, second = raw.users[0], raw.users[1]
    assert first == {
        "user_id": "7", "gender": "female", "age": "under 18", "occupation": "K-12 student", "zip": "48067",
    }  # fmt: skip
    assert second["occupation"] == "99"
    assert len(OCCUPATIONS_1M) == 21
    (tmp_path / "ratings.dat").unlink()
    with gzip.open(tmp_path / "interactions.csv.gz", "wt") as stream:
        stream.write("userId,position,movieId\n7,1,2\n8,0,1\n7,0,1\n")
    got = MovieLens(path).read().interactions[:]
    assert got == {"user_id": ["7", "7", "8"], "item_id": ["1", "2", "1"]}


def test_movielens_latest_with_tags_and_overviews(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        ratings__csv="userId,movieId,rating,timestamp\n7,1,4.0,881250949\n8,2,3.0,891717742\n",
        movies__csv='movieId,title,genres\n1,"Lantern, The (1995)",Action|War\n2,Plain,(no genres listed)\n',
        tags__csv="userId,movieId,tag,timestamp\n7,1,Dark,1\n8,1,dark,2\n8,1,slow,3\n8,1,a,4\n",
        links__csv="movieId,imdbId,tmdbId\n1,0114709,862\n2,0113497,\n",
    )
    (tmp_path / "tmdb.csv").write_text('id,overview\n862,"A lamp, lit.\nAnd more."\n')
    check(MovieLens(path).read())
    items = MovieLens(path, overviews=str(tmp_path / "tmdb.csv"), tags=True, max_tags=2).read().items
    assert items is not None
    assert items[0] == FILM | {"tags": ["dark", "a"], "overview": "A lamp, lit.\nAnd more."}
    assert items[1] == {"item_id": "2", "title": "Plain", "year": "", "genres": [], "tags": [], "overview": ""}
    (tmp_path / "links.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"overviews needs links\.csv"):
        MovieLens(path, overviews=str(tmp_path / "tmdb.csv")).read()


def test_movielens_of_nothing_known(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no MovieLens data set.*but notes\.txt"):
        MovieLens(folder(tmp_path, notes__txt="")).read()
    with pytest.raises(FileNotFoundError, match="no folder or zip archive"):
        MovieLens(str(tmp_path / "nowhere")).read()


REVIEWS_2018 = [
    {"overall": 5.0, "reviewerID": "A1", "asin": "0001", "reviewText": "Holds well.", "summary": "Good tape",
     "unixReviewTime": 1400000000, "reviewTime": "05 13, 2014", "verified": True},
    {"overall": 2.0, "reviewerID": "A2", "asin": "0002", "summary": "Bad!", "unixReviewTime": 1400000001},
]  # fmt: skip
META_2018 = [
    {"asin": "0001", "title": "Tape &amp; foil", "brand": "Acme", "category": ["Tools", "Tape"],
     "description": ["Strong.", "Wide."], "feature": ["Silver"], "price": "$3"},
    {"asin": "0003", "title": "Cold", "description": [], "brand": ""},
]  # fmt: skip
REVIEWS_2023 = [
    {"rating": 5.0, "title": "Good tape", "text": "Holds well.", "asin": "V1", "parent_asin": "0001", "user_id": "A1",
     "timestamp": 1400000000123, "images": []},
    {"rating": 2.0, "title": "Bad!", "text": "", "asin": "0002", "parent_asin": "0002", "user_id": "A2",
     "timestamp": 1400000001456},
]  # fmt: skip
META_2023 = [
    {"main_category": "All", "title": "Tape &amp; foil", "features": ["Silver"], "description": ["Strong.", "Wide."],
     "store": "Acme", "categories": ["Tools", "Tape"], "details": {"Color": "Silver"}, "parent_asin": "0001"},
    {"title": "Cold", "parent_asin": "0003", "store": None, "description": [], "categories": [], "features": []},
]  # fmt: skip


@pytest.mark.parametrize(("reviews", "meta"), [(REVIEWS_2018, META_2018), (REVIEWS_2023, META_2023)])
def test_amazon(tmp_path: Path, reviews: list[dict], meta: list[dict]) -> None:
    paths = []
    for name, records in (("reviews.json.gz", reviews), ("meta.jsonl.gz", meta)):
        paths.append(str(tmp_path / name))
        with gzip.open(paths[-1], "wt") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)
    raw = AmazonReviews(paths[0], paths[1]).read()
    assert raw.interactions[:] == {
        "user_id": ["A1", "A2"], "item_id": ["0001", "0002"], "rating": [5.0, 2.0],
        "timestamp": [1400000000, 1400000001], "review": ["Good tape. Holds well.", "Bad!"],
    }  # fmt: skip
    assert raw.items is not None
    assert raw.items[0] == {
        "item_id": "0001", "title": "Tape &amp; foil", "brand": "Acme", "categories": ["Tools", "Tape"],
        "description": ["Strong.", "Wide."], "features": ["Silver"],
    }  # fmt: skip
    assert raw.items[1]["title"] == "Cold"
    assert raw.items[1]["description"] == []
    assert "review" not in AmazonReviews(paths[0], review_text=False).read().interactions.column_names
    assert AmazonReviews(paths[0], paths[1]).paths() == paths


def test_amazon_nested_categories(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(REVIEWS_2018[0]))
    record = {"asin": "0001", "categories": [["Tools", "Tape"], ["Tools", "Foil"]]}
    (tmp_path / "m.json").write_text(json.dumps(record))
    items = AmazonReviews(str(tmp_path / "r.json"), str(tmp_path / "m.json")).read().items
    assert items is not None
    assert items[0]["categories"] == ["Tools", "Tape", "Foil"]


@pytest.mark.parametrize("text", ["ann\t3 001 3\nbob x\t7\n", "ann 3 001 3\r\n\r\nbobx 7\r\n"])
def test_sequence_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.txt").write_bytes(text.encode())
    got = SequenceFiles(str(tmp_path / "log.txt")).read().interactions[:]
    bob = "bob x" if "\t" in text else "bobx"
    assert got == {"user_id": ["ann", "ann", "ann", bob], "item_id": ["3", "001", "3", "7"]}


def test_sequence_json_pair(tmp_path: Path) -> None:
    log, items = tmp_path / "x.inter.json", tmp_path / "x.item.json"
    log.write_text('{"0": [5, "006", 5],\n "1": [7]}')
    items.write_text('{"5": {"title": "Five", "brand": "null"}, "006": {"title": "Six"}, "8": {}}')
    raw = SequenceFiles(str(log), str(items)).read()
    assert raw.interactions[:] == {"user_id": ["0", "0", "0", "1"], "item_id": ["5", "006", "5", "7"]}
    assert raw.items is not None
    assert raw.items[:] == {"item_id": ["5", "006", "8"], "title": ["Five", "Six", ""], "brand": ["null", "", ""]}
    (tmp_path / "items.csv").write_text("item,name\n5,Five\n")
    table = SequenceFiles(str(log), str(tmp_path / "items.csv"), item_columns={"title": "name"}).read().items
    assert table is not None
    assert table[0] == {"item_id": "5", "title": "Five"}


def test_sequence_errors(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("ann\t1 2\nbob\t\n")
    with pytest.raises(BadRowError, match="line 2: the user 'bob' has no items"):
        SequenceFiles(str(path)).read()
    assert SequenceFiles(str(path), on_bad_rows="skip").read().report.n_skipped == 1
    path = tmp_path / "log.json"
    path.write_text('{"ann": [1], "ann": [2]}')
    with pytest.raises(ValueError, match="the key 'ann' stands twice"):
        SequenceFiles(str(path)).read()
    path.write_text('{"ann": [1], "bob": 3}')
    with pytest.raises(BadRowError, match="entry 2: the user 'bob' has no list"):
        SequenceFiles(str(path)).read()
    path.write_text('{"ann": [1, {"id": 2}]}')
    with pytest.raises(BadRowError, match="entry 1"):
        SequenceFiles(str(path)).read()
    path.write_text("")
    with pytest.raises(ValueError, match=r"log.json"):
        SequenceFiles(str(path)).read()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("offline")
def test_hub_from_a_local_folder(tmp_path: Path) -> None:
    for name, content in (
        (
            "log/train.csv",
            "user_id,parent_asin,rating,timestamp,store\na,001,5.0,1400000000000,x\nb,002,4.0,1400000001000,y\n",
        ),
        ("log/test.csv", "user_id,parent_asin,rating,timestamp,store\na,002,3.0,1400000002000,z\n"),
        ("items/data.jsonl", '{"parent_asin": "B1", "title": "null"}\n{"parent_asin": "002", "title": null}\n'),
        ("films/data.csv", "asin,title\n001,null\n1,NA\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    reader = HubDataset(str(tmp_path / "log"), items=str(tmp_path / "items"))
    raw = reader.read()
    assert raw.interactions["user_id"][:] == ["a", "b", "a"]
    assert raw.interactions["item_id"][:] == ["001", "002", "002"]
    assert raw.interactions["timestamp"][:] == [1400000000, 1400000001, 1400000002]
    assert raw.items is not None
    assert raw.items[:] == {"item_id": ["B1", "002"], "title": ["null", ""]}
    films = HubDataset(str(tmp_path / "log"), items=str(tmp_path / "films")).read().items
    assert films is not None
    assert films[:] == {"item_id": ["001", "1"], "title": ["null", "NA"]}
    assert len(HubDataset(str(tmp_path / "log"), split="test").read().interactions) == 1
    assert raw.source_digest
    assert reader.paths() == [str(tmp_path / "log"), str(tmp_path / "items")]
    with pytest.raises(ValueError, match="interaction_columns maps `item_id`"):
        HubDataset(str(tmp_path / "log"), interaction_columns={"item_id": "sku"}).read()


@pytest.mark.usefixtures("offline")
def test_hub_offline_and_not_cached() -> None:
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        HubDataset("nobody/no-such-data-set").read()
