"""Compressed language models: they load without a pickle, and one model encodes all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.compress import layers_of
from lightning_rec.recommend.export import export
from lightning_rec.recommend.int8 import INT8, Int8Linear, read_int8, write_int8

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
GPT2_TEXT = {"language_model: TINY_BERT": "language_model: TINY_GPT2"}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "bert": BertModel(BertConfig(**SMALL)),
        "roberta": RobertaModel(RobertaConfig(**SMALL)),
        "distilbert": DistilBertModel(DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=40)),
        "gpt2": GPT2Model(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=32)),
    }


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same but for rounding, which may move an input of a quantised layer from one level to the next."""
    assert torch.cosine_similarity(found, wanted, dim=-1).min() > 0.999
    assert ((found - wanted).abs() <= 1e-5).float().mean() > 0.9


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2"])
def test_layers_are_found(name):
    assert len(layers_of(models()[name])[1]) == 3


def test_layers_that_are_not_found():
    model = models()["bert"]
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"0 lists of 5 layers .* Leave keep_layers out"):
        layers_of(model)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2"])
def test_eight_bits_come_back(name, tmp_path):
    model = models()[name].eval()
    model.pooler = None
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").unlink()
    write_int8(model, tmp_path)
    assert (tmp_path / INT8).stat().st_size < whole / 1.5
    read = read_int8(tmp_path)
    assert any(isinstance(part, Int8Linear) for part in read.modules())
    assert not any(type(part) is nn.Linear for part in read.modules())
    ids = torch.randint(5, 40, (4, 9))
    with torch.no_grad():
        wanted, found = model(input_ids=ids).last_hidden_state, read(input_ids=ids).last_hidden_state
    assert torch.cosine_similarity(wanted, found, dim=-1).min() > 0.99
    assert not torch.equal(wanted, found)


def test_the_linear_layer_by_hand():
    """Weights are levels times scales; inputs are rounded to 1/127 of their range."""
    weight = torch.tensor([[127, -127, 0], [1, 2, 64]], dtype=torch.int8)
    layer = Int8Linear(weight, torch.tensor([0.01, 0.1]), torch.tensor([0.5, -0.5]))
    x = torch.tensor([[1.0, -1.0, 0.5]])
    wanted = torch.tensor([[1.27 * 2 + 0.5, 0.1 - 0.2 + 3.2 - 0.5]])
    torch.testing.assert_close(layer(x), wanted, atol=0.1, rtol=0)
    x.requires_grad_()
    exact = layer(x)  # with gradients it is an ordinary product
    torch.testing.assert_close(exact, wanted)
    exact.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.27 + 0.1, -1.27 + 0.2, 6.4]]))


def test_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    layer = Int8Linear(torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.rand(8), torch.randn(8))
    x = torch.randn(5, 3, 16) * torch.tensor([0.01, 1, 100, 0, 1])[:, None, None]
    together = layer(x)
    assert together.shape == (5, 3, 8)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in x]), together, rtol=0, atol=0)
    exact = nn.functional.linear(x, layer.levels * layer.scales[:, None], layer.bias)
    error = (together - exact).abs().amax((1, 2)) / x.abs().amax((1, 2)).clamp_min(1e-9)
    assert error.max() < 16 * 127 / 64  # half a level of each input, at most


def test_zero_rows_and_no_bias():
    layer = Int8Linear(torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2), None)
    assert not layer(torch.randn(3, 4)).any()


@pytest.mark.parametrize("options", [{"keep_layers": 1}, {"quantise": True}, {"keep_layers": 1, "quantise": True}])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_one_model_encodes_all(options, model, run_of, tmp_path, caplog):
    checkpoint = run_of("text_pooled", GPT2_TEXT if model == "gpt2" else None)
    with caplog.at_level("INFO"):
        manifest = export(checkpoint, tmp_path / "out", progress=False, **options)
    artefact = Artefact.read(tmp_path / "out")
    found = artefact.encode_texts(artefact.texts[1:])
    assert_near(found, artefact.raw_vectors[1:])
    part = artefact.manifest.parts["language_model"]
    steps = part["compression"]
    assert len(steps) == len(options)
    assert steps[-1]["after"]["bytes"] < steps[0]["before"]["bytes"]
    for step in steps:
        assert {"bytes", "texts_per_second", "ndcg@10"} == set(step["before"]) == set(step["after"])
    messages = [record.getMessage() for record in caplog.records if "texts a second" in record.getMessage()]
    assert len(messages) == len(options)
    assert "MiB, before" in messages[0]
    assert "test NDCG@10" in messages[0]
    folder = tmp_path / "out" / "language_model"
    if "keep_layers" in options:
        assert (part["layers"], part["of_layers"]) == (1, 2)
        config = json.loads((folder / "config.json").read_text())
        assert 1 in (config.get("num_hidden_layers"), config.get("n_layer"))
    if "quantise" in options:
        assert part["weights"] == "int8"
        assert [path.name for path in folder.glob("*.safetensors")] == [INT8]
        assert f"language_model/{INT8}" in manifest.digests
    whole = tmp_path / "whole"
    export(checkpoint, whole, progress=False)
    assert not torch.equal(Artefact.read(whole).raw_vectors, artefact.raw_vectors)


def test_a_pruned_model_is_one_of_transformers(run_of, tmp_path):
    export(run_of("text_pooled"), tmp_path / "out", progress=False, keep_layers=1)
    folder = tmp_path / "out" / "language_model"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(model.encoder.layer) == 1
    model(**tokenizer("red shoe", return_tensors="pt"))


@pytest.mark.parametrize(("name", "merge"), [("lora_batch", True), ("gpt2_full", False), ("text_id_gate", False)])
def test_merged_adapters_whole_models_and_ids(name, merge, run_of, tmp_path):
    export(run_of(name), tmp_path / "out", progress=False, merge=merge, keep_layers=1, quantise=True)
    artefact = Artefact.read(tmp_path / "out")
    assert artefact.item_tower.encoder.tune == "frozen"
    found = artefact.encode_texts(artefact.texts[1:])
    if name != "text_id_gate":  # which adds what it knows of the ids
        assert_near(found, artefact.raw_vectors[1:])


def test_the_explanation_of_words_has_gradients(run_of, tmp_path):
    export(run_of("text_pooled"), tmp_path / "out", progress=False, quantise=True)
    encoder = Artefact.read(tmp_path / "out").item_tower.encoder
    model = encoder.running_model(torch.device("cpu"))
    inputs = torch.randn(1, 4, 16, requires_grad=True)
    model(inputs_embeds=inputs).last_hidden_state[0, 0, 0].backward()
    assert inputs.grad.any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("id_sequence", {"keep_layers": 1}, "IdItemTower is no TextItemTower"),
        ("language_user", {"quantise": True}, "LanguageUserTower reads users with one"),
        ("lora_batch", {"quantise": True}, r"merge it \(--merge true\)"),
        ("text_pooled", {"keep_layers": 3}, "keep_layers is 3, but the language model has 2 layers"),
        ("text_pooled", {"keep_layers": 0}, "keep 1 to 2"),
    ],
)
def test_what_cannot_be_compressed_says_so_and_leaves_nothing(name, options, message, run_of, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(run_of(name), tmp_path / "out", progress=False, **options)
    assert not any(tmp_path.iterdir())


def test_weights_that_do_not_fit(tmp_path):
    model = models()["bert"]
    model.save_pretrained(tmp_path)
    write_int8(model, tmp_path)  # with a pooler, which is never read
    with pytest.raises(ValueError, match=r"int8\.safetensors does not fit its config.json"):
        read_int8(tmp_path)


def test_an_altered_byte_of_eight_bits_is_named(run_of, tmp_path):
    export(run_of("text_pooled"), tmp_path / "out", progress=False, quantise=True)
    copied = Path(shutil.copytree(tmp_path / "out", tmp_path / "copy"))
    data = bytearray((copied / "language_model" / INT8).read_bytes())
    data[-3] ^= 1
    (copied / "language_model" / INT8).write_bytes(data)
    with pytest.raises(ValueError, match=r"int8\.safetensors was altered"):
        Artefact.read(copied).encode_texts(["red shoe"])
