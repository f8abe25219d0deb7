import numpy as np
import pytest
import torch
from datasets import Dataset

from lightning_rec.data import RecDataModule
from lightning_rec.data.readers import RawData, Reader


class Invented(Reader):
    """A log made up on the spot; every event has a review that no other has."""

    def __init__(self, seed=0, n=400, n_users=25, n_items=30):
        rng = np.random.default_rng(seed)
        # no user meets an item twice, so that an item tells its event
        pairs = rng.permutation(n_users * n_items)[:n]
        self.users, self.items = pairs // n_items, pairs % n_items
        self.times = rng.integers(0, n // 2, n) + 1_000_000_000
        self.ratings = rng.integers(1, 6, n).astype(float)
        self.n_items = n_items

    def read(self):
        log = {
            "user_id": [f"u{user}" for user in self.users],
            "item_id": [f"i{item}" for item in self.items],
            "timestamp": self.times,
            "rating": self.ratings,
            "review": [f"review{row}." for row in range(len(self.users))],
        }
        table = {
            "item_id": [f"i{item}" for item in range(self.n_items)],
            "title": [f"title{item}." for item in range(self.n_items)],
        }
        return RawData(Dataset.from_dict(log), Dataset.from_dict(table))


def made(seed=0, **options):
    data = RecDataModule(reader=Invented(seed), **({"batch_size": 8, "eval_batch_size": 8} | options))
    data.setup()
    return data


def events_of_parts(data, reader):
    """Rows of the log in training, validation and test, worked out from the log alone."""
    positive = np.ones(len(reader.users), bool) if data.min_rating is None else ~(reader.ratings < data.min_rating)
    order = sorted(np.flatnonzero(positive).tolist(), key=lambda row: (reader.times[row], row))
    parts = {"train": set(), "validation": set(), "test": set()}
    if data.split_name == "global_time":
        times = [reader.times[row] for row in order]
        first, second = times[int(0.8 * len(order))], times[int(0.9 * len(order))]
        for row in order:
            moment = reader.times[row]
            parts["train" if moment < first else "validation" if moment < second else "test"].add(row)
        return parts
    for user in set(reader.users.tolist()):
        own = [row for row in order if reader.users[row] == user]
        if len(own) >= 3:
            parts["test"].add(own.pop())
            parts["validation"].add(own.pop())
        parts["train"] |= set(own)
    return parts


SETTINGS = [
    {},
    {"split": "global_time"},
    {"min_rating": 3.0},
    {"split": "global_time", "min_rating": 2.0, "windows": "all", "max_history": 3},
    {"candidates": "batch", "windows": "all", "max_history": 4},
    {"candidates": "sampled", "negatives": 5, "supervision": "random"},
    {"candidates": "sampled", "negatives": 2, "negatives_per_user": True, "split": "global_time"},
    {"candidates": "sampled", "negatives": 5, "negative_distribution": "popularity", "supervision": "last"},
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("seed", range(2))
def test_nothing_of_validation_and_test_reaches_training(seed, options):
    data = made(seed, user_template="{titles} {reviews}", user_titles=100, **options)
    reader = data.reader
    parts = events_of_parts(data, reader)
    training = {(f"u{reader.users[row]}", f"i{reader.items[row]}") for row in parts["train"]}
    reviews = {f"review{row}." for row in parts["train"]}
    targets, histories = set(), set()
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            rows = batch.items.rows
            for number in range(len(batch.users)):
                user = data.user_ids[int(batch.users.users[number])]

                def pairs(rows, user=user):
                    return {(user, data.catalogue.ids[row]) for row in rows.tolist() if row}

                targets |= pairs(rows[batch.targets[number]])
                histories |= pairs(rows[batch.users.history[number]])
                assert pairs(batch.known[number]) <= training
                text = batch.users.texts[number]
                words = set(text.split())
                assert {word for word in words if word.startswith("review")} <= reviews
                titles = {word.strip(",") for word in words if word.startswith("title")}
                assert titles <= {f"title{id_[1:]}." for name, id_ in training if name == user}
                # the text was made before the last target
                last = data.catalogue.ids[int(rows[batch.targets[number]][batch.users.lengths[number] - 1])]
                assert f"title{last[1:]}." not in titles
    assert targets <= training
    assert histories <= training
    counts = np.zeros(len(data.catalogue), int)
    for _, id_ in training:
        counts[data.catalogue.row(id_)] += 1
    assert data.train_counts.tolist() == counts.tolist()
    assert data.view.counts.tolist() == counts.tolist()


@pytest.mark.parametrize("options", SETTINGS[:4])
def test_evaluation_finds_each_later_event_once_and_reads_what_came_before(options):
    data = made(3, **options)
    reader = data.reader
    parts = events_of_parts(data, reader)
    earlier = {"val_dataloader": parts["train"], "test_dataloader": parts["train"] | parts["validation"]}
    for name, part in (("val_dataloader", "validation"), ("test_dataloader", "test")):
        found = set()
        for batch in getattr(data, name)():
            for number in range(len(batch.users)):
                user = int(data.user_ids[int(batch.users.users[number])][1:])
                before = {int(reader.items[row]) for row in earlier[name] if reader.users[row] == user}
                assert before, "users without a history are excluded, and counted"
                history = batch.users.history[number].tolist()
                history = {int(data.catalogue.ids[row][1:]) for row in history if row}
                assert history <= before
                assert len(history) == min(len(before), data.max_history)
                targets = [int(data.catalogue.ids[row][1:]) for row in batch.targets[number].tolist() if row]
                assert not set(targets) & before
                found |= {(user, item) for item in targets}
                seen = {int(data.catalogue.ids[row][1:]) for row in batch.seen[number].tolist() if row}
                assert before <= seen
                later = parts["test"] | (parts["validation"] if part == "validation" else set())
                assert not seen & {int(reader.items[row]) for row in later if reader.users[row] == user}
        expected = {(int(reader.users[row]), int(reader.items[row])) for row in parts[part]}
        cold = {user for user, _ in expected} - {int(reader.users[row]) for row in earlier[name]}
        assert found == {(user, item) for user, item in expected if user not in cold}
        key = f"{part}_users_excluded_cold"
        assert data.split.counts[key] == len(cold)


def test_prediction_keeps_the_order_and_the_repeats_of_who_was_asked_for(tmp_path):
    file = tmp_path / "users.txt"
    asked = ["u3", "nobody", "u1", "u3", "u2"]
    file.write_text("\n".join(asked) + "\n")
    for users in (asked, str(file)):
        data = made(predict_users=users, eval_batch_size=2)
        batches = list(data.predict_dataloader())
        index = torch.cat([batch.index for batch in batches])
        rows = torch.cat([batch.users.users for batch in batches])
        assert sorted(index.tolist()) == list(range(5))
        answered = {int(number): data.user_ids[int(row)] for number, row in zip(index, rows, strict=True)}
        assert [answered[number] for number in range(5)] == ["u3", "", "u1", "u3", "u2"]
        assert data.asked_users == asked
    everyone = made()
    everyone.predict_dataloader()
    assert everyone.asked_users == everyone.user_ids[1:]


def test_prediction_knows_the_newest_events():
    data = made(predict_users=["u4"], max_history=3)
    batch = next(iter(data.predict_dataloader()))
    own = [row for row in range(len(data.reader.users)) if data.reader.users[row] == 4]
    own.sort(key=lambda row: (data.reader.times[row], row))
    expected = [f"i{data.reader.items[row]}" for row in own]
    assert [data.catalogue.ids[row] for row in batch.users.history[0]] == expected[-3:]
    assert sorted(data.catalogue.ids[row] for row in batch.seen[0]) == sorted(expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_gives_the_batches_that_are_left(num_workers):
    def loader():
        data = made(candidates="sampled", negatives=3, supervision="random", batch_size=4, num_workers=num_workers)
        return data.train_dataloader()

    def contents(batches):
        return [(batch.items.rows.tolist(), batch.targets.tolist()) for batch in batches]

    whole = loader()
    whole.sampler.set_epoch(1)
    expected = contents(whole)
    iterator = iter(whole)
    next(iterator), next(iterator)
    resumed = loader()
    resumed.load_state_dict(whole.state_dict())
    resumed.sampler.set_epoch(1)
    assert contents(resumed) == expected[2:]


def test_set_up_reads_once_whatever_the_stage():
    class Counted(Invented):
        reads = 0

        def read(self):
            type(self).reads += 1
            return super().read()

    data = RecDataModule(reader=Counted())
    for stage in ("fit", "validate", "test", "predict", None):
        data.setup(stage)
    assert Counted.reads == 1
    assert data.view is data.view


def test_what_is_said_of_the_data(capsys, caplog):
    caplog.set_level("INFO")
    data = made(min_rating=3.0)
    said = caplog.text + "".join(capsys.readouterr())
    for part in ("Read 400 interactions", "Catalogue: 30 items", "not counted events", data.protocol):
        assert part in said


def test_targets_that_are_filtered_are_said(caplog):
    class Again(Reader):
        def read(self):
            rows = {"user_id": ["a"] * 4, "item_id": ["x", "y", "z", "x"]}
            return RawData(Dataset.from_dict(rows))

    caplog.set_level("INFO")
    RecDataModule(reader=Again()).setup()
    assert "1 test targets were touched before and are filtered" in caplog.text
    caplog.clear()
    RecDataModule(reader=Again(), filter_seen=False).setup()
    assert "filtered: they count" not in caplog.text


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"set data\.reader, or data\.path"):
        RecDataModule()
    with pytest.raises(ValueError, match="negatives of at least 1"):
        RecDataModule(path="x", candidates="sampled")
    with pytest.raises(ValueError, match="max_history must be at least 1"):
        RecDataModule(path="x", max_history=0)
    with pytest.raises(ValueError, match="recognises no data set at nowhere"):
        RecDataModule(path="nowhere").setup()


def test_a_global_time_split_without_times_is_refused():
    class NoTimes(Invented):
        def read(self):
            raw = super().read()
            raw.interactions = raw.interactions.remove_columns("timestamp")
            return raw

    with pytest.raises(ValueError, match="needs times"):
        RecDataModule(reader=NoTimes(), split="global_time").setup()


def test_a_filtered_table_is_read_through_its_indices():
    """Tables that were filtered or shuffled by ``datasets`` keep their rows aside."""

    class Turned(Invented):
        def read(self):
            raw = super().read()
            raw.interactions = raw.interactions.select(range(len(raw.interactions) - 1, -1, -1))
            return raw

    data = RecDataModule(reader=Turned())
    data.setup()
    reader = data.reader
    for number, user in enumerate(data.user_ids[1:], 1):
        own = [row for row in range(len(reader.users))[::-1] if f"u{reader.users[row]}" == user]
        own.sort(key=lambda row: reader.times[row])
        start, end = data.histories.indptr[number : number + 2]
        assert data.histories.times[start:end].tolist() == reader.times[own].tolist()
        assert data.histories.ratings[start:end].tolist() == reader.ratings[own].tolist()
        assert [data.catalogue.ids[row] for row in data.histories.items[start:end]] == [
            f"i{reader.items[row]}" for row in own
        ]
