"""What a run is measured by: exact full rankings, streaming over users and over chunks of the catalogue."""

from lightning_rec.metrics.base import RankingMetric, RankingResult
from lightning_rec.metrics.beyond import BeyondAccuracy
from lightning_rec.metrics.ranking import RankingMetrics, popularity_thirds
from lightning_rec.metrics.ranks import RanksAndTop, ScoreTable, rank_and_top, target_ranks, top_k
from lightning_rec.metrics.rating import RatingMetrics

__all__ = [
    "BeyondAccuracy",
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
