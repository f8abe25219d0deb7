"""Impressions through two towers: losses and scores against plain loops, resume, figures, predictions."""

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_rec import EcommerceDataModule, NewsImpressionDataModule, TwoTower
from lightning_rec.data import Batch, CatalogueView, ImpressionBatch, ItemBatch, UserBatch
from lightning_rec.data.readers import Files
from lightning_rec.impression import ImpressionTwoTower
from lightning_rec.impression_baselines import ImpressionPopularity, drawn
from lightning_rec.towers import CandidateAwareUserTower, IdItemTower, PooledUserTower, SequenceUserTower
from lightning_rec.towers.age import AgeBias
from lightning_rec.towers.score import Cosine

SHOP = Path(__file__).parent / "data" / "files" / "shop"
N_ROWS, CANDIDATES, HISTORY = 40, 7, 6
NAN = float("nan")


class Nearest(CandidateAwareUserTower):
    """A weighted mean of the history, by how near each article is to the candidate."""

    def attend(self, users, items, candidates):
        history = items[users.history]
        near = (candidates @ history.transpose(1, 2)).masked_fill(~users.mask[:, None], -1e9)
        return (near.softmax(-1) @ history) * (users.lengths > 0)[:, None, None]


def view(**options):
    counts = torch.arange(N_ROWS) % 11
    return CatalogueView(n_rows=N_ROWS, n_users=5, counts=counts, digest="d", ids_digest="i", **options)


def impressions(seed, size, in_table=False, labelled=True):
    """A batch by hand: catalogue rows, or positions in the table of a training step."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, N_ROWS, (size, CANDIDATES), generator=draw)
    sizes = torch.randint(1, CANDIDATES + 1, (size,), generator=draw)
    lengths = torch.randint(0, HISTORY + 1, (size,), generator=draw)
    history = torch.randint(1, N_ROWS, (size, HISTORY), generator=draw)
    shown, read = torch.arange(CANDIDATES) < sizes[:, None], torch.arange(HISTORY) < lengths[:, None]
    labels = torch.randint(0, 2, rows.shape, generator=draw).float().masked_fill(~shown, NAN)
    ages = (100 * torch.rand(rows.shape, generator=draw)).masked_fill(~shown, NAN)
    rows, history = rows * shown, history * read
    popularity = torch.rand(rows.shape, generator=draw) * shown
    items, n_candidates, log_q = None, 0, None
    if in_table:
        candidates = rows[rows > 0].unique()
        rest = history[(history > 0) & ~torch.isin(history, candidates)].unique()
        items = ItemBatch(torch.cat([torch.zeros(1, dtype=torch.int64), candidates, rest]))
        place = torch.zeros(N_ROWS, dtype=torch.int64)
        place[items.rows] = torch.arange(len(items))
        rows, history, n_candidates = place[rows], place[history], len(candidates)
        log_q = -torch.rand(n_candidates, generator=draw)
    return Batch(
        users=UserBatch(history, lengths, torch.zeros(size, dtype=torch.int64)),
        items=items,
        n_candidates=n_candidates,
        log_q=log_q,
        known=torch.randint(0, N_ROWS, (size, 3), generator=draw) if in_table else None,
        index=torch.arange(size),
        impressions=ImpressionBatch(rows, sizes, labels if labelled else None, ages=ages, popularity=popularity),
    )


def built(user_tower=None, **options):
    torch.manual_seed(0)
    tower = PooledUserTower("mean") if user_tower is None else user_tower
    module = ImpressionTwoTower(IdItemTower(8, init_std=1.0), tower, **options)
    module.build(view())
    for name, parameter in module.named_parameters():
        if "bias" in name:
            parameter.data.normal_()
    return module.double()


TOWERS = {
    "pooled": lambda: PooledUserTower("mean"),
    "causal": lambda: SequenceUserTower(blocks=1, heads=2, dropout=0.0, max_length=HISTORY),
    "candidate aware": lambda: Nearest(),
}


def score_by_hand(module, vectors, history, candidate, age=NAN):
    """The score of one candidate for one user: ``vectors`` by row or place."""
    history = torch.tensor(history, dtype=torch.int64)
    users = UserBatch(
        history[None] if len(history) else torch.zeros(1, 1, dtype=torch.int64),
        torch.tensor([len(history)]),
        torch.zeros(1, dtype=torch.int64),
    )
    if isinstance(module.user_tower, CandidateAwareUserTower):
        interest = module.user_tower.attend(users, vectors, vectors[candidate][None, None])[0, 0]
    else:
        interest = module.user_tower(users, vectors)[0, -1]
    score = module.score.interest(interest) @ module.score.items(vectors[candidate][None])[0]
    return score + (module.age(torch.tensor(age)) if module.age is not None else 0)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("in_batch", "timed"),
    [(False, True), (True, False), (True, True)],
    ids=["own candidates", "in-batch negatives", "those that were there already"],
)
@pytest.mark.parametrize("tower", TOWERS)
def test_the_loss_against_a_loop(tower, in_batch, timed):
    module = built(TOWERS[tower](), in_batch_negatives=in_batch, age=AgeBias(4))
    batch = impressions(3, 12, in_table=True)
    shown, users, rows = batch.impressions, batch.users, batch.items.rows
    times = 1_573_000_000 + 36_000 * torch.arange(12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    if timed:
        shown.times = times
    vectors = module.item_tower(batch.items)
    clicked, born = {}, {}  # place: the least age at which it was clicked, and the earliest publication
    for i in range(len(users)):
        for place, label, age in zip(
            shown.candidates[i].tolist(), shown.labels[i], shown.ages[i].tolist(), strict=True
        ):
            if label == 1:
                clicked[place] = min(age, clicked.get(place, math.inf))
                born[place] = min(int(times[i]) - 3600 * age, born.get(place, math.inf))
    losses, excluded, unborn = [], 0, 0
    for i in range(len(users)):
        history = users.history[i, : users.lengths[i]].tolist()
        own = [(int(shown.candidates[i, j]), float(shown.labels[i, j])) for j in range(int(shown.sizes[i]))]
        scores = [
            score_by_hand(module, vectors, history, place, float(shown.ages[i, j])) for j, (place, _) in enumerate(own)
        ]
        negatives = [score for score, (_, label) in zip(scores, own, strict=True) if label == 0]
        if in_batch:
            mine = {place for place, _ in own} | set(history)
            known = set(batch.known[i].tolist())
            for place, age in clicked.items():
                if place in mine or int(rows[place]) in known:
                    excluded += 1
                    continue
                if timed and born[place] > int(times[i]) + 60:
                    unborn += 1
                    continue
                correction = batch.log_q[place - 1] - batch.log_q[[other - 1 for other in clicked]].mean()
                negatives.append(score_by_hand(module, vectors, history, place, age) - correction)
        for score, (_, label) in zip(scores, own, strict=True):
            if label == 1 and negatives:
                losses.append(torch.stack([score, *negatives]).logsumexp(0) - score)
    assert len(losses) > 10
    assert excluded > 0 or not in_batch
    assert (unborn > 0) == (in_batch and timed)
    assert module.loss(batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_what_a_tower_wants_added_to_the_loss(monkeypatch):
    module = built()
    batch = impressions(3, 5, in_table=True)
    plain = module.loss(batch)
    monkeypatch.setattr(module.item_tower, "auxiliary_loss", lambda: torch.tensor(0.5))
    monkeypatch.setattr(module.user_tower, "auxiliary_loss", lambda: torch.tensor(0.25))
    torch.testing.assert_close(module.loss(batch), plain + 0.75)


def test_a_step_without_clicks_has_no_in_batch_negatives():
    module = built(in_batch_negatives=True)
    batch = impressions(0, 4, in_table=True)
    batch.impressions.labels = torch.where(batch.impressions.labels == 1, 0.0, batch.impressions.labels)
    loss = module.loss(batch)
    loss.backward()
    assert loss.item() == 0


def test_scores_are_float32_under_bfloat16():
    module = built(score=Cosine(), in_batch_negatives=True, age=AgeBias()).float()
    kinds = []
    inner = module.objective.forward
    module.objective.forward = lambda scores, labels, **rest: (
        kinds.append((scores.dtype, rest["extra"].dtype)) or inner(scores, labels, **rest)
    )
    batch = impressions(1, 6, in_table=True)
    exact = module.loss(batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module.loss(batch).item()
    assert kinds == [(torch.float32, torch.float32)] * 2
    assert rounded == pytest.approx(exact, rel=0.02)


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("tower", TOWERS)
def test_scores_against_a_loop_that_encodes_each_impression_by_itself(tower):
    module = built(TOWERS[tower](), score=Cosine(), age=AgeBias(4)).float().eval()
    batch = impressions(5, 20, labelled=False)
    found = module.predict_step(batch, 0)
    shown, users = batch.impressions, batch.users
    for i in range(len(users)):
        history = users.history[i, : users.lengths[i]].tolist()
        for j in range(int(shown.sizes[i])):
            candidate = int(shown.candidates[i, j])
            table = torch.tensor(sorted({0, candidate, *history}))
            vectors = module.item_tower(ItemBatch(table))
            place = {row: number for number, row in enumerate(table.tolist())}
            expected = score_by_hand(
                module, vectors, [place[row] for row in history], place[candidate], float(shown.ages[i, j])
            )
            if not history:
                expected = module.train_counts[candidate].float()
            assert found["scores"][i, j].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    assert found["fallback"].tolist() == (users.lengths == 0).tolist()
    assert found["fallback"].any()


def test_each_article_is_encoded_once():
    module = built().float()
    seen = []
    inner = module.item_tower.forward
    module.item_tower.forward = lambda items: seen.append(len(items)) or inner(items)
    for seed in range(3):
        module.predict_step(impressions(seed, 5), 0)
    assert seen == [N_ROWS]


def test_many_pairs_are_scored_in_parts(monkeypatch):
    module, batch = built().float(), impressions(2, 11)
    whole = module.predict_step(batch, 0)["scores"]
    monkeypatch.setattr("lightning_rec.impression.PAIRS", 130)
    assert torch.equal(module.predict_step(batch, 0)["scores"], whole)


# ---------------------------------------------------------------------- runs


class Handmade(LightningDataModule):
    """Batches by hand."""

    protocol = "Invented."
    asked_impressions: ClassVar = [str(number) for number in range(6)]

    def __init__(self):
        super().__init__()
        self.view = view(groups=torch.arange(N_ROWS) % 3)

    def train_dataloader(self):
        return DataLoader([impressions(seed, 6, in_table=True) for seed in range(4)], batch_size=None)

    def val_dataloader(self):
        return DataLoader([impressions(seed, 6) for seed in (10, 11)], batch_size=None)

    test_dataloader = val_dataloader

    def predict_dataloader(self):
        return DataLoader([impressions(10, 6, labelled=False)], batch_size=None)


def trainer(folder, **options):
    seed_everything(0, verbose=False)
    chosen = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return Trainer(**(chosen | options))


def fresh(**options):
    return ImpressionTwoTower(IdItemTower(8, init_std=1.0), PooledUserTower("mean"), lr=0.05, **options)


def test_figures_of_a_fit(tmp_path):
    run = trainer(tmp_path)
    run.fit(fresh(), Handmade())
    figures = run.callback_metrics
    assert {"val/auc", "val/mrr", "val/ndcg@5", "val/ndcg@10", "train/loss"} <= set(figures)
    assert "val/log_loss" not in figures, "a softmax gives no probabilities"
    histories = [int(length) for batch in Handmade().val_dataloader() for length in batch.users.lengths]
    assert figures["val/popularity_share"].item() == pytest.approx(histories.count(0) / len(histories))


def test_validation_leaves_no_sums_behind(tmp_path):
    module = fresh()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, Handmade())
    assert module.val_fallback.impressions == 0
    again = trainer(tmp_path).validate(module, Handmade(), verbose=False)[0]
    assert {name: value for name, value in again.items() if "auc" in name or "ndcg" in name} == pytest.approx(
        {name: run.callback_metrics[name].item() for name in again if "auc" in name or "ndcg" in name}
    )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    module = fresh()
    module.objective.forward = lambda scores, labels, **rest: scores.sum() * torch.inf
    with pytest.raises(FloatingPointError, match=r"at step 0 \(epoch 0, batch 0\)"):
        trainer(tmp_path).fit(module, Handmade())


def test_a_test_without_labels_says_so(tmp_path):
    data = Handmade()
    data.test_dataloader = data.predict_dataloader
    with pytest.raises(ValueError, match="no labels"):
        trainer(tmp_path).test(fresh(), data, verbose=False)


def test_a_checkpoint_answers_as_the_run_did(tmp_path):
    module = fresh(age=AgeBias(3))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, Handmade())
    run.save_checkpoint(tmp_path / "a.ckpt")
    expected = trainer(tmp_path).test(module, Handmade(), verbose=False)[0]
    assert module.age.bias.abs().sum() > 0
    other = fresh(age=AgeBias(3))
    found = trainer(tmp_path).test(
        other, Handmade(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False, weights_only=True
    )[0]
    assert found == pytest.approx(expected, nan_ok=True)
    with pytest.raises(RuntimeError, match=r"The model has no age\.bias"):
        trainer(tmp_path).test(fresh(), Handmade(), ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True)


class Losses(Callback):
    """Keeps the loss of every batch."""

    def __init__(self):
        self.found = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found[trainer.fit_loop.epoch_loop.total_batch_idx] = float(outputs["loss"])


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(tmp_path):
    def run(folder, ckpt_path=None, every_n=None):
        losses = Losses()
        saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every_n)
        fit = trainer(folder, max_epochs=2, callbacks=[losses, saver], enable_checkpointing=True)
        data = NewsImpressionDataModule(path=str(SHOP.parent / "mind"), negatives=2, batch_size=16)
        module = ImpressionTwoTower(
            IdItemTower(8),
            SequenceUserTower(blocks=1, heads=1, dropout=0.3),
            lr=0.01,
            in_batch_negatives=True,
            age=AgeBias(4),
        )
        fit.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return losses.found, module, fit.num_training_batches

    whole, module, steps = run(tmp_path / "whole", every_n=1)
    assert steps >= 3
    for stop in (2, steps, steps + 1):
        resumed, other, _ = run(tmp_path / str(stop), str(tmp_path / "whole" / f"step={stop}.ckpt"))
        assert resumed == {step: loss for step, loss in whole.items() if step >= stop}
        for (name, left), right in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(left, right), name


# ---------------------------------------------------------------------- what does not go together


def test_each_module_names_the_data_that_it_needs(tmp_path):
    reader = Files(str(SHOP / "interactions.csv"))
    with pytest.raises(ValueError, match=r"EcommerceDataModule serves interactions.*lightning_rec\.TwoTower"):
        trainer(tmp_path).fit(fresh(), EcommerceDataModule(reader, min_rating=0))
    impressions = NewsImpressionDataModule(path=str(SHOP.parent / "mind"))
    with pytest.raises(ValueError, match=r"serves impressions, .*set model\.class_path to lightning_rec\.Impression"):
        trainer(tmp_path).fit(TwoTower(IdItemTower(8), PooledUserTower()), impressions)
    with pytest.raises(ValueError, match="Nearest looks at the candidates"):
        TwoTower(IdItemTower(8), Nearest())


# ---------------------------------------------------------------------- baselines


@pytest.mark.parametrize("kind", ["recent", "total", "random"])
def test_baselines_by_hand(tmp_path, kind):
    batch = impressions(4, 6)
    module = ImpressionPopularity(kind)
    module.build(view())
    found = module.predict_step(batch, 0)
    shown = batch.impressions
    if kind == "recent":
        expected = torch.log1p(shown.popularity)
    elif kind == "total":
        expected = torch.log1p((shown.candidates % 11).float())
    else:
        expected = torch.stack(
            [drawn(0, torch.tensor(i), row) for i, row in zip(batch.index.tolist(), shown.candidates, strict=True)]
        )
        assert not torch.equal(expected, drawn(1, batch.index[:, None], shown.candidates))
    assert torch.equal(found["scores"][shown.mask], expected[shown.mask])
    assert not found["fallback"].any()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, Handmade())
    assert "val/auc" in run.callback_metrics


def test_recent_clicks_need_times():
    module = ImpressionPopularity()
    module.build(view())
    batch = impressions(4, 6)
    batch.impressions.popularity = None
    with pytest.raises(ValueError, match="use kind: total"):
        module.predict_step(batch, 0)


def test_random_numbers_are_even_and_unlike_each_other():
    numbers = drawn(3, torch.arange(200)[:, None], torch.arange(500)[None])
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.005)
    assert numbers.std().item() == pytest.approx(12**-0.5, abs=0.005)
    assert 0 <= numbers.min() < numbers.max() < 1
    assert numbers.unique().numel() > 0.99 * numbers.numel()
    assert torch.corrcoef(numbers.T[:20]).fill_diagonal_(0).abs().max() < 0.35
