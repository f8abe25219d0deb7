"""Advertisements: whole impressions, positions, what people wrote; one row a display."""

import pytest
import torch

from lightning_rec.data import AdsDataModule
from lightning_rec.data.collate import BatchIndex

FILES = "tests/data/files/ads"


@pytest.fixture
def ads(request):
    folder = request.config.rootpath / FILES

    def make(**options):
        data = AdsDataModule(path=str(folder), **({"batch_size": 8} | options))
        data.setup()
        return data

    return make


@pytest.fixture
def displays(request):
    """The file by plain string operations: impression -> rows."""
    lines = (request.config.rootpath / FILES / "displays.csv").read_text().splitlines()[1:]
    found = {}
    for line in lines:
        number, *row = line.split(",")
        found.setdefault(number, []).append(row)
    return found


def test_rows_of_one_display_are_one_impression(ads, displays):
    data = ads()
    log = data.impressions
    assert log.ids == list(displays)
    for number, rows in enumerate(displays.values()):
        part = slice(log.starts[number], log.starts[number + 1])
        assert [data.catalogue.ids[row] for row in log.candidates[part]] == [row[2] for row in rows]
        assert log.labels[part].tolist() == [int(row[3]) for row in rows]
        assert log.positions[part].tolist() == [int(row[4]) for row in rows]
        assert data.user_ids[log.users[number]] == rows[0][0]


def test_a_training_sample_is_a_whole_impression(ads):
    data = ads()
    assert data.candidates == "whole"
    dataset = data.train_dataset()
    batch = dataset[BatchIndex(torch.arange(len(dataset)).numpy(), (0,))]
    assert batch.impressions.sizes.unique().tolist() == [4]
    assert set(batch.impressions.labels.unique().tolist()) == {0.0, 1.0}
    assert batch.impressions.positions.unique().tolist() == [1, 2, 3, 4]


def test_text_and_groups_of_an_ad(ads):
    data = ads()
    assert data.catalogue.texts[1] == "Trail boots. Dry feet on long walks. Hillfoot. shoes"
    advertisers = data.catalogue.attribute("advertiser")
    groups = data.view.groups.tolist()
    for one in range(1, len(groups)):
        for two in range(1, len(groups)):
            assert (groups[one] == groups[two]) == (advertisers[one] == advertisers[two])


def test_the_history_is_the_clicks_of_earlier_displays(ads, displays):
    data = ads()
    clicks = {}
    rows = list(displays.values())
    for part in ("train", "validation", "test"):
        for number in data.numbers(part):
            user = rows[number][0][0]
            log = data.impressions
            history = log.history[log.history_starts[number] : log.history_ends[number]]
            assert [data.catalogue.ids[row] for row in history] == clicks.get(user, [])
            clicks.setdefault(user, []).extend(row[2] for row in rows[number] if row[3] == "1")


def test_feedback_is_known_only_later(ads, displays):
    data = ads(user_template="{profile}. {feedback}. {titles}")
    rows = list(displays.values())
    written = set()
    dataset = data.evaluation_dataset("test")
    batch = dataset[BatchIndex(torch.arange(len(dataset)).numpy(), (0,))]
    first = int(data.numbers("test")[0])
    for number in range(first):  # the displays stand in the order of time
        if any(row[5] for row in rows[number]):
            written.add(rows[number][0][0])
    texts = dict(
        zip(
            [data.user_ids[user] for user in data.impressions.users[data.numbers("test")]],
            batch.users.texts,
            strict=True,
        )
    )
    assert any("more of this" in text for text in texts.values())
    for user, text in texts.items():
        if user in written:
            assert "more of this" in text
    training = data.train_dataset()
    early = training[BatchIndex(torch.tensor([0]).numpy(), (0,))]
    assert "more of this" not in early.users.texts[0]


def test_clicks_with_position_bias_are_fitted(ads, tmp_path):
    from lightning import Trainer

    from lightning_rec import ImpressionTwoTower
    from lightning_rec.objectives import ClickBCE, Examination
    from lightning_rec.towers import IdItemTower, PooledUserTower

    objective = ClickBCE(examination=Examination(positions=4))
    model = ImpressionTwoTower(IdItemTower(dim=8), PooledUserTower(), objective=objective, lr=0.05)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    data = ads()
    trainer.fit(model, data)
    found = trainer.test(model, data, verbose=False)[0]
    assert 0 < found["test/log_loss"] < 2
    assert 0 <= found["test/calibration_error"] <= 1
    assert found["test/labelled"] == 4 * found["test/impressions"] + 4 * found["test/impressions_skipped"]
