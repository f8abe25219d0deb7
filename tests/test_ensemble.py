"""Ensembles against brute force: every score of every member normalised and averaged in float64, then sorted."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything

from lightning_rec import EcommerceDataModule, Ensemble
from lightning_rec.cli import main
from lightning_rec.data.batch import UserBatch
from lightning_rec.data.readers import Files
from lightning_rec.ensemble_members import newest
from lightning_rec.metrics import RankingMetrics
from lightning_rec.recommend.fitted import open_run

SHOP = Path(__file__).parent / "data" / "files" / "shop"
TOWERS = "lightning_rec.towers"
READER = {
    "class_path": "lightning_rec.data.readers.Files",
    "init_args": {"interactions": f"{SHOP}/interactions.csv", "items": f"{SHOP}/items.csv"},
}


def spec(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


def config(model, **data):
    return {
        "model": model,
        "data": spec(
            "lightning_rec.EcommerceDataModule", **({"reader": READER, "min_rating": 0, "max_history": 8} | data)
        ),
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1},
    }


def runs(bert):
    sequence = spec(f"{TOWERS}.SequenceUserTower", blocks=1, heads=1)
    repeats = spec(f"{TOWERS}.score.Cosine", learn_repeats=True)
    return {
        "ids": config(
            spec("lightning_rec.TwoTower", item_tower=spec(f"{TOWERS}.IdItemTower", dim=8), user_tower=sequence)
        ),
        "repeats": config(
            spec(
                "lightning_rec.TwoTower",
                item_tower=spec(f"{TOWERS}.IdItemTower", dim=12, init_std=1.0),
                user_tower=spec(f"{TOWERS}.PooledUserTower"),
                score=repeats,
                objective=spec("lightning_rec.objectives.Softmax", exclude_known=False),
                lr=0.3,
            ),
            max_history=3,
        ),
        "text": config(
            spec(
                "lightning_rec.TwoTower",
                item_tower=spec(f"{TOWERS}.TextItemTower", language_model=bert, dim=4, init_std=None),
                user_tower=spec(f"{TOWERS}.PooledUserTower", pooling="gru"),
            )
        ),
        "popular": config(
            spec(
                "lightning_rec.TwoTower",
                item_tower=spec(f"{TOWERS}.PopularityItemTower"),
                user_tower=spec(f"{TOWERS}.ConstantUserTower"),
            )
        ),
    }


@pytest.fixture(scope="module")
def members(tmp_path_factory, tiny_bert):
    """Checkpoints of four runs that have nothing in common but their data."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    parser.add_subclass_arguments(LightningDataModule, "data")
    found = {}
    seed_everything(0, verbose=False)
    for name, content in runs(tiny_bert).items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        built = parser.instantiate(parser.parse_object({part: content[part] for part in ("model", "data")}))
        runner = trainer(folder, max_epochs=1, limit_val_batches=0)
        runner.fit(built["model"], built["data"])
        found[name] = str(folder / "checkpoints" / "last.ckpt")
        runner.save_checkpoint(found[name])
    return found


def shop(**options):
    files = Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv"))
    return EcommerceDataModule(files, **({"min_rating": 0, "max_history": 8, "eval_batch_size": 7} | options))


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", enable_checkpointing=False, **quiet, **options)


@cache
def own_scores(checkpoint, dataset):
    """``(users, items)`` float64 scores of one run, by its own data module and its own code; and its bonus."""
    run = open_run(Path(checkpoint))
    batches = list(run.data.test_dataloader() if dataset == "test" else run.data.predict_dataloader())
    rows = torch.cat([batch.index for batch in batches])
    scores = []
    with torch.no_grad():
        for batch in batches:
            interest, table, _ = run.module.interests(batch)
            scores.append(interest.double() @ table.items.double().T)
    repeat = run.module.score.repeat
    return torch.cat(scores)[rows.argsort()][:, 1:].numpy(), None if repeat is None else repeat.item()


def member_scores(checkpoint, dataset, served):
    scores, repeat = own_scores(checkpoint, dataset)
    scores = scores.copy()
    if repeat is not None:
        assert repeat != 0
        for user, history in enumerate(served):
            scores[user, sorted({row - 1 for row in history if row})] += repeat
    return scores


def normalised(scores, how):
    if how == "none":
        return scores
    low = scores.mean(1, keepdims=True) if how == "z_score" else scores.min(1, keepdims=True)
    size = scores.std(1, keepdims=True) if how == "z_score" else scores.max(1, keepdims=True) - low
    return (scores - low) / size


def expected(members, dataset, data, how, weights=None):
    batches = list(data.test_dataloader() if dataset == "test" else data.predict_dataloader())
    served = {}
    for batch in batches:
        served |= dict(zip(batch.index.tolist(), batch.users.history.tolist(), strict=True))
    histories = [served[number] for number in range(len(served))]
    each = [normalised(member_scores(path, dataset, histories), how) for path in members]
    scores = np.average(each, axis=0, weights=weights)
    for batch in batches:
        if batch.seen is None:
            continue
        for user, seen in zip(batch.index.tolist(), batch.seen.tolist(), strict=True):
            scores[user, [row - 1 for row in seen if row]] = -np.inf
    return scores


CASES = [
    (["ids", "repeats", "text", "popular"], "z_score", None, True),
    (["ids", "repeats", "text", "popular"], "z_score", [1.0, 2.0, 0.5, 0.0], False),
    (["ids", "repeats", "popular"], "min_max", [3.0, 1.0, 1.0], False),
    (["ids", "repeats", "text"], "none", [1.0, 2.0, 3.0], False),
    (["repeats"], "z_score", None, False),
]


@pytest.mark.parametrize(("names", "how", "weights", "filter_seen"), CASES)
def test_predictions_are_the_mean_of_normalised_scores(members, tmp_path, names, how, weights, filter_seen):
    chosen = [members[name] for name in names]
    module = Ensemble(chosen, normalise=how, weights=weights, top_k=30, chunk_size=11)
    data = shop(filter_seen=filter_seen)
    parts = trainer(tmp_path).predict(module, data)
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = found["index"].argsort()
    rows, scores = found["rows"][order].numpy(), found["scores"][order].double().numpy()
    data.trainer = None
    wanted = expected(chosen, "predict", data, how, weights)
    for user in range(len(wanted)):
        real = rows[user] > 0
        assert real.sum() == np.isfinite(wanted[user]).sum()
        assert sorted(rows[user][real]) == sorted(np.flatnonzero(np.isfinite(wanted[user])) + 1)
        np.testing.assert_allclose(scores[user][real], wanted[user][rows[user][real] - 1], rtol=2e-5, atol=2e-5)
        assert (np.diff(wanted[user][rows[user][real] - 1]) < 1e-5).all(), "best first"
    assert not found["fallback"].any()


def test_figures_are_those_of_the_sorted_scores(members, tmp_path):
    chosen = [members[name] for name in ("ids", "repeats", "text")]
    data = shop()
    module = Ensemble(chosen, metrics=[RankingMetrics(ks=(5,), names=("hr", "ndcg", "mrr"))])
    figures = trainer(tmp_path).test(module, data, verbose=False)[0]
    data.trainer = None
    scores = expected(chosen, "test", data, "z_score")
    ranks = np.zeros(len(scores))
    for batch in data.test_dataloader():
        for user, target in zip(batch.index.tolist(), batch.targets[:, 0].tolist(), strict=True):
            own = scores[user, target - 1]
            ranks[user] = (scores[user] >= own).sum() if np.isfinite(own) else 1000
    assert figures["test/hr@5"] == pytest.approx((ranks <= 5).mean())
    assert figures["test/ndcg@5"] == pytest.approx(np.where(ranks <= 5, 1 / np.log2(ranks + 1), 0).mean(), rel=1e-6)
    assert figures["test/mrr@5"] == pytest.approx(np.where(ranks <= 5, 1 / ranks, 0).mean(), rel=1e-6)


def test_one_member_ranks_as_it_does_alone(members, tmp_path):
    alone = open_run(Path(members["ids"]))
    figures = trainer(tmp_path).test(alone.module, alone.data, verbose=False)[0]
    for how in ("z_score", "min_max"):
        found = trainer(tmp_path).test(Ensemble([members["ids"]], normalise=how), shop(), verbose=False)[0]
        assert found == pytest.approx(figures, nan_ok=True), how


def test_chunks_change_no_figure(members, tmp_path):
    chosen = [members["ids"], members["repeats"]]
    modules = (Ensemble(chosen, normalise="min_max", chunk_size=size) for size in (7, 8192))
    found = [trainer(tmp_path).test(module, shop(filter_seen=False), verbose=False)[0] for module in modules]
    assert found[0] == pytest.approx(found[1], nan_ok=True)


def test_from_the_command_line(members, tmp_path):
    model = spec("lightning_rec.Ensemble", checkpoints=[members["ids"], members["popular"]])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config(model)))
    options = ["--config", str(tmp_path / "c.yaml"), "--trainer.default_root_dir", str(tmp_path / "out")]
    main(["test", *options])
    result = json.loads(next(tmp_path.rglob("test_metrics.json")).read_text())
    assert 0 < result["metrics"]["test/ndcg@10"] < 1
    assert result["metrics"]["test/users"] == 40
    main(["predict", *options])
    table = pq.read_table(next(tmp_path.rglob("predictions.parquet"))).to_pylist()
    assert {row["source"] for row in table} == {"towers"}
    assert [row["rank"] for row in table[:10]] == list(range(1, 11))
    assert len({row["user_id"] for row in table}) == 40


def test_users_whom_some_do_not_know(members, tmp_path):
    both, first, popular = ([members[name] for name in names] for names in (("ids", "popular"), ("ids",), ("popular",)))

    def answers(chosen):
        parts = trainer(tmp_path).predict(Ensemble(chosen), shop(predict_users=["u001", "nobody"]))
        return {
            name: torch.cat([part[name] for part in parts])[torch.cat([p["index"] for p in parts]).argsort()]
            for name in parts[0]
        }

    # the popularity member answers everyone, the one of histories does not know a new user
    assert torch.equal(answers(both)["rows"][1], answers(popular)["rows"][1])
    assert answers(both)["fallback"].tolist() == [False, False]
    assert answers(first)["fallback"].tolist() == [False, True]
    assert torch.equal(answers(first)["rows"][1], answers(popular)["rows"][1])


def test_constant_scores_earn_no_credit_and_no_nan(members, tmp_path):
    module = Ensemble([members["ids"]])
    data = shop()
    runner = trainer(tmp_path)
    runner.test(module, data, verbose=False)
    module.members[0].item_tower.table.weight.fill_(0.3)
    figures = runner.test(module, data, verbose=False)[0]
    assert figures["test/hr@5"] == 0
    for how in ("z_score", "min_max"):
        module.normalise = how
        parts = runner.predict(module, data)
        assert torch.isfinite(torch.cat([part["scores"] for part in parts])).all()


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9])
def test_the_newest_events_against_a_loop(window):
    histories = [[4, 5, 6, 7, 8], [3], [], [1, 2, 3, 4]]
    lengths = torch.tensor([len(history) for history in histories])
    padded = torch.tensor([history + [0] * (5 - len(history)) for history in histories])
    found = newest(UserBatch(padded, lengths, torch.zeros(4), times=padded * 10), window)
    for row, history in enumerate(histories):
        kept = history[-window:]
        assert found.lengths[row] == len(kept)
        assert found.history[row].tolist() == kept + [0] * (found.history.shape[1] - len(kept))
        assert found.times[row].tolist() == [10 * event for event in found.history[row].tolist()]


# ---------------------------------------------------------------------- what is refused


def refused(members, tmp_path, data=None, **options):
    trainer(tmp_path).test(Ensemble(members, **options), data or shop(), verbose=False)


def test_a_member_of_other_data_is_named(members, tmp_path):
    log = (SHOP / "interactions.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join([log[0], *reversed(log[1:])]))
    (tmp_path / "items.csv").write_text("\n".join((SHOP / "items.csv").read_text().splitlines()[:-1]))
    fewer_items = EcommerceDataModule(Files(str(SHOP / "interactions.csv"), str(tmp_path / "items.csv")))
    with pytest.raises(
        ValueError, match=r"Member 1 of the ensemble, .*last\.ckpt, was fitted on other items: it knows"
    ):
        refused([members["ids"], members["text"]], tmp_path, fewer_items)
    other_order = EcommerceDataModule(Files(str(tmp_path / "log.csv"), str(SHOP / "items.csv")))
    with pytest.raises(ValueError, match=r"Member 1 of the ensemble, .*last\.ckpt, was fitted on other users"):
        refused([members["ids"]], tmp_path, other_order)


def test_what_cannot_be_opened_is_named(members, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Member 2 of the ensemble, nowhere\.ckpt, is no file"):
        refused([members["ids"], "nowhere.ckpt"], tmp_path)
    (tmp_path / "checkpoints").mkdir()
    lost = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(members["ids"], weights_only=True)
    content.pop("hyper_parameters", None)
    torch.save(content, lost)
    with pytest.raises(ValueError, match=r"Member 1 of the ensemble, .* cannot be built again"):
        refused([str(lost)], tmp_path)


def test_weights_and_training_are_checked(members, tmp_path):
    with pytest.raises(ValueError, match=r"at least one fitted run"):
        Ensemble([])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match=r"one weight of at least 0 for each of the 2 checkpoints"):
            Ensemble(["a", "b"], weights=weights)
    with pytest.raises(ValueError, match=r"An ensemble has nothing to train"):
        trainer(tmp_path).fit(Ensemble([members["ids"]]), shop())


def test_other_options_and_a_shorter_history_are_told(members, tmp_path):
    with pytest.warns(UserWarning, match=r"fitted with max_history 8, but the ensemble's data gives 4: set"):
        refused([members["ids"]], tmp_path, shop(max_history=4))
    with pytest.warns(UserWarning, match=r"was fitted with template None \(here '\{title\}'\)"):
        refused([members["ids"]], tmp_path, shop(template="{title}"))
