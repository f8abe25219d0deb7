"""A tower that begins with an adapter somebody trained: read whole, trained on or used as it is, exported inside."""

import json
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lightning_rec.cli import main
from lightning_rec.data.batch import CatalogueView
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import open_run
from lightning_rec.towers import LanguageUserTower, TextItemTower
from lightning_rec.towers.adapter_folder import HEAD, as_spec, save_head
from lightning_rec.towers.adapters import AdapterError
from lightning_rec.towers.language import TextEncoder

SHOP = Path(__file__).parents[1] / "data" / "files" / "shop"
CONFIG = """
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower:
      class_path: lightning_rec.towers.TextItemTower
      init_args: {language_model: TINY_BERT, dim: 16, adapter: ADAPTER}
    user_tower: {class_path: lightning_rec.towers.PooledUserTower}
    language_lr: 0.02
data:
  class_path: lightning_rec.EcommerceDataModule
  init_args:
    reader:
      class_path: lightning_rec.data.readers.Files
      init_args: {interactions: SHOP/interactions.csv, items: SHOP/items.csv}
    min_rating: 0
    max_history: 8
    batch_size: 16
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, logger: false}
"""
TEXTS = ["red shoe", "an old film about a dog"]
VIEW = CatalogueView(n_rows=3, texts=["", *TEXTS])
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3),
}


@pytest.fixture
def written(tiny_bert, tmp_path):
    """Writes an adapter by plain peft; gives its folder, and what plain peft makes of the texts with it."""

    def write(kind="lora", name="adapter"):
        torch.manual_seed(5)
        config = CONFIGS[kind]()
        config.task_type = "FEATURE_EXTRACTION"
        model = peft.get_peft_model(AutoModel.from_pretrained(tiny_bert), config)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def by_peft(tiny_bert, folder, texts=TEXTS):
    """Vectors of the texts by plain peft, one by one."""
    plain = TextEncoder(tiny_bert)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert), folder).eval()
    with torch.no_grad():
        found = [
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, -ids.shape[1] :].mean(1)[0]
            for ids in (torch.tensor(plain.tokenizer(text)["input_ids"])[None] for text in texts)
        ]
    return torch.stack(found)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_vectors_are_those_of_plain_peft_and_can_be_trained_on(tiny_bert, written, kind):
    folder = written(kind)
    encoder = TextEncoder(tiny_bert, adapter=folder).eval()
    assert encoder.tune == "adapter"
    torch.testing.assert_close(encoder.encode(TEXTS), by_peft(tiny_bert, folder), atol=1e-5, rtol=0)
    trained = [name for name, value in encoder.named_parameters() if value.requires_grad]
    assert trained
    encoder.train().encode_table(encoder.tokenise(TEXTS), torch.arange(2)).sum().backward()
    assert any(value.grad is not None for value in encoder.parameters())


def test_frozen_it_is_merged_once_and_cached_apart_from_the_plain_model(tiny_bert, written, tmp_path):
    folder, other = written(), written("dora", "other")
    options = {"tune": "frozen", "cache_dir": str(tmp_path / "cache")}
    plain = TextEncoder(tiny_bert, **options)
    for adapter in (folder, other):
        encoder = TextEncoder(tiny_bert, adapter=adapter, **options)
        assert encoder.fingerprint != plain.fingerprint
        found = encoder.encode_cached(TEXTS, torch.device("cpu"))
        torch.testing.assert_close(found, by_peft(tiny_bert, adapter), atol=1e-5, rtol=0)
        assert not list(encoder.parameters())
    assert len(list((tmp_path / "cache" / "merged").iterdir())) == 2
    torch.testing.assert_close(plain.encode_cached(TEXTS, torch.device("cpu")), TextEncoder(tiny_bert).encode(TEXTS))
    with pytest.raises(AdapterError, match=r"cannot be merged"):
        TextEncoder(tiny_bert, adapter=written("prefix", "prefix"), **options)


def test_what_does_not_fit_is_refused(tiny_bert, tiny_gpt2, written, tmp_path):
    folder = written()
    with pytest.raises(ValueError, match=r"adapter is .* but peft begins with a new one: give one of the two"):
        TextEncoder(tiny_bert, adapter=folder, peft=peft.LoraConfig())
    with pytest.raises(ValueError, match=r"but tune is full"):
        TextEncoder(tiny_bert, adapter=folder, tune="full")
    with pytest.raises(AdapterError, match=r"there is no .*gone/adapter_config\.json: name a folder"):
        TextEncoder(tiny_bert, adapter=str(tmp_path / "gone"))
    with pytest.raises(AdapterError, match=r"no module called query|made for a BertModel, but .* a GPT2Model"):
        TextEncoder(tiny_gpt2, adapter=folder)
    place = tmp_path / "adapter"
    state = load_file(place / "adapter_model.safetensors")
    name = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != name} | {"more": state[name]}, place / "x")
    (place / "x").replace(place / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=rf"it lacks {name}.*it has more, which the model has not"):
        TextEncoder(tiny_bert, adapter=folder)
    save_file(state | {name: torch.zeros(7, 1)}, place / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"is \(7, 1\) there and"):
        TextEncoder(tiny_bert, adapter=folder)
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"may hold code, which is never run here"):
        TextEncoder(tiny_bert, adapter=folder)
    config = json.loads((place / "adapter_config.json").read_text()) | {"peft_type": "NO_SUCH_KIND"}
    (place / "adapter_config.json").write_text(json.dumps(config))
    (place / "adapter_model.bin").rename(place / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"is no adapter that this peft knows"):
        TextEncoder(tiny_bert, adapter=folder)


def test_a_head_beside_it_is_the_first_projection(tiny_bert, written, tmp_path):
    folder = written()
    first = TextItemTower(language_model=tiny_bert, adapter=folder, dim=8, init_std=None)
    first.configure(VIEW)
    save_head(first, tmp_path / "adapter")
    again = TextItemTower(language_model=tiny_bert, adapter=folder, dim=8)
    again.configure(VIEW)
    torch.testing.assert_close(again.projection.weight, first.projection.weight, rtol=0, atol=0)
    with pytest.raises(AdapterError, match=r"there and \(4, 32\) here|take the file away"):
        TextItemTower(language_model=tiny_bert, adapter=folder, dim=4).configure(VIEW)
    (tmp_path / "adapter" / HEAD).unlink()
    TextItemTower(language_model=tiny_bert, adapter=folder, dim=4).configure(VIEW)


def test_a_shared_model_takes_one_for_the_user_tower(tiny_bert, written):
    item = TextItemTower(language_model=tiny_bert, dim=8)
    item.configure(VIEW)
    folder = written()
    user = LanguageUserTower(adapter=folder)
    user.configure(VIEW, item)
    torch.testing.assert_close(user.eval().encoder.encode(TEXTS), by_peft(tiny_bert, folder), atol=1e-5, rtol=0)
    torch.testing.assert_close(item.encoder.encode(TEXTS), TextEncoder(tiny_bert).encode(TEXTS))


def test_a_config_as_yaml_has_it():
    config = peft.LoraConfig(r=3, target_modules=["value", "query"], base_model_name_or_path="/home/of/somebody")
    found = as_spec(config)
    assert found["class_path"] == "peft.LoraConfig"
    assert found["init_args"] == {"r": 3, "target_modules": ["query", "value"]}


def test_fit_resume_test_and_export(tiny_bert, written, tmp_path):
    folder = written()
    text = CONFIG.replace("TINY_BERT", tiny_bert).replace("SHOP", str(SHOP)).replace("ADAPTER", folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(text)
    command = ["--config", str(tmp_path / "run" / "run.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]
    main(["fit", *command, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"])
    last = next((tmp_path / "run").rglob("last.ckpt"))
    main(["test", *command, "--ckpt_path", str(last)])
    fitted = open_run(last).module.item_tower
    assert (fitted.encoder.encode(TEXTS) - by_peft(tiny_bert, folder)).abs().max() > 1e-6, "it was trained on"
    for merge in (False, True):
        export(last, tmp_path / "out", merge=merge, progress=False)
        part = Artefact.read(tmp_path / "out").towers.item
        torch.testing.assert_close(part.encoder.encode(TEXTS), fitted.encoder.encode(TEXTS), atol=1e-5, rtol=0)
        said = [
            path for path in (tmp_path / "out").rglob("*") if path.is_file() and folder.encode() in path.read_bytes()
        ]
        assert not said, "no path of this machine"
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(SystemExit):
        main(["test", *command, "--ckpt_path", str(last)])
