"""Every adapter on both kinds of model: what is trained, what travels, what is refused."""

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from lightning_rec import TwoTower
from lightning_rec.data.batch import CatalogueView
from lightning_rec.recommend.lazy_towers import instantiate
from lightning_rec.towers import (
    AdaLoraConfig,
    BottleneckConfig,
    IdItemTower,
    ItemTower,
    LanguageUserTower,
    SequenceUserTower,
    TextItemTower,
)
from lightning_rec.towers.adapters import AdapterError, linear_names, merged
from lightning_rec.towers.language import TextEncoder

TEXTS = ["red shoe", "", "the old dog and the new cat", "blue"]
VIEW = CatalogueView(n_rows=3, texts=["", "red shoe", "old film"])
# made anew each time: values far from the identity, so that every parameter has a gradient at once
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False),
    "rslora": lambda: peft.LoraConfig(r=2, use_rslora=True, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(init_ia3_weights=False),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, init_lora_weights=False),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
    "houlsby": lambda: BottleneckConfig(placement="houlsby", width=3, init_std=0.5),
    "pfeiffer": lambda: BottleneckConfig(width=3, init_std=0.5),
}
MERGES = {"lora", "dora", "rslora", "ia3", "adalora"}


@pytest.fixture(params=ADAPTERS)
def adapter(request):
    return request.param


def encoder_of(folder, name, **options):
    torch.manual_seed(3)
    return TextEncoder(folder, peft=ADAPTERS[name](), **options)


def test_a_step_trains_the_adapter_and_nothing_else(tiny_model, adapter):
    encoder = encoder_of(tiny_model, adapter).train()
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder.encode_table(encoder.tokenise(TEXTS), torch.arange(4)).square().sum().backward()
    optimizer.step()
    assert trained
    for name, p in encoder.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (name in trained), name
        assert torch.equal(p, before[name]) == (name not in trained), name


def test_a_saved_adapter_is_read_by_peft(tiny_model, adapter, tmp_path):
    encoder = encoder_of(tiny_model, adapter).eval()
    encoder.model.save_pretrained(tmp_path)
    table = encoder.tokenise(["red shoe", "blue dog"])
    with torch.no_grad():
        expected = encoder.encode_table(table, torch.arange(2))
        plain = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), tmp_path).eval()
        encoder.model = plain
        torch.testing.assert_close(encoder.encode_table(table, torch.arange(2)), expected, atol=1e-6, rtol=0)
        encoder.model = AutoModel.from_pretrained(tiny_model).eval()
        encoder._prompt_learning = False
        assert (encoder.encode_table(table, torch.arange(2)) - expected).abs().max() > 1e-3, "the adapter counts"


def test_merging(tiny_model, adapter):
    encoder = encoder_of(tiny_model, adapter).eval()
    expected = encoder.encode(TEXTS)
    if adapter in MERGES:
        encoder.model = merged(encoder.model)
        torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-5, rtol=0)
    else:
        with pytest.raises(AdapterError, match="cannot be merged"):
            merged(encoder.model)


def test_through_both_towers(tiny_bert, adapter):
    module = TwoTower(
        TextItemTower(tiny_bert, dim=8, peft=ADAPTERS[adapter]()),
        LanguageUserTower(language_model=tiny_bert, peft=ADAPTERS[adapter]()),
    )
    module.build(VIEW)
    for tower in (module.item_tower, module.user_tower):
        names = [name for name, p in tower.encoder.named_parameters() if p.requires_grad]
        assert len(names) == len(list(tower.language_parameters())) > 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            peft.LoraConfig(target_modules=["query", "q_proj"]),
            r"LoraConfig.*no module called q_proj",
        ),
        (peft.LoraConfig(target_modules="nothing.*"), r"LoraConfig.*not found"),
        (BottleneckConfig(target_modules=["LayerNorm"]), r"BottleneckConfig.*follows a linear layer"),
    ],
)
def test_a_misfit_names_tower_adapter_and_layers(tiny_bert, config, said):
    with pytest.raises(AdapterError, match=said) as raised:
        TwoTower(TextItemTower(tiny_bert, peft=config), SequenceUserTower(blocks=1)).build(VIEW)
    message = str(raised.value)
    assert message.startswith("The item tower (TextItemTower): The adapter ")
    assert "attention.output.dense" not in message
    assert "intermediate.dense, key, output.dense, query, value" in message
    with pytest.raises(AdapterError, match=r"The user tower \(LanguageUserTower\)"):
        TwoTower(IdItemTower(8), LanguageUserTower(language_model=tiny_bert, peft=config)).build(VIEW)


def test_virtual_tokens_that_do_not_fit(tiny_model):
    with pytest.raises(AdapterError, match=r"PrefixTuningConfig.*a pass through it fails"):
        TextEncoder(tiny_model, peft=peft.PrefixTuningConfig(num_virtual_tokens=3, token_dim=12))
    with pytest.raises(AdapterError, match=r"no room for a text beside 99 virtual tokens"):
        TextEncoder(tiny_model, peft=peft.PromptTuningConfig(num_virtual_tokens=99))


def test_names_of_linear_layers(tiny_gpt2):
    assert linear_names(AutoModel.from_pretrained(tiny_gpt2)) == ["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("peft.LoraConfig", {"r": 2, "use_dora": True}),
        ("peft.LoraConfig", {"r": 2, "use_rslora": True}),
        ("peft.IA3Config", {}),
        ("peft.PrefixTuningConfig", {"num_virtual_tokens": 2}),
        ("peft.PromptTuningConfig", {"num_virtual_tokens": 2}),
        ("peft.PromptEncoderConfig", {"num_virtual_tokens": 2, "encoder_hidden_size": 8}),
        ("peft.AdaLoraConfig", {"total_step": 50}),
        ("lightning_rec.towers.AdaLoraConfig", {"init_r": 4, "target_r": 2}),
        ("lightning_rec.towers.BottleneckConfig", {"placement": "houlsby", "width": 4}),
    ],
)
def test_by_name_as_in_yaml(tiny_bert, name, options):
    arguments = {"language_model": tiny_bert, "peft": {"class_path": name, "init_args": options}}
    spec = {"class_path": "lightning_rec.towers.TextItemTower", "init_args": arguments}
    tower = instantiate(ItemTower, spec, "item tower")
    tower.configure(VIEW)
    config = tower.encoder.model.peft_config["default"]
    assert type(config).__name__ == name.rpartition(".")[2]
    assert {key: getattr(config, key) for key in options} == options
