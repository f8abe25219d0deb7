"""Crop, mask and reorder: what is changed, what never is, and that no step's history knows its target."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.data.augment_history import HistoryAugmentation, uniform
from lightning_rec.data.collate import BatchIndex, KnownItems, TrainDataset, training_samples
from lightning_rec.data.histories import build_histories
from lightning_rec.data.readers import Files
from lightning_rec.data.sampling import NegativeSampler
from lightning_rec.towers import IdItemTower, SequenceUserTower

SHOP = Path(__file__).parent / "files" / "shop"
N_USERS, N_EVENTS = 30, 400


def histories():
    """Every event has an item of its own, so that an item tells its event: item ``i + 1`` is event ``i``."""
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(1, N_USERS + 1, N_EVENTS))
    return build_histories(
        users,
        np.arange(1, N_EVENTS + 1),
        np.arange(N_EVENTS) * 10,
        np.arange(N_EVENTS) % 5 + 1.0,
        user_ids=["", *(f"u{user}" for user in range(1, N_USERS + 1))],
    )


def dataset(augmentation, supervision="every", candidates="catalogue", max_history=9, windows="all"):
    found = histories()
    samples = training_samples(found, found.indptr[1:], max_history, windows)
    sampler = NegativeSampler(np.ones(N_EVENTS + 1), "uniform") if candidates == "sampled" else None
    return TrainDataset(
        found,
        samples,
        KnownItems.of(found, found.indptr[1:]),
        N_EVENTS + 1,
        candidates,
        sampler,
        20,
        supervision=supervision,
        augmentation=augmentation,
    )


def rows(made, chosen, epoch=0, batch=0):
    """History, targets and the rest of a batch, as catalogue rows."""
    found = made[BatchIndex(np.asarray(chosen), (7, epoch, batch, 0))]
    table = found.items.rows.numpy()
    return table[found.users.history.numpy()], table[found.targets.numpy()], found


ALL = {"crop": 0.7, "mask": 0.7, "reorder": 0.7, "reorder_ratio": 0.8}


@pytest.mark.parametrize("candidates", ["catalogue", "sampled", "batch"])
@pytest.mark.parametrize("supervision", ["every", "random", "last"])
@pytest.mark.parametrize("options", [ALL, {"crop": 1.0}, {"mask": 1.0}, {"reorder": 1.0}], ids=str)
def test_a_step_knows_nothing_of_its_target_and_later(options, supervision, candidates):
    made = dataset(HistoryAugmentation(**options), supervision, candidates)
    changed = targets_seen = 0
    for epoch in range(4):
        history, targets, batch = rows(made, range(len(made)), epoch)
        lengths = batch.users.lengths.numpy()
        for number in range(len(made)):
            start, end = made.samples.starts[number], made.samples.ends[number]
            own = set(range(start + 1, end + 1))  # items of the sample
            assert not history[number, lengths[number] :].any()
            assert not targets[number, lengths[number] :].any()
            seen = history[number, : lengths[number]]
            changed += not np.array_equal(seen, np.arange(start + 1, end))
            for step in np.flatnonzero(targets[number]):
                target = targets[number, step]
                known = [row for row in seen[: step + 1] if row]
                assert target in own
                assert set(known) <= own
                assert len(set(known)) == len(known)
                # items are numbered in the order of time
                assert all(row < target for row in known), "an event of the future, or the target itself"
                if "mask" not in options:
                    assert max(known) == target - 1, "the target is what followed next"
                    assert batch.users.times[number, step] == 10 * (target - 2)
                assert batch.ratings[number, step] == (target - 1) % 5 + 1
                targets_seen += 1
            assert batch.ratings[number][targets[number] == 0].isnan().all()
            assert targets[number, lengths[number] - 1], "the last step is always supervised"
            if supervision != "every":
                assert (targets[number] > 0).sum() == 1
    assert changed > len(made)
    assert targets_seen >= 4 * len(made)


def test_off_changes_nothing():
    plain, off = dataset(None, "random", "sampled"), dataset(HistoryAugmentation(), "random", "sampled")
    for one, other in zip(rows(plain, range(8))[:2], rows(off, range(8))[:2], strict=True):
        assert np.array_equal(one, other)


def test_a_crop_is_a_stretch_with_its_own_targets():
    made = dataset(HistoryAugmentation(crop=1.0, crop_ratio=0.5))
    firsts = set()
    for epoch in range(20):
        history, targets, batch = rows(made, range(len(made)), epoch)
        for number, length in enumerate(batch.users.lengths.tolist()):
            steps = made.samples.lengths[number] - 1
            assert length == max(steps // 2, 1)
            first = history[number, 0]
            assert history[number, :length].tolist() == list(range(first, first + length))
            assert targets[number, :length].tolist() == list(range(first + 1, first + 1 + length))
            if number == 0:
                firsts.add(first - made.samples.starts[0] - 1)
    steps = made.samples.lengths[0] - 1
    assert firsts == set(range(steps - steps // 2 + 1)), "every place is drawn"


@pytest.mark.parametrize("supervision", ["random", "last"])
def test_a_crop_keeps_the_only_target(supervision):
    plain, cropped = (
        dataset(augmentation, supervision) for augmentation in (None, HistoryAugmentation(crop=1.0, crop_ratio=0.3))
    )
    whole, part = (rows(made, range(20))[1] for made in (plain, cropped))
    assert whole.max(1).tolist() == part.max(1).tolist()


def test_masked_events_leave_their_places():
    made = dataset(HistoryAugmentation(mask=1.0, mask_ratio=0.4))
    history, targets, batch = rows(made, range(len(made)))
    whole, same, _ = rows(dataset(None), range(len(made)))
    assert np.array_equal(targets, same)
    for number, length in enumerate(batch.users.lengths.tolist()):
        assert (history[number, :length] == 0).sum() == int(length * 0.4)
    assert np.array_equal(history[history > 0], whole[history > 0])


def test_a_reordered_stretch_holds_the_same_events():
    made = dataset(HistoryAugmentation(reorder=1.0, reorder_ratio=0.5))
    history, targets, batch = rows(made, range(len(made)))
    whole, all_targets, _ = rows(dataset(None), range(len(made)))
    assert np.array_equal(np.sort(history), np.sort(whole))
    for number, length in enumerate(batch.users.lengths.tolist()):
        moved = np.flatnonzero(history[number] != whole[number])
        if len(moved):
            assert moved[-1] - moved[0] < int(length * 0.5)
        # supervised exactly where the events up to the step are those that came first
        closed = [set(history[number, : j + 1]) == set(whole[number, : j + 1]) for j in range(length)]
        assert (targets[number, :length] > 0).tolist() == closed
        assert np.array_equal(targets[number, :length][closed], all_targets[number, :length][closed])


def test_chances_are_kept():
    made = dataset(HistoryAugmentation(mask=0.3, mask_ratio=0.5))
    hits = long = 0
    for epoch in range(60):
        history, _, batch = rows(made, range(len(made)), epoch)
        lengths = batch.users.lengths.numpy()
        masked = np.array([(row[:n] == 0).any() for row, n in zip(history, lengths, strict=True)])
        hits, long = hits + masked[lengths > 1].sum(), long + (lengths > 1).sum()
    assert abs(hits / long - 0.3) < 4 * np.sqrt(0.21 / long)


def test_the_same_sample_is_changed_alike_in_any_batch_of_its_epoch():
    made = dataset(HistoryAugmentation(**ALL))
    alone, *_ = rows(made, [3], epoch=2, batch=5)
    among, *_ = rows(made, [8, 3, 1], epoch=2, batch=0)
    assert among[1, : alone.shape[1]].tolist() == alone[0].tolist()
    others = [rows(made, [3], epoch)[0][0].tolist() for epoch in range(6)]
    assert len({str(history) for history in others}) > 2, "each epoch draws anew"


def test_random_numbers_are_uniform_and_independent():
    drawn = uniform((1, 2), np.arange(4000), 0, 10)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.bincount((drawn * 10).astype(int).ravel(), minlength=10).std() < 4 * np.sqrt(40_000 * 0.09)
    assert abs(np.corrcoef(drawn.T) - np.eye(10)).max() < 0.1
    for other in (uniform((1, 3), np.arange(4000), 0, 10), uniform((1, 2), np.arange(4000), 1, 10)):
        assert abs(np.corrcoef(drawn.ravel(), other.ravel())[0, 1]) < 0.03
    assert np.array_equal(uniform((-1,), np.array([5]), 0), uniform((2**64 - 1,), np.array([5]), 0))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"history_augmentation\.mask is a probability from 0 to 1, not 1\.5"):
        HistoryAugmentation(mask=1.5)
    with pytest.raises(ValueError, match=r"history_augmentation\.crop_ratio is a share of the history, above 0"):
        HistoryAugmentation(crop=0.5, crop_ratio=0.0)
    with pytest.raises(ValueError, match=r"mask_ratio is below 1"):
        HistoryAugmentation(mask_ratio=1.0)


# ---------------------------------------------------------------------- in a run


def fit(folder, ckpt_path=None):
    seed_everything(3, verbose=False)
    data = EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")),
        min_rating=0,
        batch_size=8,
        candidates="sampled",
        negatives=5,
        history_augmentation=HistoryAugmentation(crop=0.5, mask=0.5, reorder=0.5),
    )
    module = TwoTower(IdItemTower(8), SequenceUserTower(blocks=1, heads=1), lr=0.01)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        max_epochs=2,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.global_step == 10
    return module


def test_a_resumed_run_sees_the_same_histories(tmp_path):
    whole = fit(tmp_path)
    resumed = fit(tmp_path, ckpt_path=tmp_path / "step=7.ckpt")  # in the middle of an epoch
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_evaluation_is_never_changed():
    options = {"min_rating": 0, "max_history": 4}
    files = Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv"))
    plain = EcommerceDataModule(files, **options)
    changed = EcommerceDataModule(files, history_augmentation=HistoryAugmentation(crop=1, mask=1, reorder=1), **options)
    for data in (plain, changed):
        data.setup()
    for loader in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        for one, other in zip(getattr(plain, loader)(), getattr(changed, loader)(), strict=True):
            assert torch.equal(one.users.history, other.users.history)
            assert one.targets is None or torch.equal(one.targets, other.targets)
