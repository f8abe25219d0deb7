import peft
import pytest
import torch
from transformers import AutoModel

from lightning_rec.towers.language import TextEncoder
from lightning_rec.towers.quantisation import quantisation_options


@pytest.fixture
def fake(monkeypatch, tiny_bert):
    """A machine that says it has a GPU, and a loader that only writes down what it was given."""
    monkeypatch.setattr("lightning_rec.towers.quantisation._installed", lambda: True)
    # the config asks for the package's version; what it would do with it is not looked at
    monkeypatch.setattr("transformers.BitsAndBytesConfig.post_init", lambda self: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    given, model = [], AutoModel.from_pretrained(tiny_bert)

    def load(folder, **options):
        given.append(options)
        return model

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", load)
    return given


def test_a_machine_without_it_says_what_is_missing(monkeypatch, tiny_bert):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"'4bit' needs .*a CUDA device.*set quantisation to none"):
        TextEncoder(tiny_bert, quantisation="4bit", peft=peft.LoraConfig(r=2))
    encoder = TextEncoder(tiny_bert, quantisation="8bit")  # frozen: loaded when it is needed
    with pytest.raises(RuntimeError, match="'8bit' needs"):
        encoder.encode(["red"])
    monkeypatch.setattr("lightning_rec.towers.quantisation._installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"bitsandbytes.* and a CUDA device"):
        quantisation_options("8bit")
    assert quantisation_options("none") == {}


def test_what_the_loader_is_given(fake, tiny_bert):
    TextEncoder(tiny_bert, quantisation="8bit").encode(["red"])
    TextEncoder(tiny_bert, quantisation="4bit").encode(["red"])
    TextEncoder(tiny_bert).encode(["red"])
    eight, four = (options["quantization_config"] for options in fake[:2])
    assert eight.load_in_8bit
    assert not eight.load_in_4bit
    assert four.load_in_4bit
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert fake[0]["device_map"] == {"": 0}
    assert "quantization_config" not in fake[2]


def test_an_adapter_is_put_in_after_the_preparation(fake, tiny_bert, monkeypatch):
    prepared = []
    monkeypatch.setattr(
        "peft.prepare_model_for_kbit_training", lambda model, **options: prepared.append(options) or model
    )
    encoder = TextEncoder(tiny_bert, quantisation="4bit", peft=peft.LoraConfig(r=2))
    assert prepared == [{"use_gradient_checkpointing": False}]
    assert {name for name, p in encoder.named_parameters() if p.requires_grad}
    TextEncoder(tiny_bert, quantisation="4bit").encode(["red"])
    assert len(prepared) == 1, "a frozen model needs none"


def test_a_model_tuned_whole_is_not_quantised(tiny_bert):
    with pytest.raises(ValueError, match="frozen models and adapters"):
        TextEncoder(tiny_bert, tune="full", quantisation="8bit")


def test_quantised_vectors_have_a_cache_of_their_own(tiny_bert):
    keys = {TextEncoder(tiny_bert, quantisation=kind).cache_key("x") for kind in ("none", "8bit", "4bit")}
    assert len(keys) == 3
