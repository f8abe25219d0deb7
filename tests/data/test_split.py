from collections import Counter, defaultdict
from datetime import date

import numpy as np
import pytest

from lightning_rec.data.histories import build_histories, k_core
from lightning_rec.data.split import global_time, leave_one_out, refit


def names(n_users):
    return ["", *(f"u{row}" for row in range(1, n_users + 1))]


def random_log(seed, n=400, n_users=40, n_items=30, span=60):
    """Few instants and few items, so that equal times and repeats are common."""
    rng = np.random.default_rng(seed)
    users = np.minimum(rng.geometric(0.08, n), n_users)
    return users, rng.integers(1, n_items + 1, n), rng.integers(0, span, n) + 10_000_000_000, names(n_users)


def histories_of(seed, **options):
    users, items, times, ids = random_log(seed)
    return build_histories(users, items, times, user_ids=ids, **options)


def test_events_are_sorted_by_user_time_and_file_order():
    histories = build_histories(
        np.array([2, 1, 2, 1, 2, 1]),
        np.array([5, 6, 7, 8, 9, 6]),
        np.array([3, 9, 1, 2, 3, 2]),
        np.array([1, 2, np.nan, 4, 5, 0], np.float64),
        user_ids=names(3),
    )
    assert histories.indptr.tolist() == [0, 0, 3, 6, 6]
    assert histories.items.tolist() == [8, 6, 6, 7, 5, 9]
    assert histories.event.tolist() == [3, 5, 1, 2, 0, 4]
    assert histories.times.tolist() == [2, 2, 9, 1, 3, 3]
    assert np.array_equal(histories.ratings, np.array([4, 0, 2, np.nan, 1, 5], np.float32), equal_nan=True)
    assert histories.history(2).tolist() == [7, 5, 9]
    assert histories.history(0).tolist() == histories.history(3).tolist() == []
    assert histories.users_of_events().tolist() == [1, 1, 1, 2, 2, 2]
    assert (histories.n_users, len(histories), histories.report["users_without_events"]) == (4, 6, 1)
    assert {a.dtype for a in (histories.indptr, histories.items, histories.times, histories.event)} == {
        np.dtype(np.int64)
    }
    assert histories.ratings.dtype == np.float32


def test_without_times_the_order_is_that_of_the_file():
    histories = build_histories(np.array([1, 2, 1, 1]), np.array([4, 3, 2, 1]), user_ids=names(2))
    assert histories.history(1).tolist() == [4, 2, 1]
    assert histories.times is None
    assert histories.ratings is None


def test_order_with_equal_times_is_that_of_a_stable_sort():
    for seed in range(5):
        users, items, times, ids = random_log(seed)
        histories = build_histories(users, items, times, user_ids=ids)
        expected = sorted(range(len(users)), key=lambda row: (users[row], times[row], row))
        assert histories.event.tolist() == expected
        assert histories.items.tolist() == items[expected].tolist()


def test_unknown_items_and_events_that_do_not_count_are_left_out_and_counted():
    histories = build_histories(
        np.array([1, 1, 1, 2]), np.array([0, 3, 4, 0]), user_ids=names(2), keep=np.array([True, False, True, False])
    )
    assert histories.items.tolist() == [4]
    assert histories.event.tolist() == [2]
    report = histories.report
    assert (report["interactions"], report["unknown_item_events"], report["not_counted_events"]) == (4, 2, 1)
    assert (report["events"], report["users"], report["users_without_events"]) == (1, 2, 1)


@pytest.mark.parametrize("repeats", ["keep", "first", "last"])
def test_repeats(repeats):
    for seed in range(5):
        users, items, times, ids = random_log(seed)
        histories = build_histories(users, items, times, user_ids=ids, repeats=repeats)
        order = sorted(range(len(users)), key=lambda row: (users[row], times[row], row))
        if repeats == "keep":
            expected = order
        else:
            chosen = {}
            for row in order if repeats == "last" else order[::-1]:
                chosen[users[row], items[row]] = row
            expected = [row for row in order if row in set(chosen.values())]
        assert histories.event.tolist() == expected
        assert histories.report["repeats_dropped"] == len(users) - len(expected)


def test_k_core_against_brute_force():
    for seed in range(8):
        users, items, _, ids = random_log(seed)
        mask, counts = k_core(users, items, 8, 12)
        alive = list(range(len(users)))
        while True:
            of_user, of_item = Counter(users[alive]), Counter(items[alive])
            left = [row for row in alive if of_user[users[row]] >= 8 and of_item[items[row]] >= 12]
            if left == alive:
                break
            alive = left
        assert np.flatnonzero(mask).tolist() == alive
        assert counts["core_events_dropped"] == len(users) - len(alive)
        assert counts["core_users_dropped"] == len(set(users)) - len(set(users[alive]))
        assert counts["core_items_dropped"] == len(set(items)) - len(set(items[alive]))
        histories = build_histories(users, items, user_ids=ids, user_min=8, item_min=12)
        assert sorted(histories.event.tolist()) == alive
        assert histories.report["core_rounds"] == counts["core_rounds"]
        assert histories.n_users == len(ids)


def test_k_core_is_repeated_until_stable_and_may_leave_nothing():
    # item 3 has one event; without it user 2 has one; without user 2 item 2 has one; and so on.
    mask, counts = k_core(np.array([1, 1, 2, 2]), np.array([1, 2, 2, 3]), 2, 2)
    assert not mask.any()
    assert counts["core_rounds"] >= 2
    assert k_core(np.array([], int), np.array([], int), 2, 2)[0].tolist() == []
    assert len(build_histories(np.array([1]), np.array([1]), user_ids=names(1), user_min=2)) == 0


def test_bad_arguments_are_named():
    one = np.array([1])
    with pytest.raises(ValueError, match="1 user codes, but 2 items"):
        build_histories(one, np.array([1, 2]), user_ids=names(1))
    with pytest.raises(ValueError, match="User codes go from 1 to 1; here from 0 to 2"):
        build_histories(np.array([0, 2]), np.array([1, 2]), user_ids=names(1))
    with pytest.raises(ValueError, match="padding"):
        build_histories(one, one, user_ids=["u", "v"])
    with pytest.raises(ValueError, match="'keep', 'first' or 'last'"):
        build_histories(one, one, user_ids=names(1), repeats="drop")
    with pytest.raises(ValueError, match="at least 3"):
        leave_one_out(histories_of(0), min_events=2)


def test_leave_one_out_by_hand():
    # u1 has four events, u2 two, u3 three, u4 none
    users = np.array([1, 1, 1, 1, 2, 2, 3, 3, 3])
    histories = build_histories(users, np.arange(1, 10), user_ids=names(4))
    split = leave_one_out(histories)
    assert split.train_end.tolist() == [0, 2, 6, 7, 9]
    assert split.validation_end.tolist() == [0, 3, 6, 8, 9]
    assert split.validation_users.tolist() == split.test_users.tolist() == [1, 3]
    assert split.users(histories, "train").tolist() == [1, 2, 3]
    assert split.counts["users_excluded_few_events"] == split.counts["users_excluded_no_events"] == 1
    assert (split.counts["train_events"], split.counts["validation_events"], split.counts["test_events"]) == (5, 2, 2)
    assert split.train_counts(histories, 10).tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    assert leave_one_out(histories, min_events=4).test_users.tolist() == [1]


SPLITS = {
    "leave_one_out": leave_one_out,
    "fractions": lambda histories: global_time(histories, 0.8, 0.9),
    "times": lambda histories: global_time(histories, 10_000_000_030, 10_000_000_045),
    "cold": lambda histories: global_time(histories, 0.3, 0.5, cold_users=True),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("repeats", ["keep", "last"])
def test_nothing_of_validation_and_test_reaches_training(name, repeats):
    for seed in range(10):
        histories = histories_of(seed, repeats=repeats)
        split = SPLITS[name](histories)
        parts = [split.in_part(histories, part) for part in ("train", "validation", "test")]
        # every event is in one part
        assert (sum(part.astype(int) for part in parts) == 1).all()
        train = set(histories.event[parts[0]])
        assert train.isdisjoint(histories.event[parts[1] | parts[2]])
        start, end = histories.indptr[:-1], histories.indptr[1:]
        assert (start <= split.train_end).all()
        assert (split.train_end <= split.validation_end).all()
        assert (split.validation_end <= end).all()
        times, user = histories.times, histories.users_of_events()
        if name == "leave_one_out":
            latest = defaultdict(lambda: -1)
            for u, t in zip(user[parts[0]], times[parts[0]], strict=True):
                latest[u] = max(latest[u], t)
            assert all(times[split.train_end[u]] >= latest[u] for u in split.validation_users)
        else:
            assert times[parts[0]].max() < times[parts[1]].min()
            assert times[parts[1]].max() < times[parts[2]].min()
        counts = split.train_counts(histories, 31)
        assert counts.sum() == split.counts["train_events"] == len(train)
        assert Counter(histories.items[parts[0]]) == {row: n for row, n in enumerate(counts) if n}


@pytest.mark.parametrize("name", SPLITS)
def test_test_histories_hold_the_validation_item(name):
    histories = histories_of(3)
    split = SPLITS[name](histories)
    both = np.intersect1d(split.validation_users, split.test_users)
    assert len(both)
    for user in both:
        history = histories.event[histories.indptr[user] : split.validation_end[user]]
        validation = histories.event[split.train_end[user] : split.validation_end[user]]
        targets = histories.event[split.validation_end[user] : histories.indptr[user + 1]]
        assert len(targets)
        assert history[-len(validation) :].tolist() == validation.tolist()
        assert set(history).isdisjoint(targets)


def cut_log():
    #          u1: before, at the first cut, at the second   u2: validation and test only   u3: test only
    users = np.array([1, 1, 1, 2, 2, 3, 4])
    times = np.array([9, 10, 20, 15, 25, 30, 1])
    return build_histories(users, np.arange(1, 8), times, user_ids=names(4))


def test_global_time_boundaries_and_cold_users():
    histories = cut_log()
    split = global_time(histories, 10, 20)
    # an event at the instant of a cut is in the later part
    assert split.train_end.tolist() == [0, 1, 3, 5, 7]
    assert split.validation_end.tolist() == [0, 2, 4, 5, 7]
    assert split.validation_users.tolist() == [1]
    # u2 has an event before the test part, in validation
    assert split.test_users.tolist() == [1, 2]
    assert split.counts["validation_users_excluded_cold"] == 1
    assert split.counts["test_users_excluded_cold"] == 1
    assert (split.counts["test_events"], split.counts["test_targets"]) == (3, 2)
    everyone = global_time(histories, 10, 20, cold_users=True)
    assert everyone.validation_users.tolist() == [1, 2]
    assert everyone.test_users.tolist() == [1, 2, 3]
    assert "test_users_excluded_cold" not in everyone.counts
    assert "1970-01-01T00:00:10Z" in split.description


@pytest.mark.parametrize("cold_users", [False, True])
def test_events_in_the_gap_are_in_no_part_but_in_later_histories(cold_users):
    for seed in range(5):
        users, items, times, ids = random_log(seed)
        histories = build_histories(users, items, (times - 10_000_000_000) * 3600, user_ids=ids)
        first, second, gap = 30, 50, 6.5
        split = global_time(histories, first * 3600, second * 3600, cold_users=cold_users, gap=gap)
        hours, user = histories.times / 3600, histories.users_of_events()
        wanted = {
            "train": hours < first - gap,
            "validation": (hours >= first) & (hours < second - gap),
            "test": hours >= second,
        }
        for part, events in wanted.items():
            assert split.in_part(histories, part).tolist() == events.tolist()
            assert split.counts[f"{part}_events"] == events.sum()
        left = ~np.any(list(wanted.values()), axis=0)
        assert split.counts["gap_events"] == left.sum() > 0
        # the history of an evaluated user is all that happened before the moment, the gap included
        for part, moment in (("validation", first), ("test", second)):
            starts, _ = split.bounds(histories, part)
            for u in split.users(histories, part):
                assert starts[u] - histories.indptr[u] == ((user == u) & (hours < moment)).sum()
        asked = {u for u in user[wanted["test"]] if cold_users or ((user == u) & (hours < second)).any()}
        assert set(split.test_users.tolist()) == asked
        last = refit(split, histories)
        assert last.in_part(histories, "train").tolist() == (hours < second - gap).tolist()
        assert last.in_part(histories, "test").tolist() == wanted["test"].tolist()
        assert last.counts["train_events"] == (hours < second - gap).sum()
        assert last.counts["gap_events"] == ((hours >= second - gap) & (hours < second)).sum()
        assert not last.in_part(histories, "validation").any()


def test_an_event_at_the_edge_of_the_gap():
    times = np.array([0, 127, 128, 200, 227, 228, 300])
    histories = build_histories(np.ones(7, int), np.arange(1, 8), times, user_ids=names(1))
    split = global_time(histories, 200, 300, gap=72 / 3600)
    parts = {part: times[split.in_part(histories, part)].tolist() for part in ("train", "validation", "test")}
    assert parts == {"train": [0, 127], "validation": [200, 227], "test": [300]}
    assert "the 0.02 hours before each moment are left out" in split.description
    assert "hours" not in global_time(histories, 200, 300).description


def test_a_gap_that_leaves_nothing_is_refused():
    histories = cut_log()
    with pytest.raises(ValueError, match=r"with a gap of 1 hours before each, leaves no event for training"):
        global_time(histories, 10, 20, gap=1)
    for gap in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"gap is .* number of hours"):
            global_time(histories, 10, 20, gap=gap)


def test_fractions_are_moments_so_that_an_instant_is_never_split():
    users, times = np.ones(10, int), np.array([0, 1, 2, 3, 4, 5, 5, 5, 5, 9])
    histories = build_histories(users, np.arange(1, 11), times, user_ids=names(1))
    split = global_time(histories, 0.8, 0.9)
    assert (split.train_end[1], split.validation_end[1]) == (5, 9)


def test_moments_are_read_from_iso_text_dates_and_numbers():
    days = np.arange(10) * 86_400
    histories = build_histories(np.ones(10, int), np.arange(1, 11), days, user_ids=names(1))
    for first, second in (
        ("1970-01-06", "1970-01-09"),
        (date(1970, 1, 6), date(1970, 1, 9)),
        (5 * 86_400, 8 * 86_400),
        (5.0 * 86_400, str(8 * 86_400)),
        ("0.5", "0.8"),
        ("1970-01-06T01:00:00+01:00", "1970-01-08T23:59:59.5Z"),
    ):
        split = global_time(histories, first, second)
        assert (split.train_end[1], split.validation_end[1]) == (5, 8)


def test_global_time_errors_name_the_remedy():
    timeless = build_histories(np.array([1]), np.array([1]), user_ids=names(1))
    with pytest.raises(ValueError, match=r"needs times.*data\.split: leave_one_out"):
        global_time(timeless)
    histories = cut_log()
    with pytest.raises(ValueError, match=r"no event for training.*from 1970-01-01T00:00:01Z to 1970-01-01T00:00:30Z"):
        global_time(histories, 0, 20)
    with pytest.raises(ValueError, match="no event for validation"):
        global_time(histories, 20, 10)
    with pytest.raises(ValueError, match="no event for test"):
        global_time(histories, 10, "2020-01-01")
    for value in ("soon", float("nan"), True, None):
        with pytest.raises(ValueError, match="validation_start is"):
            global_time(histories, value, 20)


def test_refit_trains_on_validation_and_leaves_the_test_alone():
    histories = build_histories(
        np.array([1, 1, 1, 1, 2, 2, 3, 3, 3]),
        np.array([1, 2, 3, 4, 5, 6, 7, 8, 9]),
        user_ids=["", "a", "b", "c"],
    )
    split = leave_one_out(histories)
    last = refit(split, histories)
    assert histories.items[last.in_part(histories, "train")].tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert not last.in_part(histories, "validation").any()
    assert last.users(histories, "validation").tolist() == []
    assert last.in_part(histories, "test").tolist() == split.in_part(histories, "test").tolist()
    assert last.users(histories, "test").tolist() == split.users(histories, "test").tolist() == [1, 3]
    assert last.counts["train_events"] == 7
    assert "validation events are trained on" in last.description
