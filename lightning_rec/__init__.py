"""lightning_rec: two-tower recommenders over pretrained language models, on PyTorch Lightning."""

from typing import TYPE_CHECKING

from lightning_rec.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_rec.data import (
        AdsDataModule,
        EcommerceDataModule,
        ImpressionDataModule,
        NewsDataModule,
        NewsImpressionDataModule,
        RecDataModule,
        VideoDataModule,
    )
    from lightning_rec.ensemble import Ensemble
    from lightning_rec.impression import ImpressionTwoTower
    from lightning_rec.impression_baselines import ImpressionPopularity
    from lightning_rec.impression_ensemble import ImpressionEnsemble
    from lightning_rec.module import TwoTower
    from lightning_rec.towers import ItemTower, UserTower
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "callbacks": [],
            "checkpoint": [],
            "data": [
                "AdsDataModule",
                "EcommerceDataModule",
                "ImpressionDataModule",
                "NewsDataModule",
                "NewsImpressionDataModule",
                "RecDataModule",
                "VideoDataModule",
            ],
            "ensemble": ["Ensemble"],
            "impression": ["ImpressionTwoTower"],
            "impression_baselines": ["ImpressionPopularity"],
            "impression_ensemble": ["ImpressionEnsemble"],
            "metrics": [],
            "module": ["TwoTower"],
            "objectives": [],
            "pretraining": [],
            "recommend": [],
            "towers": ["ItemTower", "UserTower"],
        },
    )

__version__ = "0.1.0"

__all__ = [
    "AdsDataModule",
    "EcommerceDataModule",
    "Ensemble",
    "ImpressionDataModule",
    "ImpressionEnsemble",
    "ImpressionPopularity",
    "ImpressionTwoTower",
    "ItemTower",
    "NewsDataModule",
    "NewsImpressionDataModule",
    "RecDataModule",
    "TwoTower",
    "UserTower",
    "VideoDataModule",
]
