"""Bottleneck adapters: where they go, that they begin as the identity, and what they refuse."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
)

from lightning_rec.towers.bottleneck import BottleneckConfig, BottleneckLayer

SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "bert": lambda: AutoModel.from_config(BertConfig(**SMALL)),
    "roberta": lambda: AutoModel.from_config(RobertaConfig(**SMALL)),
    "distilbert": lambda: AutoModel.from_config(
        DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    ),
    "gpt2": lambda: AutoModel.from_config(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2)),
    "llama": lambda: AutoModel.from_config(LlamaConfig(**SMALL)),
    "modernbert": lambda: AutoModel.from_config(
        ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    ),
    "t5": lambda: T5EncoderModel(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
}
IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_family(kind, placement, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    plain = model(input_ids=IDS).last_hidden_state
    state = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = get_peft_model(model, BottleneckConfig(placement=placement, width=3)).eval()
    layers = [name for name, module in adapted.named_modules() if isinstance(module, BottleneckLayer)]
    assert len(layers) == (4 if placement == "houlsby" else 2), layers
    # a fresh adapter is the identity
    torch.testing.assert_close(adapted(input_ids=IDS).last_hidden_state, plain, atol=1e-6, rtol=0)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == len(layers) * (16 * 3 + 3 + 3 * 16 + 16)
    for p in adapted.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    tuned = adapted(input_ids=IDS).last_hidden_state
    assert (tuned - plain).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    base = MODELS[kind]().eval()
    base.load_state_dict(state)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).last_hidden_state, tuned, atol=1e-6, rtol=0)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        again.merge_and_unload()
    torch.testing.assert_close(again.unload()(input_ids=IDS).last_hidden_state, plain)


def test_by_hand():
    base = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(base.weight)
    with torch.no_grad():
        base.bias.copy_(torch.tensor([1.0, -2.0]))
    layer = BottleneckLayer(base, "default", BottleneckConfig(width=1, activation="relu"))
    with torch.no_grad():
        layer.bottleneck_down["default"].weight.copy_(torch.tensor([[3.0, 1.0]]))  # 3 - 2 = 1
        layer.bottleneck_up["default"].weight.copy_(torch.tensor([[10.0], [20.0]]))
    assert layer(torch.zeros(1, 2)).tolist() == [[11.0, 18.0]]
    layer.bottleneck_config["default"].residual = False
    assert layer(torch.zeros(1, 2)).tolist() == [[10.0, 20.0]]
    layer.enable_adapters(False)
    assert layer(torch.zeros(1, 2)).tolist() == [[1.0, -2.0]]


def test_reduction_factor_and_layers_by_hand():
    model = get_peft_model(MODELS["bert"](), BottleneckConfig(reduction_factor=4, target_modules=["query"]))
    layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    assert [layer.bottleneck_down["default"].out_features for layer in layers] == [4, 4]


def test_two_adapters_on_one_model():
    model = get_peft_model(MODELS["gpt2"](), BottleneckConfig(width=3)).eval()
    plain = model(input_ids=IDS).last_hidden_state
    model.add_adapter("other", BottleneckConfig(placement="houlsby", width=2, init_std=1.0))
    assert torch.equal(model(input_ids=IDS).last_hidden_state, plain)
    model.set_adapter("other")
    assert (model(input_ids=IDS).last_hidden_state - plain).abs().max() > 1e-3


def test_refusals():
    with pytest.raises(ValueError, match=r"placement is 'middle'"):
        BottleneckConfig(placement="middle")
    with pytest.raises(ValueError, match=r"activation is 'sin': choose one of relu"):
        BottleneckConfig(activation="sin")
    with pytest.raises(ValueError, match=r"width is 0"):
        BottleneckConfig(width=0)
    with pytest.raises(ValueError, match=r"of type 'custom' is not known.*target_modules"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), BottleneckConfig())
