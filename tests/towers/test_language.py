import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_rec.towers.language import TextEncoder, find_language_model, pool
from lightning_rec.towers.pooling import padded_right
from lightning_rec.towers.tokens import length_batches

TEXTS = ["red shoe", "", "the old dog and the new cat of a big city river", "blue", "red shoe", "unheard words"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_alone_equals_the_text_beside_longer_ones(tiny_model, pooling):
    encoder = TextEncoder(tiny_model, pooling=pooling)
    together = encoder.encode(TEXTS)
    assert together.shape == (6, 16)
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    for text, vector in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(encoder.encode([text])[0], vector, atol=1e-5, rtol=0)
    encoder.token_budget = 1  # every text a batch of its own
    torch.testing.assert_close(encoder.encode(TEXTS), together, atol=1e-5, rtol=0)


def test_threads_change_nothing(tiny_bert):
    encoder = TextEncoder(tiny_bert, token_budget=8)
    expected = encoder.encode(TEXTS * 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(encoder.encode(TEXTS * 3), expected, atol=1e-6, rtol=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_on_either_side(tiny_model, pooling):
    encoder = TextEncoder(tiny_model, pooling=pooling)
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    right = encoder(ids, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    left = encoder(torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]]))
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder(ids[1:, :2]), right[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_padding_on_either_side_behind_virtual_tokens(tiny_model, kind):
    torch.manual_seed(0)
    encoder = TextEncoder(tiny_model, peft=kind(num_virtual_tokens=3)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    right = encoder(ids, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    left = encoder(torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]]))
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder(ids[1:, :2]), right[1:], atol=1e-5, rtol=0)


def test_padding_goes_behind_the_tokens():
    tokens, mask = (
        torch.tensor([[0, 0, 8], [5, 6, 7], [3, 0, 0], [0, 0, 0]]),
        torch.tensor([[0, 0, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]]),
    )
    moved, seen = padded_right(tokens, mask)
    assert moved.tolist() == [[8, 0, 0], [5, 6, 7], [3, 0, 0], [0, 0, 0]]
    assert seen.tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [3.0], [5.0]]])
    assert pool(hidden, torch.tensor([[1, 1, 0]]), "mean").item() == 2
    assert pool(hidden, torch.tensor([[0, 1, 1]]), "cls").item() == 3
    assert pool(hidden, torch.tensor([[1, 1, 0]]), "last").item() == 3
    assert pool(hidden, None, "mean").item() == 3
    assert pool(hidden, None, "last").item() == 5
    assert pool(hidden, None, "cls").item() == 1


def test_length_batches_keep_every_text_and_the_budget():
    lengths = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0))
    batches = list(length_batches(lengths, 64))
    assert sorted(torch.cat(batches).tolist()) == list(range(200))
    assert all(len(batch) == 1 or len(batch) * int(lengths[batch].max()) <= 64 for batch in batches)
    assert len(list(length_batches(torch.tensor([100, 100]), 64))) == 2


def test_limits_come_from_the_model_where_the_tokenizer_has_none(tiny_bert, tiny_gpt2):
    assert TextEncoder(tiny_bert, max_tokens=500).max_tokens == 40
    encoder = TextEncoder(tiny_gpt2, max_tokens=500)
    assert encoder.max_tokens == 32
    assert encoder.pad_id == 0
    assert encoder.encode(["red " * 100]).isfinite().all()
    assert TextEncoder(tiny_bert, max_tokens=5).tokenise(["red " * 100]).lengths.tolist() == [5]


def test_frozen_is_no_part_of_the_module(tiny_bert):
    encoder = TextEncoder(tiny_bert)
    assert encoder.model is None
    encoder.encode(["red"])
    assert not list(encoder.parameters())
    assert not encoder.state_dict()
    assert encoder.model is not None
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    encoder.train()
    assert not encoder.model.training
    with torch.inference_mode():
        vectors = encoder.encode(["red"])
    assert not vectors.is_inference()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lora_matrix_receives_a_gradient(tiny_model, checkpointing):
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    encoder = TextEncoder(tiny_model, peft=config, gradient_checkpointing=checkpointing).train()
    assert encoder.tune == "adapter"
    assert config.target_modules is None, "the caller's config is left alone"
    table = encoder.tokenise(TEXTS)
    encoder.encode_table(table, torch.arange(len(TEXTS))).square().sum().backward()
    names = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    for name, parameter in encoder.named_parameters():
        if name in names:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_gradient_checkpointing_does_recompute_and_changes_no_gradient(tiny_bert):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = TextEncoder(tiny_bert, peft=peft.LoraConfig(r=2), gradient_checkpointing=checkpointing).train()
        calls: list[int] = []
        layer = encoder.model.base_model.model.encoder.layer[0].intermediate
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
        encoder(torch.tensor([[5, 6, 7]])).square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_full_tuning_gives_every_parameter_a_gradient(tiny_bert):
    encoder = TextEncoder(tiny_bert, tune="full").train()
    table = encoder.tokenise(["red shoe", "blue"])
    encoder.encode_table(table, torch.arange(2)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["query", "value"], feedforward_modules=[]),
        peft.PromptTuningConfig(num_virtual_tokens=3),
        peft.LoraConfig(r=2, use_dora=True),
    ],
    ids=["ia3", "prompt", "dora"],
)
def test_other_methods_of_peft(tiny_bert, config):
    encoder = TextEncoder(tiny_bert, peft=config)
    vectors = encoder.encode_table(encoder.tokenise(TEXTS), torch.arange(6))
    assert vectors.shape == (6, 16)
    vectors.sum().backward()
    assert any(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(num_virtual_tokens=3),
        peft.PromptTuningConfig(num_virtual_tokens=3),
        peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
    ],
    ids=["prefix", "prompt", "p-tuning"],
)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_virtual_tokens_train_and_are_not_pooled(tiny_model, config, pooling):
    encoder = TextEncoder(tiny_model, pooling=pooling, peft=config).train()
    texts = [*TEXTS, "red " * 100]  # as long as the model can read beside the virtual tokens
    encoder.encode_table(encoder.tokenise(texts), torch.arange(7)).square().sum().backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad.any() for parameter in trained)
    together = encoder.encode(texts)
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_prefix_tuning_refuses_gradient_checkpointing(tiny_bert):
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        TextEncoder(tiny_bert, peft=peft.PrefixTuningConfig(num_virtual_tokens=3), gradient_checkpointing=True)


def test_contradicting_options(tiny_bert):
    with pytest.raises(ValueError, match="needs a peft config"):
        TextEncoder(tiny_bert, tune="adapter")
    with pytest.raises(ValueError, match="needs tune 'adapter'"):
        TextEncoder(tiny_bert, tune="full", peft=peft.LoraConfig())
    with pytest.raises(ValueError, match=r"trainer\.precision"):
        TextEncoder(tiny_bert, tune="full", dtype="bfloat16")
    with pytest.raises(RuntimeError, match="frozen"):
        TextEncoder(tiny_bert, tune="full").encode_cached(["red"])


def test_a_missing_model_says_what_to_do(tmp_path, tiny_bert, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no language model 'nobody/nothing'.*use 'minilm'"):
        find_language_model("nobody/nothing")
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_bert, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="pickles"):
        find_language_model(str(folder))


def test_fingerprint_follows_content_not_time(tmp_path, tiny_bert):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_bert, folder)
    encoder = TextEncoder(str(folder))
    first = encoder.fingerprint
    assert first == TextEncoder(tiny_bert).fingerprint
    path = folder / "model.safetensors"
    before = path.stat()
    weights = load_file(path)
    weights["embeddings.word_embeddings.weight"][5] += 1
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == before.st_size
    assert encoder.fingerprint != first
    shutil.copy(Path(tiny_bert) / "model.safetensors", path)
    assert encoder.fingerprint == first
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("shoe", "sock"))
    assert encoder.fingerprint != first


def test_minilm_by_its_special_name(minilm):
    encoder = TextEncoder()
    assert encoder.folder == minilm
    assert (encoder.width, encoder.max_tokens) == (384, 128)
    vectors = torch.nn.functional.normalize(encoder.encode(["a red shoe", "crimson footwear", "tax law"]), dim=-1)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
