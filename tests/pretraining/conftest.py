"""A tiny BERT with a mask token, a tiny shop whose every review is told apart, and short runs over both."""

from __future__ import annotations

import json

import pytest
import torch
from lightning import Trainer, seed_everything

from lightning_rec import EcommerceDataModule
from lightning_rec.data.readers import Files

SENTENCE_FILES = {
    "modules.json": [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ],
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
    "sentence_bert_config.json": {"max_seq_length": 24},
}
TITLES = ["red shoe", "blue boot", "green film", "old book", "new dog", "big cat", "small war", "space song"]


@pytest.fixture(scope="session")
def masked_bert(tmp_path_factory, tiny_bert) -> str:
    """The tiny BERT with a mask token, as a sentence-transformers folder with mean pooling."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "masked-bert"
    model, tokenizer = AutoModel.from_pretrained(tiny_bert), AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(3)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    for name, content in SENTENCE_FILES.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(scope="session")
def sequences(tmp_path_factory) -> str:
    """A folder that the e-commerce domain recognises: 12 users, 8 items."""
    folder = tmp_path_factory.mktemp("sequences")
    items = {str(row): {"title": title, "description": f"the {title} of love"} for row, title in enumerate(TITLES)}
    log = {f"u{user}": [(user * 3 + step * (1 + user % 3)) % 8 for step in range(7)] for user in range(12)}
    (folder / "shop.item.json").write_text(json.dumps(items))
    (folder / "shop.inter.json").write_text(json.dumps(log))
    return str(folder)


@pytest.fixture
def reviewed(tmp_path):
    """Makes a data module: three users with five events each, every event with a review of its own."""

    def make(**options) -> EcommerceDataModule:
        events = [(user, step, (user + step) % 6) for user in range(3) for step in range(5)]
        rows = [f"u{user},i{item},{1000 + step},wrote u{user} s{step}" for user, step, item in events]
        (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp,review", *rows]))
        titles = [f"i{row},{title}" for row, title in enumerate(TITLES[:6])]
        # an item with the text of another, and one that has none
        (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *titles, "i6,red shoe", "i7,"]))
        return EcommerceDataModule(Files(str(tmp_path / "log.csv"), str(tmp_path / "items.csv")), **options)

    return make


@pytest.fixture
def fit(tmp_path):
    """Makes a short run without checkpoints."""

    def run(module, data, epochs=1, seed=5, **options) -> Trainer:
        options = {"enable_checkpointing": False, "logger": False} | options
        trainer = Trainer(
            max_epochs=epochs,
            default_root_dir=tmp_path,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        seed_everything(seed, verbose=False)
        trainer.fit(module, data)
        return trainer

    return run
