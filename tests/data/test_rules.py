"""The data rules, each at the level of the data module, on small files."""

import gzip

import numpy as np
import pytest
import torch
from lightning import Trainer

from lightning_rec import TwoTower
from lightning_rec.callbacks.results import PredictionWriter
from lightning_rec.data import EcommerceDataModule, RecDataModule
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.readers import Files
from lightning_rec.data.readers.base import BadRowError
from lightning_rec.towers import IdItemTower, PooledUserTower

LATER = 1_000_000_000


@pytest.fixture
def ready(tmp_path):
    """Writes a log and an item table as CSV and sets up the data module on them."""

    def make(log, items=None, users=None, kind=RecDataModule, reader=None, **options):
        places = {}
        for name, text in (("interactions", log), ("items", items), ("users", users)):
            if text is not None:
                places[name] = str(tmp_path / f"{name}.csv")
                (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
        data = kind(reader=Files(**places, **(reader or {})), **options)
        data.setup()
        return data

    return make


def histories(data):
    return {
        user: [data.catalogue.ids[row] for row in data.histories.history(number)]
        for number, user in enumerate(data.user_ids)
        if user
    }


def one_batch(dataset):
    return dataset[BatchIndex(np.arange(len(dataset)), (0,))]


# ---------------------------------------------------------------- 1: ids


def test_ids_that_look_like_numbers_stay_apart_from_file_to_answer(ready):
    log = "user_id,item_id\n001,1\n001,1.0\n001,001\n1,001\n1,1\n1,\u00e9\n1,e\u0301\n1.0,5863\n"
    items = "item_id,year\n001,\n1,\n1.0,1999\n5863,\n\u00e9,\ne\u0301,\n"
    data = ready(log, items, predict_users=["1.0", "01", "1", "001"], filter_seen=False)
    assert data.catalogue.ids == ["", "001", "1", "1.0", "5863", "\u00e9", "e\u0301"]
    assert data.catalogue.texts[3] == "1999"
    assert histories(data) == {
        "001": ["1", "1.0", "001"],
        "1": ["001", "1", "\u00e9", "e\u0301"],
        "1.0": ["5863"],
    }
    dataset = data.prediction_dataset()
    assert data.asked_users == ["1.0", "01", "1", "001"]
    assert [data.user_ids[row] for row in dataset.users] == ["1.0", "", "1", "001"]


@pytest.mark.parametrize("filter_seen", [True, False])
def test_row_0_is_never_returned(ready, filter_seen):
    """A user who has seen everything gets fewer answers, each of them an item or nothing at all."""
    data = ready("user_id,item_id\na,x\na,y\na,z\nb,x\n", predict_users=["a", "b", "who"], filter_seen=filter_seen)
    model = TwoTower(IdItemTower(dim=4), PooledUserTower(pooling="mean"), top_k=3)
    model.build(data.view)
    model.eval()
    with torch.no_grad():
        for parameter in model.item_tower.parameters():
            parameter.fill_(1.0)
        # every item scores -4, so that padding, which scores 0, would come first
        model.user_tower.forward = lambda users, items: -torch.ones(len(users), 1, 4)
        answer = model.predict_step(one_batch(data.prediction_dataset()), 0)
    assert answer["fallback"].tolist() == [False, False, True]
    rows = [[row for row in user if row] for user in answer["rows"].tolist()]
    assert [len(user) for user in rows] == ([0, 2, 3] if filter_seen else [3, 3, 3])
    assert all(len(set(user)) == len(user) for user in rows)
    assert data.catalogue.row("x") not in rows[1] or not filter_seen


@pytest.mark.parametrize(("filter_seen", "told"), [(True, ", 1 of whom have touched every item"), (False, "")])
def test_predict_says_how_many_users_have_no_row(ready, tmp_path, caplog, filter_seen, told):
    users = ["a", "b", "a"]
    data = ready("user_id,item_id\na,x\na,y\na,z\nb,x\n", predict_users=users, filter_seen=filter_seen)
    model = TwoTower(IdItemTower(dim=4), PooledUserTower(pooling="mean"), top_k=3)
    writer = PredictionWriter(str(tmp_path / "found.jsonl"), "jsonl")
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    with caplog.at_level("INFO"):
        Trainer(callbacks=[writer], **quiet).predict(model, data)
    assert f"3 users{told}" in caplog.text
    assert ("have touched" in caplog.text) == filter_seen


# ---------------------------------------------------------------- 2: order


def test_order_is_by_time_and_then_by_the_file(ready):
    log = "user_id,item_id,timestamp\n" + "".join(
        f"{user},{item},{LATER + when}\n"
        for user, item, when in [
            ("b", "p", 9),
            ("a", "x", 5),
            ("b", "q", 9),
            ("a", "y", 2),
            ("a", "z", 5),
            ("b", "r", 1),
        ]
    )
    assert histories(ready(log)) == {"b": ["r", "p", "q"], "a": ["y", "x", "z"]}
    assert histories(ready("user_id,item_id\na,z\nb,q\na,x\na,y\n")) == {"a": ["z", "x", "y"], "b": ["q"]}


@pytest.mark.parametrize(
    "times",
    [
        ["1500000000", "1400000000", "1600000000"],
        ["1500000000000", "1400000000000", "1600000000000"],
        ["2017-07-14T02:40:00Z", "2014-05-13T16:53:20Z", "2020-09-13T12:26:40Z"],
    ],
)
def test_seconds_milliseconds_and_iso_are_told_apart(ready, times):
    data = ready("user_id,item_id,timestamp\n" + "".join(f"a,{i},{t}\n" for i, t in zip("xyz", times, strict=True)))
    assert histories(data) == {"a": ["y", "x", "z"]}
    assert data.histories.times.tolist() == [1_400_000_000, 1_500_000_000, 1_600_000_000]


def test_a_mixture_of_times_is_an_error_that_names_rows(ready):
    rows = [f"a,i{n},{1_500_000_000 + n}" for n in range(5)] + ["a,j,1500000000000", "a,k,2017-07-14T02:40:00Z"]
    with pytest.raises(ValueError, match=r"line (7|8)"):
        ready("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")


def test_a_reader_that_leaves_out_some_times_is_refused(ready):
    from datasets import Dataset

    from lightning_rec.data.readers import RawData, Reader

    class Some(Reader):
        def read(self):
            rows = {"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "timestamp": [5, None, 7]}
            return RawData(Dataset.from_dict(rows))

    with pytest.raises(ValueError, match=r"Row 1 of the interactions has no timestamp"):
        RecDataModule(reader=Some()).setup()


# ---------------------------------------------------------------- 3: split


def log_of(n, n_users, n_items, seed=0, ratings=False):
    rng = np.random.default_rng(seed)
    header = "user_id,item_id,timestamp" + (",rating" if ratings else "")
    rows = [
        f"u{rng.integers(n_users)},i{rng.integers(n_items)},{LATER + rng.integers(10 * n)}"
        + (f",{rng.integers(1, 6)}" if ratings else "")
        for _ in range(n)
    ]
    return "\n".join([header, *rows]) + "\n"


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_the_split_is_stated_with_the_protocol(ready, split):
    data = ready(log_of(200, 10, 20), split=split, filter_seen=False)
    start = {"leave_one_out": "Leave-one-out: the newest event of each user", "global_time": "Global time: training"}
    assert data.protocol.startswith(start[split])
    assert data.protocol.endswith("full ranking of 20 items, seen items kept.")
    assert "seen items filtered" in ready(log_of(200, 10, 20), split=split).protocol


# ---------------------------------------------------------------- 4: duplicates, repeats, counts


def test_exact_duplicates_are_dropped_and_counted_and_repeats_follow_the_flag(ready):
    rows = [("x", 1), ("y", 2), ("x", 1), ("x", 3), ("z", 4)]
    log = "user_id,item_id,timestamp\n" + "".join(f"a,{item},{LATER + when}\n" for item, when in rows)
    kept = ready(log)
    assert kept.report.n_duplicates == 1
    assert "Dropped 1 exact duplicate" in str(kept.report)
    assert histories(kept) == {"a": ["x", "y", "x", "z"]}
    first, last = ready(log, repeats="first"), ready(log, repeats="last")
    assert histories(first) == {"a": ["x", "y", "z"]}
    assert histories(last) == {"a": ["y", "x", "z"]}
    assert first.histories.report["repeats_dropped"] == last.histories.report["repeats_dropped"] == 1


def test_users_left_out_and_denominators_are_counted(ready):
    log = "user_id,item_id\n" + "".join(f"a,i{n}\n" for n in range(4)) + "b,i1\nb,i2\nc,i3\nd,?\n"
    items = "item_id,title\n" + "".join(f"i{n},t{n}\n" for n in range(6))
    data = ready(log, items)
    counts = data.split.counts
    assert (counts["users"], counts["test_users"], counts["test_targets"]) == (4, 1, 1)
    assert counts["users_excluded_few_events"] == 2
    assert counts["users_excluded_no_events"] == 1
    assert len(data.evaluation_dataset("test")) == 1
    # users with too little to evaluate are trained on, one event alone teaches nothing
    assert sorted(data.user_ids[user] for user in data.train_dataset().samples.users) == ["a", "b"]
    assert data.train_counts.tolist() == [0, 1, 2, 1, 1, 0, 0]


def test_the_k_core_is_counted(ready):
    log = "user_id,item_id\na,x\na,y\nb,x\nb,y\nb,z\nc,z\n"
    data = ready(log, min_user_events=2, min_item_events=2)
    assert histories(data) == {"a": ["x", "y"], "b": ["x", "y"], "c": []}
    assert data.histories.report["core_events_dropped"] == 2
    assert data.histories.report["core_users_dropped"] == 1


def test_what_the_k_core_drops_was_seen_all_the_same(ready):
    log = "user_id,item_id,rating\na,rare,5\na,x,5\na,y,5\na,z,1\nb,x,5\nb,y,5\nlone,y,5\n"
    data = ready(log, min_user_events=2, min_item_events=2, min_rating=3)
    assert histories(data) == {"a": ["x", "y"], "b": ["x", "y"], "lone": []}
    dataset = data.prediction_dataset()
    batch = dataset[BatchIndex(np.arange(len(dataset)), (0,))]
    seen = {
        user: {data.catalogue.ids[row] for row in rows if row}
        for user, rows in zip(data.asked_users, batch.seen.tolist(), strict=True)
    }
    assert seen == {"a": {"rare", "x", "y", "z"}, "b": {"x", "y"}, "lone": {"y"}}


# ---------------------------------------------------------------- 5: bad rows, unknown items, cold items


def test_a_bad_row_stops_or_is_skipped_counted_and_listed(ready):
    log = "user_id,item_id,timestamp\na,x,1500000000\na,,1500000001\na,y,http://x.y/z\na,z,1500000002\na,w,1500000003\n"
    with pytest.raises(BadRowError, match=r"interactions\.csv, line 3.*item_id is empty"):
        ready(log)
    data = ready(log, reader={"on_bad_rows": "skip"})
    assert data.report.n_skipped == 2
    assert [row.line for row in data.report.skipped] == [3, 4]
    assert histories(data) == {"a": ["x", "z", "w"]}


@pytest.mark.parametrize("unknown_items", ["drop", "add"])
def test_interactions_with_unknown_items_are_counted(ready, unknown_items):
    data = ready(
        "user_id,item_id\na,x\na,?\na,y\nb,?\nb,x\n", "item_id,title\nx,X\ny,Y\nz,Z\n", unknown_items=unknown_items
    )
    assert data.catalogue.report["unknown_interactions"] == 2
    if unknown_items == "drop":
        assert histories(data) == {"a": ["x", "y"], "b": ["x"]}
        assert data.catalogue.ids == ["", "x", "y", "z"]
    else:
        assert histories(data) == {"a": ["x", "?", "y"], "b": ["?", "x"]}
        assert data.catalogue.ids == ["", "x", "y", "z", "?"]
        assert data.catalogue.texts == ["", "X", "Y", "Z", ""]


def test_items_never_touched_are_candidates(ready):
    data = ready("user_id,item_id\na,x\na,y\na,x\nb,x\nb,y\n", "item_id,title\ncold,C\nx,X\ny,Y\n")
    assert data.catalogue.report["untouched_items"] == 1
    cold = data.catalogue.row("cold")
    assert data.train_counts[cold] == 0
    batch = one_batch(data.train_dataset())
    assert cold in batch.items.rows[1 : batch.n_candidates + 1].tolist()
    assert data.view.n_rows == 4


# ---------------------------------------------------------------- 6: text


def test_text_stays_text(ready):
    titles = ["null", "NA", "None", '"quoted"', "🎬", "电影", "A &amp; B", "", "<br>"]
    table = "item_id\ttitle\n" + "".join(f"i{row}\t{title}\n" for row, title in enumerate(titles))
    data = ready("user_id,item_id\na,i0\na,i1\n", table)
    assert data.catalogue.texts[1:] == ["null", "NA", "None", '"quoted"', "🎬", "电影", "A & B", "", ""]
    assert data.catalogue.empty_texts == 2
    plain = ready("user_id,item_id\na,i0\na,i1\n", table, cleaning=[])
    assert plain.catalogue.texts[7:] == ["A &amp; B", "", "<br>"]


def test_the_newest_of_a_history_is_kept_when_it_is_cut(ready):
    data = ready("user_id,item_id\n" + "".join(f"a,i{n}\n" for n in range(9)), max_history=3)
    batch = one_batch(data.train_dataset())
    ids = data.catalogue.ids
    assert [ids[row] for row in batch.users.history[0]] == ["i3", "i4", "i5"]
    assert [ids[row] for row in batch.targets[0]] == ["i4", "i5", "i6"]
    test = one_batch(data.evaluation_dataset("test"))
    assert [ids[row] for row in test.users.history[0]] == ["i5", "i6", "i7"]
    predict = one_batch(data.prediction_dataset())
    assert [ids[row] for row in predict.users.history[0]] == ["i6", "i7", "i8"]


# ---------------------------------------------------------------- 7: what caches and checkpoints go by


def test_the_digest_covers_content_order_and_options(ready):
    log, items = "user_id,item_id\na,x\na,y\n", "item_id,title\nx,One\ny,<b>Two</b>\n"
    one = ready(log, items).view
    assert ready(log, items).view.digest == one.digest
    others = [
        ready(log, "item_id,title\nx,One\ny,<b>Too</b>\n").view,
        ready(log, "item_id,title\ny,<b>Two</b>\nx,One\n").view,
        ready(log, items, cleaning=[]).view,
        ready(log, items, template="{title}!").view,
    ]
    assert len({one.digest, *(view.digest for view in others)}) == 5
    assert others[0].ids_digest == one.ids_digest != others[1].ids_digest
    assert ready("user_id,item_id\nb,x\nb,y\n", items).view.users_digest != one.users_digest


# ---------------------------------------------------------------- 8: each user once


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("eval_batch_size", [4, 256])
def test_each_user_is_evaluated_once_over_all_ranks(ready, world_size, eval_batch_size):
    class Place:
        def __init__(self, rank):
            self.global_rank, self.world_size = rank, world_size

    data = ready(log_of(300, 20, 10), eval_batch_size=eval_batch_size)
    for loader, expected in (
        ("val_dataloader", data.split.validation_users),
        ("test_dataloader", data.split.test_users),
        ("predict_dataloader", np.arange(1, len(data.user_ids))),
    ):
        found = []
        for rank in range(world_size):
            data.trainer = Place(rank)
            own = [user for batch in getattr(data, loader)() for user in batch.users.users.tolist()]
            assert own  # Lightning refuses a loader that is empty on one rank only
            found += own
        data.trainer = None
        assert sorted(found) == expected.tolist()


# ---------------------------------------------------------------- 9: nothing is executed, only plain values travel


def test_hyperparameters_are_plain_values(ready):
    data = ready("user_id,item_id\na,x\na,y\n")
    assert "reader" not in data.hparams

    def plain(value):
        if isinstance(value, list | tuple):
            return all(plain(part) for part in value)
        if isinstance(value, dict):
            return all(plain(part) for part in value.values())
        return value is None or isinstance(value, str | int | float | bool)

    assert all(plain(value) for value in data.hparams.values())


def test_pickles_are_not_read(tmp_path):
    file = tmp_path / "interactions.csv.gz"
    import pickle

    file.write_bytes(gzip.compress(pickle.dumps({"user_id": ["a"], "item_id": ["x"]})))
    with pytest.raises(ValueError):
        RecDataModule(reader=Files(str(file))).setup()


# ---------------------------------------------------------------- ratings


RATED = "user_id,item_id,rating,timestamp\n" + "".join(
    f"a,{item},{rating},{LATER + when}\n"
    for when, (item, rating) in enumerate(
        [("zero", "0"), ("minus", "-1"), ("none", "NaN"), ("empty", ""), ("far", "99"), ("three", "3"), ("five", "5")]
    )
)


def test_ratings_below_the_minimum_are_touched_but_not_positive(ready):
    data = ready(RATED, kind=EcommerceDataModule)
    assert histories(data) == {"a": ["none", "empty", "far", "three", "five"]}
    assert [data.catalogue.ids[row] for row in data.touched.items] == ["zero", "minus"]
    # touched before the test, so that none of them is recommended or ranked; the target is free
    test = one_batch(data.evaluation_dataset("test"))
    assert {data.catalogue.ids[row] for row in test.seen[0]} == {"zero", "minus", "none", "empty", "far", "three"}
    assert one_batch(ready(RATED, kind=EcommerceDataModule, filter_seen=False).evaluation_dataset("test")).seen is None
    everything = ready(RATED)
    assert everything.touched is None
    assert len(histories(everything)["a"]) == 7


def test_ratings_outside_the_readers_range_are_bad_rows(ready):
    with pytest.raises(BadRowError, match=r"line 3: the rating -1 is outside 0 to 5"):
        ready(RATED, reader={"rating_range": (0, 5)})
    data = ready(RATED, reader={"rating_range": (0, 5), "on_bad_rows": "skip"})
    assert [row.line for row in data.report.skipped] == [3, 6]
    # one training event is left; the range for regression is that of the training ratings, not the reader's
    assert data.rating_range == (0, 0)


def test_the_range_for_regression_is_that_of_the_data_or_the_one_given(ready):
    assert ready(RATED).view.rating_range == (-1, 99)
    assert ready(RATED, rating_range=(0, 5)).view.rating_range == (0, 5)
    assert ready("user_id,item_id\na,x\na,y\n").view.rating_range is None
    assert ready("user_id,item_id,rating\na,x,\na,y,NaN\n").view.rating_range is None


def test_ratings_stand_beside_their_targets(ready):
    data = ready(RATED)
    batch = one_batch(data.train_dataset())
    assert [data.catalogue.ids[row] for row in batch.targets[0]] == ["minus", "none", "empty", "far"]
    expected = np.array([-1, np.nan, np.nan, 99], np.float32)
    assert np.array_equal(batch.ratings[0].numpy(), expected, equal_nan=True)
    assert one_batch(data.evaluation_dataset("test")).ratings.tolist() == [[5]]


# ---------------------------------------------------------------- nothing to learn from


def test_nothing_to_train_on_is_an_error_that_says_what_to_check(ready):
    data = ready("user_id,item_id\na,x\nb,y\n")
    with pytest.raises(ValueError, match="No user has two training events"):
        data.train_dataloader()
    none = ready("user_id,item_id\na,1\na,2\na,3\n", "item_id,title\n01,X\n02,Y\n")
    assert none.catalogue.report["unknown_interactions"] == 3
    with pytest.raises(ValueError, match="ids of the interactions are those of the items"):
        none.train_dataloader()
    rated = ready("user_id,item_id,rating\na,x,1\na,y,2\na,z,1\n", min_rating=3)
    with pytest.raises(ValueError, match="Check min_rating"):
        rated.train_dataloader()
    with pytest.raises(ValueError, match="no interactions"):
        ready("user_id,item_id\n")
