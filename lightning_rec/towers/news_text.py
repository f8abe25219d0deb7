"""The text part of a news tower: one encoder for titles and abstracts, a language model or word vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.towers.language import TextEncoder
from lightning_rec.towers.tokens import TokenTable
from lightning_rec.towers.word_vectors import WordOptions, WordVectorEncoder

#: What a step needs of texts: the vectors of a frozen language model, or tokens for one that is trained.
TextTable = Tensor | TokenTable


class NewsText(nn.Module):
    """Distinct texts through one encoder, with features of about unit scale.

    Args:
        language: options of :class:`TextEncoder`.
        words: word vectors in the place of the language model; None: the language model.
        features: what a frozen language model's vectors become: see :class:`TextItemTower`.
        texts: the catalogue's texts, the vocabulary of word vectors; empty without data.
    """

    encoder: TextEncoder | WordVectorEncoder
    feature_mean: Tensor
    feature_scale: Tensor
    measured: Tensor

    def __init__(
        self,
        language: dict[str, Any],
        words: WordOptions | None,
        features: Literal["standardise", "normalise", "raw"],
        texts: Iterable[str],
    ) -> None:
        super().__init__()
        self.features = features
        if words is not None:
            self.encoder = WordVectorEncoder(words, texts)
        else:
            self.encoder = TextEncoder(**language)
        self.width = self.encoder.width
        self.frozen = isinstance(self.encoder, TextEncoder) and self.encoder.tune == "frozen"
        if self.frozen:
            self.register_buffer("feature_mean", torch.zeros(self.width))
            self.register_buffer("feature_scale", torch.ones(self.width))
            self.register_buffer("measured", torch.zeros((), dtype=torch.bool))
        else:
            # Categories and entities stand beside the text: no view drowns the others by its scale.
            self.norm = nn.LayerNorm(self.width)

    def attach(self, texts: Sequence[str], device: torch.device) -> TextTable:
        """The catalogue's distinct texts, as a step needs them; a frozen model's vectors come from the disk cache."""
        if not self.frozen:
            return self.encoder.tokenise(texts).to(device)
        assert isinstance(self.encoder, TextEncoder)
        vectors = self.encoder.encode_cached(texts, device).to(device)
        real = vectors[torch.tensor([bool(text) for text in texts], device=device)]
        # A single text has no deviation to divide by.
        if self.features == "standardise" and not self.measured and len(real) > 1:
            self.feature_mean.copy_(real.mean(0))
            self.feature_scale.copy_(1 / real.std(0, unbiased=False).clamp_min(1e-6))
            self.measured.fill_(True)
        return self._shape(vectors)

    def read(self, texts: Sequence[str], device: torch.device) -> TextTable:
        """New texts, as a step needs them: nothing is measured and no disk is looked at."""
        if not self.frozen:
            return self.encoder.tokenise(texts).to(device)
        return self._shape(self.encoder.encode(texts, device))

    def _shape(self, vectors: Tensor) -> Tensor:
        if self.features == "standardise":
            return (vectors - self.feature_mean) * self.feature_scale
        return F.normalize(vectors, dim=-1) if self.features == "normalise" else vectors

    def forward(self, table: TextTable, rows: Tensor) -> Tensor:
        """Features of texts, each distinct text encoded once.

        Args:
            table: what ``attach`` or ``read`` gave.
            rows: ``(...)`` rows of the table.

        Returns:
            ``(..., width)`` features.
        """
        if isinstance(table, Tensor):
            return F.embedding(rows, table)
        distinct, places = rows.unique(return_inverse=True)
        return F.embedding(places, self.norm(self.encoder.encode_table(table, distinct)))

    def language_parameters(self) -> Iterable[nn.Parameter]:
        """What is trained of a language model; word vectors learn like the rest of the tower."""
        if isinstance(self.encoder, WordVectorEncoder):
            return ()
        return (parameter for parameter in self.encoder.parameters() if parameter.requires_grad)
