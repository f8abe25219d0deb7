"""A tower's head beside its adapter: written whole, restored whole or not at all."""

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from lightning_rec.data.batch import CatalogueView
from lightning_rec.towers import TextIdItemTower, TextItemTower
from lightning_rec.towers.adapter_folder import HEAD, load_head, save_adapter, save_head
from lightning_rec.towers.adapters import AdapterError

VIEW = CatalogueView(n_rows=3, texts=["", "red shoe", "old film"])


def tower_of(folder, kind=TextItemTower, **options):
    tower = kind(language_model=folder, peft=peft.LoraConfig(r=2, init_lora_weights=False), **options)
    tower.configure(VIEW)
    return tower.eval()


def test_an_adapter_and_its_head_travel(tiny_bert, tmp_path):
    tower = tower_of(tiny_bert, TextIdItemTower, dim=8, init_std=None)
    save_adapter(tower.encoder.model, tmp_path, "tiny-bert")
    save_head(tower, tmp_path)
    assert sorted(load_file(tmp_path / HEAD)) == ["projection.bias", "projection.weight"], "no vectors of ids"
    assert '"base_model_name_or_path": "tiny-bert"' in (tmp_path / "adapter_config.json").read_text()
    again = tower_of(tiny_bert, dim=8)
    again.encoder.model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert), tmp_path).eval()
    load_head(again, tmp_path)
    text = tower._project(tower.encoder.encode(["red dog"]))
    torch.testing.assert_close(again._project(again.encoder.encode(["red dog"])), text, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 4}, r"projection\.bias is \(8,\) there and \(4,\) here.*take the file away"),
        ({"dim": 8, "projection": "mlp"}, r"it lacks projection\.0\.bias.*it has projection\.bias, projection\.weight"),
    ],
)
def test_a_head_that_does_not_fit_changes_nothing(tiny_bert, tmp_path, options, said):
    save_head(tower_of(tiny_bert, dim=8), tmp_path)
    other = tower_of(tiny_bert, **options)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(AdapterError, match=said):
        load_head(other, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
