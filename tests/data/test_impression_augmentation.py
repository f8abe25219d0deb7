"""Augmentation of training impressions: histories and texts are changed, what was shown and clicked never is."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from datasets import Dataset
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rec import ImpressionDataModule, ImpressionTwoTower, NewsDataModule, NewsImpressionDataModule, TwoTower
from lightning_rec.cli import main
from lightning_rec.data.augment_history import HistoryAugmentation
from lightning_rec.data.augment_text import TextAugmentation
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.readers import ImpressionReader, RawImpressions
from lightning_rec.towers import IdItemTower, NewsItemTower, PooledUserTower, SequenceUserTower, TextItemTower
from lightning_rec.towers.news import WordOptions

FILES = Path(__file__).parent / "files"
N, WIDEST = 120, 9


class Log(ImpressionReader):
    """Impressions whose histories hold every event once, in the order of the items' numbers; some have none."""

    def read(self):
        rng = np.random.default_rng(0)
        sizes = rng.integers(2, 6, N)
        lengths = np.arange(N) % (WIDEST + 1)
        firsts = rng.integers(0, 30, N)
        table = {
            "user_id": [f"u{user}" for user in rng.integers(0, 9, N)],
            "timestamp": np.arange(N) * 900 + 1_600_000_000,
            "candidates": [[f"i{item}" for item in rng.integers(0, 50, size)] for size in sizes],
            "labels": [(rng.random(size) < 0.4).astype(int).tolist() for size in sizes],
            "history": [
                [f"i{item}" for item in range(first, first + n)] for first, n in zip(firsts, lengths, strict=True)
            ],
        }
        items = {"item_id": [f"i{item}" for item in range(50)], "title": [f"t{item}" for item in range(50)]}
        return RawImpressions(Dataset.from_dict(table), Dataset.from_dict(items))


def made(augmentation=None, **options):
    data = ImpressionDataModule(
        Log(), history_augmentation=augmentation, **({"batch_size": 8, "negatives": 2} | options)
    )
    data.setup()
    return data


def step(dataset, epoch=0, chosen=None, number=0):
    chosen = np.arange(len(dataset)) if chosen is None else np.asarray(chosen)
    batch = dataset[BatchIndex(chosen, (7, epoch, number, 0))]
    return batch, batch.items.rows[batch.users.history]


def events(rows, lengths):
    """The histories as lists of catalogue rows, after a look at their padding."""
    steps = np.arange(rows.shape[1])
    assert not rows[steps >= lengths.numpy()[:, None]].any()
    return [row[:length].tolist() for row, length in zip(rows, lengths.tolist(), strict=True)]


ALL = {"crop": 0.7, "mask": 0.7, "reorder": 0.7, "reorder_ratio": 0.8}


@pytest.mark.parametrize("options", [{}, {"candidates": "whole", "max_candidates": 3}], ids=["sampled", "whole"])
def test_what_was_shown_and_clicked_is_untouched(options):
    plain, changed = (made(how, **options).train_dataset() for how in (None, HistoryAugmentation(**ALL)))
    different = 0
    for epoch in range(3):
        (one, before), (other, after) = step(plain, epoch), step(changed, epoch)
        assert one.items.rows[one.impressions.candidates].equal(other.items.rows[other.impressions.candidates])
        for name in ("sizes", "labels", "weights", "ages", "popularity", "times"):
            left, right = getattr(one.impressions, name), getattr(other.impressions, name)
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        assert one.log_q.equal(other.log_q)
        assert one.n_candidates == other.n_candidates
        assert one.users.users.equal(other.users.users)
        assert one.index.equal(other.index)
        different += sum(
            a != b for a, b in zip(events(before, one.users.lengths), events(after, other.users.lengths), strict=True)
        )
    assert different > len(plain)


def test_a_crop_keeps_the_newest_events():
    plain, cropped = (made(how).train_dataset() for how in (None, HistoryAugmentation(crop=1.0, crop_ratio=0.5)))
    (one, before), (other, after) = step(plain), step(cropped)
    whole = events(before, one.users.lengths)
    assert [] in whole
    for found, past in zip(events(after, other.users.lengths), whole, strict=True):
        assert found == past[len(past) - max(len(past) // 2, min(len(past), 1)) :]


def test_masked_events_leave_their_places_and_reordered_ones_stay_in_a_stretch():
    masks, orders = HistoryAugmentation(mask=1.0, mask_ratio=0.4), HistoryAugmentation(reorder=1.0, reorder_ratio=0.5)
    plain, masked, moved = (made(how).train_dataset() for how in (None, masks, orders))
    one, before = step(plain)
    other, after = step(masked)
    assert other.users.lengths.equal(one.users.lengths)
    for found, past in zip(events(after, other.users.lengths), events(before, one.users.lengths), strict=True):
        assert found.count(0) == int(len(past) * 0.4)
        assert all(event in (0, real) for event, real in zip(found, past, strict=True))
    other, after = step(moved)
    shuffled = 0
    for found, past in zip(events(after, other.users.lengths), events(before, one.users.lengths), strict=True):
        assert sorted(found) == sorted(past)
        places = [place for place, (event, real) in enumerate(zip(found, past, strict=True)) if event != real]
        assert not places or places[-1] - places[0] < int(len(past) * 0.5)
        shuffled += bool(places)
    assert shuffled > 20


def test_the_draws_depend_on_seed_epoch_and_sample_alone():
    changed = made(HistoryAugmentation(**ALL)).train_dataset()
    long = np.flatnonzero(changed.sort_key == WIDEST)

    def drawn(epoch, chosen, number):
        batch, rows = step(changed, epoch, chosen, number)
        return events(rows, batch.users.lengths)

    assert drawn(2, long[:1], 5)[0] == drawn(2, long, 0)[0], "the others of its batch and its place do not matter"
    epochs = [str(drawn(epoch, long, 0)) for epoch in range(4)]
    assert len(set(epochs)) == 4
    assert str(drawn(0, long, 0)) == epochs[0]


def test_workers_and_a_loader_that_goes_on_see_the_same():
    augmentation = HistoryAugmentation(**ALL)
    wanted = list(made(augmentation).train_dataloader())
    workers = made(augmentation, num_workers=2).train_dataloader()
    workers.load_state_dict({"epoch": 0, "batches": 2})
    rest = list(workers)
    assert len(rest) == len(wanted) - 2 > 0
    for one, other in zip(wanted[2:], rest, strict=True):
        assert one.items.rows.equal(other.items.rows)
        assert one.users.history.equal(other.users.history)
        assert one.users.lengths.equal(other.users.lengths)


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader", "predict_dataloader"])
def test_evaluation_is_never_changed(loader):
    plain, changed = (
        made(),
        made(HistoryAugmentation(crop=1, mask=1, reorder=1), text_augmentation=TextAugmentation(1.0)),
    )
    for one, other in zip(getattr(plain, loader)(), getattr(changed, loader)(), strict=True):
        assert one.users.history.equal(other.users.history)
        assert one.users.lengths.equal(other.users.lengths)
        assert one.impressions.candidates.equal(other.impressions.candidates)
        assert other.items is None


def test_what_is_hidden_of_a_history_is_no_negative_of_its_user():
    """Negatives of others' clicks leave out what the user has read, whether or not the tower is shown it."""
    plain, changed = (made(how).train_dataset() for how in (None, HistoryAugmentation(crop=1.0, mask=1.0)))
    module = ImpressionTwoTower(IdItemTower(4), PooledUserTower(), in_batch_negatives=True)
    data = made()
    module.build(data.view)
    outs = []
    for dataset in (plain, changed):
        batch, _ = step(dataset)
        outs.append(module._own(batch)[:, 1 : batch.n_candidates + 1])
    assert outs[0].equal(outs[1])


def fit(folder, ckpt_path=None):
    seed_everything(3, verbose=False)
    data = NewsImpressionDataModule(
        path=str(FILES / "mind"),
        batch_size=12,
        history_augmentation=HistoryAugmentation(crop=0.5, mask=0.5, reorder=0.5),
        text_augmentation=TextAugmentation(probability=1.0, delete=0.3),
    )
    tower = NewsItemTower(dim=8, words=WordOptions(dim=4, heads=1, head_dim=4, hidden=4), hidden=4)
    module = ImpressionTwoTower(tower, SequenceUserTower(blocks=1, heads=1), lr=0.01, in_batch_negatives=True)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        max_epochs=2,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.num_training_batches > 2
    return module, trainer.num_training_batches


def test_a_resumed_run_sees_the_same(tmp_path):
    whole, steps = fit(tmp_path)
    resumed, _ = fit(tmp_path, ckpt_path=tmp_path / f"step={steps + 1}.ckpt")  # in the middle of an epoch
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# ---------------------------------------------------------------------- texts


LORA = {"peft": peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)}
STRONG = TextAugmentation(probability=1, delete=0.5, swap=0.5)


def news(fields=(), **options):
    data = NewsImpressionDataModule(path=str(FILES / "mind"), **({"text_augmentation": STRONG} | options))
    data.setup()
    data.variant_fields = fields
    return data


def without_dropout(tower):
    for layer in tower.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)
        if hasattr(layer, "options"):
            layer.options.dropout = 0.0
    return tower


@pytest.mark.parametrize("kind", ["lora", "full", "words"])
def test_a_news_tower_reads_variants_of_each_of_its_fields(kind, tiny_bert):
    options = {
        "lora": {"language_model": tiny_bert, **LORA},
        "full": {"language_model": tiny_bert, "tune": "full"},
        "words": {"words": WordOptions(dim=6, heads=2, head_dim=4, hidden=3, dropout=0.0)},
    }[kind]
    tower = NewsItemTower(dim=8, category_dim=4, entity_dim=3, hidden=5, **options)
    assert tower.reads_variants
    data = news(tower.text_fields)
    tower.configure(data.view)
    tower.prepare(data.view)
    for view in tower.name_views:
        torch.nn.init.normal_(view.table.vectors[1:])
    dataset = data.train_dataset()
    batch, again, other = (dataset[BatchIndex(np.arange(9), (0, 0, number, 0))] for number in (1, 1, 2))
    assert set(batch.items.fields) == {"title", "abstract"}
    assert batch.items.texts is None
    assert batch.items.fields == again.items.fields
    rows = batch.items.rows.tolist()
    same = sorted(set(rows) & set(other.items.rows.tolist()))
    for name in ("title", "abstract"):
        real, found = [data.view.fields[name][row] for row in rows], batch.items.fields[name]
        for text, variant in zip(real, found, strict=True):
            words = [word.strip('.,:?"').lower() for word in text.split()]
            assert all(word.strip('.,:?"').lower() in words for word in variant.split() if word.strip('.,:?"'))
        assert found != real
        others = dict(zip(other.items.rows.tolist(), other.items.fields[name], strict=True))
        first = dict(zip(rows, found, strict=True))
        assert [first[row] for row in same] != [others[row] for row in same], "each step draws anew"
    fields = {name: [data.view.fields[name][row] for row in rows] for name in tower.fields}
    tower.eval()
    plain = tower(batch.items)
    torch.testing.assert_close(plain, tower.encode_items(fields), atol=1e-5, rtol=1e-4)
    without_dropout(tower).train()
    found = tower(batch.items)
    torch.testing.assert_close(found, tower.encode_items(fields | batch.items.fields), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, plain)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.text.parameters() if p.requires_grad)


def test_a_news_tower_without_fields_reads_variants_of_the_whole_texts():
    data = news(("headline",))
    tower = NewsItemTower(
        title="headline", abstract=None, categories=None, entities=None, dim=4, words=WordOptions(dim=4, encoder="mean")
    )
    tower.configure(data.view)
    tower.prepare(data.view)
    batch = data.train_dataset()[BatchIndex(np.arange(6), (0, 0, 0, 0))]
    assert batch.items.fields is None
    without_dropout(tower).train()
    torch.testing.assert_close(tower(batch.items), tower.encode_texts(batch.items.texts))


def test_a_text_tower_reads_variants_of_the_whole_texts(tiny_bert):
    data = news()
    tower = TextItemTower(tiny_bert, dim=8, init_std=None, **LORA)
    module = ImpressionTwoTower(tower, PooledUserTower())
    module.check_data(data)
    module.build(data.view)
    tower.prepare(data.view)
    batch = data.train_dataset()[BatchIndex(np.arange(6), (0, 0, 0, 0))]
    without_dropout(tower).train()
    torch.testing.assert_close(tower(batch.items), tower.encode_texts(batch.items.texts))


def test_towers_that_cannot_read_variants_refuse(tiny_bert):
    frozen = (NewsItemTower(tiny_bert), NewsItemTower(title=None, abstract=None, tune="full"), TextItemTower(tiny_bert))
    for tower in (*frozen, IdItemTower(8)):
        module = ImpressionTwoTower(tower, PooledUserTower())
        with pytest.raises(ValueError, match=r"does not read them in training: .* and for NewsItemTower with words"):
            module.check_data(news())
        module.check_data(news(text_augmentation=TextAugmentation(texts="users"), user_template="{titles}"))


def test_users_texts_are_changed_in_training():
    plain, changed = (
        news(text_augmentation=TextAugmentation(probability=p, delete=0.5, texts="users"), user_template="{titles}")
        for p in (0, 1)
    )
    index = BatchIndex(np.arange(12), (0, 0, 0, 0))
    one, other = plain.train_dataset()[index], changed.train_dataset()[index]
    assert one.users.texts != other.users.texts
    assert other.items.texts is other.items.fields is None
    for left, right in zip(plain.val_dataloader(), changed.val_dataloader(), strict=True):
        assert left.users.texts == right.users.texts
    with pytest.raises(ValueError, match=r"text_augmentation\.texts is both, but users have no texts"):
        news(text_augmentation=TextAugmentation(texts="both")).train_dataset()


def test_objects_given_from_python_are_no_hyperparameters():
    assert "text_augmentation" not in news().hparams
    assert news().hparams["negatives"] == 4


def spied(monkeypatch):
    """The item batches that news towers read in training."""
    seen, inner = [], NewsItemTower.forward
    monkeypatch.setattr(
        NewsItemTower,
        "forward",
        lambda self, items: (seen.append(items) if self.training else None) or inner(self, items),
    )
    return seen


def test_both_by_the_command_line(tmp_path, monkeypatch, tiny_bert, capsys):
    (tmp_path / "table.tsv").write_text("game\tcontest\nsong\ttune\n")
    texts = {"probability": 1.0, "replace": 1.0, "table": str(tmp_path / "table.tsv")}
    tower = {
        "class_path": "lightning_rec.towers.NewsItemTower",
        "init_args": {
            "language_model": tiny_bert,
            "dim": 8,
            "peft": {"class_path": "peft.LoraConfig", "init_args": {"r": 2}},
        },
    }
    user_tower = {"class_path": "lightning_rec.towers.NRMSUserTower", "init_args": {"heads": 2}}
    config = {
        "model": {
            "class_path": "lightning_rec.ImpressionTwoTower",
            "init_args": {"item_tower": tower, "user_tower": user_tower},
        },
        "data": {
            "class_path": "lightning_rec.NewsImpressionDataModule",
            "init_args": {"path": str(FILES / "mind"), "text_augmentation": texts, "batch_size": 16},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    overlay = Path(__file__).parents[2] / "configs" / "overlay" / "history_augmentation.yaml"
    seen = spied(monkeypatch)
    stacked = ["--config", str(tmp_path / "c.yaml"), "--config", str(overlay)]
    fitted = main(["fit", *stacked, "--trainer.default_root_dir", str(tmp_path / "run")])
    assert fitted.datamodule.history_augmentation.reorder == 0.2
    titles = [title for items in seen for title in items.fields["title"]]
    assert any("contest" in title for title in titles)
    assert any("tune" in title for title in titles)
    path = next(tmp_path.rglob("last.ckpt"))
    kept = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    assert kept["history_augmentation"]["crop"] == 0.2
    assert kept["text_augmentation"]["table"] == str(tmp_path / "table.tsv")
    main(["validate", "--ckpt_path", str(path)])
    figures = json.loads(next(tmp_path.rglob("validate_metrics.json")).read_text())["metrics"]
    assert 0 <= figures["val/auc"] <= 1
    del tower["init_args"]["peft"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["fit", *stacked])
    assert "NewsItemTower does not read them in training" in " ".join(capsys.readouterr().err.split())


def test_a_news_tower_over_interactions_reads_variants_too(tmp_path, monkeypatch):
    data = NewsDataModule(path=str(FILES / "newsroom"), max_age="all", candidates="batch", text_augmentation=STRONG)
    words = WordOptions(dim=4, encoder="mean")
    tower = NewsItemTower(abstract=None, categories=None, entities=None, dim=4, words=words)
    seen = spied(monkeypatch)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 1}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(TwoTower(tower, PooledUserTower()), data)
    assert seen
    assert all(set(items.fields) == {"title"} for items in seen)
