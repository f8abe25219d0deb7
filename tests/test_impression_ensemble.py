"""Ensembles of impressions, by the command line, against loops over what each member predicts by itself."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import log_loss, roc_auc_score

from lightning_rec import ImpressionEnsemble
from lightning_rec.cli import main
from lightning_rec.data import NewsImpressionDataModule
from lightning_rec.data.collate import BatchIndex
from lightning_rec.ensemble_members import open_member
from lightning_rec.impression import ImpressionTwoTower

FILES = Path(__file__).parent / "data" / "files"
TOWERS = "lightning_rec.towers"


def spec(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


def data_spec(**options):
    chosen = {"path": str(FILES / "mind" / "train"), "split": "time", "validation_start": 0.4, "test_start": 0.6}
    return spec(
        "lightning_rec.NewsImpressionDataModule", **(chosen | {"max_history": 8, "batch_size": 8, "seed": 1} | options)
    )


def two_tower(item_tower, user_tower, **options):
    return spec("lightning_rec.ImpressionTwoTower", item_tower=item_tower, user_tower=user_tower, lr=0.05, **options)


def runs(bert):
    words = {"dim": 8, "heads": 2, "head_dim": 4, "hidden": 8}
    ids, pooled = spec(f"{TOWERS}.IdItemTower", dim=8), spec(f"{TOWERS}.PooledUserTower")
    return {
        "ids": (
            two_tower(ids, spec(f"{TOWERS}.SequenceUserTower", blocks=1, heads=1, max_length=8)),
            {"max_history": 3},
        ),
        "news": (
            two_tower(
                spec(f"{TOWERS}.NewsItemTower", dim=16, words=words, hidden=8),
                spec(f"{TOWERS}.NRMSUserTower", heads=2, hidden=8),
                age=spec(f"{TOWERS}.age.AgeBias", buckets=4),
                popularity=spec(f"{TOWERS}.age.PopularityBias", buckets=4),
            ),
            {},
        ),
        "aware": (
            two_tower(
                spec(f"{TOWERS}.TextItemTower", language_model=bert, dim=6, init_std=None),
                spec(f"{TOWERS}.CandidateAttentionUserTower", kind="din"),
                score=spec(f"{TOWERS}.score.Cosine"),
            ),
            {"candidates": "whole"},
        ),
        "unsure": (two_tower(ids, pooled, calibrate=False), {}),
        "recent": (spec("lightning_rec.ImpressionPopularity", kind="recent"), {}),
    }


def written(path, model, data):
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    path.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": quiet | {"max_epochs": 2}}))
    return ["--config", str(path), "--trainer.default_root_dir", str(path.parent / path.stem)]


@pytest.fixture(scope="module")
def members(tmp_path_factory, tiny_bert):
    """Checkpoints of runs that have nothing in common but their data."""
    folder = tmp_path_factory.mktemp("members")
    found = {}
    for name, (model, options) in runs(tiny_bert).items():
        main(["fit", *written(folder / f"{name}.yaml", model, data_spec(**options))])
        found[name] = str(next((folder / name).rglob("last.ckpt")))
    return found


def figures_of(folder):
    return json.loads(next(folder.rglob("test_metrics.json")).read_text())["metrics"]


def table_of(folder):
    """Impression -> its candidates with their scores as predicted, and who answered."""
    found = {}
    for row in pq.read_table(next(folder.rglob("predictions.parquet"))).to_pylist():
        found.setdefault(row["impression_id"], []).append((row["item_id"], row["score"], row["source"]))
    return found


@pytest.fixture(scope="module")
def alone(members, tmp_path_factory):
    """What each member predicts and measures by itself, by the command line."""
    found = {}
    for name, path in members.items():
        folder = tmp_path_factory.mktemp(name)
        options = ["--ckpt_path", path, "--predictions.path", str(folder / "predictions.parquet")]
        main(["predict", *options])
        main(["test", "--ckpt_path", path])
        found[name] = table_of(folder), figures_of(Path(path).parent.parent)
    return found


def ran(tmp_path, members, names, commands=("test", "predict"), data=None, **options):
    model = spec("lightning_rec.ImpressionEnsemble", checkpoints=[members[name] for name in names], **options)
    where = written(tmp_path / "ensemble.yaml", model, data_spec(**(data or {})))
    for command in commands:
        main([command, *where])
    return tmp_path / "ensemble"


def shown(part):
    """Impression -> items in the order shown, and their labels, read from the files."""
    lines = (FILES / "mind" / part / "behaviors.tsv").read_text(encoding="utf-8").splitlines()
    rows = {line.split("\t")[0]: line.split("\t")[4].split() for line in lines}
    return {name: [candidate.rsplit("-", 1) for candidate in row] for name, row in rows.items()}


def brute_force(tables, how, weights):
    """Impression -> items and the mean of normalised scores."""
    found = {}
    for impression in tables[0]:
        items = sorted(item for item, _, _ in tables[0][impression])
        each, used = [], []
        for table, weight in zip(tables, weights, strict=True):
            scores = {item: score for item, score, _ in table[impression]}
            own = np.array([scores[item] for item in items], dtype=np.float64)
            if table[impression][0][2] == "popularity" or not weight:
                continue
            if how != "none" and own.max() > own.min():
                own = (
                    (own - own.mean()) / own.std() if how == "z_score" else (own - own.min()) / (own.max() - own.min())
                )
            elif how != "none":
                own = 0 * own
            each.append(own)
            used.append(weight)
        found[impression] = items, np.average(each, axis=0, weights=used) if each else None
    return found


CASES = [
    (["ids", "news", "aware", "recent"], "z_score", [1.0, 1.0, 1.0, 1.0]),
    (["ids", "news", "aware"], "z_score", [2.0, 0.5, 1.0]),
    (["ids", "aware", "news"], "min_max", [1.0, 3.0, 0.0]),
    (["news", "aware"], "none", [1.0, 2.0]),
]


@pytest.mark.parametrize(("names", "how", "weights"), CASES)
def test_predictions_and_figures_are_those_of_the_mean(members, alone, tmp_path, names, how, weights):
    folder = ran(tmp_path, members, names, normalise=how, weights=weights)
    wanted = brute_force([alone[name][0] for name in names], how, weights)
    found = table_of(folder)
    assert set(found) == set(wanted)
    assert len(found) > 10
    counts = []
    for impression, (items, scores) in wanted.items():
        rows = found[impression]
        assert sorted(item for item, _, _ in rows) == items
        assert [score for _, score, _ in rows] == sorted((score for _, score, _ in rows), reverse=True)
        counts.append(scores is None)
        assert {source for _, _, source in rows} == {"popularity" if scores is None else "towers"}
        if scores is not None:
            expected = dict(zip(items, scores, strict=True))
            assert [score for _, score, _ in rows] == pytest.approx(
                [expected[item] for item, _, _ in rows], abs=2e-5, rel=2e-5
            )
    assert any(counts) == ("recent" not in names), "the log has a user without a history"
    aucs, gains = [], []
    for impression, candidates in shown("train").items():
        if impression not in wanted or len({label for _, label in candidates}) < 2:
            continue
        scores = {item: score for item, score, _ in found[impression]}
        labels, given = [int(label) for _, label in candidates], [scores[item] for item, _ in candidates]
        aucs.append(roc_auc_score(labels, given))
        ordered = [label for _, label in sorted((-score, label) for score, label in zip(given, labels, strict=True))]
        discounts = 1 / np.log2(np.arange(2, 7))
        gains.append(np.dot(ordered[:5], discounts[: len(ordered)]) / discounts[: min(sum(labels), 5)].sum())
    figures = figures_of(folder)
    assert figures["test/impressions"] == len(aucs) > 5
    assert figures["test/auc"] == pytest.approx(np.mean(aucs), rel=1e-6)
    assert figures["test/ndcg@5"] == pytest.approx(np.mean(gains), rel=1e-6)
    assert figures["test/popularity_share"] == pytest.approx(np.mean(counts))


@pytest.mark.parametrize(
    ("name", "how"),
    [("ids", "min_max"), ("news", "z_score"), ("aware", "z_score"), ("unsure", "none"), ("recent", "min_max")],
)
def test_one_member_ranks_and_measures_as_it_does_alone(members, alone, tmp_path, name, how):
    folder = ran(tmp_path, members, [name], normalise=how)
    table, figures = alone[name]
    assert figures_of(folder) == pytest.approx(figures, nan_ok=True)
    assert {i: [row[0] for row in rows] for i, rows in table_of(folder).items()} == {
        i: [row[0] for row in rows] for i, rows in table.items()
    }


def data_of(**options):
    data = NewsImpressionDataModule(**(data_spec()["init_args"] | options))
    data.setup()
    return data


def test_click_figures_are_those_of_the_mean_probability(members, tmp_path):
    windows = {"ids": 3, "news": 8, "recent": 8}
    figures = figures_of(ran(tmp_path, members, list(windows), ["test"]))
    each, knows = [], []
    for name, window in windows.items():
        data = data_of(max_history=window)
        member, _ = open_member(ImpressionTwoTower, Path(members[name]), data.view, name)
        member.item_tower.prepare(data.view)
        dataset = data.evaluation_dataset("test")
        batch = dataset[BatchIndex(np.arange(len(dataset)), (0,))]
        scores, known = member.candidate_scores(batch)
        each.append(member.probabilities(scores))
        knows.append(known)
    real = ~batch.impressions.labels.isnan()
    known = torch.stack(knows)[:, :, None]
    chances = ((torch.stack(each) * known).sum(0) / known.sum(0))[real].tolist()
    labels = batch.impressions.labels[real].tolist()
    assert figures["test/labelled"] == len(labels)
    assert figures["test/mean_prediction"] == pytest.approx(np.mean(chances), rel=1e-5)
    assert figures["test/log_loss"] == pytest.approx(log_loss(labels, chances), rel=1e-5)


def test_without_the_probabilities_of_one_there_are_no_figures_of_clicks(members, tmp_path):
    assert "test/log_loss" not in figures_of(ran(tmp_path, members, ["ids", "unsure"], ["test"]))


def test_the_others_of_a_batch_change_nothing(members):
    data = data_of()
    ensemble = ImpressionEnsemble([members[name] for name in ("ids", "news", "aware", "recent")]).eval()
    ensemble.build(data.view)
    ensemble.item_tower.prepare(data.view)
    found = {}
    with torch.no_grad():
        for size in (100, 3, 1):
            data.eval_batch_size = size
            for batch in data.test_dataloader():
                out = ensemble.predict_step(batch, 0)
                for number, width, scores in zip(
                    out["index"].tolist(), out["sizes"].tolist(), out["scores"], strict=True
                ):
                    found.setdefault(number, []).append(scores[:width])
    for one, *others in found.values():
        assert len(others) == 2
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)  # the towers' own rounding
            assert other.argsort(stable=True).equal(one.argsort(stable=True))


def test_the_submission_format(members, tmp_path):
    model = spec("lightning_rec.ImpressionEnsemble", checkpoints=[members["ids"], members["aware"]])
    where = written(tmp_path / "ensemble.yaml", model, data_spec())
    main(["predict", *where, "--predictions.format", "mind"])
    main(["predict", *where])
    table = table_of(tmp_path / "ensemble")
    lines = next(tmp_path.rglob("prediction.txt")).read_text().splitlines()
    assert len(lines) == len(table)
    candidates = shown("train")
    for line in lines:
        name, ranks = line.split(" ", 1)
        order = [item for item, _, _ in table[name]]
        items = [item for item, _ in candidates[name]]
        assert [order[rank - 1] for rank in json.loads(ranks)] == items


# ---------------------------------------------------------------------- what is refused


def test_other_data_and_other_classes_are_named(members, tmp_path, capsys):
    def said(command, *options):
        with pytest.raises(SystemExit):
            main([command, *options])
        return " ".join(capsys.readouterr().err.split())

    model = spec("lightning_rec.ImpressionEnsemble", checkpoints=[members["ids"]])
    where = written(tmp_path / "c.yaml", model, data_spec())
    assert "An ensemble has nothing to train" in said("fit", *where)
    whole = written(tmp_path / "c.yaml", model, data_spec(path=str(FILES / "mind"), split="auto"))
    assert "was fitted on other items: it knows" in said("validate", *whole)
    shop = written(tmp_path / "c.yaml", model, spec("lightning_rec.EcommerceDataModule", path=str(FILES / "shop")))
    assert "or model.class_path to lightning_rec.Ensemble." in said("test", *shop)
    full = written(tmp_path / "c.yaml", spec("lightning_rec.Ensemble", checkpoints=[members["ids"]]), data_spec())
    assert "set model.class_path to lightning_rec.ImpressionEnsemble" in said("test", *full)


def test_weights_are_checked_and_other_options_told(members, tmp_path):
    with pytest.raises(ValueError, match=r"at least one fitted run"):
        ImpressionEnsemble([])
    with pytest.raises(ValueError, match=r"one weight of at least 0 for each of the 2 checkpoints"):
        ImpressionEnsemble(["a", "b"], weights=[1.0])
    with pytest.warns(UserWarning, match=r"was fitted with popularity_half_life 24\.0 \(here 6\.0\)"):
        ran(tmp_path, members, ["news"], ["test"], data={"popularity_half_life": 6.0})
    with pytest.warns(UserWarning, match=r"fitted with max_history 8, but the ensemble's data gives 2: set"):
        ran(tmp_path, members, ["news"], ["test"], data={"max_history": 2})
