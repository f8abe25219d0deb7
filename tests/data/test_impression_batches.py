from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from lightning_rec.data import ImpressionDataModule
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.impression_batches import ImpressionTrainDataset
from lightning_rec.data.readers import ImpressionReader, RawImpressions

HOUR = 3600


class Log(ImpressionReader):
    """A log made up on the spot, with every oddity that there is."""

    def __init__(self, seed=0, n=150, n_items=25, history=True, **columns):
        rng = np.random.default_rng(seed)
        self.sizes = rng.integers(0, 9, n)
        self.columns = {
            "impression_id": [str(n - number) for number in range(n)],
            "user_id": [f"u{user}" for user in rng.integers(0, 9, n)],
            "timestamp": np.sort(rng.integers(0, n, n)) * 900 + 1_600_000_000,
            "candidates": [[f"i{item}" for item in rng.integers(0, n_items, size)] for size in self.sizes],
            "labels": [(rng.random(size) < 0.3).astype(int).tolist() for size in self.sizes],
            "positions": [list(range(1, size + 1)) for size in self.sizes],
            "propensities": [rng.random(size).tolist() for size in self.sizes],
            "dwell": [rng.random(size).tolist() for size in self.sizes],
        }
        if history:
            lengths = rng.integers(0, 12, n)
            self.columns["history"] = [[f"i{item}" for item in rng.integers(0, n_items, size)] for size in lengths]
        # clicks only, non-clicks only, nothing known
        for number, value in ((0, 1), (1, 0), (2, None)):
            self.columns["labels"][number] = None if value is None else [value] * int(self.sizes[number])
        self.columns |= columns
        self.items = {"item_id": [f"i{item}" for item in range(20)], "title": [f"t{item}" for item in range(20)]}

    def read(self):
        return RawImpressions(Dataset.from_dict(self.columns), Dataset.from_dict(self.items))


def made(seed=0, reader=None, **options):
    data = ImpressionDataModule(reader=reader or Log(seed), **({"batch_size": 8, "eval_batch_size": 16} | options))
    data.setup()
    return data


def whole(dataset, seed=0):
    return dataset[BatchIndex(np.arange(len(dataset)), (seed,))]


def raw_rows(data, reader, number):
    return [data.catalogue.row(item) for item in reader.columns["candidates"][number]]


def same(one, other):
    for name in ("history", "lengths", "users"):
        assert torch.equal(getattr(one.users, name), getattr(other.users, name))
    for name in ("candidates", "sizes", "weights"):
        assert torch.equal(getattr(one.impressions, name), getattr(other.impressions, name))
    assert torch.equal(one.items.rows, other.items.rows)


def check_table(batch):
    """The table holds each row of the step once: padding, candidates, then what is history only."""
    rows = batch.items.rows
    shown, history = batch.impressions.candidates, batch.users.history
    assert rows[0] == 0
    assert len(rows.unique()) == len(rows)
    assert set(shown[batch.impressions.mask].tolist()) == set(range(1, batch.n_candidates + 1))
    assert shown[~batch.impressions.mask].eq(0).all()
    assert history[~batch.users.mask].eq(0).all()
    used = set(shown.flatten().tolist()) | set(history.flatten().tolist()) | {0}
    assert used == set(range(len(rows)))
    assert batch.log_q.shape == (batch.n_candidates,)
    assert torch.isfinite(batch.log_q).all()


@pytest.mark.parametrize("negatives", [0, 1, 2, 4, 50])
@pytest.mark.parametrize("seed", range(3))
def test_sampled_candidates(seed, negatives):
    reader = Log(seed)
    data = made(seed, reader, negatives=negatives)
    dataset = data.train_dataset()
    batch = whole(dataset, seed)
    check_table(batch)
    shown = batch.impressions
    rows = batch.items.rows[shown.candidates]
    clicks = Counter()
    for sample, number in enumerate(batch.index.tolist()):
        assert data.parts[number] == 0
        items, labels = raw_rows(data, reader, number), reader.columns["labels"][number]
        clicked = {item for item, label in zip(items, labels, strict=True) if label}
        free = {item for item, label in zip(items, labels, strict=True) if not label} - clicked
        size = int(shown.sizes[sample])
        found = rows[sample, :size].tolist()
        assert found[0] in clicked
        clicks[number, found[0]] += 1
        assert size == 1 + min(negatives, len(free))
        assert len(set(found)) == size
        assert set(found[1:]) <= free
        assert shown.labels[sample, :size].tolist() == [1] + [0] * (size - 1)
        assert shown.labels[sample, size:].isnan().all()
        assert shown.weights[sample, 0] == 1
        assert shown.weights[sample, 1:size].sum().item() == pytest.approx(len(free) if size > 1 else 0, rel=1e-5)
        assert shown.weights[sample, size:].eq(0).all()
        for column, item in enumerate(found):
            place = int(shown.positions[sample, column]) - 1
            assert items[place] == item
            assert shown.dwell[sample, column].item() == pytest.approx(reader.columns["dwell"][number][place])
            given = reader.columns["propensities"][number][place]
            assert shown.propensities[sample, column].item() == pytest.approx(given)
    expected = Counter()
    for number in data.numbers("train").tolist():
        for item, label in zip(raw_rows(data, reader, number), reader.columns["labels"][number] or [], strict=False):
            expected[number, item] += label
    assert clicks == +expected


def test_negatives_are_drawn_evenly_and_without_order():
    bare = dict.fromkeys(("positions", "propensities", "dwell"), [None] * 150)
    reader = Log(candidates=[["i1", "i2", "i3", "i3", "i4", "i1"]] * 150, labels=[[0, 1, 0, 0, 0, 1]] * 150, **bare)
    data = made(reader=reader, negatives=2)
    drawn = Counter()
    dataset = data.train_dataset()
    for seed in range(30):
        batch = whole(dataset, seed)
        drawn.update(map(tuple, batch.items.rows[batch.impressions.candidates][:, 1:].tolist()))
    three, four = data.catalogue.row("i3"), data.catalogue.row("i4")
    assert set(drawn) == {(three, four), (four, three)}  # i1 was clicked too, i3 was shown twice
    assert drawn[three, four] / drawn.total() == pytest.approx(0.5, abs=0.02)
    reader = Log(candidates=[[f"i{item}" for item in range(6)]] * 150, labels=[[1, 0, 0, 0, 0, 0]] * 150, **bare)
    dataset = made(reader=reader, negatives=2).train_dataset()
    drawn = Counter()
    for seed in range(60):
        batch = whole(dataset, seed)
        drawn.update(batch.items.rows[batch.impressions.candidates][:, 1:].flatten().tolist())
    assert len(drawn) == 5
    for count in drawn.values():
        assert count / drawn.total() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("most", [None, 1, 3, 100])
@pytest.mark.parametrize("seed", range(2))
def test_whole_impressions(seed, most):
    reader = Log(seed)
    data = made(seed, reader, candidates="whole", max_candidates=most)
    batch = whole(data.train_dataset(), seed)
    check_table(batch)
    labelled = [n for n in data.numbers("train").tolist() if reader.columns["labels"][n]]
    assert batch.index.tolist() == labelled
    rows, shown = batch.items.rows[batch.impressions.candidates], batch.impressions
    for sample, number in enumerate(labelled):
        items, labels = raw_rows(data, reader, number), reader.columns["labels"][number]
        size, n_clicks = int(shown.sizes[sample]), sum(labels)
        room = len(items) if most is None else most
        assert size == max(min(len(items), room), n_clicks)
        places = shown.positions[sample, :size].tolist()
        assert places == sorted(set(places))  # the order shown, nothing twice
        assert rows[sample, :size].tolist() == [items[place - 1] for place in places]
        assert shown.labels[sample, :size].tolist() == [labels[place - 1] for place in places]
        assert shown.labels[sample].nansum() == n_clicks
        weights = shown.weights[sample, :size][shown.labels[sample, :size] == 0]
        total = len(items) - n_clicks if size > n_clicks else 0
        assert weights.sum().item() == pytest.approx(total, rel=1e-5)
        assert shown.weights[sample, :size][shown.labels[sample, :size] == 1].eq(1).all()


def test_the_same_seed_draws_the_same():
    dataset = made().train_dataset()
    one, two, other = (dataset[BatchIndex(np.arange(40), seed)] for seed in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    same(one, two)
    assert not (one.items.rows.shape == other.items.rows.shape and one.items.rows.equal(other.items.rows)) or not (
        one.impressions.candidates.equal(other.impressions.candidates)
    )


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"candidates": "whole", "max_candidates": 3}])
def test_a_loader_goes_on_where_it_stopped(options):
    data = made(**options)
    batches = list(data.train_dataloader())
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 3})
    rest = list(loader)
    assert len(rest) == len(batches) - 3 > 0
    for one, other in zip(batches[3:], rest, strict=True):
        same(one, other)


def test_log_q_is_the_chance_to_be_among_the_clicks_of_a_step():
    data = made(reader=Log(3, n=400, n_items=12), batch_size=16)
    for options in ({"candidates": "sampled"}, {"candidates": "whole"}):
        data.candidates = options["candidates"]
        dataset = data.train_dataset()
        rng = np.random.default_rng(0)
        hits, log_q = np.zeros(len(data.catalogue)), np.full(len(data.catalogue), np.nan)
        for step in range(600):
            batch = dataset[BatchIndex(rng.choice(len(dataset), 16, replace=True), (step,))]
            clicked = batch.impressions.candidates[batch.impressions.labels == 1].unique()
            hits[batch.items.rows[clicked].numpy()] += 1
            log_q[batch.items.rows[1 : batch.n_candidates + 1].numpy()] = batch.log_q.numpy()
        seen = hits > 0
        np.testing.assert_allclose(np.exp(log_q[seen]), hits[seen] / 600, atol=0.07)
        assert seen.sum() > 8


@pytest.mark.parametrize("candidates", ["sampled", "whole"])
def test_known_rows_are_the_clicks_of_training(candidates):
    reader = Log(1)
    data = made(1, reader, candidates=candidates)
    batch = whole(data.train_dataset())
    clicked = {}
    for number in data.numbers("train").tolist():
        for item, label in zip(raw_rows(data, reader, number), reader.columns["labels"][number] or [], strict=False):
            if label:
                clicked.setdefault(reader.columns["user_id"][number], set()).add(item)
    for sample, number in enumerate(batch.index.tolist()):
        found = batch.known[sample]
        assert set(found[found > 0].tolist()) == clicked.get(reader.columns["user_id"][number], set())


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("part", ["train", "validation", "test", "predict"])
def test_the_newest_of_a_history_stays_and_evaluation_has_every_candidate(part, history):
    reader = Log(2, history=history)
    data = made(2, reader, max_history=4)
    if part == "train":
        batch = whole(data.train_dataset())
        history_rows = batch.items.rows[batch.users.history]
        numbers = batch.index.tolist()
    else:
        dataset = data.prediction_dataset() if part == "predict" else data.evaluation_dataset(part)
        batch = whole(dataset)
        history_rows = batch.users.history
        assert batch.items is None
        assert batch.index.tolist() == list(range(len(dataset)))
        numbers = dataset.numbers.tolist()
    for sample, number in enumerate(numbers):
        user = reader.columns["user_id"][number]
        if history:
            past = reader.columns["history"][number]
        else:
            past = [
                item
                for other in range(150)
                if reader.columns["user_id"][other] == user
                and reader.columns["timestamp"][other] < reader.columns["timestamp"][number]
                for item, label in zip(
                    reader.columns["candidates"][other], reader.columns["labels"][other] or [], strict=False
                )
                if label
            ]
        past = [data.catalogue.row(item) for item in past][-4:]
        length = int(batch.users.lengths[sample])
        assert history_rows[sample, :length].tolist() == past
        assert history_rows[sample, length:].eq(0).all()
        if part == "train":
            continue
        items, shown = raw_rows(data, reader, number), batch.impressions
        size = int(shown.sizes[sample])
        assert shown.candidates[sample, :size].tolist() == items
        assert shown.candidates[sample, size:].eq(0).all()
        if part == "predict":
            assert shown.labels is None
        else:
            assert shown.labels[sample, :size].tolist() == reader.columns["labels"][number]
            assert shown.labels[sample, size:].isnan().all()
    assert (batch.users.times is None) == history


def brute_force_signals(data, reader, number, item, half_life, clicks_of):
    """Age and popularity of an item at an impression, worked out from the log alone."""
    part, now = data.parts[number], reader.columns["timestamp"][number]
    age, popularity = None, 0.0
    for other in range(len(reader.columns["candidates"])):
        then = reader.columns["timestamp"][other]
        for shown, label in zip(
            reader.columns["candidates"][other],
            reader.columns["labels"][other] or [0] * len(reader.columns["candidates"][other]),
            strict=True,
        ):
            if shown != item:
                continue
            if data.parts[other] <= part and then <= now:
                age = max(age or 0, (now - then) / HOUR)
            if label and then < now and data.parts[other] <= (part if clicks_of == "past" else 0):
                popularity += 0.5 ** ((now - then) / HOUR / half_life)
    return age, popularity


@pytest.mark.parametrize("clicks_of", ["past", "train"])
@pytest.mark.parametrize("parts", ["time", "mixed"])
def test_ages_and_popularity_know_nothing_of_the_future(parts, clicks_of):
    rng = np.random.default_rng(5)
    columns = {} if parts == "time" else {"part": rng.choice(["train", "validation", "test", "predict"], 150).tolist()}
    reader = Log(4, **columns)
    data = made(4, reader, popularity_half_life=3, popularity_from=clicks_of, negatives=2)
    datasets = [data.train_dataset(), data.evaluation_dataset("validation"), data.evaluation_dataset("test")]
    for dataset in [*datasets, data.prediction_dataset()]:
        batch = whole(dataset)
        shown, rows = batch.impressions, batch.impressions.candidates
        training = isinstance(dataset, ImpressionTrainDataset)
        if training:
            rows = batch.items.rows[rows]
        numbers = batch.index.tolist() if training else dataset.numbers.tolist()
        for sample, number in enumerate(numbers):
            for column in range(int(shown.sizes[sample])):
                item = data.catalogue.ids[int(rows[sample, column])]
                age, popularity = brute_force_signals(data, reader, number, item, 3, clicks_of)
                assert shown.ages[sample, column].item() == pytest.approx(age, abs=1e-4)
                assert shown.popularity[sample, column].item() == pytest.approx(popularity, rel=1e-4, abs=1e-6)
        assert shown.ages[~shown.mask].isnan().all()
        assert shown.popularity[~shown.mask].eq(0).all()


def test_without_times_there_is_no_age():
    reader = Log(timestamp=[None] * 150)
    data = made(reader=reader, split="order")
    for batch in (whole(data.train_dataset()), whole(data.evaluation_dataset("test"))):
        assert batch.impressions.ages is batch.impressions.popularity is batch.users.times is None


def test_users_without_training_are_new():
    reader = Log(user_id=["old"] * 130 + ["new", "old"] * 10)
    data = made(reader=reader)
    assert whole(data.train_dataset()).users.users.eq(1).all()
    dataset = data.evaluation_dataset("test")
    names = [reader.columns["user_id"][number] for number in dataset.numbers]
    trained = {reader.columns["user_id"][number] for number in data.numbers("train")}
    assert "new" in names
    for name, row in zip(names, whole(dataset).users.users.tolist(), strict=True):
        assert row == (data.user_ids.index(name) if name in trained else 0)


def test_batches_of_nothing_known():
    """No history at all, no candidate at all: shapes stay two-dimensional."""
    reader = Log(history=False, labels=[[0] * int(size) for size in Log().sizes])
    data = made(reader=reader, candidates="whole")
    batch = whole(data.train_dataset())
    assert batch.users.history.shape == (len(batch.users), 1)
    assert batch.users.lengths.eq(0).all()
    empty = [n for n, number in enumerate(data.evaluation_dataset("validation").numbers) if reader.sizes[number] == 0]
    assert not empty  # an impression without candidates has no label
    prediction = data.prediction_dataset()
    none = np.flatnonzero(reader.sizes[prediction.numbers] == 0)
    batch = prediction[BatchIndex(none, (0,))]
    assert batch.impressions.candidates.shape == (len(none), 1)
    assert batch.impressions.sizes.eq(0).all()


def test_evaluation_comes_once_and_longest_first():
    data = made(seed=5, split="order", validation_start=0.3, test_start=0.6)
    batches = list(data.test_dataloader())
    index = torch.cat([batch.index for batch in batches])
    assert sorted(index.tolist()) == list(range(len(data.evaluation_dataset("test"))))
    lengths = [int(batch.users.lengths.max()) for batch in batches]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("split", ["time", "order", "files mixed in time"])
@pytest.mark.parametrize("candidates", ["sampled", "whole"])
def test_training_is_the_same_whatever_happens_later(candidates, split, history):
    """Everything about later parts is replaced but their times: nothing that training sees may change."""
    rng = np.random.default_rng(1)
    n = 150
    columns = {"feedback": [f"word{number}" for number in range(n)]}
    if split.startswith("files"):
        columns["part"] = rng.choice(["train", "validation", "test"], n).tolist()
    found = []
    for change in (False, True):
        reader = Log(6, history=history, n_items=20, **columns)
        if change:
            later = np.flatnonzero(found[0][0].parts > 0)
            for number in later.tolist():
                size = int(reader.sizes[number])
                reader.columns["candidates"][number] = [f"i{item}" for item in rng.integers(0, 20, size)]
                reader.columns["labels"][number] = (rng.random(size) < 0.7).astype(int).tolist()
                reader.columns["feedback"] = [
                    "changed" if place == number else text for place, text in enumerate(reader.columns["feedback"])
                ]
                if "part" not in columns:  # users are numbered as they appear, which would change the numbers only
                    reader.columns["user_id"][number] = f"u{rng.integers(9)}"
                if history:
                    reader.columns["history"][number] = ["i0"] * 30
        how = "auto" if split.startswith("files") else split
        options = {"user_template": "{titles} {feedback}", "user_titles": 50, "split": how}
        data = made(reader=reader, candidates=candidates, max_candidates=4, **options)
        found.append((data, list(data.train_dataloader())))
    (one, before), (two, after) = found
    assert np.array_equal(one.parts, two.parts)
    assert np.array_equal(one.train_counts, two.train_counts)
    assert one.view.recent_counts.equal(two.view.recent_counts)
    names = ("candidates", "sizes", "labels", "weights", "ages", "popularity")
    words = 0
    assert len(before) == len(after)
    for first, second in zip(before, after, strict=True):
        same(first, second)
        torch.testing.assert_close(first.log_q, second.log_q)
        assert sorted(map(sorted, first.known.tolist())) == sorted(map(sorted, second.known.tolist()))
        assert first.users.texts == second.users.texts
        words += sum("word" in text for text in first.users.texts)
        for name in names:
            torch.testing.assert_close(
                getattr(first.impressions, name), getattr(second.impressions, name), equal_nan=True
            )
    assert words  # feedback did reach training from earlier training impressions
    assert [b.users.texts for b in one.test_dataloader()] != [b.users.texts for b in two.test_dataloader()]
