import peft
import pytest
import torch
from transformers import AutoModel

from lightning_rec.towers.language import TextEncoder
from lightning_rec.towers.quantisation import four_bits_on_cpu, quantisation_options

FOUR = pytest.param("4bit", marks=pytest.mark.skipif(not four_bits_on_cpu(), reason="needs AVX-512"))


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
    monkeypatch.setattr("lightning_rec.towers.quantisation._installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"'4bit' needs bitsandbytes.*set quantisation to none"):
        TextEncoder(tiny_bert, quantisation="4bit", peft=peft.LoraConfig(r=2))
    encoder = TextEncoder(tiny_bert, quantisation="8bit")  # frozen: loaded when it is needed
    with pytest.raises(RuntimeError, match=r"'8bit' needs bitsandbytes"):
        encoder.encode(["red"])
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


def test_without_a_gpu_the_processor_computes_in_float32(fake, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lightning_rec.towers.quantisation.four_bits_on_cpu", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"needs a CUDA device, or a processor with AVX-512.*set quantisation to 8bit"
    ):
        quantisation_options("4bit")
    monkeypatch.setattr("lightning_rec.towers.quantisation.four_bits_on_cpu", lambda: True)
    options = quantisation_options("4bit")
    assert options["device_map"] == {"": "cpu"}
    assert options["quantization_config"].bnb_4bit_compute_dtype == torch.float32


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


def test_states_of_eight_bits_are_not_kept(tiny_bert):
    with pytest.raises(ValueError, match=r"set frozen_layers to 0, or quantisation to 4bit"):
        TextEncoder(tiny_bert, peft=peft.LoraConfig(r=2), frozen_layers=1, quantisation="8bit")


def test_a_model_tuned_whole_is_not_quantised(tiny_bert):
    with pytest.raises(ValueError, match="frozen models and adapters"):
        TextEncoder(tiny_bert, tune="full", quantisation="8bit")


def test_quantised_vectors_have_a_cache_of_their_own(tiny_bert):
    keys = {TextEncoder(tiny_bert, quantisation=kind).cache_key("x") for kind in ("none", "8bit", "4bit")}
    assert len(keys) == 3


TEXTS = ["red shoe", "", "the old dog of the city"]
LAYER = "encoder.layer.0.intermediate.dense"


@pytest.fixture
def installed(monkeypatch):
    """Real bitsandbytes, on a CPU."""
    pytest.importorskip("bitsandbytes", reason="needs the extra quantise")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize("kind", ["8bit", FOUR])
def test_a_frozen_model_says_nearly_the_same(installed, kind, caplog):
    dtype, near = (torch.int8, 0.2) if kind == "8bit" else (torch.uint8, 0.5)
    whole = TextEncoder().encode(TEXTS)
    encoder = TextEncoder(quantisation=kind)
    vectors = encoder.encode(TEXTS)
    weight = encoder.model.get_submodule(LAYER).weight
    assert weight.dtype == dtype
    assert weight.numel() * weight.element_size() == 384 * 1536 // (1 if kind == "8bit" else 2)
    assert vectors.dtype == torch.float32
    error = (vectors - whole).norm(dim=1) / whole.norm(dim=1)
    assert 0 < error.max() < near
    alone = encoder.encode(TEXTS[2:])
    assert (alone - vectors[2:]).norm() / alone.norm() < near / 4
    assert not caplog.records, "nothing is said a thousand times"


@pytest.mark.parametrize("kind", ["8bit", FOUR])
def test_an_adapter_on_a_quantised_model_learns(installed, kind, tiny_bert):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    encoder = TextEncoder(tiny_bert, quantisation=kind, peft=config).train()
    goal = torch.randn(3, encoder.width, generator=torch.Generator().manual_seed(0))

    def error():  # in evaluation mode, as a validation before the first step
        return float((encoder.encode(TEXTS) - goal).square().mean())

    before = error()
    tuned = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in tuned)
    table = encoder.tokenise(TEXTS)
    optimizer = torch.optim.Adam(tuned.values(), lr=0.02)
    for _ in range(20):
        loss = (encoder.encode_table(table, torch.arange(3)) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in tuned.values())
        optimizer.step()
    assert error() < 0.98 * before


@pytest.mark.skipif(not four_bits_on_cpu(), reason="needs AVX-512")
def test_layers_of_any_width_are_read_in_four_bits(installed, tiny_bert):
    vectors = TextEncoder(tiny_bert, quantisation="4bit").encode(TEXTS)  # 16 wide, no multiple of 32
    assert torch.isfinite(vectors).all()
