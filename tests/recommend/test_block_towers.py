"""Whitened texts, a mixture of experts, LiGR blocks and biases of attention, exported and answering."""

import pytest
import torch

from lightning_rec.recommend import Recommender, Request
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export

NAME = "white_moe_ligr_time"
DAY = 86_400


def test_the_checkpoint_holds_statistics_and_tables(run_of):
    state = torch.load(run_of(NAME), weights_only=True)["state_dict"]
    assert state["item_tower.whitening.matrix"].dtype == torch.float64
    assert state["item_tower.whitening.matrix"].shape == (16, 6)
    assert state["item_tower.whitening.mean"].any()
    assert state["item_tower.projection.weight"].shape == (3, 16, 6)
    assert state["user_tower.attention_bias.time.table"].any(), "trained"
    assert state["user_tower.attention_bias.distance.table"].shape == (4, 2)
    assert "item_tower.feature_mean" not in state


def test_a_new_text_is_as_one_of_the_catalogue(artefact_of):
    artefact = Artefact.read(artefact_of(NAME))
    rows = torch.tensor([1, 2, 5])
    tower = artefact.item_tower
    wanted = tower.encode_texts([artefact.texts[row] for row in rows])
    torch.testing.assert_close(artefact.encode_texts([artefact.texts[row] for row in rows]), wanted)
    ids = (tower.table.weight * tower.warm)[rows]
    torch.testing.assert_close(artefact.raw_vectors[rows], wanted + ids, atol=1e-5, rtol=1e-4)


def test_gaps_between_events_count_and_the_date_does_not(artefact_of):
    recommender = Recommender(Artefact.read(artefact_of(NAME)))
    ids = recommender.artefact.ids[1:5]

    def scores(times):
        answer = recommender.recommend(Request(history=ids, times=times, k=5, filter_seen=False))
        return {item.id: item.score for item in answer.items}

    start = 1_700_000_000
    gaps = [start, start + 60, start + 300 * DAY, start + 300 * DAY + 5]
    one = scores(gaps)
    assert scores([time + 999 * DAY for time in gaps]) == pytest.approx(one)
    assert scores([start + number for number in range(4)]) != pytest.approx(one)
    assert scores(None) != pytest.approx(one), "unknown times add nothing"


def test_onnx_of_relative_positions(run_of, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    onnx = pytest.importorskip("lightning_rec.recommend.onnx", reason="the extra `export` is not installed")
    monkeypatch.setattr(onnx, "_by_export", onnx._by_script)  # the newer exporter takes several seconds
    checkpoint = run_of(NAME, {"time_bias: true": "time_bias: false"})
    export(checkpoint, tmp_path / "out", progress=False, onnx=True)
    artefact = Artefact.read(tmp_path / "out")
    towers = onnx.OnnxTowers(artefact)
    texts = [*artefact.texts[1:4], "a new red shoe"]
    wanted = artefact.ready(artefact.encode_texts(texts))
    torch.testing.assert_close(towers.encode_texts(texts), wanted, atol=1e-4, rtol=1e-4)
    said = artefact.manifest.parts["onnx"]["differences"]
    assert set(said) == {"item_tower.onnx", "user_tower.onnx"}


def test_onnx_has_no_times_to_give(run_of, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    onnx = pytest.importorskip("lightning_rec.recommend.onnx", reason="the extra `export` is not installed")
    monkeypatch.setattr(onnx, "_by_export", onnx._by_script)
    with pytest.raises(ValueError, match=r"reads the times of a history \(time_bias\)"):
        export(run_of(NAME), tmp_path / "out", progress=False, onnx=True)
