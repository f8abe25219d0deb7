import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rec import TwoTower
from lightning_rec.data import RecDataModule
from lightning_rec.data.cold import cold_rows, hold_out
from lightning_rec.data.histories import build_histories
from lightning_rec.data.readers import RawData, Reader
from lightning_rec.data.split import global_time, leave_one_out, refit
from lightning_rec.metrics import RankingMetrics
from lightning_rec.towers import IdItemTower, PooledUserTower, SequenceUserTower, TextIdItemTower, TextItemTower
from lightning_rec.towers.score import Cosine


class Invented(Reader):
    """A log made up on the spot; every event has a review that no other has."""

    def __init__(self, seed, n=500, n_users=25, n_items=30):
        rng = np.random.default_rng(seed)
        pairs = rng.permutation(n_users * n_items)[:n]  # no user meets an item twice
        self.users, self.items = pairs // n_items, pairs % n_items
        self.times, self.ratings = rng.integers(0, n // 2, n) + 1_000_000_000, rng.integers(1, 6, n).astype(float)

    def read(self):
        log = {
            "user_id": [f"u{user}" for user in self.users],
            "item_id": [f"i{item}" for item in self.items],
            "timestamp": self.times,
            "rating": self.ratings,
            "review": [f"review{row}." for row in range(len(self.users))],
        }
        names = range(int(self.items.max()) + 1)
        table = {"item_id": [f"i{item}" for item in names], "title": [f"title{item}." for item in names]}
        return RawData(Dataset.from_dict(log), Dataset.from_dict(table))


def made(seed=0, **options):
    data = RecDataModule(
        reader=Invented(seed), **({"cold_items": 0.3, "batch_size": 8, "eval_batch_size": 8} | options)
    )
    data.setup()
    return data


def held(data):
    """Catalogue rows that are held out, as the option tells them once more."""
    return set(cold_rows(data.cold_items, data.cold_seed, data.catalogue.ids, data.histories).tolist())


def log(pairs, times=None):
    users, items = np.array(pairs).T
    names = ["", *(f"u{user}" for user in range(1, users.max() + 1))]
    return build_histories(users, items, times, user_ids=names)


IDS = ["", *(f"item {row}" for row in range(1, 41))]


def one_of_each(rows):
    return log([(1, row) for row in rows])


# ---------------------------------------------------------------------- the choice


def test_a_share_is_of_the_items_with_events_and_grows_by_more_of_them():
    histories = one_of_each([row for row in range(1, 41) for _ in range(row % 3)])  # rows 3, 6 .. 39 have no event
    touched = set(histories.items.tolist())
    found = [set(cold_rows(share, 0, IDS, histories).tolist()) for share in (0, 0.01, 0.1, 0.5, 0.96)]
    assert [len(rows) for rows in found] == [0, 1, 3, 14, 26]  # of 27
    assert all(rows <= more <= touched for rows, more in pairwise(found))
    assert set(cold_rows(0.5, 1, IDS, histories).tolist()) != found[3]


def test_the_choice_goes_by_ids_whatever_the_order_of_rows():
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(5):
        names = ["", *rng.permutation(IDS[1:]).tolist()]
        rows = cold_rows(0.25, 3, names, one_of_each(rng.permutation(np.arange(1, 41))))
        assert (np.diff(rows) > 0).all()
        chosen.add(frozenset(names[row] for row in rows))
    assert len(chosen) == 1
    assert len(chosen.pop()) == 10


def test_items_by_name_and_by_file(tmp_path):
    histories = one_of_each([1, 2, 3])
    assert cold_rows(["item 3", "item 1", "item 3", "item 40"], 0, IDS, histories).tolist() == [1, 3, 40]
    (tmp_path / "cold.txt").write_text("\ufeffitem 2\n\nitem 3\n")
    assert cold_rows(str(tmp_path / "cold.txt"), 9, IDS, histories).tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"names 'item 41', .*\(1 of 2 ids are not\)\. Did you mean 'item"):
        cold_rows(["item 2", "item 41"], 0, IDS, histories)
    with pytest.raises(FileNotFoundError, match=r"data\.cold_items names the file .*one item id a line"):
        cold_rows(str(tmp_path / "none.txt"), 0, IDS, histories)


@pytest.mark.parametrize("share", [1, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_of_all_or_more_is_refused_before_anything_is_read(share):
    with pytest.raises(ValueError, match=rf"cold_items is {re.escape(str(share))}; .*below 1"):
        RecDataModule(path="nowhere", cold_items=share)


def test_something_must_be_left_to_train_on():
    with pytest.raises(ValueError, match="holds out all of the 1 items"):
        cold_rows(0.1, 0, IDS, one_of_each([7, 7, 7]))
    with pytest.raises(ValueError, match="holds out all of the 2 items"):
        cold_rows(["item 1", "item 2"], 0, IDS, one_of_each([1, 2, 2]))
    assert cold_rows(0.1, 0, IDS, one_of_each([7, 8])).size == 1


# ---------------------------------------------------------------------- the split, by hand

# user 1: 1 2 3 | 4 | 5, user 2: 2 9 | 2 | 9, user 3: 9 | 9 | 1, user 4: 1 9 (too few events to be evaluated)
PAIRS = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 2), (2, 9), (2, 2), (2, 9), (3, 9), (3, 9), (3, 1), (4, 1), (4, 9)]


def test_leave_one_out_by_hand():
    histories = log(PAIRS)
    split = leave_one_out(histories)
    cold = hold_out(split, histories, np.array([2, 9]))
    trained, ends = cold.training(histories)
    assert [trained.items[trained.indptr[user] : ends[user]].tolist() for user in range(5)] == [[], [1, 3], [], [], [1]]
    assert trained.event.tolist() == [0, 2, 12]
    assert cold.users(histories, "train").tolist() == [1, 4]
    assert cold.train_counts(histories, 10).tolist() == [0, 2, 0, 1, 0, 0, 0, 0, 0, 0]
    for part in ("validation", "test"):
        assert cold.users(histories, part).tolist() == split.users(histories, part).tolist() == [1, 2, 3]
        assert cold.in_part(histories, part).tolist() == split.in_part(histories, part).tolist()
    wanted = {"cold_items": 2, "cold_events": 8, "cold_train_events_left_out": 5, "train_users": 2, "train_events": 3}
    wanted |= {"cold_validation_targets": 2, "cold_test_targets": 1, "test_targets": 3, "validation_targets": 3}
    assert {name: cold.counts[name] for name in wanted} == wanted
    assert cold.description.endswith(
        "; 2 cold items, whose 8 events are all kept out of training (5 would have been in it), are 2 of the "
        "validation and 1 of the test targets."
    )


def test_nothing_held_out_is_the_same_split():
    histories = log(PAIRS)
    split = leave_one_out(histories)
    assert hold_out(split, histories, np.zeros(0, np.int64)) is split
    assert split.training(histories) == (histories, split.train_end)


def test_a_last_fit_trains_on_warm_validation_events_only():
    histories = log(PAIRS)
    cold = hold_out(refit(leave_one_out(histories), histories), histories, np.array([2, 9]))
    assert histories.items[cold.in_part(histories, "train")].tolist() == [1, 3, 4, 1]
    assert cold.counts["train_events"] == 4
    assert (cold.counts["cold_validation_targets"], cold.counts["cold_test_targets"]) == (0, 1)
    assert "validation events are trained on; 2 cold items" in cold.description


def test_global_time_by_hand():
    histories = log([(1, 1), (1, 9), (2, 2), (1, 3), (2, 9), (1, 9)], np.array([1, 2, 3, 11, 12, 21]))
    split = global_time(histories, 10, 20)
    cold = hold_out(split, histories, np.array([9]))
    assert histories.items[cold.in_part(histories, "train")].tolist() == [1, 2]
    assert (cold.counts["cold_validation_targets"], cold.counts["cold_test_targets"]) == (1, 1)
    assert cold.users(histories, "test").tolist() == split.users(histories, "test").tolist() == [1]


# ---------------------------------------------------------------------- what training sees

SETTINGS = [
    {},
    {"cold_items": ["i1", "i2", "i28"], "min_rating": 3.0},
    {"split": "global_time", "windows": "all", "max_history": 3},
    {"fit_on": "train_validation", "supervision": "random"},
    {"candidates": "batch", "windows": "all", "max_history": 4},
    {"candidates": "sampled", "negatives": 5, "supervision": "random", "min_user_events": 12, "min_item_events": 8},
    {"candidates": "sampled", "negatives": 30, "negatives_per_user": True, "split": "global_time"},
    {"candidates": "sampled", "negatives": 5, "negative_distribution": "popularity", "supervision": "last"},
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("seed", range(2))
def test_no_cold_event_reaches_training(seed, options):
    data = made(seed, user_template="{titles} {reviews}", user_titles=100, **options)
    plain = made(seed, **options | {"cold_items": 0})
    cold = held(data)
    assert len(cold) == (3 if isinstance(data.cold_items, list) else round(0.3 * len(np.unique(data.histories.items))))
    assert not data.train_counts[sorted(cold)].any()
    assert data.view.counts.tolist() == data.train_counts.tolist()
    assert not data.view.recent_counts[sorted(cold)].any()
    warm = [row for row in range(len(data.catalogue)) if row not in cold]
    assert data.train_counts[warm].tolist() == plain.train_counts[warm].tolist()

    trained, met = {row for row in warm if data.train_counts[row]}, set()
    titles = re.compile("|".join(rf"\b{re.escape(data.catalogue.display(row))}" for row in sorted(cold)))
    item_of_review = dict(zip((f"review{n}." for n in range(500)), data.reader.items.tolist(), strict=True))
    for batch in data.train_dataloader():
        rows = batch.items.rows.tolist()
        assert set(rows) <= {0} | trained
        assert not batch.items.whole
        assert set(batch.known.flatten().tolist()) <= {0} | trained
        assert int(batch.targets.max()) <= batch.n_candidates <= len(rows) - 1
        met |= {rows[position] for position in batch.targets.flatten().tolist() if position}
        if data.candidates == "catalogue":
            assert rows == [0, *sorted(trained)]
        for text in batch.users.texts:
            assert not titles.search(text)
            assert not {f"i{item_of_review[word]}" for word in re.findall(r"review\d+\.", text)} & {
                data.catalogue.ids[row] for row in cold
            }
    assert met <= trained
    assert len(met) > len(trained) / 2


@pytest.mark.parametrize("options", SETTINGS[:4])
def test_training_positions_are_those_of_the_log_without_the_cold_items(options):
    """Every supervised position, as (history, target), against a loop over the histories."""
    data = made(**options | {"max_history": 100, "supervision": "every"})
    cold = held(data)
    wanted = set()
    for user in range(1, data.histories.n_users):
        first, end = data.histories.indptr[user], data.split.train_end[user]
        events = [row for row in data.histories.items[first:end].tolist() if row not in cold]
        wanted |= {(user, tuple(events[:step]), events[step]) for step in range(1, len(events))}
    found = set()
    for batch in data.train_dataloader():
        rows = batch.items.rows
        rows_of = rows[batch.users.history], rows[batch.targets]
        for user, history, targets in zip(batch.users.users, *rows_of, strict=True):
            for step in targets.nonzero()[:, 0].tolist():
                found.add((int(user), tuple(history[: step + 1].tolist()), int(targets[step])))
    assert found == wanted


def test_evaluation_is_that_of_a_run_without_cold_items():
    data, plain = made(), made(cold_items=0)
    for part in ("validation", "test"):
        one, other = data.evaluation_dataset(part), plain.evaluation_dataset(part)
        for name in ("users", "cuts", "ends"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist()
        assert one.histories.items.tolist() == other.histories.items.tolist()
    assert "9 cold items" in data.protocol
    assert "cold items" not in plain.protocol


def test_all_items_untrained_in_a_users_history_leave_the_user_evaluated():
    """Whoever touched cold items alone is no training sample, and is asked all the same."""
    data = made()
    user = int(data.split.test_users[0])
    own = sorted({data.catalogue.ids[row] for row in data.histories.history(user)})
    data = made(cold_items=own)
    assert user not in data.train_dataset().samples.users
    assert user in data.split.test_users


# ---------------------------------------------------------------------- the model


def small(tower=None, **options):
    torch.manual_seed(0)
    user_tower = SequenceUserTower(blocks=1, heads=1, max_length=50, dropout=0.0)
    return TwoTower(IdItemTower(8, init_std=0.5) if tower is None else tower, user_tower, **options)


@pytest.mark.parametrize("candidates", ["catalogue", "sampled"])
def test_a_cold_item_gets_no_gradient_in_training(candidates, tiny_bert):
    data = made(candidates=candidates, negatives=25)
    cold = sorted(held(data))
    tower = TextIdItemTower(language_model=tiny_bert, dim=8, alignment=0.1, id_dropout=0.2)
    module = small(tower)
    module.build(data.view)
    tower.prepare(data.view)
    tower.vectors.requires_grad_()
    for batch in data.train_dataloader():
        module.loss(batch).backward()
    for gradient in (tower.table.weight.grad, tower.vectors.grad):
        assert not gradient[cold].any()
        assert gradient[np.flatnonzero(data.train_counts)].any(1).all()
    assert not tower.warm[cold].any()


def test_slices_are_those_of_a_loop():
    data = made(filter_seen=False)
    cold = held(data)
    metrics = [RankingMetrics(ks=(10,), names=("hr", "ndcg"), slices=("warm", "cold"))]
    module = small(metrics=metrics)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    figures = trainer.test(module, data, verbose=False)[0]

    untrained = {row for row in range(1, len(data.catalogue)) if not data.train_counts[row]}
    assert cold <= untrained
    found = {"warm": [], "cold": []}
    with torch.no_grad():
        for batch in data.test_dataloader():
            interest, table, _ = module.interests(batch)
            scores = interest @ table.items[1:].T
            for line, target in zip(scores, batch.targets[:, 0].tolist(), strict=True):
                rank = int((line >= line[target - 1]).sum())
                gain = 1 / np.log2(1 + rank) if rank <= 10 else 0.0
                found["cold" if target in untrained else "warm"].append((rank <= 10, gain))
    for name, values in found.items():
        hr, ndcg = np.array(values, dtype=float).mean(0)
        assert figures[f"test/{name}/users"] == len(values) > 3
        assert figures[f"test/{name}/hr@10"] == pytest.approx(hr, abs=1e-6)
        assert figures[f"test/{name}/ndcg@10"] == pytest.approx(ndcg, abs=1e-6)


def test_neighbours_by_text_score_by_cosine_to_the_mean(tiny_bert):
    """The baseline without training, against a loop: it ranks a cold item as any other."""
    data = made(template="{title} red shoe old", filter_seen=False)
    tower = TextItemTower(language_model=tiny_bert, dim=None, projection="none", features="normalise")
    module = TwoTower(tower, PooledUserTower(), score=Cosine(temperature=1.0))
    module.build(data.view)
    tower.prepare(data.view)
    texts = tower.encoder.encode(data.catalogue.texts, torch.device("cpu"))
    unit = texts / texts.norm(dim=1, keepdim=True)
    with torch.no_grad():
        batch = next(iter(data.test_dataloader()))
        interest, table, known = module.interests(batch)
    assert bool(known.all())
    for vector, history, length in zip(interest, batch.users.history, batch.users.lengths, strict=True):
        mean = unit[history[:length]].mean(0)
        torch.testing.assert_close(table.items[1:] @ vector, unit[1:] @ mean / mean.norm(), atol=1e-5, rtol=0)


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    def run(epochs, ckpt_path=None):
        seed_everything(3, verbose=False)
        saver = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        module = small(lr=0.01)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[saver],
            max_epochs=epochs,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, made(candidates="sampled", negatives=5), ckpt_path=ckpt_path, weights_only=True)
        return module

    whole = run(3)
    run(1)
    resumed = run(3, tmp_path / "1" / "last.ckpt")
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
