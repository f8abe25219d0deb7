import time

import numpy as np
import pytest

from lightning_rec.data.collate import (
    BatchIndex,
    KnownItems,
    Samples,
    TrainDataset,
    gather_flat,
    gather_slices,
    target_chances,
    training_samples,
)
from lightning_rec.data.histories import build_histories
from lightning_rec.data.sampling import NegativeSampler
from lightning_rec.data.split import leave_one_out

N_ITEMS = 25


def make_histories(seed, n=300, n_users=20, with_times=True, with_ratings=True):
    rng = np.random.default_rng(seed)
    users = np.minimum(rng.geometric(0.12, n), n_users)
    ratings = np.where(rng.random(n) < 0.2, np.nan, rng.integers(1, 6, n).astype(float))
    return build_histories(
        users,
        rng.integers(1, N_ITEMS + 1, n),
        rng.integers(0, 50, n) if with_times else None,
        ratings if with_ratings else None,
        user_ids=["", *(f"u{user}" for user in range(1, n_users + 1))],
    )


def make_dataset(histories, max_history=6, windows="newest", candidates="catalogue", **options):
    ends = leave_one_out(histories).train_end
    samples = training_samples(histories, ends, max_history, windows)
    sampler = options.pop("sampler", None)
    if candidates == "sampled" and sampler is None:
        counts = np.bincount(histories.items, minlength=N_ITEMS + 1)
        only = options.pop("trained_only", False)
        sampler = NegativeSampler(counts, options.pop("distribution", "uniform"), trained_only=only)
    known = KnownItems.of(histories, ends)
    return TrainDataset(histories, samples, known, N_ITEMS + 1, candidates, sampler, **options)


def fetch(dataset, samples, seed=0):
    return dataset[BatchIndex(np.asarray(samples), (seed,))]


def catalogue_rows(batch, positions):
    return batch.items.rows[positions]


def test_slices_of_every_length():
    offsets, mask = gather_slices(np.array([4, 2, 9]), np.array([6, 2, 12]))
    assert offsets.tolist() == [[4, 5, 0], [0, 0, 0], [9, 10, 11]]
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert gather_slices(np.array([3]), np.array([3]), least=1)[1].tolist() == [[False]]
    assert gather_slices(np.array([3]), np.array([3]))[0].shape == (1, 0)
    offsets, owner = gather_flat(np.array([4, 2, 9]), np.array([6, 2, 12]))
    assert (offsets.tolist(), owner.tolist()) == ([4, 5, 9, 10, 11], [0, 0, 2, 2, 2])
    assert gather_flat(np.zeros(0, int), np.zeros(0, int))[0].shape == (0,)


@pytest.mark.parametrize("max_history", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_windows_newest_are_the_newest_events_of_each_user(seed, max_history):
    histories = make_histories(seed)
    ends = leave_one_out(histories).train_end
    samples = training_samples(histories, ends, max_history)
    found = {
        int(user): (int(start), int(end))
        for user, start, end in zip(samples.users, samples.starts, samples.ends, strict=True)
    }
    expected = {}
    for user in range(histories.n_users):
        start, end = int(histories.indptr[user]), int(ends[user])
        if end - start >= 2:
            expected[user] = (max(start, end - max_history - 1), end)
    assert found == expected
    assert len(samples) == len(expected)


@pytest.mark.parametrize("max_history", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_windows_all_have_every_event_but_the_first_as_a_target_once(seed, max_history):
    histories = make_histories(seed)
    ends = leave_one_out(histories).train_end
    samples = training_samples(histories, ends, max_history, "all")
    targets = []
    for user, start, end in zip(samples.users, samples.starts, samples.ends, strict=True):
        assert histories.indptr[user] <= start
        assert end <= ends[user]
        assert 2 <= end - start <= max_history + 1
        targets += range(start + 1, end)
    expected = []
    for user in range(histories.n_users):
        expected += range(histories.indptr[user] + 1, ends[user])
    assert sorted(targets) == expected
    # a window that holds the newest event is the one that `newest` takes
    newest = training_samples(histories, ends, max_history)
    windows = set(zip(samples.users.tolist(), samples.starts.tolist(), samples.ends.tolist(), strict=True))
    assert set(zip(newest.users.tolist(), newest.starts.tolist(), newest.ends.tolist(), strict=True)) <= windows


def test_users_with_fewer_than_two_events_give_no_sample():
    histories = build_histories(np.array([1, 3, 3]), np.array([1, 2, 3]), user_ids=["", "a", "b", "c"])
    samples = training_samples(histories, histories.indptr[1:], 5)
    assert samples.users.tolist() == [3]
    assert len(training_samples(histories, histories.indptr[:-1], 5, "all")) == 0


@pytest.mark.parametrize("candidates", ["catalogue", "batch", "sampled"])
@pytest.mark.parametrize("supervision", ["every", "random", "last"])
@pytest.mark.parametrize("windows", ["newest", "all"])
def test_batches_equal_those_of_a_loop_over_events(candidates, supervision, windows):
    histories = make_histories(1)
    dataset = make_dataset(histories, 4, windows, candidates, supervision=supervision, negatives=5)
    samples = dataset.samples
    for seed in range(4):
        chosen = np.random.default_rng(seed).permutation(len(samples))[: 3 + seed]
        batch = fetch(dataset, chosen, seed)
        history, targets = catalogue_rows(batch, batch.users.history), catalogue_rows(batch, batch.targets)
        assert history.shape == targets.shape == batch.users.times.shape == batch.ratings.shape
        assert history.shape[1] == int(batch.users.lengths.max())
        for row, sample in enumerate(chosen.tolist()):
            start, end = int(samples.starts[sample]), int(samples.ends[sample])
            length = int(batch.users.lengths[row])
            if supervision == "random":
                assert 1 <= length <= end - start - 1
            else:
                assert length == end - start - 1
            padding = history.shape[1] - length
            events = list(range(start, start + length))
            supervised = [supervision == "every" or step == length - 1 for step in range(length)]
            assert history[row].tolist() == [int(histories.items[event]) for event in events] + [0] * padding
            assert batch.users.times[row].tolist() == [int(histories.times[event]) for event in events] + [0] * padding
            assert (
                targets[row].tolist()
                == [
                    int(histories.items[event + 1]) if wanted else 0
                    for event, wanted in zip(events, supervised, strict=True)
                ]
                + [0] * padding
            )
            expected = [
                histories.ratings[event + 1] if wanted else np.nan
                for event, wanted in zip(events, supervised, strict=True)
            ] + [np.nan] * padding
            assert np.array_equal(batch.ratings[row].numpy(), np.array(expected, np.float32), equal_nan=True)
            user = int(samples.users[sample])
            assert int(batch.users.users[row]) == user
            training = histories.items[histories.indptr[user] : leave_one_out(histories).train_end[user]]
            known = [row for row in batch.known[row].tolist() if row]
            assert known == sorted(set(training.tolist()))
        rows = batch.items.rows.tolist()
        assert rows[0] == 0
        assert len(set(rows)) == len(rows)
        distinct_targets = set(targets[targets > 0].tolist())
        listed = rows[1 : batch.n_candidates + 1]
        assert distinct_targets <= set(listed)
        if candidates == "catalogue":
            assert batch.items.whole
            assert rows == list(range(N_ITEMS + 1))
            assert batch.n_candidates == N_ITEMS
            assert batch.log_q is None
        else:
            assert not batch.items.whole
            assert listed[: len(distinct_targets)] == sorted(distinct_targets)
            assert set(rows[batch.n_candidates + 1 :]) == set(history[history > 0].tolist()) - set(listed)
            assert batch.log_q.shape == (batch.n_candidates,)
            assert bool((batch.log_q <= 0).all())
        if candidates == "batch":
            assert batch.n_candidates == len(distinct_targets)


def test_data_without_times_and_ratings():
    batch = fetch(make_dataset(make_histories(0, with_times=False, with_ratings=False)), [0, 1])
    assert batch.users.times is None
    assert batch.ratings is None
    assert batch.users.texts is None


def test_the_same_seed_gives_the_same_batch_and_batches_do_not_touch_one_another():
    dataset = make_dataset(make_histories(2), candidates="sampled", negatives=4, supervision="random")
    first = fetch(dataset, [3, 1, 4], 5)
    kept = {name: getattr(first, name).clone() for name in ("targets", "known", "log_q", "ratings")}
    fetch(dataset, [0, 2], 6)
    again = fetch(dataset, [3, 1, 4], 5)
    for name, tensor in kept.items():
        assert getattr(first, name).equal(tensor) or name == "ratings"
        assert np.array_equal(getattr(again, name).numpy(), tensor.numpy(), equal_nan=True)
    assert again.items.rows.equal(first.items.rows)
    other = [fetch(dataset, [3, 1, 4], seed).items.rows.tolist() for seed in range(5)]
    assert any(rows != first.items.rows.tolist() for rows in other)


def test_a_random_prefix_may_end_at_any_event():
    dataset = make_dataset(make_histories(0), 6, supervision="random")
    longest = int(dataset.samples.lengths.argmax())
    lengths = {int(fetch(dataset, [longest], seed).users.lengths[0]) for seed in range(200)}
    assert lengths == set(range(1, int(dataset.samples.lengths[longest])))


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
@pytest.mark.parametrize("per_user", [False, True])
def test_negatives_are_no_targets_of_the_step(distribution, per_user):
    dataset = make_dataset(
        make_histories(3), candidates="sampled", negatives=6, per_user=per_user, distribution=distribution
    )
    for seed in range(20):
        batch = fetch(dataset, [seed % len(dataset)], seed)
        targets = set(catalogue_rows(batch, batch.targets[batch.targets > 0]).tolist())
        listed = batch.items.rows[1 : batch.n_candidates + 1].tolist()
        negatives = set(listed[len(targets) :])
        assert negatives
        assert 0 not in negatives
        assert not negatives & targets
        if per_user:  # one user in the step, so that all negatives are drawn for that user
            assert not negatives & set(batch.known[0].tolist())


def everything_but(missing):
    """A user who knows all items but ``missing``, and one who knows two."""
    rows = [row for row in range(1, N_ITEMS + 1) if row not in missing]
    users = np.array([1] * len(rows) + [2, 2])
    histories = build_histories(users, np.array([*rows, 1, 2]), user_ids=["", "all", "two"])
    samples = training_samples(histories, histories.indptr[1:], 100)
    known = KnownItems.of(histories, histories.indptr[1:])
    return histories, samples, known


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
@pytest.mark.parametrize("per_user", [False, True])
@pytest.mark.parametrize("missing", [[], [N_ITEMS], [3, 7]])
def test_a_user_who_knows_nearly_everything_is_served_in_bounded_time(distribution, per_user, missing):
    histories, samples, known = everything_but(missing)
    # nearly all the weight is on known items, so that drawing and throwing away would never end
    counts = np.where(np.isin(np.arange(N_ITEMS + 1), missing), 0, 10**9)
    sampler = NegativeSampler(counts, distribution, power=1.0)
    dataset = TrainDataset(histories, samples, known, N_ITEMS + 1, "sampled", sampler, negatives=50, per_user=per_user)
    began = time.process_time()
    batch = fetch(dataset, [0])
    assert time.process_time() - began < 1
    listed = batch.items.rows[1 : batch.n_candidates + 1].tolist()
    targets = set(histories.history(1)[1:].tolist())
    if per_user:
        assert set(listed) - targets == set(missing)
    else:  # what a step knows of a single user is in `known`; negatives of the step only avoid its targets
        assert targets <= set(listed) <= targets | set(missing) | {1}
        assert set(listed) > targets
        if distribution == "uniform":
            assert set(missing) <= set(listed)
    assert bool(np.isfinite(batch.log_q.numpy()).all())
    both = fetch(dataset, [0, 1])
    assert bool(np.isfinite(both.log_q.numpy()).all())


def simulated_inclusion(dataset, batch_size, steps, seed=0):
    """How often each row was a candidate, and the mean of exp(log_q) where it was one."""
    rng = np.random.default_rng(seed)
    counts, sums = np.zeros(N_ITEMS + 1), np.zeros(N_ITEMS + 1)
    for step in range(steps):
        batch = fetch(dataset, rng.choice(len(dataset), batch_size, replace=False), step)
        rows = batch.items.rows[1 : batch.n_candidates + 1].numpy()
        counts[rows] += 1
        sums[rows] += np.exp(batch.log_q.numpy())
    return counts / steps, sums / np.maximum(counts, 1)


@pytest.mark.parametrize(
    ("candidates", "supervision", "options"),
    [
        ("batch", "every", {}),
        ("batch", "random", {}),
        ("sampled", "every", {"negatives": 4}),
        ("sampled", "last", {"negatives": 4, "distribution": "popularity"}),
        ("sampled", "random", {"negatives": 2, "per_user": True}),
        ("sampled", "every", {"negatives": 2, "per_user": True, "distribution": "popularity"}),
        ("sampled", "every", {"negatives": 4, "trained_only": True}),
        ("sampled", "random", {"negatives": 2, "per_user": True, "trained_only": True}),
        ("sampled", "last", {"negatives": 2, "per_user": True, "distribution": "popularity", "trained_only": True}),
    ],
)
def test_log_q_is_the_log_of_how_often_a_row_is_a_candidate(supervision, candidates, options):
    rng = np.random.default_rng(7)
    lengths = rng.integers(3, 9, 80)
    # a few items are touched by nearly everyone, most by few; a user who repeats an item is one chance to meet it
    weights = 1 / np.arange(1, N_ITEMS + 1) ** 1.2
    items = np.concatenate([rng.choice(N_ITEMS, length, p=weights / weights.sum()) + 1 for length in lengths])
    histories = build_histories(
        np.repeat(np.arange(1, 81), lengths), items, user_ids=["", *(f"u{number}" for number in range(80))]
    )
    untrained = []
    if options.get("trained_only"):
        untrained = [2, 5, *range(20, N_ITEMS + 1)]
        histories = histories.only(~np.isin(histories.items, untrained))
    dataset = make_dataset(histories, 20, candidates=candidates, supervision=supervision, **options)
    happened, claimed = simulated_inclusion(dataset, 5, 600)
    often = happened > 0.06
    assert often.sum() > 10
    assert not happened[untrained].any()
    gap = np.log(claimed[often] / happened[often])
    assert np.abs(gap).max() < 0.35
    assert np.abs(gap).mean() < 0.1


def test_negatives_of_a_step_that_holds_most_items_are_likely():
    """What is no target shares all draws: with few such items, each is nearly surely drawn."""
    histories, samples, known = everything_but([4, 9])
    dataset = TrainDataset(
        histories, samples, known, N_ITEMS + 1, "sampled", NegativeSampler(np.ones(N_ITEMS + 1)), negatives=3
    )
    batch = fetch(dataset, [0])  # targets: all but rows 1, 4 and 9
    rows = batch.items.rows[1 : batch.n_candidates + 1].tolist()
    log_q = dict(zip(rows, np.exp(batch.log_q.numpy()).tolist(), strict=True))
    drawn = [row for row in (1, 4, 9) if row in log_q]
    assert drawn
    assert [log_q[row] for row in drawn] == pytest.approx([1 - (2 / 3) ** 3] * len(drawn), rel=1e-4)


def test_chances_of_targets_by_hand():
    # user 1: 5 6 6 7, user 2: 6 8
    histories = build_histories(np.array([1, 1, 1, 1, 2, 2]), np.array([5, 6, 6, 7, 6, 8]), user_ids=["", "a", "b"])
    samples = training_samples(histories, histories.indptr[1:], 9)
    chances, mean = target_chances(histories, samples, "every", 10)
    assert (chances.tolist(), mean) == ([0, 0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0], 2)
    chances, mean = target_chances(histories, samples, "last", 10)
    assert (chances.tolist(), mean) == ([0, 0, 0, 0, 0, 0, 0, 0.5, 0.5, 0], 1)
    chances, mean = target_chances(histories, samples, "random", 10)
    assert (chances.tolist(), mean) == (pytest.approx([0, 0, 0, 0, 0, 0, 1 / 3, 1 / 6, 0.5, 0]), 1)


def test_user_texts_are_asked_for_what_lies_before_the_last_target():
    asked = []

    def texts(users, ends):
        asked.append((users.tolist(), ends.tolist()))
        return ["text"] * len(users)

    dataset = make_dataset(make_histories(0), 4, supervision="random", user_texts=texts)
    batch = fetch(dataset, [2, 0], 1)
    users, ends = asked[0]
    assert users == batch.users.users.tolist()
    assert ends == (dataset.samples.starts[[2, 0]] + batch.users.lengths.numpy()).tolist()
    assert batch.users.texts == ["text", "text"]


def test_known_items_of_users():
    histories = build_histories(np.array([1, 1, 1, 3]), np.array([4, 2, 4, 9]), user_ids=["", "a", "b", "c"])
    known = KnownItems.of(histories, np.array([0, 2, 3, 4]))
    assert [known[user].tolist() for user in range(4)] == [[], [2, 4], [], [9]]
    assert known.matrix(np.array([3, 2, 1])).tolist() == [[9, 0], [0, 0], [2, 4]]
    assert KnownItems.of(histories, histories.indptr[:-1]).matrix(np.array([1, 2])).shape == (2, 0)


def test_samples_have_lengths():
    assert Samples(np.array([1]), np.array([3]), np.array([7])).lengths.tolist() == [4]


def test_users_who_know_thousands_of_items_go_together():
    n_known = [3, 3000, 1, 1023, 1024, 100]
    users = np.repeat(np.arange(1, 7), n_known)
    histories = build_histories(users, np.concatenate([np.arange(1, n + 1) for n in n_known]), user_ids=[""] * 7)
    samples = training_samples(histories, histories.indptr[1:], 5)
    known = KnownItems.of(histories, histories.indptr[1:])
    key = TrainDataset(histories, samples, known, 3001, "catalogue").sort_key
    lengths = samples.lengths
    assert samples.users.tolist() == [1, 2, 4, 5, 6]
    order = np.argsort(key, kind="stable")
    assert lengths[order].tolist() == sorted(lengths.tolist())
    assert samples.users[order].tolist() == [1, 4, 6, 5, 2]
    assert key[2] == key[4]  # ordinary users stay mixed


def test_a_batch_of_a_large_log_is_made_fast():
    rng = np.random.default_rng(0)
    n, n_users, n_items = 100_000, 4_000, 20_000
    histories = build_histories(
        rng.integers(1, n_users + 1, n), rng.integers(1, n_items + 1, n), user_ids=[""] * (n_users + 1)
    )
    samples = training_samples(histories, histories.indptr[1:], 50)
    known = KnownItems.of(histories, histories.indptr[1:])
    sampler = NegativeSampler(np.ones(n_items + 1), "popularity")
    dataset = TrainDataset(histories, samples, known, n_items + 1, "sampled", sampler, negatives=100, per_user=True)
    fetch(dataset, np.arange(256))
    began = time.process_time()
    for seed in range(5):
        fetch(dataset, rng.choice(len(dataset), 256), seed)
    assert (time.process_time() - began) / 5 < 0.5
