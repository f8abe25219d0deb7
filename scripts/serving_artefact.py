"""Makes artefacts of random items for scripts/benchmark_serving.py."""

from __future__ import annotations

import random
from pathlib import Path

#: Events of each user.
HISTORY = 20
CONFIG = """
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower: {{class_path: lightning_rec.towers.IdItemTower, init_args: {{dim: {dim}}}}}
    user_tower:
      class_path: lightning_rec.towers.SequenceUserTower
      init_args: {{blocks: 2, heads: 2, max_length: 50}}
data:
  class_path: lightning_rec.EcommerceDataModule
  init_args:
    reader:
      class_path: lightning_rec.data.readers.Files
      init_args: {{interactions: {folder}/interactions.csv, items: {folder}/items.csv}}
    batch_size: 16
trainer: {{max_steps: 1, limit_val_batches: 0, accelerator: cpu, enable_progress_bar: false, logger: false}}
checkpoint: {{monitor: null}}
"""


def make_artefact(folder: Path, prefix: str, items: int, users: int, dim: int) -> Path:
    """Makes an artefact of random items through fit and export.

    Args:
        folder: where everything is written.
        prefix: begins every item id, so that items of two catalogues can be told apart.
        items: number of items.
        users: number of users, with 20 events each.
        dim: width of the item vectors.
    """
    from lightning_rec.cli import main as command

    folder.mkdir(parents=True)
    rng = random.Random(prefix)
    with (folder / "items.csv").open("w") as file:
        file.write("item_id,title\n")
        file.writelines(f"{prefix}{number},Title of {prefix}{number}\n" for number in range(items))
    with (folder / "interactions.csv").open("w") as file:
        file.write("user_id,item_id,timestamp\n")
        for user in range(users):
            chosen = rng.sample(range(items), HISTORY)
            file.writelines(f"u{user},{prefix}{item},{1_600_000_000 + moment}\n" for moment, item in enumerate(chosen))
    (folder / "config.yaml").write_text(CONFIG.format(dim=dim, folder=folder))
    command(["fit", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(folder)])
    checkpoint = next(folder.rglob("last.ckpt"))
    command(["export", str(checkpoint), str(folder / "artefact"), "--progress", "false"])
    return folder / "artefact"
