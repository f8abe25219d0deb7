"""Directions of frozen texts beside text and id, exported and answering, with items held out as cold."""

import pytest
import torch

from lightning_rec.recommend import Recommender, Request
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export

NAME = "neighbours"


def test_a_new_text_is_as_a_cold_item_of_the_catalogue(artefact_of):
    artefact = Artefact.read(artefact_of(NAME))
    cold = (artefact.item_tower.warm[1:, 0] == 0).nonzero()[:, 0] + 1
    assert len(cold) > 1
    found = artefact.encode_texts([artefact.texts[row] for row in cold])
    torch.testing.assert_close(artefact.raw_vectors[cold], found, atol=1e-5, rtol=1e-4)


def test_a_history_is_answered_with_every_item_cold_ones_too(artefact_of):
    recommender = Recommender(Artefact.read(artefact_of(NAME)))
    ids = recommender.artefact.ids[1:]
    answer = recommender.recommend(Request(history=ids[:3], k=len(ids), filter_seen=False))
    assert {item.id for item in answer.items} == set(ids)


def test_onnx(run_of, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    onnx = pytest.importorskip("lightning_rec.recommend.onnx", reason="the extra `export` is not installed")
    monkeypatch.setattr(onnx, "_by_export", onnx._by_script)  # the newer exporter takes several seconds
    export(run_of(NAME), tmp_path / "out", progress=False, onnx=True)
    artefact = Artefact.read(tmp_path / "out")
    texts = [*artefact.texts[1:4], "a new red shoe"]
    wanted = artefact.ready(artefact.encode_texts(texts))
    torch.testing.assert_close(onnx.OnnxTowers(artefact).encode_texts(texts), wanted, atol=1e-4, rtol=1e-4)
