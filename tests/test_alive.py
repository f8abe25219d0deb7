"""What a run ranks and recommends is alive when the user asks."""

import numpy as np
import pytest
import torch
from lightning import Trainer

from lightning_rec import NewsDataModule, TwoTower
from lightning_rec.alive import alive_windows
from lightning_rec.data.batch import Batch, UserBatch
from lightning_rec.metrics import RankingMetrics
from lightning_rec.towers import ConstantUserTower, IdItemTower, PooledUserTower, RecencyPopularityItemTower

HOUR = 3600


def rows_of(path):
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


@pytest.fixture
def newsroom(request):
    return request.path.parent / "data" / "files" / "newsroom"


def births(folder):
    born = {}
    for _, item, time in rows_of(folder / "clicks.csv"):
        born[item] = min(int(time), born.get(item, 2**62))
    for item, *_, published in rows_of(folder / "news.csv"):
        born[item] = min(int(published or 2**62), born.get(item, 2**62))
    return born


def trainer(tmp_path):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, **options)


@pytest.mark.parametrize("hours", [40, 70])
def test_nothing_unborn_or_dead_is_recommended_whoever_asks(newsroom, tmp_path, hours):
    asked = min(int(row[2]) for row in rows_of(newsroom / "clicks.csv")) + hours * HOUR
    users = ["nobody", *(f"r{number}" for number in range(1, 9))]
    data = NewsDataModule(path=str(newsroom), max_age=12, request_time=asked, predict_users=users)
    module = TwoTower(IdItemTower(dim=4), PooledUserTower(), top_k=50)
    parts = trainer(tmp_path).predict(module, data)
    found = [{data.catalogue.ids[row] for row in rows.tolist() if row} for part in parts for rows in part["rows"]]
    fallback = torch.cat([part["fallback"] for part in parts])
    born = births(newsroom)
    living = {item for item, moment in born.items() if moment <= asked <= moment + 12 * HOUR}
    assert bool(fallback.any()), "popularity answers the unknown user, with living articles too"
    assert living
    assert set.union(*found) == living
    dead = {item for item, moment in born.items() if moment + 12 * HOUR < asked}
    assert dead
    assert not set.union(*found) & dead


def test_recency_popularity_is_measured_among_the_living(newsroom, tmp_path):
    """Test figures of the baseline, against a loop over the log."""
    data = NewsDataModule(path=str(newsroom), max_age=24, recency_half_life=6, validation_start=0.6, test_start=0.65)
    metrics = [RankingMetrics(ks=(5,), names=("hr", "ndcg"))]
    module = TwoTower(RecencyPopularityItemTower(), ConstantUserTower(), metrics=metrics)
    figures = trainer(tmp_path).test(module, data, verbose=False)[0]
    born = births(newsroom)
    clicks = sorted(
        ((int(time), place, user, item) for place, (user, item, time) in enumerate(rows_of(newsroom / "clicks.csv"))),
    )
    times = [time for time, *_ in clicks]
    first, second = times[int(0.6 * len(times))], times[int(0.65 * len(times))]
    newest = max(time for time in times if time < first)
    weight = dict.fromkeys(born, 0.0)
    for time, _, _, item in clicks:
        if time < first:
            weight[item] += 0.5 ** ((newest - time) / (6 * HOUR))
    hits, gains = [], []
    for user in {user for time, _, user, _ in clicks if time >= second}:
        seen = {item for time, _, other, item in clicks if other == user and time < second}
        wanted = [(time, item) for time, _, other, item in clicks if other == user and time >= second]
        if not any(other == user and time < second for time, _, other, _ in clicks):
            continue
        asked = wanted[0][0]
        candidates = {item for item, moment in born.items() if moment <= asked <= moment + 24 * HOUR} - seen
        targets = {item for _, item in wanted}
        found = targets & candidates
        # ties count against the model: what is not to be found comes first
        order = sorted(candidates, key=lambda item: (-weight[item], item in found))
        places = [order.index(item) + 1 for item in found]
        hits.append(any(place <= 5 for place in places))
        best = sum(1 / np.log2(1 + place) for place in range(1, min(5, len(targets)) + 1))
        gains.append(sum(1 / np.log2(1 + place) for place in places if place <= 5) / best)
    assert figures["test/users"] == len(hits)
    assert figures["test/hr@5"] == pytest.approx(np.mean(hits), abs=1e-6)
    assert figures["test/ndcg@5"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert 0 < np.mean(hits) < 1


def test_no_limit_without_lifetimes_or_times():
    empty = torch.zeros(2, 1, dtype=torch.int64)
    batch = Batch(UserBatch(empty, empty[:, 0], empty[:, 0]), times=torch.tensor([5, 6]))
    assert alive_windows(None, batch) is None
    assert alive_windows(object(), batch) is None
