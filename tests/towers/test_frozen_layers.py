from pathlib import Path

import peft
import pytest
import torch

from lightning_rec.cli import main
from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import open_run
from lightning_rec.towers import TextItemTower
from lightning_rec.towers.bottleneck import BottleneckConfig
from lightning_rec.towers.language import TextEncoder

TESTS = Path(__file__).parent.parent
TEXTS = ["", "red shoe", "the old dog of the new city", "blue", "red shoe", "a big red river song of the small cat"]
ROWS = torch.tensor([5, 1, 3, 2])
WORKS = ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "qwen3"]


def encoder_of(folder, kind, cache, **options):
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    how = {"peft": adapter} if kind == "adapter" else {"tune": "full"}
    return TextEncoder(folder, frozen_layers=2, cache_dir=str(cache), **how, **options)


def gradients(encoder, table):
    encoder.zero_grad()
    vectors = encoder.encode_table(table, ROWS)
    vectors.square().sum().backward()
    return vectors.detach(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("name", WORKS)
def test_cached_is_uncached_forward_and_backward(name, kind, family_folder, tmp_path):
    encoder = encoder_of(family_folder(name), kind, tmp_path)
    table = encoder.tokenise(TEXTS)
    kept = encoder.with_states(table)
    encoder.train()
    for layer in encoder._bottom.top:  # the top's dropout draws anew every time
        for module in layer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for module in layer.modules():
            for option in ("attention_dropout", "dropout", "attn_dropout"):
                if isinstance(getattr(module, option, None), float):
                    setattr(module, option, 0.0)
    whole, from_whole = gradients(encoder, table)
    ran = []
    hooks = [layer.register_forward_pre_hook(lambda module, _: ran.append(module)) for layer in encoder._bottom.top]
    resumed, from_resumed = gradients(encoder, kept)
    assert ran
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(resumed, whole, atol=1e-5, rtol=0)
    assert from_whole.keys() == from_resumed.keys()
    for key, gradient in from_whole.items():
        assert gradient.any(), key
        torch.testing.assert_close(from_resumed[key], gradient, atol=1e-5, rtol=1e-4)
    path = f"{encoder._bottom.name}."
    below = [n for n in from_whole if f"{path}0." in n or f"{path}1." in n or "embed" in n or "wte" in n]
    assert not below, "nothing of the bottom is trained"


def test_a_step_does_read_the_cache_and_runs_no_layer_below(tiny_bert, tmp_path):
    encoder = TextEncoder(tiny_bert, tune="full", frozen_layers=1, cache_dir=str(tmp_path)).eval()
    kept = encoder.with_states(encoder.tokenise(TEXTS))
    before = encoder.encode_table(kept, ROWS)
    calls = []
    encoder.model.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(encoder.encode_table(kept, ROWS), before)
    assert not calls
    kept.states[:] += torch.randn(16).numpy()
    assert (encoder.encode_table(kept, ROWS) - before).abs().max() > 1e-2
    encoder.encode(["red"])
    assert calls, "a new text goes through every layer"


def test_the_states_are_made_once_and_lie_on_disk(tiny_bert, tmp_path, monkeypatch):
    encoder = TextEncoder(tiny_bert, tune="full", frozen_layers=1, cache_dir=str(tmp_path))
    first = encoder.with_states(encoder.tokenise(TEXTS))
    (file,) = (tmp_path / "hidden_states").glob("*")
    other = TextEncoder(tiny_bert, tune="full", frozen_layers=1, cache_dir=str(tmp_path))
    monkeypatch.setattr("lightning_rec.towers.frozen_layers.as_stored", None)  # would fail if it were made again
    second = other.with_states(other.tokenise(TEXTS))
    assert (first.states == second.states).all()
    assert file.stat().st_size >= first.tokens.shape[0] * 16 * 4
    assert not list((tmp_path / "hidden_states").glob(".*"))


def test_half_precision_on_disk(tiny_bert, tmp_path):
    single = TextEncoder(tiny_bert, tune="full", frozen_layers=1, cache_dir=str(tmp_path)).eval()
    half = TextEncoder(tiny_bert, tune="full", frozen_layers=1, cache_dir=str(tmp_path), cache_dtype="float16").eval()
    kept = half.with_states(half.tokenise(TEXTS))
    assert kept.states.dtype == "float16"
    torch.testing.assert_close(half.encode_table(kept, ROWS), single.encode(TEXTS)[ROWS], atol=5e-3, rtol=0)


def test_the_bottom_stays_in_evaluation_mode(tiny_model, tmp_path):
    encoder = TextEncoder(tiny_model, peft=peft.LoraConfig(r=2), frozen_layers=1, cache_dir=str(tmp_path)).train()
    assert all(not module.training for layer in encoder._bottom.bottom for module in layer.modules())
    assert all(module.training for layer in encoder._bottom.top for module in layer.modules())
    encoder.eval()
    assert not any(module.training for module in encoder.modules())


@pytest.mark.parametrize("recompute", [True, "passes"])
def test_with_recomputation_the_gradient_is_the_same(recompute, family_folder, tmp_path):
    plain = encoder_of(family_folder("gpt2"), "adapter", tmp_path).eval()
    again = encoder_of(family_folder("gpt2"), "adapter", tmp_path, gradient_checkpointing=recompute)
    again.load_state_dict(plain.state_dict())
    again.train()
    for module in again.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    table = plain.tokenise(TEXTS)
    expected = gradients(plain, plain.with_states(table))[1]
    found = gradients(again, again.with_states(table))[1]
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused(tiny_bert, family_folder):
    with pytest.raises(ValueError, match="between 0 and 1 of them"):
        TextEncoder(tiny_bert, tune="full", frozen_layers=2)
    with pytest.raises(ValueError, match="virtual tokens enter at the bottom"):
        TextEncoder(tiny_bert, peft=peft.PromptTuningConfig(num_virtual_tokens=2), frozen_layers=1)
    with pytest.raises(ValueError, match="one of the two"):
        TextEncoder(tiny_bert, peft=peft.LoraConfig(exclude_modules=["query"]), frozen_layers=1)
    for name in ("t5", "deberta-v2"):
        with pytest.raises(ValueError, match="share relative positions"):
            TextEncoder(family_folder(name), tune="full", frozen_layers=1)


@pytest.mark.parametrize(
    "options",
    [
        {"tune": "full"},
        {"peft": peft.LoraConfig(r=2)},
        {"peft": peft.IA3Config(target_modules=["query", "value"], feedforward_modules=[])},
        {"peft": BottleneckConfig(width=4)},
    ],
    ids=["full", "lora", "ia3", "bottleneck"],
)
def test_in_an_item_tower(tiny_bert, tmp_path, options):
    view = CatalogueView(n_rows=len(TEXTS), texts=TEXTS)
    tower = TextItemTower(tiny_bert, dim=8, frozen_layers=1, cache_dir=str(tmp_path), **options)
    tower.configure(view)
    tower.prepare(view)
    assert tower.tokens.states is not None
    trained = [name for name, parameter in tower.encoder.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("layer.1." in name for name in trained)
    tower.eval()
    vectors = tower(ItemBatch(torch.arange(len(TEXTS)), whole=True))
    torch.testing.assert_close(tower.encode_texts(TEXTS), vectors, atol=1e-5, rtol=0)


def test_from_the_command_line_to_the_artefact(tiny_bert, tmp_path):
    text = (TESTS / "configs" / "text_pooled.yaml").read_text()
    assert "TINY_BERT, dim: 16" in text
    text = text.replace("TINY_BERT, dim: 16", f"{tiny_bert}, dim: 16, tune: full, frozen_layers: 1")
    (tmp_path / "given.yaml").write_text(text.replace("SHOP", str(TESTS / "data" / "files" / "shop")))
    main(["fit", "--config", str(tmp_path / "given.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")])
    checkpoint = next((tmp_path / "run").rglob("last.ckpt"))
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert any("encoder.layer.1." in name for name in names)
    assert not any("encoder.layer.0." in name or "embeddings" in name for name in names), "what is frozen is not stored"
    export(checkpoint, tmp_path / "out", progress=False)
    fitted, artefact = open_run(checkpoint), Artefact.read(tmp_path / "out")
    texts = [*artefact.texts[1:4], "a new red shoe", ""]
    expected = fitted.module.item_tower.encode_texts(texts)
    torch.testing.assert_close(artefact.encode_texts(texts), expected, atol=1e-5, rtol=0)
