"""Item towers and user towers: what turns items and histories into vectors whose dot product ranks."""

from lightning_rec.towers.base import ItemTower, Tower, UserTower, parameter_summary
from lightning_rec.towers.baselines import ConstantUserTower, IdUserTower, PopularityItemTower
from lightning_rec.towers.item import IdItemTower, TextIdItemTower, TextItemTower
from lightning_rec.towers.language import TextEncoder
from lightning_rec.towers.language_user import LanguageUserTower
from lightning_rec.towers.user import PooledUserTower, SequenceUserTower

__all__ = [
    "ConstantUserTower",
    "IdItemTower",
    "IdUserTower",
    "ItemTower",
    "LanguageUserTower",
    "PooledUserTower",
    "PopularityItemTower",
    "SequenceUserTower",
    "TextEncoder",
    "TextIdItemTower",
    "TextItemTower",
    "Tower",
    "UserTower",
    "parameter_summary",
]
