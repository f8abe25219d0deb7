import json
import shutil

import pytest
import torch

from lightning_rec.towers.language import TextEncoder
from lightning_rec.towers.model_folder import with_sentence_files
from lightning_rec.towers.sentence_folder import SentenceSettings, sentence_settings

TEXTS = ["red shoe", "the old dog of the new city " * 5, "blue"]


@pytest.fixture
def stating(tmp_path, tiny_bert):
    """Makes a sentence-transformers folder around the tiny BERT."""

    def make(pooling, normalise=True, **transformer):
        folder = tmp_path / "stating"
        shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
        paths = ["", "1_Pooling", "2_Normalize"]
        modules = [
            {"idx": n, "name": str(n), "path": paths[n], "type": f"sentence_transformers.models.{kind}"}
            for n, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | pooling))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12} | transformer))
        return folder

    return make


def test_what_the_files_state_is_done(stating):
    folder = stating({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    assert sentence_settings(folder) == SentenceSettings("cls", True, 12, False)
    encoder = TextEncoder(str(folder), pooling=None)
    assert (encoder.pooling, encoder.normalise, encoder.max_tokens) == ("cls", True, 12)
    plain = TextEncoder(str(folder), pooling="cls", max_tokens=12)
    assert not plain.normalise
    expected = torch.nn.functional.normalize(plain.encode(TEXTS), dim=-1)
    torch.testing.assert_close(encoder.encode(TEXTS), expected)
    assert encoder.cache_key("x") != plain.cache_key("x"), "normalised vectors have a cache of their own"


def test_the_new_name_of_a_pooling_and_lower_case(stating):
    folder = stating({"pooling_mode": "lasttoken"}, normalise=False, do_lower_case=True)
    encoder = TextEncoder(str(folder), pooling=None)
    assert (encoder.pooling, encoder.normalise) == ("last", False)
    torch.testing.assert_close(encoder.encode(["RED Shoe"]), encoder.encode(["red shoe"]))


def test_any_other_folder_is_pooled_by_mean(tiny_bert):
    encoder = TextEncoder(tiny_bert, pooling=None)
    assert (encoder.pooling, encoder.normalise) == ("mean", False)
    torch.testing.assert_close(encoder.encode(TEXTS), TextEncoder(tiny_bert).encode(TEXTS))


def test_what_cannot_be_followed_is_said(stating):
    with pytest.raises(ValueError, match=r"states the pooling cls \+ mean"):
        sentence_settings(stating({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}))
    with pytest.raises(ValueError, match="states the pooling max"):
        sentence_settings(stating({"pooling_mode": "max"}))
    folder = stating({"pooling_mode": "mean"})
    (folder / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    with pytest.raises(ValueError, match="prompt 'query' before every text"):
        sentence_settings(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="Transformer, Pooling, Dense"):
        sentence_settings(folder)


def test_a_hub_that_does_not_answer_is_not_taken_for_a_mean(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="name a pooling"):
        with_sentence_files(tmp_path, "nobody/nothing")


@pytest.mark.parametrize("which", ["made up", "minilm"])
def test_vectors_are_those_of_sentence_transformers(which, stating, minilm):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    folder = str(minilm if which == "minilm" else stating(cls))
    texts = [*TEXTS, "a red shoe for the river " * 60]
    expected = library.SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True)
    encoder = TextEncoder(folder, pooling=None)
    assert encoder.max_tokens == (256 if which == "minilm" else 12)
    torch.testing.assert_close(encoder.encode(texts), expected, atol=1e-5, rtol=0)
