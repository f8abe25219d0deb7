"""Masked-token and next-token training: the loss by hand, seeds, freezing, and what does not fit."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from lightning_rec.callbacks import ExampleTable, LearningRates
from lightning_rec.pretraining import ContrastiveItems, LanguageModelling, PretrainingTexts
from lightning_rec.pretraining.masking import mask_tokens
from lightning_rec.pretraining.texts import TextBatch

TEXTS = ["red shoe of love", "the old book and the new dog of the city", "war", ""]


def built(model, **options):
    torch.manual_seed(0)
    module = LanguageModelling(model, **options)
    module.configure_model()
    module.prepare(TEXTS)
    return module.eval()


def by_hand(logits, targets):
    """Cross-entropy of each target, in Python's own numbers."""
    rows = logits.double().tolist()
    return [math.log(sum(map(math.exp, row))) - row[target] for row, target in zip(rows, targets, strict=True)]


@torch.no_grad()
def test_masked_loss_is_that_of_a_count_by_hand(masked_bert):
    module = built(masked_bert)
    assert module.objective == "masked"
    assert module.head_is_new
    batch = TextBatch(torch.arange(4))
    losses, hits = module.losses(batch, torch.Generator().manual_seed(2))
    ids, mask = module.tokens(batch)
    hidden, asked = mask_tokens(ids, mask, module._vocabulary, generator=torch.Generator().manual_seed(2))
    logits = module.model(input_ids=hidden, attention_mask=mask).logits
    assert asked.sum(1).tolist() == [1, 2, 1, 0], "15 % of 4 and 10 words, at least one, and none of an empty text"
    assert losses.tolist() == pytest.approx(by_hand(logits[asked], ids[asked].tolist()), abs=1e-5)
    assert hits.tolist() == (logits[asked].argmax(-1) == ids[asked]).tolist()
    figures = module.figures(losses.mean(), hits.float().mean())
    assert float(figures["perplexity"]) == pytest.approx(math.exp(float(losses.mean())))


@torch.no_grad()
def test_next_token_loss_is_that_of_transformers(tiny_gpt2):
    module = built(tiny_gpt2)
    assert module.objective == "next_token"
    ids, mask = module.tokens(TextBatch(torch.arange(3)))
    losses, _ = module.losses(TextBatch(torch.arange(3)))
    assert len(losses) == 3 + 9, "each word of a text but its first"
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    whole = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    torch.testing.assert_close(losses.mean(), whole(input_ids=ids, attention_mask=mask, labels=labels).loss)


@torch.no_grad()
def test_a_batch_with_nothing_to_find(masked_bert, tiny_gpt2):
    for model in (masked_bert, tiny_gpt2):
        module = built(model)
        losses, hits = module.losses(TextBatch(torch.tensor([3])))
        assert len(losses) == len(hits) == 0
        assert float(module.training_step(TextBatch(torch.tensor([3])), 0)) == 0


@torch.no_grad()
def test_packing_asks_for_the_whole_of_long_texts(tiny_gpt2):
    cut, whole = built(tiny_gpt2, max_tokens=4), built(tiny_gpt2, max_tokens=4, pack=True)
    batch = TextBatch(torch.tensor([1, 2]))
    assert len(cut.losses(batch)[0]) == 3
    ids, mask = whole.tokens(batch)
    end = whole.text.tokenizer.eos_token_id
    assert ids.shape == (4, 4)
    assert ids.flatten()[:13].tolist().count(end) == 2, "the end of each text is said"
    assert int(mask.sum()) == 13


def test_the_head_is_tied_and_trained(masked_bert, reviewed, fit):
    module = LanguageModelling(masked_bert, lr=0.01, head_lr=0.02)
    fit(module, PretrainingTexts(source=reviewed(), batch_size=4))
    model = module.model
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    rates = {group["name"]: group["initial_lr"] for group in module.trainer.optimizers[0].param_groups}
    assert rates == {"language": 0.01, "language_no_decay": 0.01, "towers": 0.02, "towers_no_decay": 0.02}


def test_frozen_layers_stay_as_they_are(masked_bert, reviewed, fit):
    module = LanguageModelling(masked_bert, frozen_layers=1, lr=0.01)
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, PretrainingTexts(source=reviewed(), batch_size=4))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert any("encoder.layer.1." in name for name in changed)
    assert any("cls.predictions.transform" in name for name in changed)
    assert not any("layer.0." in name or "embeddings" in name or "decoder.weight" in name for name in changed)
    module.train()
    assert not module.model.bert.embeddings.dropout.training, "dropout below what is trained is off"
    assert module.model.bert.encoder.layer[1].output.dropout.training


def test_an_adapter_trains_alone(tiny_gpt2, reviewed, fit):
    adapter = peft.LoraConfig(r=2, target_modules=["c_attn"])
    module = LanguageModelling(tiny_gpt2, peft=adapter, lr=0.1)
    data = PretrainingTexts(source=reviewed(), batch_size=4)
    fit(module, data)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained), "the head of GPT-2 is tied to its embeddings, which are frozen"


def test_the_same_seed_gives_the_same_weights(masked_bert, reviewed, fit):
    found = []
    for seed, share in ((5, 0.2), (5, 0.2), (6, 0.2)):
        module = LanguageModelling(masked_bert, lr=0.01)
        fit(module, PretrainingTexts(source=reviewed(), batch_size=4, validation_share=share), seed=seed)
        found.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_validation_asks_the_same_each_time_and_draws_nothing_from_training(masked_bert, reviewed, fit):
    data = PretrainingTexts(source=reviewed(), validation_share=0.4, batch_size=4)
    module = LanguageModelling(masked_bert)
    trainer = fit(module, data)
    state = torch.get_rng_state()
    first = trainer.validate(module, data, verbose=False)[0]
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.validate(module, data, verbose=False)[0] == first
    assert set(first) == {"val/loss", "val/perplexity", "val/accuracy"}
    tested = trainer.test(module, data, verbose=False)[0]
    assert tested["test/loss"] == first["val/loss"]


def test_a_run_is_logged_and_the_table_of_examples_stays_away(masked_bert, reviewed, fit, tmp_path):
    module = LanguageModelling(masked_bert)
    data = PretrainingTexts(source=reviewed(), batch_size=4)
    callbacks = [ExampleTable(), LearningRates()]
    fit(module, data, logger=TensorBoardLogger(tmp_path), callbacks=callbacks, log_every_n_steps=1)
    found = EventAccumulator(module.logger.log_dir).Reload().Tags()
    assert {"train/loss", "val/loss", "val/perplexity", "val/accuracy"} <= set(found["scalars"])
    assert found["tensors"] == []


def test_training_lowers_the_loss(tiny_gpt2, reviewed, fit):
    data = PretrainingTexts(source=reviewed(), validation_share=0.0, batch_size=4)
    module = LanguageModelling(tiny_gpt2, lr=0.01, schedule="constant")
    data.setup("fit")
    module.configure_model()
    module.prepare(data.texts)
    batch = TextBatch(torch.arange(len(data.texts)))
    before = float(module.eval().losses(batch)[0].mean())
    fit(module, data, epochs=20)
    assert float(module.eval().losses(batch)[0].mean()) < 0.7 * before


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(masked_bert, reviewed, fit, precision):
    module = LanguageModelling(masked_bert, gradient_checkpointing=True)
    trainer = fit(module, PretrainingTexts(source=reviewed(), batch_size=4), precision=precision)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


REFUSED = [
    ("masked_bert", {"objective": "next_token"}, r"objective is next_token, but masked-bert .* was made for masked"),
    ("tiny_gpt2", {"objective": "masked"}, r"objective is masked, but tiny-gpt2 .* name an encoder such as BERT"),
    ("tiny_bert", {}, r"needs a mask token .* and this tokenizer has none"),
    ("masked_bert", {"mask_share": 0.0}, r"mask_share is 0.0"),
]


@pytest.mark.parametrize(("model", "options", "message"), REFUSED)
def test_what_does_not_fit_is_said(request, model, options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelling(request.getfixturevalue(model), **options)


def test_an_adapter_that_cannot_be_merged_is_refused_before_training(masked_bert):
    module = LanguageModelling(masked_bert, peft=peft.PrefixTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"PrefixTuningConfig cannot .* such as peft.LoraConfig"):
        module.configure_model()


def test_models_that_know_no_tokens_to_find_are_refused(tmp_path, monkeypatch, masked_bert):
    from lightning_rec.pretraining import language_modelling

    monkeypatch.setattr(language_modelling, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", {})
    monkeypatch.setattr(language_modelling, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
    with pytest.raises(ValueError, match=r"made neither with masked tokens nor with next tokens"):
        LanguageModelling(masked_bert)


def test_batches_of_another_kind_are_refused(masked_bert, reviewed):
    with pytest.raises(ValueError, match=r"LanguageModelling cannot read the batches of EcommerceDataModule"):
        LanguageModelling(masked_bert).check_data(reviewed())
    with pytest.raises(ValueError, match=r"set data.class_path to lightning_rec.pretraining.PretrainingPairs"):
        ContrastiveItems(masked_bert).check_data(PretrainingTexts(source=reviewed()))
