"""From files to batches: readers, catalogue, split, text, and a data module for each domain."""

from typing import TYPE_CHECKING

from lightning_rec.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_rec.data.ads import AdsDataModule
    from lightning_rec.data.batch import Batch, CatalogueView, ImpressionBatch, ItemBatch, UserBatch
    from lightning_rec.data.datamodule import RecDataModule
    from lightning_rec.data.ecommerce import EcommerceDataModule
    from lightning_rec.data.impression_module import ImpressionDataModule
    from lightning_rec.data.news import NewsDataModule, NewsImpressionDataModule
    from lightning_rec.data.video import VideoDataModule
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ads": ["AdsDataModule"],
            "batch": ["Batch", "CatalogueView", "ImpressionBatch", "ItemBatch", "UserBatch"],
            "datamodule": ["RecDataModule"],
            "ecommerce": ["EcommerceDataModule"],
            "impression_module": ["ImpressionDataModule"],
            "news": ["NewsDataModule", "NewsImpressionDataModule"],
            "readers": [],
            "video": ["VideoDataModule"],
        },
    )

__all__ = [
    "AdsDataModule",
    "Batch",
    "CatalogueView",
    "EcommerceDataModule",
    "ImpressionBatch",
    "ImpressionDataModule",
    "ItemBatch",
    "NewsDataModule",
    "NewsImpressionDataModule",
    "RecDataModule",
    "UserBatch",
    "VideoDataModule",
]
