"""Rating prediction from end to end: the baselines against closed forms, and reviews as user text without a leak."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from lightning_rec.cli import main
from lightning_rec.data import EcommerceDataModule
from lightning_rec.data.readers import AmazonReviews

HERE = Path(__file__).parent
AMAZON = HERE / "data" / "files" / "amazon2018"
TOWERS = "lightning_rec.towers."
ALONE = {"max_history": 1, "windows": "all", "supervision": "last"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_REC_CACHE", str(tmp_path / "cache"))


def reviews(**options):
    datamodule = EcommerceDataModule(path=str(AMAZON), min_rating=0, **options)
    datamodule.setup()
    return datamodule


def fit_and_test(tmp_path, item, user, head=None, data=None, epochs=3, lr=0.01, **model):
    """Fits and tests by the command line; returns the figures of the test and the data module."""
    config = {
        "model": {
            "class_path": "lightning_rec.TwoTower",
            "init_args": {
                "item_tower": item,
                "user_tower": user,
                "objective": {"class_path": "lightning_rec.objectives.RatingHead", "init_args": head or {}},
                "metrics": [],
                "lr": lr,
                **model,
            },
        },
        "data": {
            "class_path": "lightning_rec.EcommerceDataModule",
            "init_args": {"path": str(AMAZON), "min_rating": 0, "batch_size": 64, **ALONE, **(data or {})},
        },
        "trainer": {
            "max_epochs": epochs,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "runs"),
        },
        "checkpoint": {"monitor": "val/rmse", "mode": "min"},
        "early_stopping": {"monitor": "val/rmse", "mode": "min", "patience": 100},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])
    tested = main(["test", "--config", str(path), "--ckpt_path", "last"])
    run = max((tmp_path / "runs").rglob("test_metrics.json"), key=lambda file: file.stat().st_mtime)
    result = json.loads(run.read_text())
    assert "Leave-one-out" in result["protocol"]
    return result["metrics"], tested.datamodule


def tower(name, **options):
    return {"class_path": TOWERS + name, "init_args": options}


def ratings_of(datamodule, part):
    """User rows, item rows and stars of a part, in order."""
    histories = datamodule.histories
    chosen = datamodule.split.in_part(histories, part)
    return histories.users_of_events()[chosen], histories.items[chosen], histories.ratings[chosen].astype(float)


def test_the_file_is_read_as_amazons_are():
    raw = AmazonReviews(str(AMAZON / "reviews.json"), str(AMAZON / "meta_reviews.json")).read()
    assert len(raw.interactions) == 458
    assert raw.report.n_duplicates == 1
    assert set(raw.interactions.column_names) == {"user_id", "item_id", "rating", "timestamp", "review"}
    assert len(raw.items) == 30
    datamodule = reviews()
    _, _, stars = ratings_of(datamodule, "train")
    assert datamodule.view.rating_mean == pytest.approx(stars.mean())
    assert datamodule.view.rating_range == (1.0, 5.0)
    assert (stars < 3).any(), "min_rating: 0 keeps the low stars of a shop as targets"


def test_the_global_mean_is_that_of_scikit_learn(tmp_path):
    found, datamodule = fit_and_test(
        tmp_path, tower("PopularityItemTower"), tower("ConstantUserTower"), {"dot": False}, epochs=1
    )
    mean = ratings_of(datamodule, "train")[2].mean()
    _, _, stars = ratings_of(datamodule, "test")
    guess = np.full(len(stars), mean)
    assert found["test/ratings"] == len(stars) == 40
    assert found["test/rmse"] == pytest.approx(root_mean_squared_error(stars, guess), rel=1e-5)
    assert found["test/mae"] == pytest.approx(mean_absolute_error(stars, guess), rel=1e-5)


def test_the_bias_model_is_that_of_alternating_least_squares(tmp_path):
    """Every rating but the first of each user is a target; batches of all of them make Adam's steps exact."""
    penalty = 4.0
    datamodule = reviews()
    n_users, n_items = len(datamodule.user_ids), len(datamodule.catalogue)
    users, items, stars = ratings_of(datamodule, "train")
    mean = stars.mean()
    later = np.append(False, users[1:] == users[:-1])
    u, i, y = users[later], items[later], stars[later] - mean
    user_bias, item_bias = np.zeros(n_users), np.zeros(n_items)
    for _ in range(300):
        item_bias = np.bincount(i, y - user_bias[u], n_items) / (penalty + np.bincount(i, minlength=n_items))
        user_bias = np.bincount(u, y - item_bias[i], n_users) / (penalty + np.bincount(u, minlength=n_users))
    users, items, stars = ratings_of(datamodule, "test")
    guess = np.clip(mean + user_bias[users] + item_bias[items], 1, 5)

    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.03, "weight_decay": 2 * penalty / len(y)}}
    found, _ = fit_and_test(
        tmp_path,
        tower("BiasItemTower"),
        tower("BiasUserTower"),
        data={"batch_size": 1000, "supervision": "every"},
        epochs=160,
        optimizer=adam,
        lr_scheduler={"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.97}},
    )
    assert found["test/rmse"] == pytest.approx(root_mean_squared_error(stars, guess), abs=2e-3)
    assert found["test/mae"] == pytest.approx(mean_absolute_error(stars, guess), abs=2e-3)


def test_reviews_and_item_text_say_the_stars(tmp_path, tiny_bert):
    """Users write what they look for and items say what they are; neither the mean nor a bias can know."""
    found, datamodule = fit_and_test(
        tmp_path,
        tower("BiasItemTower", content=tower("TextItemTower", language_model=tiny_bert, dim=8)),
        tower(
            "BiasUserTower",
            content=tower("LanguageUserTower", language_model=tiny_bert, max_tokens=40),
            ids=False,
        ),
        data={"user_template": "{reviews}", "user_titles": 3, "batch_size": 32},
        epochs=20,
        lr=0.02,
    )
    mean = ratings_of(datamodule, "train")[2].mean()
    _, _, stars = ratings_of(datamodule, "test")
    assert np.isfinite([found["test/rmse"], found["test/mae"]]).all()
    guess = np.full(len(stars), mean)
    assert found["test/rmse"] < 0.8 * root_mean_squared_error(stars, guess)
    assert found["test/mae"] < 0.8 * mean_absolute_error(stars, guess)

    def adam(lr, weight_decay):
        return {"class_path": "torch.optim.Adam", "init_args": {"lr": lr, "weight_decay": weight_decay}}

    biases, _ = fit_and_test(
        tmp_path, tower("BiasItemTower"), tower("BiasUserTower"), epochs=40, optimizer=adam(0.01, 1e-2)
    )
    factors, _ = fit_and_test(
        tmp_path, tower("BiasItemTower", factors=16), tower("BiasUserTower"), epochs=60, optimizer=adam(5e-3, 1e-4)
    )
    for name in ("test/rmse", "test/mae"):
        assert found[name] < 0.8 * biases[name], "biases of users and items know nothing of tastes"
        assert factors[name] < 0.8 * biases[name], "tastes are planted, so that factors find them too"


def marked():
    """Reviews that name their own item, so that a leak shows."""

    class Marked(AmazonReviews):
        def read(self):
            raw = super().read()
            names = [f"<{item}>" for item in raw.interactions["item_id"]]
            raw.interactions = raw.interactions.remove_columns("review").add_column("review", names)
            return raw

    return Marked(str(AMAZON / "reviews.json"), str(AMAZON / "meta_reviews.json"))


@pytest.mark.parametrize(
    "options",
    [
        {"supervision": "last", "windows": "all", "max_history": 1},
        {"supervision": "random"},
        {"supervision": "every", "windows": "all", "max_history": 4},
        {"supervision": "every", "candidates": "batch"},
    ],
)
def test_a_users_text_never_holds_the_review_of_its_target(options):
    datamodule = EcommerceDataModule(
        reader=marked(), min_rating=0, user_template="{reviews}", user_titles=99, cleaning=[], **options
    )
    datamodule.setup()
    ids = datamodule.catalogue.ids
    checked = 0
    for batch in datamodule.train_dataloader():
        # a tower that reads texts gives one vector a history, which is supervised by what followed all of it
        last = batch.targets.gather(1, (batch.users.lengths - 1)[:, None])[:, 0]
        for user, row, text in zip(batch.users.users, batch.items.rows[last], batch.users.texts, strict=True):
            assert f"<{ids[int(row)]}>" not in text
            held_out = datamodule.histories.items[datamodule.split.train_end[user] :][:2]
            assert not any(f"<{ids[int(other)]}>" in text for other in held_out)
            assert text
            checked += 1
    assert checked >= 40
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        for batch in loader:
            for row, text in zip(batch.targets[:, 0], batch.users.texts, strict=True):
                assert text
                assert f"<{ids[int(row)]}>" not in text


def test_the_mean_of_the_ratings_is_that_of_the_training_part_alone():
    datamodule = reviews()
    before = datamodule.view.rating_mean
    other = reviews()
    held_out = ~other.split.in_part(other.histories, "train")
    other.histories.ratings[held_out] = 1.0
    other.__dict__.pop("view", None)
    assert other.view.rating_mean == before
    assert torch.isfinite(torch.tensor(before))
