"""Contrastive training on items: the loss by hand, what is no negative, and what it does to the vectors."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch.nn import functional as F

from lightning_rec.pretraining import ContrastiveItems, PretrainingPairs
from lightning_rec.pretraining.contrastive import contrast
from lightning_rec.pretraining.pairs import PairBatch

TEXTS = ["red shoe", "blue boot of the city", "green film", "old book and a new dog"]


def unit(rows):
    return F.normalize(torch.tensor(rows), dim=-1)


def test_loss_by_hand():
    first, second = unit([[1.0, 0.0], [0.0, 1.0]]), unit([[1.0, 0.0], [1.0, 1.0]])
    losses, hits = contrast(first, second, torch.zeros(2, 2, dtype=torch.bool), temperature=0.5)
    near = 2 / math.sqrt(2)  # a cosine of 1/√2 over 0.5
    rows = [[2.0, near], [0.0, near]]
    forth = [math.log(sum(map(math.exp, row))) - row[place] for place, row in enumerate(rows)]
    columns = list(zip(*rows, strict=True))
    back = [math.log(sum(map(math.exp, column))) - column[place] for place, column in enumerate(columns)]
    assert losses.tolist() == pytest.approx([(one + two) / 2 for one, two in zip(forth, back, strict=True)])
    assert hits.tolist() == [True, True]


def test_equal_scores_are_no_hit():
    same = unit([[1.0, 0.0], [1.0, 0.0]])
    losses, hits = contrast(same, same, torch.zeros(2, 2, dtype=torch.bool), temperature=0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert hits.tolist() == [False, False]


def test_a_known_positive_is_no_negative():
    """Whatever an excluded partner's vector is, it changes neither loss nor gradient of that anchor's row."""
    torch.manual_seed(0)
    first, second = F.normalize(torch.randn(3, 4), dim=-1), F.normalize(torch.randn(3, 4), dim=-1)
    excluded = torch.zeros(3, 3, dtype=torch.bool)
    excluded[0, 1] = True
    found, _ = contrast(first, second, excluded, 0.1)
    logits = (first @ second.T / 0.1).double()
    row = logits[0, [0, 2]]
    column = logits[:, 0]
    assert float(found[0]) == pytest.approx(
        float((row.logsumexp(0) - row[0] + column.logsumexp(0) - column[0]) / 2), abs=1e-5
    )
    first.requires_grad_(True)
    second.requires_grad_(True)
    contrast(first, second, excluded, 0.1)[0].sum().backward()
    assert torch.isfinite(first.grad).all()
    assert torch.isfinite(second.grad).all()


def test_all_others_known_leaves_nothing_to_tell_apart():
    excluded = ~torch.eye(2, dtype=torch.bool)
    losses, hits = contrast(unit([[1.0, 0.0], [0.0, 1.0]]), unit([[0.0, 1.0], [1.0, 0.0]]), excluded, 0.1)
    assert losses.tolist() == [0, 0]
    assert hits.tolist() == [True, True]


@pytest.mark.parametrize("model", ["masked_bert", "tiny_gpt2"])
def test_texts_go_through_encoder_and_pooling(model, request):
    module = ContrastiveItems(request.getfixturevalue(model), pooling="last", temperature=0.2)
    module.configure_model()
    module.prepare(TEXTS)
    module.eval()
    batch = PairBatch(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.zeros(2, 2, dtype=torch.bool))
    vectors = F.normalize(module.text.encode(TEXTS), dim=-1)
    wanted, _ = contrast(vectors[[0, 2]], vectors[[1, 0]], batch.excluded, 0.2)
    torch.testing.assert_close(module.losses(batch)[0], wanted, atol=1e-5, rtol=1e-5)


def test_passes_have_the_plain_gradient(masked_bert):
    grads = []
    for options in ({}, {"gradient_checkpointing": "passes", "token_budget": 8}):
        module = ContrastiveItems(masked_bert, **options)
        module.configure_model()
        module.prepare(TEXTS)
        module.eval()
        batch = PairBatch(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.zeros(2, 2, dtype=torch.bool))
        module.losses(batch)[0].mean().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frozen", [0, 1])
def test_training_brings_pairs_together(masked_bert, reviewed, fit, frozen, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_REC_CACHE", str(tmp_path / "cache"))
    data = PretrainingPairs(source=reviewed(), window=1, batch_size=4, validation_share=0.0)
    module = ContrastiveItems(masked_bert, frozen_layers=frozen, lr=0.01, temperature=0.1, schedule="constant")
    data.setup("fit")
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.prepare(data.texts)
    (batch,) = data.train_dataloader()
    start = float(module.eval().losses(batch)[0].mean().detach())
    fit(module, data, epochs=15)
    assert float(module.eval().losses(batch)[0].mean().detach()) < 0.7 * start
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert any(".layer.1." in name for name in changed)
    assert any("embeddings" in name or ".layer.0." in name for name in changed) == (frozen == 0)


def test_figures_of_validation(masked_bert, reviewed, fit):
    data = PretrainingPairs(source=reviewed(), window=2, validation_share=0.4, batch_size=2)
    module = ContrastiveItems(masked_bert)
    trainer = fit(module, data)
    found = trainer.validate(module, data, verbose=False)[0]
    assert set(found) == {"val/loss", "val/recall@1"}
    batches = list(data.val_dataloader())
    losses, hits = zip(*(module.eval().losses(batch) for batch in batches), strict=True)
    assert found["val/loss"] == pytest.approx(float(torch.cat(losses).mean().detach()), abs=1e-6)
    assert found["val/recall@1"] == pytest.approx(float(torch.cat(hits).float().mean()))


def test_adapters(masked_bert, reviewed, fit):
    module = ContrastiveItems(masked_bert, peft=peft.LoraConfig(r=2, target_modules=["query", "value"]), lr=0.01)
    fit(module, PretrainingPairs(source=reviewed(), batch_size=4))
    assert all("lora_" in name for name, parameter in module.named_parameters() if parameter.requires_grad)
    module = ContrastiveItems(masked_bert, peft=peft.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"PromptTuningConfig cannot go: .* such as peft.LoraConfig"):
        module.configure_model()


def test_a_temperature_of_zero_is_refused(masked_bert):
    with pytest.raises(ValueError, match=r"temperature is 0"):
        ContrastiveItems(masked_bert, temperature=0.0)
