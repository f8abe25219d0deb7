import datetime

import numpy as np
import pytest
from datasets import Dataset

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.impression_signals import Ages, Popularity
from lightning_rec.data.impression_split import split_impressions
from lightning_rec.data.impressions import (
    PARTS,
    build_impressions,
    earlier_events,
    item_ids,
    unknown_shares,
    with_click_histories,
)

ITEMS = Dataset.from_dict({"item_id": ["a", "b", "c", "d"], "title": ["A", "B", "C", "D"]})


def table(**columns):
    rows = len(columns["candidates"])
    return Dataset.from_dict({"user_id": ["u"] * rows} | columns)


def built(log, items=ITEMS, unknown="add", users=None):
    catalogue = Catalogue.build(items, item_ids(log), unknown_items=unknown)
    users = np.ones(len(log), dtype=np.int64) if users is None else users
    return build_impressions(log, catalogue, users), catalogue


def test_columns_are_flat_and_keep_order_and_repeats():
    log, catalogue = built(
        table(
            impression_id=["7", "7"],
            timestamp=[30, 20],
            candidates=[["b", "a", "b"], ["d"]],
            labels=[[0, 1, 1], None],
            history=[["c", "a"], []],
            positions=[None, [5]],
            dwell=[[1.5, None, 2.0], None],
            propensities=[[0.5, 0.25, 1.0], [0.125]],
            feedback=["good", None],
        )
    )
    assert log.ids == ["7", "7"]
    assert log.times.tolist() == [30, 20]
    assert log.starts.tolist() == [0, 3, 4]
    assert [catalogue.ids[row] for row in log.candidates] == ["b", "a", "b", "d"]
    assert log.labels.tolist() == [0, 1, 1, -1]
    assert log.labelled.tolist() == [True, False]
    assert log.counts(1).tolist() == [2, 0]
    assert log.positions.tolist() == [0, 0, 0, 5]
    np.testing.assert_equal(log.dwell, np.array([1.5, np.nan, 2.0, np.nan], np.float32))
    assert log.propensities.tolist() == [0.5, 0.25, 1.0, 0.125]
    assert log.feedback == ["good", ""]
    assert [catalogue.ids[row] for row in log.history] == ["c", "a"]
    assert (log.history_starts.tolist(), log.history_ends.tolist()) == ([0, 2], [2, 2])
    assert log.has_history
    assert log.parts is None


def test_what_a_log_lacks_is_none():
    log, _ = built(table(candidates=[["a"], ["b", "c"]]))
    assert log.ids == ["1", "2"]
    assert log.times is log.positions is log.propensities is log.dwell is log.parts is log.feedback is None
    assert log.labels.tolist() == [-1, -1, -1]
    assert not log.has_history
    assert not log.labelled.any()


def test_a_column_of_nothing_but_null_is_absent():
    log, _ = built(table(candidates=[["a"], ["b"]], labels=[None, None], timestamp=[None, None], part=[None, None]))
    assert log.times is log.parts is None
    assert not log.labelled.any()


def test_selected_rows_are_read_as_selected():
    whole = table(candidates=[["a"], ["b", "c"], ["d"]], labels=[[1], [0, 1], [0]])
    log, catalogue = built(whole.select([2, 0]))
    assert [catalogue.ids[row] for row in log.candidates] == ["d", "a"]
    assert log.labels.tolist() == [0, 1]


def test_unknown_items_get_rows_with_empty_text():
    log, catalogue = built(table(candidates=[["a", "x"], ["y"]], labels=[[0, 1], [1]], history=[["x", "z"], ["b"]]))
    assert catalogue.ids[1:5] == ["a", "b", "c", "d"]
    assert sorted(catalogue.ids[5:]) == ["x", "y", "z"]
    assert catalogue.texts[5:] == ["", "", ""]
    assert unknown_shares(log, np.array([0, 1]), 5) == {"candidates": 2 / 3, "clicks": 1.0, "history": 2 / 3}
    assert unknown_shares(log, np.array([1]), 5) == {"candidates": 1.0, "clicks": 1.0, "history": 0.0}
    assert unknown_shares(log, np.array([], dtype=int), 5) == {"candidates": 0, "clicks": 0, "history": 0}


def test_unknown_items_can_be_left_out():
    log, catalogue = built(
        table(
            candidates=[["x", "a"], ["y"], ["b", "x", "c"]],
            labels=[[1, 0], [1], [0, 1, 1]],
            positions=[[1, 2], [1], [1, 2, 3]],
            history=[["x", "d"], [], ["z"]],
        ),
        unknown="drop",
    )
    assert [catalogue.ids[row] for row in log.candidates] == ["a", "b", "c"]
    assert log.starts.tolist() == [0, 1, 1, 3]
    assert log.labels.tolist() == [0, 0, 1]
    assert log.positions.tolist() == [2, 1, 3]
    assert [catalogue.ids[row] for row in log.history] == ["d"]
    assert (log.history_ends - log.history_starts).tolist() == [1, 0, 0]
    assert log.report == {"dropped_candidates": 3, "dropped_history": 2}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": [[1], [0, 1]]}, r"Impression '2' \(number 2 of the log\) has 2 labels and 1 candidates"),
        ({"labels": [[1], [2]]}, "Impression '2' .* has the label 2"),
        ({"positions": [[1, 2], [1]]}, "Impression '1' .* has 2 positions and 1 candidates"),
        ({"timestamp": [5, None]}, "Impression '2' .* has no time, and others have one"),
        ({"part": ["train", "dev"]}, "Impression '2' .* the part 'dev'; the parts are train, validation"),
        ({"part": ["train", None]}, "Impression '2' .* the part None"),
    ],
)
def test_what_does_not_fit_is_named(columns, message):
    with pytest.raises(ValueError, match=message):
        built(table(impression_id=["1", "2"], candidates=[["a"], ["b"]], **columns))


def test_candidates_are_needed():
    with pytest.raises(ValueError, match="have no candidates"):
        built(table(candidates=[None, None]))


# ---------------------------------------------------------------------- random logs


def random_log(seed, n=120, n_users=7, n_items=15, times=True):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 6, n)
    columns = {
        "user_id": [f"u{user}" for user in rng.integers(0, n_users, n)],
        "candidates": [[f"i{item}" for item in rng.integers(0, n_items, size)] for size in sizes],
        "labels": [rng.integers(0, 2, size).tolist() if rng.random() < 0.9 else None for size in sizes],
    }
    if times:
        columns["timestamp"] = rng.integers(0, n // 2, n) * 1800 + 1_000_000_000
    data = Dataset.from_dict(columns)
    users = np.array([int(user[1:]) + 1 for user in columns["user_id"]])
    log, catalogue = built(data, items=None, users=users)
    return log, catalogue, columns


@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("how", ["random parts", "by time", "one part"])
@pytest.mark.parametrize("seed", range(3))
def test_histories_are_clicks_of_strictly_earlier_impressions(seed, how, times):
    log, catalogue, columns = random_log(seed, times=times)
    rng = np.random.default_rng(seed)
    parts = rng.integers(0, 4, len(log)) if how == "random parts" else np.zeros(len(log))
    if how == "by time":
        moments = np.arange(len(log)) if log.times is None else log.times
        parts = np.searchsorted(np.quantile(moments, [0.5, 0.7, 0.9]), moments, "right")
    log.parts = parts.astype(np.int8)
    with_click_histories(log)
    for number in range(len(log)):
        seen = []
        for other in range(len(log)):
            if columns["user_id"][other] != columns["user_id"][number] or parts[other] > parts[number]:
                continue
            if times:
                if log.times[other] < log.times[number]:
                    seen.append((log.times[other], other))
            elif (parts[other], other) < (parts[number], number):
                seen.append((parts[other], other))
        expected = [
            (moment, item)
            for moment, other in sorted(seen)
            for item, label in zip(columns["candidates"][other], columns["labels"][other] or [], strict=False)
            if label == 1
        ]
        found = slice(log.history_starts[number], log.history_ends[number])
        assert [catalogue.ids[row] for row in log.history[found]] == [item for _, item in expected]
        if times:
            assert log.history_times[found].tolist() == [moment for moment, _ in expected]
    assert log.has_history
    assert (log.history_times is None) == (not times)


def test_impressions_of_one_time_do_not_see_each_other():
    log, catalogue = built(table(candidates=[["a"], ["b"], ["c"]], labels=[[1], [1], [1]], timestamp=[5, 5, 6]))
    log.parts = np.zeros(3, dtype=np.int8)
    with_click_histories(log)
    lengths = log.history_ends - log.history_starts
    assert lengths.tolist() == [0, 0, 2]
    assert [catalogue.ids[row] for row in log.history[log.history_starts[2] : log.history_ends[2]]] == ["a", "b"]


def test_a_log_without_clicks_has_empty_histories():
    log, _ = built(table(candidates=[["a"], ["b"]]))
    log.parts = np.zeros(2, dtype=np.int8)
    with_click_histories(log)
    assert len(log.history) == 0
    assert log.history_starts.tolist() == log.history_ends.tolist() == [0, 0]
    events, starts, ends = earlier_events(log, np.array([0, 1]))
    assert events.tolist() == [0, 1]
    assert (starts.tolist(), ends.tolist()) == ([0, 0], [0, 1])


# ---------------------------------------------------------------------- split


def test_split_by_time():
    log, *_ = random_log(0)
    parts, text = split_impressions(log)
    times = np.sort(log.times[log.labelled])
    first, second = times[int(0.8 * len(times))], times[int(0.9 * len(times))]
    for number in range(len(log)):
        moment = log.times[number]
        expected = "train" if moment < first else "validation" if moment < second else "test"
        assert PARTS[parts[number]] == expected
    assert datetime.datetime.fromtimestamp(first, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ") in text


def test_split_by_moments():
    log, _ = built(table(candidates=[["a"]] * 4, labels=[[1]] * 4, timestamp=[10, 86400, 86399, 200000]))
    parts, text = split_impressions(log, "time", "1970-01-02", 200000)
    assert parts.tolist() == [0, 1, 0, 2]
    assert text.startswith("Global time: training before 1970-01-02T00:00:00Z")


def test_split_by_order():
    log, _ = built(table(candidates=[["a"]] * 12, labels=[[1]] * 5 + [None] + [[0]] * 5 + [None]))
    parts, text = split_impressions(log, "order", 0.6, 0.8)
    assert parts.tolist() == [0] * 7 + [1, 1, 2, 2, 2]
    assert "Order of the files" in text


def test_split_by_files_cuts_the_newest_of_training_where_validation_is_missing():
    times = [4, 3, 2, 1, 4, 9]
    files = ["train"] * 5 + ["test"]
    log, _ = built(table(candidates=[["a"]] * 6, labels=[[1]] * 6, timestamp=times, part=files))
    parts, text = split_impressions(log, validation_share=0.3)
    assert parts.tolist() == [1, 0, 0, 0, 1, 2]  # both at the very moment of the cut
    assert "validation is the training part from 1970-01-01T00:00:04Z on, its newest 30%" in text
    log.times = None
    parts, text = split_impressions(log, validation_share=0.3)
    assert parts.tolist() == [0, 0, 0, 1, 1, 2]
    log.parts = np.array([0, 0, 1, 1, 2, 3], np.int8)
    parts, text = split_impressions(log)
    assert (parts.tolist(), text) == ([0, 0, 1, 1, 2, 3], "Parts of the files.")


def test_parts_of_files_can_be_overruled():
    log, _ = built(table(candidates=[["a"]] * 3, labels=[[1]] * 3, timestamp=[3, 2, 1], part=["train"] * 3))
    assert split_impressions(log, "time", 2, 3)[0].tolist() == [2, 1, 0]


def test_a_log_without_labels_is_for_prediction():
    log, _ = built(table(candidates=[["a"]] * 3))
    parts, text = split_impressions(log)
    assert parts.tolist() == [3, 3, 3]
    assert "for prediction" in text


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({}, {}, "none. Map a column to timestamp, or set split: order"),
        ({"split": "time"}, {"timestamp": [5] * 4}, "no labelled impression for train"),
        ({"split": "order", "test_start": 0.8}, {}, "no labelled impression for validation"),
        (
            {"split": "order", "validation_start": "2020-01-01"},
            {},
            "validation_start is '2020-01-01'; with split: order",
        ),
        ({}, {"part": ["train"] * 4, "timestamp": [5] * 4}, "too short"),
        ({"validation_share": 2}, {"part": ["train"] * 4}, "validation_share is 2"),
    ],
)
def test_splits_that_cannot_be(options, columns, message):
    log, _ = built(table(candidates=[["a"]] * 4, labels=[[1]] * 4, **columns))
    with pytest.raises(ValueError, match=message):
        split_impressions(log, **options)


# ---------------------------------------------------------------------- ages and popularity


@pytest.mark.parametrize("seed", range(3))
def test_popularity_is_a_sum_over_earlier_clicks(seed):
    rng = np.random.default_rng(seed)
    rows, times = rng.integers(1, 6, 200), rng.integers(0, 300, 200) * 600 + 1_500_000_000
    asked, moments = rng.integers(0, 7, (9, 5)), rng.integers(-50, 350, (9, 5)) * 600 + 1_500_000_000
    found = Popularity(rows, times, half_life=5)(asked, moments)
    assert found.dtype == np.float32
    for place in np.ndindex(asked.shape):
        expected = sum(
            0.5 ** ((moments[place] - time) / (5 * 3600))
            for row, time in zip(rows, times, strict=True)
            if row == asked[place] and time < moments[place]
        )
        assert found[place] == pytest.approx(expected, rel=1e-6)


def test_popularity_of_a_log_much_longer_than_the_half_life():
    times = np.arange(0, 20 * 365 * 86400, 86400)
    found = Popularity(np.ones(len(times), int), times, half_life=1)(np.array([1, 1]), np.array([times[-1] + 1, 1]))
    assert found.tolist() == pytest.approx([0.5 ** (1 / 3600) * (1 + 2.0**-24), 0.5 ** (1 / 3600)])


def test_popularity_without_clicks_is_zero():
    nothing = np.zeros(0, dtype=np.int64)
    assert Popularity(nothing, nothing, 24)(np.array([[1, 2]]), np.array([[5, 6]])).tolist() == [[0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_ages_count_from_publication_or_the_first_impression(seed):
    log, catalogue, columns = random_log(seed)
    rng = np.random.default_rng(seed)
    published = np.where(rng.random(len(catalogue)) < 0.3, 1_000_000_000 + 20_000.0, np.nan)
    visible = rng.random(len(log)) < 0.6
    ages = Ages(log, visible, published)
    for number in np.flatnonzero(visible).tolist():
        for item in columns["candidates"][number]:
            row = catalogue.row(item)
            born = published[row]
            if np.isnan(born):
                born = min(log.times[k] for k in np.flatnonzero(visible) if item in columns["candidates"][k])
                assert born <= log.times[number]
            expected = max(0, log.times[number] - born) / 3600
            assert ages(np.array([row]), log.times[[number]])[0] == pytest.approx(expected)


def test_the_age_of_what_was_never_shown_is_unknown():
    log, _ = built(table(candidates=[["a"]], timestamp=[100]))
    ages = Ages(log, np.array([True]), np.full(5, np.nan))
    np.testing.assert_equal(ages(np.array([1, 2]), np.array([3700, 3700])), np.array([1, np.nan], np.float32))
