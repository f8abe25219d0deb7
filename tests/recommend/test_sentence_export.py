"""A run that pools as a sentence-transformers folder states serves so too."""

import json
import shutil

import pytest
import torch

from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export


def test_what_the_folder_states_is_served(run_of, tiny_bert, tmp_path_factory, monkeypatch):
    onnx = pytest.importorskip("lightning_rec.recommend.onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    monkeypatch.setattr(onnx, "_by_export", onnx._by_script)  # the newer exporter takes several seconds
    folder = tmp_path_factory.mktemp("stating")
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    checkpoint = run_of(
        "text_pooled", {"TINY_BERT, dim: 16": f"{folder}, dim: 16, pooling: null, features: raw"}
    )  # nearly equal texts: no scale
    output = tmp_path_factory.mktemp("out") / "artefact"
    export(checkpoint, output, progress=False, onnx=True)
    shutil.rmtree(folder)
    artefact = Artefact.read(output)
    texts = artefact.texts[1:8]
    found = artefact.encode_texts(texts)
    torch.testing.assert_close(found, artefact.raw_vectors[1:8], atol=1e-4, rtol=1e-4)
    encoder = artefact.item_tower.encoder
    assert (encoder.pooling, encoder.normalise, encoder.max_tokens) == ("cls", True, 6)
    torch.testing.assert_close(encoder.encode(texts).norm(dim=1), torch.ones(len(texts)))
    served = onnx.OnnxTowers(artefact).encode_texts(texts)
    torch.testing.assert_close(served, artefact.ready(found), atol=1e-3, rtol=1e-3)
