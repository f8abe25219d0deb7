"""MovieLens in each of its forms (Harper and Konstan, TiiS 2015)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_rec.data.interactions import canonical_interactions
from lightning_rec.data.readers.base import RawData, Reader
from lightning_rec.data.readers.columns import choose_interactions
from lightning_rec.data.readers.delimited import read_delimited
from lightning_rec.data.readers.entities import canonical_entities
from lightning_rec.data.readers.sources import Source, digest, find_sources, zip_names
from lightning_rec.data.table import OnBadRows, ReadReport, Table

#: The code tables of the 1M set's README.
AGES_1M = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56 or older",
}
OCCUPATIONS_1M = [
    "other", "academic or educator", "artist", "clerical or admin", "college or grad student", "customer service",
    "doctor or health care", "executive or managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales or marketing", "scientist", "self-employed", "technician or engineer", "tradesman or craftsman",
    "unemployed", "writer",
]  # fmt: skip
#: The genre flags of the 100K set, in their order.
GENRES_100K = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]  # fmt: skip

_ARTICLES = "The|A|An|La|Le|Les|L'|Il|Lo|Gli|El|Los|Las|Un|Une|Una|Der|Die|Das|Ein|Eine|De|Het|Den|Det"


class MovieLens(Reader):
    """The MovieLens data sets: a folder, or the zip archive as it is downloaded (read in place).

    It recognises 100K (the original ``u.data``, or atomic ``*.inter``, ``*.item``, ``*.user`` files), 1M and 10M
    (``.dat``; also with an ``interactions.csv`` of users, positions and films in place of the ratings) and the ``.csv``
    sets (latest, 20M, 25M, 32M).

    Items have ``title`` (without the year; ``Matrix, The`` becomes ``The Matrix``), ``year``, ``genres`` and, where the
    files have them, ``tags`` and ``overview``. Users have ``age``, ``gender``, ``occupation`` and ``zip``.

    Args:
        path: the folder or the zip archive.
        overviews: ``tmdb_5000_movies.csv`` (also compressed): its overviews are joined through ``links.csv``.
        tags: read ``tags.csv`` and give each film its most frequent tags.
        max_tags: at most so many tags a film.
        on_bad_rows: ``error`` stops at a bad row with file, line and reason; ``skip`` counts, lists and leaves it out.
        rating_range: lowest and highest rating; others are bad rows. None keeps every number.
    """

    def __init__(
        self,
        path: str,
        overviews: str | None = None,
        tags: bool = False,
        max_tags: int = 5,
        on_bad_rows: OnBadRows = "error",
        rating_range: tuple[float, float] | None = None,
    ) -> None:
        self.path = path
        self.overviews = overviews
        self.tags = tags
        self.max_tags = max_tags
        self.on_bad_rows = on_bad_rows
        self.rating_range = rating_range

    def paths(self) -> list[str]:
        """The files that ``read`` reads."""
        return [str(source) for source in self._sources().values()]

    def read(self) -> RawData:
        """Reads ratings, films and users."""
        report = ReadReport(self.on_bad_rows)
        sources = self._sources()
        atomic, original = "inter" in sources, "u.data" in sources
        log = next(sources[key] for key in ("inter", "u.data", "ratings", "interactions") if key in sources)
        dat = log.name.endswith(".dat")
        names = ["user_id", "item_id", "rating", "timestamp"] if original or dat else None
        table = read_delimited(
            log,
            lambda columns: choose_interactions(columns, {}, str(log)),
            report,
            delimiter="\t" if atomic or original else "::" if dat else ",",
            header=names is None,
            names=names,
        )
        interactions = canonical_interactions(table, report, self.rating_range)
        items = users = None
        if "items" in sources:
            films = _films(sources["items"], report)
            if "tags" in sources:
                films.columns["tags"] = self._tags(sources["tags"], films, report)
            if self.overviews is not None:
                films.columns["overview"] = self._overviews(sources, films, report)
            items = canonical_entities(films, "item_id", "items", report)
        if "users" in sources:
            users = canonical_entities(_people(sources["users"], report), "user_id", "users", report)
        return RawData(interactions, items, users, report, digest(list(sources.values())))

    def _sources(self) -> dict[str, Source]:
        names = self._names()
        wanted = {
            "inter": r"\.inter$",
            "u.data": r"^u\.data$",
            "ratings": r"^ratings\.(dat|csv)$",
            "interactions": r"^interactions\.csv$",
            "items": r"^(u\.item|movies\.(dat|csv)|.*\.item)$",
            "users": r"^(u\.user|users\.(dat|csv)|.*\.user)$",
        }
        if self.tags:
            wanted["tags"] = r"^tags\.csv$"
        if self.overviews is not None:
            wanted["links"] = r"^links\.csv$"
        found: dict[str, Source] = {}
        for kind, pattern in wanted.items():
            hits = [source for source in names if re.search(pattern, source.name)]
            if hits:
                found[kind] = hits[0]
        logs = [kind for kind in ("inter", "u.data", "ratings", "interactions") if kind in found]
        if not logs:
            raise FileNotFoundError(
                f"{self.path} is no MovieLens data set that is known: it holds no u.data, ratings.dat, ratings.csv,"
                f" interactions.csv or *.inter, but {', '.join(source.name for source in names[:10]) or 'nothing'}."
            )
        for kind in logs[1:]:
            del found[kind]
        for kind in ("tags", "links"):
            if kind in wanted and kind not in found:
                option = "tags" if kind == "tags" else "overviews"
                raise FileNotFoundError(f"The option {option} needs {kind}.csv, which {self.path} does not hold.")
        if self.overviews is not None:
            found["overviews"] = find_sources(self.overviews, "overviews")[0]
        return found

    def _names(self) -> list[Source]:
        path = Path(self.path).expanduser()
        if path.is_dir():
            return [Source(file) for file in sorted(path.iterdir()) if file.is_file()]
        if path.is_file():
            return [Source(path, name) for name in zip_names(path) if PurePosixPath(name).name]
        raise FileNotFoundError(f"There is no folder or zip archive {path}.")

    def _tags(self, source: Source, films: Table, report: ReadReport) -> pa.ChunkedArray:
        table = read_delimited(source, lambda _: {"item": "movieId", "tag": "tag"}, report, ",", True)
        counts: dict[str, Counter[str]] = {}
        for item, tag in zip(table.columns["item"].to_pylist(), table.columns["tag"].to_pylist(), strict=True):
            if tag.strip():
                counts.setdefault(item, Counter())[tag.strip().lower()] += 1
        tags = []
        for item in films.columns["item_id"].to_pylist():
            ranked = sorted(counts.get(item, Counter()).items(), key=lambda pair: (-pair[1], pair[0]))
            tags.append([tag for tag, _ in ranked[: self.max_tags]])
        return pa.chunked_array([pa.array(tags, pa.list_(pa.string()))])

    def _overviews(self, sources: dict[str, Source], films: Table, report: ReadReport) -> pa.ChunkedArray:
        links = read_delimited(sources["links"], lambda _: {"item": "movieId", "tmdb": "tmdbId"}, report, ",", True)
        texts = read_delimited(sources["overviews"], lambda _: {"id": "id", "overview": "overview"}, report, ",", True)
        overview = dict(zip(texts.columns["id"].to_pylist(), texts.columns["overview"].to_pylist(), strict=True))
        tmdb = dict(zip(links.columns["item"].to_pylist(), links.columns["tmdb"].to_pylist(), strict=True))
        joined = [overview.get(tmdb.get(item) or "", "") for item in films.columns["item_id"].to_pylist()]
        report.note(f"{sum(map(bool, joined)):,} of {len(joined):,} films have an overview.")
        return pa.chunked_array([pa.array(joined, pa.string())])


def clean_title(text: str) -> tuple[str, str]:
    """``Matrix, The (1999)`` as ``("The Matrix", "1999")``; the year is empty where the title has none.

    Args:
        text: a title as MovieLens writes it.
    """
    text = text.strip()
    year = ""
    if found := re.search(r"\s*\((\d{4})(?:\s*[-–]\s*(?:\d{4})?)?\)$", text):
        year, text = found[1], text[: found.start()]
    main, bracket, rest = text.partition(" (")
    rest = re.sub(
        r"(^|\()(a\.k\.a\. )?([^()]*)(?=\))", lambda part: f"{part[1]}{part[2] or ''}{_article_first(part[3])}", rest
    )
    return _article_first(main) + bracket + rest, year


def _article_first(text: str) -> str:
    parts = re.fullmatch(rf"(.*?), ({_ARTICLES})(: .*)?", text)  # also "Crow, The: Wicked Prayer"
    if not parts:
        return text
    glue = "" if parts[2].endswith("'") else " "
    return f"{parts[2]}{glue}{parts[1]}{parts[3] or ''}"


def _films(source: Source, report: ReadReport) -> Table:
    if source.name.endswith(".csv"):
        table = read_delimited(
            source, lambda _: {"item_id": "movieId", "title": "title", "genres": "genres"}, report, ",", True
        )
    elif source.name.endswith(".dat"):
        table = _latin(source, "::", ["item_id", "title", "genres"], ["item_id", "title", "genres"], report)
    elif source.name == "u.item":
        names = ["item_id", "title", "date", "video", "url", *GENRES_100K]
        table = _latin(source, "|", names, ["item_id", "title", *GENRES_100K], report)
        flags = np.array([[flag == "1" for flag in table.columns[name].to_pylist()] for name in GENRES_100K[1:]])
        genres = [[GENRES_100K[1 + i] for i in np.flatnonzero(row)] for row in flags.T]
        table.columns = {name: table.columns[name] for name in ("item_id", "title")}
        table.columns["genres"] = pa.chunked_array([pa.array(genres, pa.list_(pa.string()))])
    else:
        return _atomic_films(source, report)
    titles, years = zip(*map(clean_title, table.columns["title"].to_pylist()), strict=True) if len(table) else ((), ())
    genres_column = table.columns["genres"]
    if pa.types.is_string(genres_column.type):
        genres_column = _lists(genres_column, lambda text: [] if text == "(no genres listed)" else text.split("|"))
    columns: dict[str, Any] = {
        "item_id": table.columns["item_id"],
        "title": titles,
        "year": years,
        "genres": genres_column,
    }
    return _with(table, columns)


def _atomic_films(source: Source, report: ReadReport) -> Table:
    fields = {"item_id": "item_id:token", "title": "movie_title:token_seq", "year": "release_year:token"}
    table = read_delimited(source, lambda _: fields | {"genres": "class:token_seq"}, report, "\t", True)
    titles = [clean_title(text)[0] for text in table.columns["title"].to_pylist()]
    genres = _lists(table.columns["genres"], lambda text: [] if text == "unknown" else text.split())
    return _with(table, dict(table.columns) | {"title": titles, "genres": genres})


def _people(source: Source, report: ReadReport) -> Table:
    if source.name.endswith(".dat"):
        names = ["user_id", "gender", "age", "occupation", "zip"]
        table = _latin(source, "::", names, names, report)
        ages = [AGES_1M.get(age, age) for age in table.columns["age"].to_pylist()]
        jobs = [_occupation(code) for code in table.columns["occupation"].to_pylist()]
        table = _with(table, dict(table.columns) | {"age": ages, "occupation": jobs})
    elif source.name == "u.user":
        names = ["user_id", "age", "gender", "occupation", "zip"]
        table = _latin(source, "|", names, names, report)
    else:
        fields = {name: f"{name}:token" for name in ("user_id", "age", "gender", "occupation")}
        table = read_delimited(source, lambda _: fields | {"zip": "zip_code:token"}, report, "\t", True)
    genders = {"M": "male", "F": "female"}
    gender = [genders.get(text, text) for text in table.columns["gender"].to_pylist()]
    return _with(table, dict(table.columns) | {"gender": gender})


def _occupation(code: str) -> str:
    return OCCUPATIONS_1M[int(code)] if code.isdigit() and int(code) < len(OCCUPATIONS_1M) else code


def _latin(source: Source, delimiter: str, names: Sequence[str], keep: Sequence[str], report: ReadReport) -> Table:
    return read_delimited(
        source,
        lambda _: {name: name for name in keep},
        report,
        delimiter,
        header=False,
        encoding="latin-1",
        quoted=False,
        names=names,
    )


def _lists(column: pa.ChunkedArray, split: Callable[[str], list[str]]) -> pa.ChunkedArray:
    return pa.chunked_array(
        [pa.array([split(text) if text else [] for text in column.to_pylist()], pa.list_(pa.string()))]
    )


def _with(table: Table, columns: dict[str, Any]) -> Table:
    arrays = {
        name: column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([pa.array(column, pa.string())])
        for name, column in columns.items()
    }
    return Table(arrays, table.lines, table.files, table.starts, table.units)
