"""Pretraining by the command line, from the configs that are there: fit, resume, test, export, and a recommender."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from lightning_rec.cli import main
from lightning_rec.towers.language import TextEncoder

CONFIGS = Path(__file__).parents[2] / "configs" / "pretraining"
TEXTS = ["red shoe", "the old book of a new dog", "war"]
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=2",
    "--data.batch_size=4",
    "--data.validation_share=0.2",
    "--model.warmup_steps=0",
]
RECOMMENDER = """
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower: {class_path: lightning_rec.towers.TextItemTower, init_args: {dim: 8, language_model: %s}}
    user_tower: {class_path: lightning_rec.towers.SequenceUserTower, init_args: {blocks: 1, heads: 1}}
data: {class_path: lightning_rec.EcommerceDataModule, init_args: {path: %s, batch_size: 8}}
trainer: {accelerator: cpu, max_epochs: 1, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(name, model, sequences, *more):
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.path", sequences, "--model.language_model", model]
    return ["fit", *options, *QUIET, "--trainer.default_root_dir", "runs", *more]


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


def check_vectors(output, base):
    """A tower reads the folder as plain transformers does, and finds something else than in the base."""
    vectors = pooled(output)
    torch.testing.assert_close(TextEncoder(str(output), max_tokens=24).encode(TEXTS), vectors, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(vectors, pooled(base), atol=1e-4), "it has learned"
    return vectors


def test_fit_and_then_a_recommender(masked_bert, sequences, capsys):
    done = main(command("masked", masked_bert, sequences, "--model.frozen_layers=1"))
    folder = Path(done.trainer.checkpoint_callback.dirpath)
    output = folder.parent / "pretrained"
    best = Path(done.trainer.checkpoint_callback.best_model_path)
    assert json.loads((output / "pretraining.json").read_text())["checkpoint"] == best.name
    vectors = check_vectors(output, masked_bert)
    Path("recommender.yaml").write_text(RECOMMENDER % (output, sequences))
    fitted = main(["fit", "--config", "recommender.yaml", "--trainer.default_root_dir", "runs/recommender"])
    raw = fitted.model.item_tower.encoder.encode(TEXTS)
    torch.testing.assert_close(raw, vectors, atol=1e-5, rtol=1e-4)
    main(["test", "--ckpt_path", str(best)])
    written = json.loads((folder.parent / "test_metrics.json").read_text())
    assert written["protocol"] == "2 texts held out of 8 (seed 0)."
    assert set(written["metrics"]) == {"test/loss", "test/perplexity", "test/accuracy"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(best)])
    assert "Pretraining predicts nothing" in capsys.readouterr().err


def test_the_config_of_next_tokens(tiny_gpt2, sequences):
    done = main(command("next_token", tiny_gpt2, sequences))
    check_vectors(done.model.output_folder(), tiny_gpt2)


def test_a_resumed_run_is_the_run_that_never_stopped(masked_bert, sequences):
    keep = ["--checkpoint.every_n_train_steps=1", "--checkpoint.monitor=null", "--model.schedule=constant"]
    whole = main(command("masked", masked_bert, sequences, *keep, "--model.output=whole"))
    stopped = [*keep, "--model.output=resumed", "--trainer.default_root_dir=stopped"]
    main(command("masked", masked_bert, sequences, *stopped, "--trainer.max_steps=3"))
    assert not same(weights("whole"), weights("resumed"))
    resumed = main(command("masked", masked_bert, sequences, *stopped, "--ckpt_path", "last"))
    assert resumed.trainer.global_step == whole.trainer.global_step > 3
    assert same(weights("whole"), weights("resumed")), "what it wrote before is replaced"


def test_a_stopped_run_is_written_by_export(masked_bert, sequences):
    lora = ["--model.peft.class_path=peft.LoraConfig", '--model.peft.init_args={"r": 2, "target_modules": ["query"]}']
    done = main(command("contrastive", masked_bert, sequences, "--model.frozen_layers=1", "--model.lr=0.05", *lora))
    run = done.model.output_folder().parent
    check_vectors(run / "pretrained", masked_bert)
    best = done.trainer.checkpoint_callback.best_model_path
    main(["export", best, "again"])
    assert same(weights("again"), weights(run / "pretrained"))
    main(["export", str(run / "checkpoints" / "last.ckpt"), "last"])
    torch.testing.assert_close(pooled("last"), done.model.text.eval().encode(TEXTS), atol=1e-5, rtol=1e-4)


def test_models_and_data_that_do_not_go_together(masked_bert, sequences, capsys):
    options = ["--data.class_path=lightning_rec.pretraining.PretrainingPairs"]
    with pytest.raises(SystemExit):
        main(command("masked", masked_bert, sequences, *options))
    assert "set data.class_path to lightning_rec.pretraining.PretrainingTexts" in capsys.readouterr().err
