"""One language model in memory, an adapter for each tower."""

import copy
from pathlib import Path

import peft
import pytest
import torch

from lightning_rec import TwoTower
from lightning_rec.cli import main
from lightning_rec.data.batch import CatalogueView, ItemBatch, UserBatch
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import open_run
from lightning_rec.towers import (
    AdaLoraConfig,
    BottleneckConfig,
    LanguageUserTower,
    SideItemTower,
    TextItemTower,
    parameter_summary,
)
from lightning_rec.towers.adapters import AdapterError
from lightning_rec.towers.language import TextEncoder

SHOP = Path(__file__).parents[1] / "data" / "files" / "shop"
VIEW = CatalogueView(n_rows=4, texts=["", "red shoe", "old film", "the new dog of the city"])
TEXTS = ["red shoe", "the old dog of the city", "blue"]
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(init_ia3_weights=False),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, init_lora_weights=False),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3),
    "houlsby": lambda: BottleneckConfig(placement="houlsby", width=3, init_std=0.5),
}
PAIRS = [(None, name) for name in ADAPTERS] + [
    ("lora", "lora"),
    ("lora", "houlsby"),
    ("prefix", "dora"),
    ("adalora", "adalora"),
    ("ia3", "prompt"),
    ("houlsby", "prefix"),
]


def users():
    n = len(TEXTS)
    return UserBatch(torch.zeros(n, 2, dtype=torch.long), torch.zeros(n), torch.zeros(n, dtype=torch.long), texts=TEXTS)


def build(folder, item, user, item_options=None, user_options=None):
    torch.manual_seed(3)
    module = TwoTower(
        TextItemTower(folder, dim=8, init_std=None, peft=item and ADAPTERS[item](), **(item_options or {})),
        LanguageUserTower(peft=user and ADAPTERS[user](), **(user_options or {})),
    )
    module.build(VIEW)
    module.item_tower.prepare(VIEW)
    return module


def adapter_parameters(tower):
    return [p for p in tower.encoder.parameters() if p.requires_grad]


def items_of(module):
    return module.item_tower(ItemBatch(torch.arange(4)))


@pytest.mark.parametrize(("item", "user"), PAIRS)
def test_as_two_models_of_their_own(tiny_bert, item, user):
    module = build(tiny_bert, item, user).eval()
    alone = {}
    for tower, name in ((module.item_tower, item), (module.user_tower, user)):
        own = TextEncoder(tiny_bert, peft=name and ADAPTERS[name]()).eval()
        if name is not None:
            own.load_state_dict(tower.encoder.state_dict())
        alone[tower] = own.encode(TEXTS)
    for tower, expected in alone.items():
        torch.testing.assert_close(tower.encoder.encode(TEXTS), expected, atol=1e-6, rtol=0)
    assert (alone[module.item_tower] - alone[module.user_tower]).abs().max() > 1e-3


@pytest.mark.parametrize("item", [None, "lora"])
def test_the_weights_are_in_memory_once(tiny_bert, item):
    module = build(tiny_bert, item, "lora")
    base = {p.data_ptr() for p in module.user_tower.encoder.parameters() if not p.requires_grad}
    inner = module.item_tower.encoder.running_model(torch.device("cpu"))
    assert {p.data_ptr() for p in inner.parameters() if not p.requires_grad} == base
    count = sum(p.numel() for p in TextEncoder(tiny_bert, tune="full").parameters())
    adapters = sum(p.numel() for tower in (module.user_tower, module.item_tower) for p in adapter_parameters(tower))
    heads = sum(
        p.numel()
        for name, p in module.named_parameters()
        if ".encoder." not in name and not name.startswith("objective")
    )
    assert parameter_summary(module) == {"trainable": adapters + heads, "total": count + adapters + heads}
    listed = [id(p) for p in module.user_tower.language_parameters()]
    assert sorted(listed) == sorted(id(p) for p in adapter_parameters(module.user_tower))
    assert not set(listed) & {id(p) for p in module.item_tower.language_parameters()}
    moved = module.to(torch.float64)
    assert {p.data_ptr() for p in moved.user_tower.encoder.parameters() if not p.requires_grad} == {
        p.data_ptr() for p in inner.parameters() if not p.requires_grad
    }
    again = copy.deepcopy(module)
    assert parameter_summary(again) == parameter_summary(module)


@pytest.mark.parametrize("recompute", [False, True, "passes"])
def test_gradients_reach_the_own_adapter_only(tiny_bert, recompute):
    options = {"gradient_checkpointing": recompute, "token_budget": 8}
    module = build(tiny_bert, "lora", "houlsby", options, options).train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    plain = build(tiny_bert, "lora", "houlsby").eval()
    plain.load_state_dict(module.state_dict())
    for one in (module, plain):
        # both passes first, then both backward passes: what is recomputed belongs to the tower that ran it
        (items_of(one).square().sum() + one.user_tower(users(), torch.zeros(4, 8)).square().sum()).backward()
    for (name, p), (_, q) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=name)
    module.zero_grad(set_to_none=True)
    items_of(module).square().sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(module.item_tower))
    assert all(p.grad is None for p in module.user_tower.encoder.parameters())
    module.zero_grad(set_to_none=True)
    module.user_tower(users(), torch.zeros(4, 8)).square().sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(module.user_tower))
    assert all(p.grad is None for p in module.item_tower.encoder.parameters())


def test_a_frozen_item_tower_keeps_the_vectors_of_the_base(tiny_bert):
    module = build(tiny_bert, None, "lora").train()
    expected = TextEncoder(tiny_bert).encode(TEXTS)
    assert torch.equal(module.item_tower.encoder.encode(TEXTS), expected)
    assert not any(name.startswith("item_tower.encoder") for name in module.state_dict())
    assert module.user_tower.encoder.training
    assert not module.item_tower.encoder.running_model(torch.device("cpu")).training


def test_beside_a_side_network_and_above_frozen_layers(tiny_bert):
    tower = SideItemTower(tiny_bert, dim=8, max_tokens=9)
    tower.configure(VIEW)
    user = LanguageUserTower(peft=ADAPTERS["lora"](), frozen_layers=1)
    user.configure(VIEW, tower)
    assert user.encoder.max_tokens == 9
    trained = {name for name, p in user.encoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("layer.1." in name for name in trained)


@pytest.mark.parametrize(
    ("item", "user", "said"),
    [
        ({"tune": "full"}, {}, r"The user tower \(LanguageUserTower\).*trains the language model whole"),
        ({"dtype": "bfloat16"}, {}, r"dtype bfloat16"),
        ({"peft": peft.LoraConfig(bias="all")}, {}, r"bias is 'all'"),
        ({}, {"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa'.*both towers share"),
        ({}, {"target_modules": ["nothing"]}, r"The user tower \(LanguageUserTower\): The adapter LoraConfig"),
    ],
)
def test_refusals(tiny_bert, item, user, said):
    module = TwoTower(TextItemTower(tiny_bert, dim=8, **item), LanguageUserTower(peft=peft.LoraConfig(r=2, **user)))
    with pytest.raises(AdapterError, match=said):
        module.build(VIEW)


CONFIG = """
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower: {class_path: lightning_rec.towers.TextItemTower, init_args: {language_model: TINY_BERT, dim: 16ITEM}}
    user_tower: {class_path: lightning_rec.towers.LanguageUserTower, init_args: {language_model: shared, peft: USER}}
    language_lr: 0.02
data:
  class_path: lightning_rec.EcommerceDataModule
  init_args:
    reader:
      class_path: lightning_rec.data.readers.Files
      init_args: {interactions: SHOP/interactions.csv, items: SHOP/items.csv, users: SHOP/users.csv}
    min_rating: 0
    max_history: 8
    batch_size: 16
    supervision: random
    user_template: "{city}, {age}. Likes {titles}. Says: {reviews}"
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, logger: false}
seed_everything: 3
"""
LORA = "{class_path: peft.LoraConfig, init_args: {r: 2}}"
HOULSBY = "{class_path: lightning_rec.towers.BottleneckConfig, init_args: {placement: houlsby, width: 3}}"


def fit(folder, tiny_bert, item, user, *options):
    folder.mkdir()
    text = CONFIG.replace("TINY_BERT", tiny_bert).replace("SHOP", str(SHOP)).replace("USER", user)
    (folder / "run.yaml").write_text(text.replace("16ITEM", f"16, peft: {item}" if item else "16"))
    main(["fit", "--config", str(folder / "run.yaml"), "--trainer.default_root_dir", str(folder), *options])
    # a resumed run goes on in the folder of its checkpoint
    return max(folder.parent.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("item", "user"),
    [
        pytest.param(LORA, LORA, id="lora-lora"),
        pytest.param("", HOULSBY, id="frozen-houlsby", marks=pytest.mark.slow),
    ],
)
def test_fit_resume_test_and_export(tiny_bert, tmp_path, item, user):
    whole = fit(tmp_path / "whole", tiny_bert, item, user, "--trainer.max_epochs", "2")
    half = fit(tmp_path / "half", tiny_bert, item, user, "--trainer.max_epochs", "1")
    resumed = fit(tmp_path / "more", tiny_bert, item, user, "--trainer.max_epochs", "2", "--ckpt_path", str(half))
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (whole, resumed))
    assert set(one) == set(other)
    assert any(name.startswith("user_tower.encoder.") for name in one)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=name)
        assert ".encoder." not in name or "lora_" in name or "bottleneck_" in name, "adapters alone are written"
    main(["test", "--config", str(tmp_path / "more" / "run.yaml"), "--ckpt_path", str(resumed)])
    fitted = open_run(resumed).module
    for merge in [False, True] if user == LORA else [False]:
        export(resumed, tmp_path / "out", merge=merge, progress=False)
        artefact = Artefact.read(tmp_path / "out")
        assert {"user_adapter"} <= set(artefact.manifest.parts)
        assert ("user_language_model" in artefact.manifest.parts) == merge
        tower = artefact.towers.user
        for part, text in ((tower, TEXTS), (artefact.towers.item, TEXTS)):
            mine = fitted.user_tower if part is tower else fitted.item_tower
            torch.testing.assert_close(part.encoder.encode(text), mine.encoder.encode(text), atol=1e-5, rtol=0)
        expected = fitted.user_tower(users(), torch.zeros(4, 16))
        torch.testing.assert_close(tower(users(), torch.zeros(4, 16)), expected, atol=1e-5, rtol=0)
        assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
