"""The table of examples shows what users touched and what they would be recommended, by title."""

from pathlib import Path

import numpy as np
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_rec import EcommerceDataModule, ImpressionPopularity, NewsImpressionDataModule, TwoTower
from lightning_rec.callbacks import ExampleTable
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.readers import Files
from lightning_rec.towers import ConstantUserTower, IdItemTower, PopularityItemTower, SequenceUserTower

SHOP = Path(__file__).parents[1] / "data" / "files" / "shop"


def attached(item_tower, user_tower):
    data = EcommerceDataModule(Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")), min_rating=0)
    data.setup()
    module = TwoTower(item_tower, user_tower)
    module.build(data.view)
    return data, module


def test_rows_hold_ids_and_titles():
    data, module = attached(PopularityItemTower(), ConstantUserTower())
    rows = ExampleTable(users=4, titles=3).rows(data, module)
    assert len(rows) == 4
    items = dict(line.split(",")[:2] for line in (SHOP / "items.csv").read_text().splitlines()[1:])
    titles = set(items.values())
    by_count = sorted(range(1, len(data.catalogue.ids)), key=lambda row: -data.train_counts[row])
    for user, history, recommended, target in rows:
        assert user in data.user_ids
        assert 1 <= len(history.split("; ")) <= 3
        assert set(history.split("; ")) | set(recommended.split("; ")) | {target} <= titles
        assert len(recommended.split("; ")) == 3
        row = data.user_ids.index(user)
        seen = set(data.histories.items[data.histories.indptr[row] : data.histories.indptr[row + 1] - 2].tolist())
        best = [data.train_counts[item] for item in by_count if item not in seen][:3]
        names = {data.catalogue.display(item): data.train_counts[item] for item in by_count}
        assert [names[title] for title in recommended.split("; ")] == best, "the most popular that was not touched"


def test_more_users_than_there_are():
    data, module = attached(IdItemTower(4), SequenceUserTower(blocks=1, heads=1))
    module.train()
    rows = ExampleTable(users=1000, titles=2).rows(data, module)
    assert len(rows) == 40
    assert len({row[0] for row in rows}) == 40
    assert module.training, "as it was"
    assert module._catalogue is None, "the next validation encodes anew"


def test_impressions_show_the_best_candidates_and_what_was_clicked():
    data = NewsImpressionDataModule(path=str(SHOP.parent / "mind"))
    data.setup()
    module = ImpressionPopularity("recent")
    module.build(data.view)
    rows = ExampleTable(users=1000, titles=3).rows(data, module)
    dataset = data.evaluation_dataset("validation")
    batch = dataset[BatchIndex(np.arange(len(dataset)), (0,))]
    shown, display = batch.impressions, data.catalogue.display
    assert len(rows) == len(dataset) > 10
    for number, (user, _, recommended, clicked) in enumerate(rows):
        size = int(shown.sizes[number])
        candidates, labels = shown.candidates[number, :size].tolist(), shown.labels[number, :size].tolist()
        best = sorted(range(size), key=lambda place: -float(shown.popularity[number, place]))[:3]
        assert user == data.user_ids[data.impressions.users[dataset.numbers[number]]]
        assert recommended == "; ".join(display(candidates[place]) for place in best)
        assert clicked == "; ".join(display(row) for row, label in zip(candidates, labels, strict=True) if label == 1)


def test_other_loggers_are_left_alone(tmp_path):
    seed_everything(0, verbose=False)
    data = EcommerceDataModule(Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")), min_rating=0)
    table = ExampleTable()
    table.rows = lambda *_: 1 / 0
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[table],
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(TwoTower(IdItemTower(4), SequenceUserTower(blocks=1, heads=1)), data)
    assert torch.isfinite(trainer.callback_metrics["val/ndcg@10"])
