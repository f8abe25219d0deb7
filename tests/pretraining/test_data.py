"""What pretraining reads: nothing that belongs to validation or test, and a seeded share held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_rec import TwoTower
from lightning_rec.data.collate import BatchIndex
from lightning_rec.pretraining import PretrainingPairs, PretrainingTexts
from lightning_rec.pretraining.pairs import KnownPairs, co_occurring
from lightning_rec.towers import IdItemTower, SequenceUserTower

ITEMS = ["red shoe", "blue boot", "green film", "old book", "new dog", "big cat"]


def texts_of(source, **options):
    data = PretrainingTexts(source=source, **options)
    data.setup("fit")
    return data


def pairs_of(source, **options):
    data = PretrainingPairs(source=source, **options)
    data.setup("fit")
    return data


def pair_texts(data):
    return {frozenset(data.texts[place] for place in pair) for pair in data.pairs.tolist()}


# ---------------------------------------------------------------------- texts


def test_texts_are_those_of_items_and_of_training_events_alone(reviewed):
    data = texts_of(reviewed())
    wanted = [f"wrote u{user} s{step}" for user in range(3) for step in range(3)]
    assert data.texts == ITEMS + wanted, "each once, and no review of the two events to be found"
    assert texts_of(reviewed(), texts="items").texts == ITEMS
    assert texts_of(reviewed(), texts="users").texts == wanted


def test_texts_of_a_split_by_time_stop_at_its_first_moment(reviewed):
    source = reviewed(split="global_time", validation_start=1002, test_start=1004)
    assert texts_of(source, texts="users").texts == [f"wrote u{user} s{step}" for user in range(3) for step in range(2)]


def test_a_user_s_text_is_that_of_the_end_of_training(reviewed):
    source = reviewed(user_template="Likes {titles}. {reviews}", user_titles=2)
    found = texts_of(source, texts="users").texts
    assert found[-3] == "Likes green film, blue boot. wrote u0 s2 wrote u0 s1"
    assert not any("s3" in text or "s4" in text for text in found)


def test_files_are_read_once_and_the_source_is_as_before(reviewed, monkeypatch):
    source = reviewed()
    reader, calls = source.reader, []
    read = type(reader).read
    monkeypatch.setattr(type(reader), "read", lambda self: calls.append(1) or read(self))
    texts_of(source)
    assert (source.reader, len(calls)) == (reader, 1)


def test_a_seeded_share_is_held_out(reviewed):
    data = texts_of(reviewed(), validation_share=0.2, batch_size=4)
    train, held = set(data.train_rows.tolist()), set(data.held_rows.tolist())
    assert len(held) == 3, "a fifth of 15"
    assert train | held == set(range(15))
    assert not train & held
    again = texts_of(reviewed(), validation_share=0.2)
    assert np.array_equal(data.held_rows, again.held_rows)
    assert not np.array_equal(data.held_rows, texts_of(reviewed(), validation_share=0.2, seed=1).held_rows)
    served = torch.cat([batch.rows for batch in data.train_dataloader()])
    assert sorted(served.tolist()) == sorted(train)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert {row for batch in loader for row in batch.rows.tolist()} == held
    assert len(texts_of(reviewed(), validation_share=0.0).held_rows) == 0
    assert data.protocol == "3 texts held out of 15 (seed 0)."


# ---------------------------------------------------------------------- pairs


def test_pairs_by_hand():
    owners, texts = np.array([1, 1, 1, 1, 2, 2, 2]), np.array([4, 2, 4, 0, 2, -1, 4])
    pairs, counts = co_occurring(owners, texts, 1)
    assert (pairs.tolist(), counts.tolist()) == ([[0, 4], [2, 4]], [1, 2]), "no pair over two users, or of one text"
    pairs, counts = co_occurring(owners, texts, 2)
    assert (pairs.tolist(), counts.tolist()) == ([[0, 2], [0, 4], [2, 4]], [1, 1, 3])
    assert co_occurring(owners[:1], texts[:1], 3)[0].shape == (0, 2)


def test_pairs_come_from_training_events_alone(reviewed):
    data = pairs_of(reviewed(), window=1)
    # users 0, 1 and 2 train on items 0 1 2, 1 2 3 and 2 3 4
    wanted = {frozenset(ITEMS[row : row + 2]) for row in range(4)}
    assert pair_texts(data) == wanted
    assert pair_texts(pairs_of(reviewed(), window=4)) == wanted | {
        frozenset(ITEMS[row : row + 3 : 2]) for row in range(3)
    }


def test_events_to_be_found_could_be_any_others(reviewed, tmp_path):
    """Whatever stands in the validation and test events, the pairs are the same."""
    first = pair_texts(pairs_of(reviewed(), window=5))
    lines = (tmp_path / "log.csv").read_text().splitlines()
    changed = [
        line.replace(line.split(",")[1], "i5") if ",1003," in line or ",1004," in line else line for line in lines
    ]
    assert changed != lines
    source = reviewed()
    (tmp_path / "log.csv").write_text("\n".join(changed))
    assert pair_texts(pairs_of(source, window=5)) == first


def test_items_of_one_text_are_one(reviewed, tmp_path):
    source = reviewed()
    log = (tmp_path / "log.csv").read_text()
    # i6 reads like i0, and i7 has no text
    (tmp_path / "log.csv").write_text(log.replace("u0,i2,", "u0,i6,").replace("u1,i1,", "u1,i7,"))
    found = pair_texts(pairs_of(source, window=2))
    assert frozenset(("red shoe",)) not in found
    assert frozenset(("red shoe", "blue boot")) in found
    assert "" not in {text for pair in found for text in pair}


def test_known_pairs_are_no_negatives():
    known = KnownPairs(np.array([[0, 3], [1, 2], [2, 4]]), 5)
    first, second = np.array([0, 1, 2]), np.array([3, 2, 4])
    assert known(first[:, None], second[None]).tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert known(second, first).all(), "in any order"
    assert not KnownPairs(np.zeros((0, 2), np.int64), 5)(first, second).any()


def test_a_batch_says_what_is_no_negative(reviewed):
    data = pairs_of(reviewed(), window=2, validation_share=0.0)
    batch = data.dataset("train")[BatchIndex(np.arange(len(data.pairs)), (0,))]
    known = {tuple(pair) for pair in data.pairs.tolist()}
    for row, anchor in enumerate(batch.anchors.tolist()):
        for column, partner in enumerate(batch.partners.tolist()):
            together = anchor == partner or (anchor, partner) in known or (partner, anchor) in known
            assert batch.excluded[row, column] == (together and row != column), (row, column)
    assert batch.excluded.any()


def test_every_pair_comes_once_an_epoch(reviewed):
    data = pairs_of(reviewed(), window=2, validation_share=0.3, batch_size=2)
    served = [
        tuple(pair)
        for b in data.train_dataloader()
        for pair in zip(b.anchors.tolist(), b.partners.tolist(), strict=True)
    ]
    held = [
        tuple(pair) for b in data.val_dataloader() for pair in zip(b.anchors.tolist(), b.partners.tolist(), strict=True)
    ]
    assert len(held) == 2
    assert sorted(served + held) == [tuple(pair) for pair in data.pairs.tolist()]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PretrainingTexts, {}, r"set data.path .* or data.source"),
        (PretrainingTexts, {"path": "a", "validation_share": 1.0}, r"validation_share is 1.0"),
        (PretrainingPairs, {"path": "a", "window": 0}, r"window is 0"),
        (PretrainingPairs, {"path": "a", "min_count": 0}, r"min_count is 0"),
        (PretrainingPairs, {"path": "a", "batch_size": 1}, r"batch_size is 1"),
    ],
)
def test_options_out_of_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_two_sources_are_refused(reviewed):
    with pytest.raises(ValueError, match=r"Pretraining reads one data set"):
        PretrainingTexts(path="somewhere", source=reviewed())


def test_data_without_anything_to_learn_from(reviewed, tmp_path):
    with pytest.raises(ValueError, match=r"0 pairs .* lower data.min_count"):
        pairs_of(reviewed(), min_count=9)
    source = reviewed()

    log = [",".join(line.split(",")[:3]) for line in (tmp_path / "log.csv").read_text().splitlines()]
    (tmp_path / "log.csv").write_text("\n".join(log))
    with pytest.raises(ValueError, match=r"There is no text to train on: data.texts is 'users'"):
        texts_of(source, texts="users")


def test_what_does_not_go_together_is_said(reviewed):
    data = PretrainingTexts(source=reviewed())
    with pytest.raises(ValueError, match=r"TwoTower cannot read: set model.class_path"):
        data.check_model(TwoTower(IdItemTower(8), SequenceUserTower(blocks=1, heads=1)))
    with pytest.raises(ValueError, match=r"Pretraining predicts nothing"):
        data.predict_dataloader()
