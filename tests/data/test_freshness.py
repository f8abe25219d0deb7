"""What is alive at a request, against a loop over every item; nothing of the future is used."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from lightning_rec.data import NewsDataModule, RecDataModule
from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.freshness import NEVER, Lifetimes, asked_at, births, publications
from lightning_rec.data.readers import RawData, Reader
from lightning_rec.metrics.ranks import AliveWindows, ScoreTable, rank_and_top

HOUR = 3600
START = 1_600_000_000


class Newsroom(Reader):
    """Articles that are read within some hours of their publication; every third tells no publication."""

    def __init__(self, seed=0, n=300, n_items=40, published=True):
        rng = np.random.default_rng(seed)
        self.born = START + np.arange(n_items) * 2 * HOUR
        items = rng.integers(0, n_items, n)
        times = self.born[items] + rng.exponential(8 * HOUR, n).astype(int)
        order = np.argsort(times, kind="stable")
        self.log = {
            "user_id": [f"u{user}" for user in rng.integers(0, 25, n)],
            "item_id": [f"n{item}" for item in items[order]],
            "timestamp": times[order].tolist(),
        }
        self.items = {"item_id": [f"n{i}" for i in range(n_items)], "title": [f"t{i}" for i in range(n_items)]}
        if published:
            self.items["published"] = [None if i % 3 == 0 else int(born) for i, born in enumerate(self.born)]

    def read(self):
        return RawData(Dataset.from_dict(self.log), Dataset.from_dict(self.items))


def made(seed=0, **options):
    data = NewsDataModule(reader=Newsroom(seed), **options)
    data.setup()
    return data


def birth_by_hand(reader, item):
    read = [t for i, t in zip(reader.log["item_id"], reader.log["timestamp"], strict=True) if i == f"n{item}"]
    told = reader.items["published"][item]
    return min([*read, *([] if told is None else [told])], default=NEVER)


@pytest.mark.parametrize("seed", range(3))
def test_births(seed):
    data = made(seed)
    reader = data.reader
    for item in range(40):
        assert data.lifetimes.born[data.catalogue.row(f"n{item}")] == birth_by_hand(reader, item)
    assert data.lifetimes.born[0] == NEVER


def test_publications_in_other_forms_and_what_is_no_time():
    items = {"item_id": ["a", "b", "c"], "published": ["2020-09-13T12:26:40Z", "", "2020-09-13"]}
    catalogue = Catalogue.build(Dataset.from_dict(items), ["a"])
    assert publications(catalogue).tolist() == [NEVER, START, NEVER, START - START % 86_400]
    items["published"] = ["soon", "", ""]
    with pytest.raises(ValueError, match="'a' has a published time that cannot be used"):
        publications(Catalogue.build(Dataset.from_dict(items), ["a"]))
    assert births(catalogue, np.array([2, 0, 2]), np.array([50, 1, 40])).tolist()[2] == 40


def test_limits_are_inclusive_and_never_overflow():
    born = np.array([NEVER, 100, NEVER - 10])
    lives = Lifetimes.of(born, 1.0)
    rows = np.array([1, 1, 1, 1, 2])
    assert lives.alive(rows, np.array([99, 100, 100 + HOUR, 101 + HOUR, 5])).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    for endless in (float("inf"), 1e30, 2e15):
        assert Lifetimes.of(born, endless).dies.tolist() == [NEVER] * 3


@pytest.mark.parametrize("max_age", [6.0, 48.0])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_ranks_are_those_among_the_living(max_age, chunk):
    """A loop over users: sort the items that are alive at the request, and look where the target stands."""
    data = made(max_age=max_age, filter_seen=False)
    batch = next(iter(data.test_dataloader()))
    vectors = torch.randn(len(data.catalogue), 8, generator=torch.Generator().manual_seed(0))
    interest = torch.randn(len(batch.users), 8, generator=torch.Generator().manual_seed(1))
    born, dies = data.lifetimes.on(torch.device("cpu"))
    windows = AliveWindows(born, dies, batch.times)
    found = rank_and_top(interest, ScoreTable(vectors), batch.targets, None, 5, chunk_size=chunk, alive=windows)
    scores = (interest.double() @ vectors.double().t()).numpy()
    for user in range(len(interest)):
        living = [
            row
            for row in range(1, len(data.catalogue))
            if data.lifetimes.born[row] <= int(batch.times[user]) <= data.lifetimes.dies[row]
        ]
        order = sorted(living, key=lambda row: -scores[user, row])
        top = [row for row in found[2][user].tolist() if row]
        assert top == order[:5]
        for place, row in enumerate(batch.targets[user].tolist()):
            if row in living:
                assert int(found[0][user, place]) == order.index(row) + 1
            elif row:
                assert int(found[0][user, place]) == len(data.catalogue)


@pytest.mark.parametrize("max_age", [3.0, 48.0, float("inf")])
def test_targets_that_are_not_alive_are_counted_and_said(max_age):
    data = made(1, max_age=max_age)
    missed = 0
    for batch in data.test_dataloader():
        for time, targets in zip(batch.times.tolist(), batch.targets.tolist(), strict=True):
            born = [birth_by_hand(data.reader, int(data.catalogue.ids[row][1:])) for row in targets if row]
            missed += sum(not 0 <= time - moment <= max_age * HOUR for moment in born)
    assert data.not_alive == missed
    assert missed or max_age > 3
    assert f"{missed:,} of the test targets are not and count as misses" in data.protocol
    assert ("hours old" in data.protocol) == np.isfinite(max_age)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_the_first_target_is_born_when_it_is_asked_for(part):
    data = made(2, max_age=float("inf"))
    starts, _ = data.split.bounds(data.histories, part)
    first = starts[data.split.users(data.histories, part)]
    asked = {}
    for batch in data.val_dataloader() if part == "validation" else data.test_dataloader():
        asked |= dict(zip(batch.index.tolist(), batch.times.tolist(), strict=True))
    assert [asked[number] for number in range(len(first))] == data.histories.times[first].tolist()
    assert (data.lifetimes.born[data.histories.items[first]] <= data.histories.times[first]).all()


def test_the_request_is_the_first_target_and_nothing_is_recommended_before_its_birth():
    data = made(filter_seen=False)
    reader = data.reader
    for batch in data.test_dataloader():
        for user, time in zip(batch.users.users.tolist(), batch.times.tolist(), strict=True):
            raw = data.user_ids[user]
            moments = [
                t for u, t in zip(reader.log["user_id"], reader.log["timestamp"], strict=True) if u == raw and t >= time
            ]
            assert min(moments) == time
            history = batch.users.history[batch.users.users == user]
            assert all(data.lifetimes.born[row] <= time for row in history.flatten().tolist() if row)


def test_predictions_are_for_the_newest_event_or_the_moment_asked_for():
    newest = max(Newsroom().log["timestamp"])
    assert made().asked_at == newest
    asked = START + 40 * HOUR
    data = made(request_time=asked, predict_users=[f"u{n}" for n in range(25)])
    assert data.asked_at == asked
    log = data.reader.log
    for batch in data.predict_dataloader():
        assert batch.times.tolist() == [asked] * len(batch.users)
        for user, length in zip(batch.users.users.tolist(), batch.users.lengths.tolist(), strict=True):
            raw = data.user_ids[user]
            before = [t for u, t in zip(log["user_id"], log["timestamp"], strict=True) if u == raw and t <= asked]
            assert length == min(len(before), data.max_history) if user else length == 0
    with pytest.raises(ValueError, match="needs times"):
        asked_at(None, "2020-01-01")


def test_what_was_touched_after_the_moment_asked_for_is_not_known():
    class Rated(Newsroom):
        def read(self):
            self.log["rating"] = [5.0 if row % 3 else 1.0 for row in range(len(self.log["item_id"]))]
            return super().read()

    asked = START + 40 * HOUR
    data = NewsDataModule(reader=Rated(), min_rating=3, request_time="2020-09-15T04:26:40Z")
    data.setup()
    assert data.asked_at == asked
    log = list(zip(data.reader.log["user_id"], data.reader.log["item_id"], data.reader.log["timestamp"], strict=True))
    answered = 0
    for batch in data.predict_dataloader():
        for user, seen in zip(batch.users.users.tolist(), batch.seen, strict=True):
            wanted = {item for name, item, time in log if name == data.user_ids[user] and time <= asked}
            assert {data.catalogue.ids[row] for row in seen.tolist() if row} == wanted
            answered += 1
    assert answered == 25


def test_options_that_cannot_work_are_refused():
    for name in ("max_age", "recency_half_life"):
        for hours in (0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{name} is a number of hours above 0"):
                made(**{name: hours})
    with pytest.raises(ValueError, match=r"max_age needs times.*data\.max_age: all"):
        RecDataModule(reader=Untimed(), max_age=5).setup()
    with pytest.raises(ValueError, match="request_time needs times"):
        RecDataModule(reader=Untimed(), request_time=5).setup()
    with pytest.raises(ValueError, match="gap is -1"):
        made(gap=-1)


def test_without_times_nobody_asks_at_a_moment():
    data = RecDataModule(reader=Untimed())
    data.setup()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert next(iter(loader)).times is None
    assert data.view.recent_counts is None


def test_a_gap_keeps_the_hours_before_each_cut_out_of_training():
    data = made(gap=3.0)
    times = data.histories.times
    first, second = (times[histories_part(data, part)].min() for part in ("validation", "test"))
    assert times[histories_part(data, "train")].max() < first - 3 * HOUR
    assert times[histories_part(data, "validation")].max() < second - 3 * HOUR
    assert data.train_counts.sum() == data.split.counts["train_events"] == histories_part(data, "train").sum()
    assert data.split.counts["gap_events"] > 0


def histories_part(data, part):
    return data.split.in_part(data.histories, part)


def test_news_are_split_by_time_and_a_log_without_times_says_what_to_do(tmp_path):
    data = made()
    assert "global time" in data.protocol.lower()
    times = data.histories.times
    cut = times[data.split.in_part(data.histories, "test")].min()
    assert times[data.split.in_part(data.histories, "train")].max() < cut
    (tmp_path / "clicks.csv").write_text("user_id,item_id\nu,a\nu,b\nu,c\n")
    (tmp_path / "news.csv").write_text("item_id,title\na,A\nb,B\nc,C\n")
    with pytest.raises(ValueError, match="leave_one_out"):
        NewsDataModule(path=str(tmp_path)).setup()
    plain = NewsDataModule(path=str(tmp_path), split="leave_one_out")
    plain.setup()
    assert plain.lifetimes is None


def test_other_domains_have_no_limit():
    data = RecDataModule(reader=Newsroom(), split="leave_one_out")
    data.setup()
    assert data.lifetimes is None
    assert made(max_age="all").lifetimes is None


@pytest.mark.parametrize("half_life", [1.0, 24.0])
def test_recent_counts(half_life):
    data = made(recency_half_life=half_life)
    train = data.split.in_part(data.histories, "train")
    newest = data.histories.times[train].max()
    wanted = np.zeros(len(data.catalogue))
    for row, time in zip(data.histories.items[train], data.histories.times[train], strict=True):
        wanted[row] += 0.5 ** ((newest - time) / (half_life * HOUR))
    np.testing.assert_allclose(data.view.recent_counts.numpy(), wanted, rtol=1e-5, atol=1e-12)


def test_recency_popularity_ranks_by_recent_counts_and_keeps_them_in_a_checkpoint():
    from lightning_rec.data.batch import CatalogueView, ItemBatch
    from lightning_rec.towers import RecencyPopularityItemTower

    data = made()
    tower = RecencyPopularityItemTower()
    tower.configure(data.view)
    rows = torch.arange(len(data.catalogue))
    assert torch.equal(tower(ItemBatch(rows, whole=True))[:, 0], data.view.recent_counts)
    other = RecencyPopularityItemTower()
    other.configure(CatalogueView(n_rows=len(data.catalogue)))
    other.load_state_dict(tower.state_dict())
    assert torch.equal(other(ItemBatch(rows[3:5]))[:, 0], data.view.recent_counts[3:5])
    without = RecDataModule(reader=Untimed())
    without.setup()
    fresh = RecencyPopularityItemTower()
    fresh.configure(without.view)
    with pytest.raises(ValueError, match="needs the times"):
        fresh.prepare(without.view)


class Untimed(Newsroom):
    """The same log without its times."""

    def read(self):
        log = {name: column for name, column in self.log.items() if name != "timestamp"}
        return RawData(Dataset.from_dict(log), Dataset.from_dict(self.items))
