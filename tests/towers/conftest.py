"""Tiny language models of every family, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["red", "blue", "green", "shoe", "boot", "film", "book", "dog", "cat", "space", "war", "love", "news", "city"]
WORDS += ["river", "song", "old", "new", "big", "small", "the", "a", "of"]
ENCODERS = ["bert", "minilm", "roberta", "distilbert", "deberta-v2", "modernbert", "t5", "t5-encoder"]
DECODERS = ["gpt2", "llama", "qwen2", "qwen3"]


def _model(family: str, words: int) -> Any:
    import transformers as hf

    small = {"vocab_size": words, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    inner = {**small, "intermediate_size": 24}
    marks = {"bos_token_id": 2, "eos_token_id": 3}
    pairs = {**inner, **marks, "num_key_value_heads": 1, "max_position_embeddings": 48, "pad_token_id": None}
    # windows far smaller than the texts, on some of the layers
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "head_dim": 8}
    if family == "bert":
        return hf.BertModel(hf.BertConfig(**inner, max_position_embeddings=48, pad_token_id=1))
    if family == "minilm":
        return hf.BertModel(hf.BertConfig(**{**inner, "num_hidden_layers": 4}, max_position_embeddings=48))
    if family == "roberta":
        return hf.RobertaModel(hf.RobertaConfig(**inner, max_position_embeddings=50, pad_token_id=1))
    if family == "distilbert":
        config = hf.DistilBertConfig(vocab_size=words, dim=16, hidden_dim=24, n_layers=3, n_heads=2, pad_token_id=1)
        config.max_position_embeddings = 48
        return hf.DistilBertModel(config)
    if family == "deberta-v2":
        options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
        options |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
        return hf.DebertaV2Model(hf.DebertaV2Config(**inner, **options, max_position_embeddings=48, pad_token_id=1))
    if family == "modernbert":
        options = {"local_attention": 4, "global_attn_every_n_layers": 2, "max_position_embeddings": 48}
        marks = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        return hf.ModernBertModel(hf.ModernBertConfig(**inner, **options, **marks))
    if family in ("t5", "t5-encoder"):
        config = hf.T5Config(vocab_size=words, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, pad_token_id=1)
        return (hf.T5Model if family == "t5" else hf.T5EncoderModel)(config)
    if family == "gpt2":
        return hf.GPT2Model(hf.GPT2Config(vocab_size=words, n_embd=16, n_layer=3, n_head=2, n_positions=48, **marks))
    if family == "llama":
        return hf.LlamaModel(hf.LlamaConfig(**pairs))
    if family == "qwen2":
        return hf.Qwen2Model(hf.Qwen2Config(**pairs, **{k: v for k, v in window.items() if k != "head_dim"}))
    return hf.Qwen3Model(hf.Qwen3Config(**pairs, **window))


def make_family(folder: Path, family: str) -> str:
    """Writes a tiny model and its tokenizer; no decoder but Qwen2 has a padding token, none a length limit."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "<unk>", "eos_token": "</s>"}
    if family in ENCODERS:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
        named |= {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    if family == "qwen2":  # transformers reads its folder as byte pairs whatever is in it: bytes, then, and no pairs
        from transformers import Qwen2Tokenizer

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Qwen2Tokenizer(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[])
    torch.manual_seed(7)
    model = _model(family, len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():  # far from the small first values, so that positions matter
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory):
    """Gives the folder of a family's tiny model, made once."""
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp("families") / family, family)
        return made[family]

    return folder


@pytest.fixture(params=[*ENCODERS, *DECODERS])
def family(request: pytest.FixtureRequest) -> str:
    """The name of one family after the other."""
    return request.param
