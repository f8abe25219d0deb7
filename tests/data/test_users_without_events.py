"""Users of the user table without a single interaction: predicted for, and otherwise as if they were not there."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from lightning_rec import TwoTower
from lightning_rec.data import ImpressionDataModule, RecDataModule
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.readers import ImpressionReader, RawData, RawImpressions, Reader
from lightning_rec.impression import ImpressionTwoTower
from lightning_rec.towers import IdItemTower, LanguageUserTower, PooledUserTower, TextItemTower

#: ``low`` has touched something without liking it: a row, and an empty history.
LOG = [("a", "x", 5), ("b", "z", 5), ("a", "y", 5), ("low", "x", 1), ("a", "z", 5), ("b", "x", 5), ("b", "y", 5)]
LOG += [("a", "w", 5), ("b", "w", 5)]
ITEMS = {"item_id": ["x", "y", "z", "w"], "title": ["red shoe", "old film", "blue boot", "new book"]}
CITIES = {"b": "big city", "new": "red river", "low": "dog", "a": "old dog", "mute": None, "late": "space"}


class Given(Reader):
    """The log above, with the users named."""

    def __init__(self, users=None):
        self.users = users

    def read(self):
        names = ("user_id", "item_id", "rating")
        log = Dataset.from_dict(dict(zip(names, map(list, zip(*LOG, strict=True)), strict=True)))
        users = self.users and Dataset.from_dict({"user_id": self.users, "city": [CITIES[user] for user in self.users]})
        return RawData(log, Dataset.from_dict(ITEMS), users)


def made(users=tuple(CITIES), **options):
    options = {"user_template": "{city}. {titles}", "min_rating": 3, "batch_size": 2} | options
    data = RecDataModule(reader=Given(users and list(users)), **options)
    data.setup()
    return data


def one_batch(dataset):
    return dataset[BatchIndex(np.arange(len(dataset)), (0,))]


def test_their_text_reaches_the_batch_by_raw_id():
    asked = ["new", "a", "nobody", "mute", "new", "low", "b"]
    batch = one_batch(made(predict_users=asked).prediction_dataset())
    assert batch.users.texts == [
        "red river",
        "old dog. new book, blue boot, old film, red shoe",
        "",
        "",
        "red river",
        "dog",
        "big city. new book, old film, red shoe, blue boot",
    ]
    assert batch.users.users.tolist() == [0, 1, 0, 0, 0, 3, 2]
    assert batch.users.lengths.tolist() == [0, 4, 0, 0, 0, 0, 4]
    assert batch.seen.sum(1).tolist() == [0, 10, 0, 0, 0, 1, 10]


def test_batches_of_the_loader_hold_the_texts_of_their_own_users():
    asked = ["new", "a", "late", "b", "mute", "low", "late"]
    texts = {}
    for batch in made(predict_users=asked, eval_batch_size=2).predict_dataloader():
        texts |= dict(zip(batch.index.tolist(), batch.users.texts, strict=True))
    assert [texts[number].split(".")[0] for number in range(7)] == [
        "red river",
        "old dog",
        "space",
        "big city",
        "",
        "dog",
        "space",
    ]


@pytest.mark.parametrize("template", ["{city}. {titles}", "{titles}", None])
def test_all_users_are_those_of_the_log_and_then_of_the_table(template):
    data = made(user_template=template)
    dataset = data.prediction_dataset()
    assert data.asked_users == ["a", "b", "low", "new", "mute", "late"]
    assert dataset.users.tolist() == [1, 2, 3, 0, 0, 0]
    assert (one_batch(dataset).users.texts is None) == (template is None)
    assert "3 users of the user table have no interactions" in str(data.report)
    alone = made(None, user_template=None)
    alone.prediction_dataset()
    assert alone.asked_users == ["a", "b", "low"]
    assert "no interactions" not in str(alone.report)


def test_nothing_else_knows_of_them():
    """Sizes, digests, split, histories and every batch of training and evaluation."""
    data, without = made(), made(["a", "b", "low"])
    assert (data.view.n_users, data.view.users_digest) == (without.view.n_users, without.view.users_digest) != (6, "")
    assert data.user_ids == without.user_ids == ["", "a", "b", "low"]
    assert data.protocol == without.protocol
    assert data.split.counts == without.split.counts
    assert data.histories.report == without.histories.report
    assert data.train_counts.tolist() == without.train_counts.tolist()
    pairs = [(data.train_dataset(), without.train_dataset())]
    pairs += [(data.evaluation_dataset(part), without.evaluation_dataset(part)) for part in ("validation", "test")]
    for pair in pairs:
        one, other = (one_batch(dataset) for dataset in pair)
        assert one.users.texts == other.users.texts
        assert "red river" not in one.users.texts
        for name in ("users", "history", "lengths"):
            assert torch.equal(getattr(one.users, name), getattr(other.users, name))
        assert torch.equal(one.targets, other.targets)


def test_towers_that_read_texts_answer_them_and_others_leave_them_to_popularity(tiny_bert):
    asked = ["new", "a", "nobody", "mute", "late", "new", "low"]
    data = made(predict_users=asked, filter_seen=False)
    torch.manual_seed(0)
    by_text = TwoTower(TextItemTower(tiny_bert, dim=8), LanguageUserTower(language_model=tiny_bert), top_k=3)
    by_history = TwoTower(IdItemTower(dim=8), PooledUserTower(pooling="mean"), top_k=3)
    answers = []
    for module in (by_text, by_history):
        module.build(data.view)
        module.item_tower.prepare(data.view)
        with torch.no_grad():
            answers.append(module.eval().predict_step(one_batch(data.prediction_dataset()), 0))
    read, sequence = answers
    assert read["fallback"].tolist() == [False, False, True, True, False, False, False]
    assert torch.equal(read["rows"][0], read["rows"][5])
    assert torch.equal(read["scores"][0], read["scores"][5])
    assert (read["scores"][0] - read["scores"][4]).abs().max() > 1e-4, "another profile has other scores"
    assert sequence["fallback"].tolist() == [True, False, True, True, True, True, True]
    # training events: x twice, y and z once; those of validation and test do not count
    assert sequence["scores"][0].tolist() == sequence["scores"][3].tolist() == [2.0, 1.0, 1.0]


class Shown(ImpressionReader):
    """Impressions of users with and without a profile, the history of each given."""

    def read(self):
        users, histories = ["a", "new", "late", "mute", "other"], [["x", "y"], [], [], [], []]
        columns = {
            "impression_id": [str(number) for number in range(5)],
            "user_id": users,
            "timestamp": [1_600_000_000 + number for number in range(5)],
            "candidates": [["x", "y", "z"]] * 5,
            "labels": [[0, 1, 0]] * 5,
            "history": histories,
            "part": ["train", "train", "test", "test", "test"],
        }
        city = {"user_id": list(CITIES), "city": list(CITIES.values())}
        return RawImpressions(Dataset.from_dict(columns), Dataset.from_dict(ITEMS), Dataset.from_dict(city))


def test_an_impression_of_a_user_without_history_is_answered_by_the_profile(tiny_bert):
    data = ImpressionDataModule(reader=Shown(), user_template="{city}. {titles}")
    data.setup()
    torch.manual_seed(0)
    module = ImpressionTwoTower(TextItemTower(tiny_bert, dim=8), LanguageUserTower(language_model=tiny_bert))
    module.build(data.view)
    module.item_tower.prepare(data.view)
    batch = one_batch(data.prediction_dataset())
    assert batch.users.texts == ["space", "", ""]
    assert batch.users.users.tolist() == [0, 0, 0]
    with torch.no_grad():
        answer = module.eval().predict_step(batch, 0)
    assert answer["fallback"].tolist() == [False, True, True]
    assert answer["scores"][1].tolist() == [0.0, 1.0, 0.0], "clicks of training, whose newest part is validation"
