import numpy as np
import pytest

from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.evaluation import EvaluationDataset, asked_users
from lightning_rec.data.histories import build_histories
from lightning_rec.data.split import global_time, leave_one_out


def random_data(seed, with_times=True, n=300, n_users=20, n_items=15):
    """Events that count, and events that were touched without counting, of one log with many ties and repeats."""
    rng = np.random.default_rng(seed)
    users = np.minimum(rng.geometric(0.12, n), n_users)
    items, times = rng.integers(1, n_items + 1, n), rng.integers(0, 50, n) + 1_000
    ratings = np.where(rng.random(n) < 0.2, np.nan, rng.integers(1, 6, n).astype(float))
    positive = ~(ratings < 3)
    ids = ["", *(f"u{user}" for user in range(1, n_users + 1))]
    log = (users, items, times if with_times else None, ratings)
    histories = build_histories(*log, user_ids=ids, keep=positive)
    touched = build_histories(*log, user_ids=ids, keep=~positive)
    return histories, touched, log


def evaluation(histories, split, part, **options):
    users = split.users(histories, part)
    starts, ends = split.bounds(histories, part)
    options = {"max_history": 4, "filter_seen": True} | options
    return EvaluationDataset(histories, users, starts[users], ends[users], **options)


def fetch(dataset, chosen):
    return dataset[BatchIndex(np.asarray(chosen), (0,))]


def everything(dataset):
    return fetch(dataset, np.arange(len(dataset)))


def without_padding(row):
    return [value for value in row.tolist() if value]


@pytest.mark.parametrize(
    ("name", "with_times"), [("leave_one_out", True), ("leave_one_out", False), ("global_time", True)]
)
@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("seed", range(3))
def test_batches_equal_those_of_a_loop_over_the_log(seed, name, part, with_times):
    histories, touched, (users, items, times, _) = random_data(seed, with_times)
    split = leave_one_out(histories) if name == "leave_one_out" else global_time(histories, 0.6, 0.8)
    dataset = evaluation(histories, split, part, touched=touched)
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:7]
    batch = fetch(dataset, chosen)
    assert batch.index.tolist() == chosen.tolist()
    assert batch.items is None
    moment = (lambda row: (times[row], row)) if with_times else (lambda row: row)
    positive = set(histories.event.tolist())
    cut_at = split.bounds(histories, part)
    filtered = 0
    for row, sample in enumerate(chosen.tolist()):
        user = int(dataset.users[sample])
        assert int(batch.users.users[row]) == user
        first_target = int(histories.event[cut_at[0][user]])
        n_targets = int(cut_at[1][user] - cut_at[0][user])
        own = sorted((event for event in range(len(users)) if users[event] == user), key=moment)
        before = [event for event in own if moment(event) < moment(first_target)]
        targets = [event for event in own if event in positive and event not in before][:n_targets]
        read = [event for event in before if event in positive][-4:]
        length = int(batch.users.lengths[row])
        assert batch.users.history[row, :length].tolist() == items[read].tolist()
        assert not batch.users.history[row, length:].any()
        if with_times:
            assert batch.users.times[row, :length].tolist() == times[read].tolist()
        found = without_padding(batch.targets[row])
        assert sorted(found) == sorted(set(items[targets].tolist()))
        # what was touched later, with whatever rating, is not seen
        assert without_padding(batch.seen[row]) == sorted(set(items[before].tolist()))
        filtered += len(set(found) & set(items[before].tolist()))
    assert filtered > 0
    assert (
        EvaluationDataset(
            histories, dataset.users[chosen], dataset.cuts[chosen], dataset.ends[chosen], 4, True, touched
        ).filtered_targets()
        == filtered
    )
    assert evaluation(histories, split, part, touched=touched, filter_seen=False).filtered_targets() == 0
    assert everything(evaluation(histories, split, part, filter_seen=False)).seen is None


def test_the_history_of_the_test_holds_the_validation_item():
    histories = build_histories(np.ones(5, int), np.array([5, 6, 7, 8, 9]), user_ids=["", "a"])
    split = leave_one_out(histories)
    validation, test = (everything(evaluation(histories, split, part)) for part in ("validation", "test"))
    assert (validation.users.history.tolist(), validation.targets.tolist()) == ([[5, 6, 7]], [[8]])
    assert (test.users.history.tolist(), test.targets.tolist()) == ([[5, 6, 7, 8]], [[9]])
    assert (validation.seen.tolist(), test.seen.tolist()) == ([[5, 6, 7]], [[5, 6, 7, 8]])
    newest = everything(evaluation(histories, split, "test", max_history=2))
    assert newest.users.history.tolist() == [[7, 8]]
    assert newest.seen.tolist() == [[5, 6, 7, 8]]  # all of it, not only what the tower reads


def test_repeated_targets_are_found_once_and_keep_their_first_rating():
    histories = build_histories(
        np.array([1, 1, 1, 1, 1, 2, 2]),
        np.array([3, 8, 9, 8, 9, 3, 4]),
        np.array([1, 11, 12, 13, 14, 1, 11]),
        np.array([5, 4, np.nan, 1, 2, 5, 3.5]),
        user_ids=["", "a", "b"],
    )
    dataset = EvaluationDataset(histories, np.array([1, 2]), np.array([1, 6]), np.array([5, 7]), 9, True)
    batch = everything(dataset)
    assert batch.targets.tolist() == [[8, 9, 0, 0], [4, 0, 0, 0]]
    expected = np.array([[4, np.nan, np.nan, np.nan], [3.5, np.nan, np.nan, np.nan]], np.float32)
    assert np.array_equal(batch.ratings.numpy(), expected, equal_nan=True)


def test_what_was_touched_in_the_same_second_is_seen_by_file_order():
    users, items, times = np.array([1, 1, 1, 1]), np.array([1, 2, 3, 4]), np.array([5, 9, 9, 9])
    positive = np.array([True, False, True, False])
    histories = build_histories(users, items, times, user_ids=["", "a"], keep=positive)
    touched = build_histories(users, items, times, user_ids=["", "a"], keep=~positive)
    dataset = EvaluationDataset(histories, np.array([1]), np.array([1]), np.array([2]), 9, True, touched)
    assert everything(dataset).seen.tolist() == [[1, 2]]


def test_an_earlier_low_rating_of_a_target_is_counted_as_filtered():
    users, items = np.array([1, 1, 1, 1]), np.array([1, 2, 1, 1])
    positive = np.array([False, True, True, True])
    histories = build_histories(users, items, user_ids=["", "a"], keep=positive)
    touched = build_histories(users, items, user_ids=["", "a"], keep=~positive)
    dataset = EvaluationDataset(histories, np.array([1]), np.array([1]), np.array([3]), 9, True, touched)
    assert dataset.filtered_targets() == 1  # one item to be found, though it comes twice
    dataset = EvaluationDataset(histories, np.array([1]), np.array([1]), np.array([3]), 9, True)
    assert dataset.filtered_targets() == 0


def test_prediction_serves_users_in_order_with_or_without_a_history():
    histories = build_histories(
        np.array([1, 1, 3, 1]), np.array([4, 5, 4, 6]), np.array([3, 1, 2, 2]), user_ids=["", "a", "b", "c"]
    )
    touched = build_histories(np.array([2, 1]), np.array([7, 8]), np.array([9, 9]), user_ids=["", "a", "b", "c"])
    users = np.array([3, 0, 1, 2, 3])
    dataset = EvaluationDataset(histories, users, histories.indptr[users + 1], None, 2, True, touched)
    assert dataset.sort_key.tolist() == [1, 0, 3, 0, 1]  # all of the history, since `seen` holds it
    batch = everything(dataset)
    assert batch.users.users.tolist() == [3, 0, 1, 2, 3]
    assert batch.index.tolist() == [0, 1, 2, 3, 4]
    assert batch.users.history.tolist() == [[4, 0], [0, 0], [6, 4], [0, 0], [4, 0]]
    assert batch.users.lengths.tolist() == [1, 0, 2, 0, 1]
    assert [without_padding(row) for row in batch.seen] == [[4], [], [4, 5, 6, 8], [7], [4]]
    assert batch.targets is None
    only = fetch(dataset, [1])
    assert only.users.history.tolist() == [[0]]  # at least one step, so that towers need no special case
    assert only.seen.shape == (1, 0)


def test_prediction_without_any_event():
    histories = build_histories(np.zeros(0, int), np.zeros(0, int), user_ids=["", "a"])
    dataset = EvaluationDataset(histories, np.array([1, 0]), np.array([0, 0]), None, 5, True)
    batch = everything(dataset)
    assert (batch.users.history.tolist(), batch.users.lengths.tolist()) == ([[0], [0]], [0, 0])


def test_user_texts_are_made_from_what_lies_before_the_cut():
    histories, _, _ = random_data(0)
    split = leave_one_out(histories)
    asked = []

    def texts(users, ends):
        asked.append((users.tolist(), ends.tolist()))
        return ["x"] * len(users)

    batch = fetch(evaluation(histories, split, "test", user_texts=texts), [1, 0])
    users = split.test_users[[1, 0]]
    assert asked == [(users.tolist(), split.validation_end[users].tolist())]
    assert batch.users.texts == ["x", "x"]


def test_who_is_asked_for(tmp_path):
    assert asked_users(None, ["a", "b"]) == ["a", "b"]
    assert asked_users(["b", "x", "b"], ["a", "b"]) == ["b", "x", "b"]
    file = tmp_path / "users.txt"
    file.write_bytes("\ufeff001\r\n1\r\n\r\n1.0\nÄnne\n001".encode())
    assert asked_users(str(file), ["a"]) == ["001", "1", "1.0", "Änne", "001"]
    with pytest.raises(FileNotFoundError, match=r"predict_users names the file .*one user id a line"):
        asked_users(str(tmp_path / "none.txt"), [])
