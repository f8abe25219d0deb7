"""Item towers and user towers: what turns items and histories into vectors whose dot product ranks."""

from typing import TYPE_CHECKING

from lightning_rec.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_rec.towers.adalora import AdaLoraConfig
    from lightning_rec.towers.base import CandidateAwareUserTower, ItemTower, Tower, UserTower, parameter_summary
    from lightning_rec.towers.baselines import (
        ConstantUserTower,
        IdUserTower,
        PopularityItemTower,
        RecencyPopularityItemTower,
    )
    from lightning_rec.towers.bias import BiasItemTower, BiasUserTower
    from lightning_rec.towers.bottleneck import BottleneckConfig
    from lightning_rec.towers.item import IdItemTower, TextIdItemTower, TextItemTower
    from lightning_rec.towers.language import TextEncoder
    from lightning_rec.towers.language_user import LanguageUserTower
    from lightning_rec.towers.neighbours import NeighbourItemTower, NeighbourUserTower
    from lightning_rec.towers.news import NewsItemTower
    from lightning_rec.towers.news_users import CandidateAttentionUserTower, LSTURUserTower, NRMSUserTower
    from lightning_rec.towers.side import SideIdItemTower, SideItemTower
    from lightning_rec.towers.user import PooledUserTower, SequenceUserTower
    from lightning_rec.towers.word_vectors import WordOptions, WordVectorEncoder
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "adalora": ["AdaLoraConfig"],
            "adapters": [],
            "age": [],
            "base": ["CandidateAwareUserTower", "ItemTower", "Tower", "UserTower", "parameter_summary"],
            "baselines": ["ConstantUserTower", "IdUserTower", "PopularityItemTower", "RecencyPopularityItemTower"],
            "bias": ["BiasItemTower", "BiasUserTower"],
            "bottleneck": ["BottleneckConfig"],
            "item": ["IdItemTower", "TextIdItemTower", "TextItemTower"],
            "language": ["TextEncoder"],
            "language_user": ["LanguageUserTower"],
            "neighbours": ["NeighbourItemTower", "NeighbourUserTower"],
            "news": ["NewsItemTower"],
            "news_users": ["CandidateAttentionUserTower", "LSTURUserTower", "NRMSUserTower"],
            "score": [],
            "side": ["SideIdItemTower", "SideItemTower"],
            "user": ["PooledUserTower", "SequenceUserTower"],
            "word_vectors": ["WordOptions", "WordVectorEncoder"],
        },
    )

__all__ = [
    "AdaLoraConfig",
    "BiasItemTower",
    "BiasUserTower",
    "BottleneckConfig",
    "CandidateAttentionUserTower",
    "CandidateAwareUserTower",
    "ConstantUserTower",
    "IdItemTower",
    "IdUserTower",
    "ItemTower",
    "LSTURUserTower",
    "LanguageUserTower",
    "NRMSUserTower",
    "NeighbourItemTower",
    "NeighbourUserTower",
    "NewsItemTower",
    "PooledUserTower",
    "PopularityItemTower",
    "RecencyPopularityItemTower",
    "SequenceUserTower",
    "SideIdItemTower",
    "SideItemTower",
    "TextEncoder",
    "TextIdItemTower",
    "TextItemTower",
    "Tower",
    "UserTower",
    "WordOptions",
    "WordVectorEncoder",
    "parameter_summary",
]
