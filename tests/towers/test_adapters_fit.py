"""Every named adapter, as YAML has it, in both towers at once through the fit command."""

from pathlib import Path

import pytest
import torch

from lightning_rec.cli import main

SHOP = Path(__file__).parents[1] / "data" / "files" / "shop"
CONFIG = """
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower:
      class_path: lightning_rec.towers.TextItemTower
      init_args: {language_model: TINY_BERT, dim: 16, max_tokens: 12, peft: PEFT}
    user_tower:
      class_path: lightning_rec.towers.LanguageUserTower
      init_args: {language_model: TINY_BERT, max_tokens: 12, peft: PEFT}
    language_lr: 0.02
data:
  class_path: lightning_rec.EcommerceDataModule
  init_args:
    reader:
      class_path: lightning_rec.data.readers.Files
      init_args: {interactions: SHOP/interactions.csv, items: SHOP/items.csv, users: SHOP/users.csv}
    min_rating: 0
    supervision: last
    batch_size: 16
    user_template: "{city}, {age}. Likes {titles}."
trainer: {accelerator: cpu, max_steps: 2, limit_val_batches: 0, enable_progress_bar: false, enable_model_summary: false}
"""
BOTTLENECK = "{class_path: lightning_rec.towers.BottleneckConfig, init_args: {placement: %s, width: 3}}"
ADAPTERS = {
    "lora": "{class_path: peft.LoraConfig, init_args: {r: 2}}",
    "dora": "{class_path: peft.LoraConfig, init_args: {r: 2, use_dora: true}}",
    "rslora": "{class_path: peft.LoraConfig, init_args: {r: 2, use_rslora: true}}",
    "ia3": "{class_path: peft.IA3Config}",
    "prefix": "{class_path: peft.PrefixTuningConfig, init_args: {num_virtual_tokens: 3}}",
    "prompt": "{class_path: peft.PromptTuningConfig, init_args: {num_virtual_tokens: 3}}",
    "adalora": "{class_path: lightning_rec.towers.adalora.AdaLoraConfig, init_args: {init_r: 3, target_r: 2}}",
    "houlsby": BOTTLENECK % "houlsby",
    "pfeiffer": BOTTLENECK % "pfeiffer",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_in_each_tower_is_fitted_and_nothing_else_of_the_model(tiny_bert, tmp_path, name):
    text = CONFIG.replace("TINY_BERT", tiny_bert).replace("SHOP", str(SHOP)).replace("PEFT", ADAPTERS[name])
    (tmp_path / "run.yaml").write_text(text)
    command = ["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    main([*command, "--checkpoint.monitor", "null"])
    state = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)["state_dict"]
    for tower in ("item_tower", "user_tower"):
        written = {key: value for key, value in state.items() if key.startswith(f"{tower}.encoder.")}
        assert written
        kinds = ("lora_", "ia3_", "prompt_encoder", "bottleneck_", "ranknum")
        assert all(any(kind in key for kind in kinds) for key in written), sorted(written)
        assert any(bool(value.any()) for key, value in written.items() if "lora_A" not in key), "it has moved from zero"
