"""Interactions from columns of text: ids, times, ratings, duplicates."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest

from lightning_rec.data.interactions import canonical_interactions, parse_numbers
from lightning_rec.data.table import BadRowError, ReadReport, Table, text_array
from lightning_rec.data.timestamps import parse_times


def table(**columns: list) -> Table:
    """A table of one invented file whose first row is line 2."""
    arrays = {name: pa.chunked_array([text_array(values)]) for name, values in columns.items()}
    size = len(next(iter(columns.values())))
    return Table(arrays, np.arange(2, size + 2), ["log.csv"], [0], ["line"])


def read(report: ReadReport | None = None, **columns: Any) -> dict[str, list]:
    options: dict[str, Any] = {name: columns.pop(name) for name in ("rating_range", "integer_ids") if name in columns}
    return canonical_interactions(table(**columns), report or ReadReport(), **options)[:]


def test_ids_stay_as_they_are_written() -> None:
    ids = ["001", "1", "1.0", "5863", "null", "NA", "None", "nan", " 7"]
    assert read(user_id=ids, item_id=ids)["item_id"] == ids


def test_an_integer_column_beside_missing_values_grows_no_point() -> None:
    assert text_array([5863, None, 5863.0, 1.5, 2**60]).to_pylist() == ["5863", None, "5863", "1.5", str(2**60)]
    assert text_array([5863.0, float("nan")]).to_pylist() == ["5863", None]


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_id_is_a_bad_row(empty: str | None) -> None:
    with pytest.raises(BadRowError, match=r"log.csv, line 3: the item_id is empty.*on_bad_rows: skip"):
        read(user_id=["u", "u"], item_id=["a", empty])
    report = ReadReport("skip")
    assert read(report, user_id=["u", "u", "v"], item_id=["a", empty, "b"])["item_id"] == ["a", "b"]
    assert report.n_skipped == 1
    assert report.skipped[0] == ("log.csv", 3, "the item_id is empty", "line")


def test_normal_forms_are_kept_apart_and_noted() -> None:
    composed, split = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    report = ReadReport()
    assert read(report, user_id=["u", "u"], item_id=[composed, split])["item_id"] == [composed, split]
    assert any("normal form" in note and "item_id" in note for note in report.notes)


def test_integer_ids_lose_their_point_only_when_asked() -> None:
    columns: dict[str, Any] = {"user_id": ["a@b.c", "1.0"], "item_id": ["1430.0", "001"]}
    report = ReadReport()
    assert read(report, **columns)["item_id"] == ["1430.0", "001"]
    got = read(integer_ids=True, **columns)
    assert got["item_id"] == ["1430", "001"]
    assert got["user_id"] == ["a@b.c", "1"]
    read(report, user_id=["u"], item_id=["1430.0"])
    assert any("integer_ids" in note for note in report.notes)


SECOND = 1_573_568_086  # 12 November 2019, 14:14:46 UTC


@pytest.mark.parametrize(
    "text",
    [
        str(SECOND), f"{SECOND}.0", f"{SECOND}000", f"{SECOND}000000", f"{SECOND}000000000", "2019-11-12T14:14:46Z",
        "2019-11-12 14:14:46", "2019-11-12T15:14:46+01:00", "2019-11-12T14:14:46.000Z", "2019/11/12 14:14:46",
        "12.11.2019 14:14:46", "20191112141446", "Tue Nov 12 14:14:46 2019", "Tue, 12 Nov 2019 14:14:46 +0000",
        "11/13/2019 2:14:46 PM",
    ],
)  # fmt: skip
def test_writings_of_one_moment(text: str) -> None:
    day = 86_400 if text.startswith("11/13") else 0
    times = parse_times(pa.chunked_array([[text, text]]))
    assert times.seconds.tolist() == [SECOND + day] * 2
    assert times.seconds.dtype == np.int64
    assert not times.bad


@pytest.mark.parametrize(
    ("texts", "days"),
    [
        (["2019-11-12", "2019-11-13"], [18212, 18213]),
        (["20191112", "20191113"], [18212, 18213]),
        (["11/12/2019", "11/13/2019"], [18212, 18213]),
        (["12/11/2019", "13/11/2019"], [18212, 18213]),
        (["11 12, 2019", "11 13, 2019"], [18212, 18213]),
        (["Nov 12, 2019", "13 November 2019"], [18212, 18213]),
        (["1969-12-31", "1970-01-02"], [-1, 1]),
    ],
)
def test_dates(texts: list[str], days: list[int]) -> None:
    assert parse_times(pa.chunked_array([texts])).seconds.tolist() == [day * 86_400 for day in days]


@pytest.mark.parametrize("far", ["9999-12-31", "0001-01-01T00:00:00Z", "1600-01-01"])
def test_a_year_that_no_log_has_is_a_bad_row(far: str) -> None:
    times = parse_times(pa.chunked_array([["2019-11-12", far, "2019-11-13"]]))
    assert times.bad == {1: f"{far!r} is no timestamp"}
    assert times.seconds[[0, 2]].tolist() == [18212 * 86_400, 18213 * 86_400]


def test_a_month_that_may_be_a_day_is_read_month_first_and_noted() -> None:
    times = parse_times(pa.chunked_array([["11/12/2019 2:14:46 PM"]]))
    assert times.seconds.tolist() == [SECOND]
    assert "month first" in times.notes[0]


def test_times_beyond_32_bits_and_counters() -> None:
    assert parse_times(pa.chunked_array([["4102444800", "4102444801"]])).seconds.tolist() == [4102444800, 4102444801]
    assert parse_times(pa.chunked_array([["0", "1", "2"]])).seconds.tolist() == [0, 1, 2]


def test_a_url_in_a_timestamp_is_a_bad_row() -> None:
    stamps = ["847434881", "84743496 https://example.org/data/films1", "847434882"]
    columns: dict[str, Any] = {"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": stamps}
    with pytest.raises(BadRowError, match=r"line 3: '84743496 https://example.org/data/films1' is no timestamp"):
        read(**columns)
    report = ReadReport("skip")
    assert read(report, **columns)["timestamp"] == [847434881, 847434882]
    assert report.n_skipped == 1


@pytest.mark.parametrize("other", [f"{SECOND}000", "2019-11-12"])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_mixture_of_writings_stops_the_run_and_names_rows(other: str, policy: Literal["error", "skip"]) -> None:
    with pytest.raises(ValueError, match=rf"mixed: most are seconds.*log.csv, line 4 \('{other}'"):
        read(
            ReadReport(policy), user_id=["u"] * 3, item_id=["a", "b", "c"], timestamp=[str(SECOND), "847434882", other]
        )


def test_one_stray_unit_among_many_is_a_bad_row() -> None:
    stamps = [str(SECOND + i) for i in range(200)] + [f"{SECOND}000"]
    report = ReadReport("skip")
    assert len(read(report, user_id=["u"] * 201, item_id=["a"] * 201, timestamp=stamps)["timestamp"]) == 200
    assert "milliseconds" in report.skipped[0].reason
    assert report.skipped[0].line == 202


def test_a_wrong_column_is_not_a_column_of_bad_rows() -> None:
    with pytest.raises(ValueError, match="Most values of the timestamp column cannot be read"):
        read(ReadReport("skip"), user_id=["u", "v"], item_id=["a", "b"], timestamp=["hello", "world"])


def test_an_empty_stamp_beside_others_is_a_bad_row_and_an_empty_column_is_none() -> None:
    report = ReadReport("skip")
    got = read(report, user_id=["u"] * 3, item_id=["a", "b", "c"], timestamp=["", "847434881", "847434882"])
    assert got["item_id"] == ["b", "c"]
    assert "timestamp" not in read(user_id=["u"], item_id=["a"], timestamp=[""])


def test_the_order_below_a_second_is_kept() -> None:
    got = read(user_id=["u"] * 3, item_id=["c", "a", "b"], timestamp=[f"{SECOND}900", f"{SECOND}100", f"{SECOND}500"])
    assert got["item_id"] == ["a", "b", "c"]
    assert got["timestamp"] == [SECOND] * 3


def test_ratings_without_a_range_are_kept_as_they_are() -> None:
    got = read(user_id=["u"] * 6, item_id=list("abcdef"), rating=["0", "-1", "NaN", "99", "", "4.5"])["rating"]
    np.testing.assert_array_equal(got, [0, -1, np.nan, 99, np.nan, 4.5])


def test_ratings_outside_their_range_are_bad_rows() -> None:
    report = ReadReport("skip")
    ratings = ["0", "-1", "NaN", "99", "5", "1", "2"]
    got = read(report, user_id=["u"] * 7, item_id=list("abcdefg"), rating=ratings, rating_range=(1, 5))
    assert got["item_id"] == ["c", "e", "f", "g"]
    assert [row.line for row in report.skipped] == [2, 3, 5]
    with pytest.raises(BadRowError, match="line 2: the rating 0 is outside 1 to 5"):
        read(user_id=["u"] * 7, item_id=list("abcdefg"), rating=ratings, rating_range=(1, 5))


@pytest.mark.parametrize("text", ["good", "4,5", "inf", "null"])
def test_a_rating_that_is_no_number_is_a_bad_row(text: str) -> None:
    _, bad = parse_numbers(pa.chunked_array([["3", text]]), "rating")
    assert list(bad) == [1]


def test_exact_duplicates_are_dropped_with_times() -> None:
    columns: dict[str, Any] = {"user_id": ["u", "u", "u", "v"], "item_id": ["a", "b", "a", "a"]}
    report = ReadReport()
    assert len(read(report, **columns)["item_id"]) == 4
    assert report.n_duplicates == 0
    got = read(report, **columns, timestamp=["847434881", "847434882", "847434881", "847434881"])
    assert got["item_id"] == ["a", "b", "a"]
    assert report.n_duplicates == 1
    repeats = read(**columns, timestamp=["847434881", "847434882", "847434883", "847434881"])
    assert len(repeats["item_id"]) == 4
    rated = read(**columns, timestamp=["847434881"] * 4, rating=["1", "1", "2", "1"])
    assert len(rated["item_id"]) == 4
    unrated = read(**columns, timestamp=["847434881"] * 4, rating=["", "1", "", "1"])
    assert len(unrated["item_id"]) == 3


def test_equal_rows_with_a_position_are_one_and_without_any_order_are_noted() -> None:
    columns: dict[str, Any] = {"user_id": ["u", "u", "u", "u"], "item_id": ["a", "b", "a", "a"]}
    report = ReadReport()
    # the last row is the first written twice; the third is the same item at another place
    got = read(report, **columns, position=["1", "2", "3", "1"])
    assert got["item_id"] == ["a", "b", "a"]
    assert (report.n_duplicates, report.notes) == (1, [])
    report = ReadReport()
    assert read(report, **columns)["item_id"] == ["a", "b", "a", "a"]
    assert report.n_duplicates == 0
    assert report.notes[0].startswith(
        "2 interactions equal an earlier one in every column. Without times, or positions"
    )


def test_positions_within_sessions_tell_no_duplicates() -> None:
    report = ReadReport()
    # two sessions of u begin with a
    columns: dict[str, Any] = {"user_id": ["u"] * 4, "item_id": ["a", "b", "a", "c"], "position": ["1", "2", "1", "2"]}
    assert sorted(read(report, **columns)["item_id"]) == ["a", "a", "b", "c"]
    assert report.n_duplicates == 0
    assert "positions that number the rows of a user, they are kept as repeats" in report.notes[0]


def test_rows_of_one_second_at_two_positions_are_two() -> None:
    columns: dict[str, Any] = {"user_id": ["u"] * 3, "item_id": ["a"] * 3, "timestamp": ["847434881"] * 3}
    got = read(**columns, position=["2", "1", "2"])
    assert got["item_id"] == ["a", "a"]
    assert "position" not in got


@pytest.mark.parametrize("times", [True, False])
def test_columns_of_lists_are_compared_too(times: bool) -> None:
    given = table(user_id=["u"] * 4, item_id=["a"] * 4, **({"timestamp": ["847434881"] * 4} if times else {}))
    given.columns["tags"] = pa.chunked_array([pa.array([["x", "y"], ["x"], ["x", "y"], None], pa.list_(pa.string()))])
    report = ReadReport()
    got = canonical_interactions(given, report)[:]
    assert got["tags"] == ([["x", "y"], ["x"], None] if times else [["x", "y"], ["x"], ["x", "y"], None])
    assert report.n_duplicates == times
    assert any(note.startswith("1 interactions equal") for note in report.notes) is not times


def test_position_orders_the_rows_of_a_user() -> None:
    got = read(user_id=["u", "v", "u"], item_id=["b", "c", "a"], position=["10", "0", "9"])
    assert got == {"user_id": ["u", "u", "v"], "item_id": ["a", "b", "c"]}
    with pytest.raises(BadRowError, match="position 'x' is no number"):
        read(user_id=["u", "v", "u"], item_id=["b", "c", "a"], position=["1", "0", "x"])


def test_no_row_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no interactions in log.csv"):
        read(user_id=[], item_id=[])


def test_the_report_lists_few_rows_and_counts_all() -> None:
    report = ReadReport("skip")
    for line in range(50):
        report.bad_row("log.csv", line, "it is odd")
    assert report.n_skipped == 50
    assert len(report.skipped) == 20
    assert "and 30 more" in str(report)


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    assert text_array(["ok", "\ud83d", "\ud83d\ude00"]).to_pylist() == ["ok", "\ufffd", "\U0001f600"]
