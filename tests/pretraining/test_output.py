"""The folder that pretraining leaves: plain, whole, with any adapter merged, and of the right weights."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertModel

from lightning_rec.pretraining import ContrastiveItems, LanguageModelling, PretrainingPairs, PretrainingTexts
from lightning_rec.pretraining.output import weights_of, whole_model
from lightning_rec.towers.language import TextEncoder

TEXTS = ["red shoe", "the old book of a new dog", "war"]


def pooled(folder, texts=TEXTS):
    """Mean vectors as plain transformers makes them, one text at a time."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack(
            [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        )


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_of_something_else_is_refused_before_training(masked_bert, reviewed, fit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    module = LanguageModelling(masked_bert, output=str(tmp_path / "mine"))
    with pytest.raises(ValueError, match=r"name a new folder as model.output"):
        fit(module, PretrainingTexts(source=reviewed(), batch_size=4))
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("kind", ["words", "pairs"])
def test_an_adapter_is_merged(kind, masked_bert, reviewed, fit, tmp_path):
    adapter = peft.LoraConfig(r=2, target_modules=["query", "output.dense"])
    options = {"peft": adapter, "lr": 0.05, "output": str(tmp_path / "out")}
    if kind == "words":
        module, data = LanguageModelling(masked_bert, **options), PretrainingTexts(source=reviewed(), batch_size=4)
    else:
        module, data = ContrastiveItems(masked_bert, **options), PretrainingPairs(source=reviewed(), batch_size=4)
    fit(module, data)
    model, tokenizer = module.eval().language_model(), AutoTokenizer.from_pretrained(masked_bert)
    with torch.no_grad():
        wanted = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
    torch.testing.assert_close(pooled(tmp_path / "out"), torch.stack(wanted), atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name in weights(tmp_path / "out"))
    assert isinstance(model, peft.PeftModel), "the module itself is as it was"
    before, after = weights(masked_bert), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("query.weight" in name or "output.dense.weight" in name for name in changed)


def test_without_a_best_checkpoint_the_last_step_is_written(masked_bert, reviewed, fit, tmp_path):
    module = LanguageModelling(masked_bert, lr=0.01, output=str(tmp_path / "out"))
    fit(module, PretrainingTexts(source=reviewed(), batch_size=4))
    assert json.loads((tmp_path / "out" / "pretraining.json").read_text())["checkpoint"] is None
    state = module.language_model().state_dict()
    written = weights(tmp_path / "out")
    assert all(torch.equal(written[name], value) for name, value in state.items())
    assert not list(tmp_path.glob(".out*")), "nothing is left beside it"
    fast = LanguageModelling(masked_bert, output=str(tmp_path / "fast"))
    fit(fast, PretrainingTexts(source=reviewed(), batch_size=4), fast_dev_run=True)
    assert not (tmp_path / "fast").exists()


def test_what_sentence_transformers_states_is_carried_over_where_it_holds(masked_bert, reviewed, fit, tmp_path):
    for name, pooling in (("same", "mean"), ("stated", None), ("other", "cls")):
        fit(
            ContrastiveItems(masked_bert, pooling=pooling, output=str(tmp_path / name)),
            PretrainingPairs(source=reviewed(), batch_size=4),
        )
    for name in ("same", "stated"):
        encoder = TextEncoder(str(tmp_path / name), pooling=None)
        assert (encoder.pooling, encoder.max_tokens) == ("mean", 24)
        assert (tmp_path / name / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "other" / "modules.json").exists(), "they state another pooling"


def test_a_pooler_is_the_base_s_own_or_absent(masked_bert, reviewed, fit, tmp_path):
    bare = tmp_path / "bare"
    BertModel.from_pretrained(masked_bert, add_pooling_layer=False).save_pretrained(bare)
    AutoTokenizer.from_pretrained(masked_bert).save_pretrained(bare)
    for name, base in (("with", masked_bert), ("without", str(bare))):
        module = LanguageModelling(base, lr=0.01, output=str(tmp_path / name))
        fit(module, PretrainingTexts(source=reviewed(), batch_size=4))
        mine, theirs = weights(tmp_path / name), weights(base)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine if key.startswith("pooler."))
    assert whole_model(bare).pooler is None
    assert whole_model(Path(masked_bert)).pooler is not None


def test_weights_come_back(masked_bert, reviewed, fit, tmp_path):
    module = LanguageModelling(masked_bert, lr=0.01, output=str(tmp_path / "out"))
    trainer = fit(module, PretrainingTexts(source=reviewed(), batch_size=4))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    first = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    moved = {name: value.clone() for name, value in module.state_dict().items()}
    with weights_of(module, tmp_path / "one.ckpt"):
        assert same(dict(module.state_dict()), first)
    assert same(dict(module.state_dict()), moved)


def test_a_checkpoint_of_something_else_is_refused(masked_bert, reviewed, fit, tmp_path):
    module = LanguageModelling(masked_bert, output=str(tmp_path / "out"))
    trainer = fit(module, PretrainingTexts(source=reviewed(), batch_size=4))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for other in (LanguageModelling(masked_bert, frozen_layers=1), ContrastiveItems(masked_bert)):
        with pytest.raises(RuntimeError, match=r"The checkpoint does not fit this"):
            other.on_load_checkpoint(torch.load(tmp_path / "one.ckpt", weights_only=True))
