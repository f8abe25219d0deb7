"""lightning_rec: two-tower recommenders over pretrained language models, on PyTorch Lightning."""

from lightning_rec.data import EcommerceDataModule, NewsDataModule, RecDataModule, VideoDataModule
from lightning_rec.module import TwoTower
from lightning_rec.towers import ItemTower, UserTower

__version__ = "0.1.0"

__all__ = [
    "EcommerceDataModule",
    "ItemTower",
    "NewsDataModule",
    "RecDataModule",
    "TwoTower",
    "UserTower",
    "VideoDataModule",
]
