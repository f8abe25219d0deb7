"""From files to batches: readers, catalogue, split, text, and a data module for each domain."""

from lightning_rec.data.batch import Batch, CatalogueView, ItemBatch, UserBatch
from lightning_rec.data.datamodule import RecDataModule
from lightning_rec.data.ecommerce import EcommerceDataModule
from lightning_rec.data.news import NewsDataModule
from lightning_rec.data.video import VideoDataModule

__all__ = [
    "Batch",
    "CatalogueView",
    "EcommerceDataModule",
    "ItemBatch",
    "NewsDataModule",
    "RecDataModule",
    "UserBatch",
    "VideoDataModule",
]
