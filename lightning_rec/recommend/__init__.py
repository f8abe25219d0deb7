"""From a fitted run to an answer: the artefact, the recommender, explanations."""

from typing import TYPE_CHECKING

from lightning_rec.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_rec.recommend.artefact import Artefact, ArtefactError
    from lightning_rec.recommend.index import ExactIndex, Index
    from lightning_rec.recommend.recommender import Recommender
    from lightning_rec.recommend.store import HistoryStore, MemoryStore
    from lightning_rec.recommend.types import (
        Answer,
        Event,
        Explanation,
        Reason,
        Recommended,
        Request,
        RequestError,
        Word,
    )
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "artefact": ["Artefact", "ArtefactError"],
            "index": ["ExactIndex", "Index"],
            "recommender": ["Recommender"],
            "store": ["HistoryStore", "MemoryStore"],
            "types": ["Answer", "Event", "Explanation", "Reason", "Recommended", "Request", "RequestError", "Word"],
        },
    )

__all__ = [
    "Answer",
    "Artefact",
    "ArtefactError",
    "Event",
    "ExactIndex",
    "Explanation",
    "HistoryStore",
    "Index",
    "MemoryStore",
    "Reason",
    "Recommended",
    "Recommender",
    "Request",
    "RequestError",
    "Word",
]
