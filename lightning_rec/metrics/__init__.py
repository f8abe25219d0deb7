"""What a run is measured by: exact full rankings, streaming over users and over chunks of the catalogue."""

from lightning_rec.metrics.base import RankingMetric, RankingResult
from lightning_rec.metrics.beyond import BeyondAccuracy
from lightning_rec.metrics.clicks import ClickMetrics
from lightning_rec.metrics.impression import ImpressionRanking
from lightning_rec.metrics.impression_base import ImpressionMetric, ImpressionResult
from lightning_rec.metrics.impression_top import ImpressionTop
from lightning_rec.metrics.ranking import RankingMetrics, popularity_thirds
from lightning_rec.metrics.ranks import AliveWindows, RanksAndTop, ScoreTable, rank_and_top, target_ranks, top_k
from lightning_rec.metrics.rating import RatingMetrics

__all__ = [
    "AliveWindows",
    "BeyondAccuracy",
    "ClickMetrics",
    "ImpressionMetric",
    "ImpressionRanking",
    "ImpressionResult",
    "ImpressionTop",
    "RankingMetric",
    "RankingMetrics",
    "RankingResult",
    "RanksAndTop",
    "RatingMetrics",
    "ScoreTable",
    "popularity_thirds",
    "rank_and_top",
    "target_ranks",
    "top_k",
]
