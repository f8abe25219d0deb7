"""Training a language model on a catalogue's own texts, before it goes into a tower."""

from typing import TYPE_CHECKING

from lightning_rec.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_rec.pretraining.contrastive import ContrastiveItems
    from lightning_rec.pretraining.language_modelling import LanguageModelling
    from lightning_rec.pretraining.pairs import PretrainingPairs
    from lightning_rec.pretraining.texts import PretrainingTexts
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "contrastive": ["ContrastiveItems"],
            "language_modelling": ["LanguageModelling"],
            "pairs": ["PretrainingPairs"],
            "texts": ["PretrainingTexts"],
        },
    )

__all__ = ["ContrastiveItems", "LanguageModelling", "PretrainingPairs", "PretrainingTexts"]
