"""Plain word vectors as a text encoder: a vector a word, and a small network over the words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.towers.attention import AdditiveAttention, MultiHeadSelfAttention
from lightning_rec.towers.sequence import dropout
from lightning_rec.towers.tokens import TokenTable, length_batches
from lightning_rec.towers.vocabulary import named_vectors

#: Rows of words: 0 is padding, 1 a word that is not in the vocabulary, then the vocabulary.
_UNKNOWN = 1
_BUDGET = 65_536
# Chinese and Japanese put no spaces between words: each sign is a word.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_ASCII = re.compile(r"\w+")


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    # Vowel signs of Hindi and others are marks, which Python's \w leaves out.
    marks = "".join(c for c in map(chr, range(0x300, 0x1E950)) if unicodedata.category(c)[0] == "M")
    return re.compile(f"([{_SIGNS}])"), re.compile(f"[\\w{re.escape(marks)}]+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: letters, digits and marks of any alphabet; a Chinese sign is a word."""
    if text.isascii():
        return _ASCII.findall(text.lower())  # most of English, in a seventh of the time
    signs, words = _patterns()
    return words.findall(signs.sub(r" \1 ", unicodedata.normalize("NFKC", text).lower()))


@dataclass
class WordOptions:
    """How texts are read through word vectors.

    Args:
        dim: width of a word vector; that of the file, with ``vectors``.
        vectors: ready-made word vectors in GloVe's or word2vec's text format, plain, .gz or .zip. Only the words of
            the catalogue are kept; how many the file has is reported. None: vectors are learned from the start.
        tune: train the word vectors; with false, words that the file does not have count as unknown.
        min_count: a word that is less frequent in the catalogue counts as unknown.
        max_words: size of the vocabulary, the most frequent words.
        max_length: texts are cut to so many words.
        encoder: ``attention``: multi-head self-attention over the words, then additive attention (NRMS, Wu et al.,
            EMNLP-IJCNLP 2019); ``cnn``: a convolution, then additive attention (NAML, Wu et al., IJCAI 2019, and
            LSTUR, An et al., ACL 2019); ``mean``: the mean of the word vectors.
        heads: attention heads.
        head_dim: width of a head; the text's vector is ``heads * head_dim`` wide.
        filters: width of the convolution's output.
        window: words that the convolution sees at once, an odd number.
        hidden: width of the additive attention.
        dropout: share of the features dropped in training, of the words and of what is made of them.
    """

    dim: int = 300
    vectors: str | None = None
    tune: bool = True
    min_count: int = 1
    max_words: int = 50_000
    max_length: int = 50
    encoder: Literal["attention", "cnn", "mean"] = "attention"
    heads: int = 16
    head_dim: int = 16
    filters: int = 300
    window: int = 3
    hidden: int = 200
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("dim", "min_count", "max_words", "max_length", "heads", "head_dim", "filters", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"words.{name} must be at least 1, but is {getattr(self, name)}.")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"words.window must be an odd number of words, but is {self.window}.")
        if not self.tune and self.vectors is None:
            raise ValueError(
                "words.tune is false, but there are no vectors to keep as they are: name a file as words.vectors, or "
                "set words.tune to true."
            )


class WordVectorEncoder(nn.Module):
    """Texts through word vectors; it is used like :class:`TextEncoder`, and its vocabulary is in the checkpoint.

    Args:
        options: see :class:`WordOptions`; None: its defaults.
        texts: the texts of the catalogue, which give the vocabulary; empty when a checkpoint brings it.
    """

    def __init__(self, options: WordOptions | None = None, texts: Iterable[str] = ()) -> None:
        super().__init__()
        self.options = o = options or WordOptions()
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(words_of(text))
        self.words = named_vectors(
            counts,
            o.dim,
            std=0.1,
            min_count=o.min_count,
            most=o.max_words,
            files=None if o.vectors is None else [o.vectors],
            tuned=o.tune,
            what="words",
            option="words.dim",
            lower=True,
        )
        # Zero until it is trained: where every word of the catalogue is known it never is.
        self.unknown = nn.Parameter(torch.zeros(o.dim))
        if o.encoder == "attention":
            self.mix = MultiHeadSelfAttention(o.dim, o.heads, o.head_dim)
            self.width = self.mix.width
        elif o.encoder == "cnn":
            self.convolution = nn.Conv1d(o.dim, o.filters, o.window, padding=o.window // 2)
            self.width = o.filters
        else:
            self.width = o.dim
        if o.encoder != "mean":
            self.pool = AdditiveAttention(self.width, o.hidden)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.unknown.device

    def tokenise(self, texts: Sequence[str]) -> TokenTable:
        """The word rows of texts, cut to ``max_length`` words; a text without words is one row of padding."""
        rows = self.words.rows
        lengths = np.zeros(len(texts) + 1, dtype=np.int64)
        pieces: list[int] = []
        for index, text in enumerate(texts, start=1):
            found = [rows.get(word, 0) + _UNKNOWN for word in words_of(text)[: self.options.max_length]] or [0]
            lengths[index] = len(found)
            pieces += found
        return TokenTable(torch.tensor(pieces, dtype=torch.int32), torch.from_numpy(lengths.cumsum()), 0)

    def forward(self, words: Tensor) -> Tensor:
        """Encodes a batch of texts.

        Args:
            words: ``(k, l)`` word rows, padded with 0.

        Returns:
            ``(k, width)`` float32 vectors; zeros for texts without a word.
        """
        mask = words > 0
        rate = self.options.dropout if self.training else 0.0
        if self.options.encoder == "attention" and not rate:
            # What is done to each word alone is done once for each distinct word.
            distinct, places = words.unique(return_inverse=True)
            x = self.mix.attend(F.embedding(places, self.mix.qkv(self._vectors(distinct))), mask)
            return self.pool(x, mask).float()
        x = dropout(self._vectors(words), rate, self.training)
        if self.options.encoder == "mean":
            return x.float().sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        # Padding is zero here, as the convolution's own is: a text's vector does not depend on its neighbours.
        x = self.mix(x, mask) if self.options.encoder == "attention" else self._convolve(x)
        return self.pool(dropout(x, rate, self.training), mask).float()

    def _vectors(self, words: Tensor) -> Tensor:
        x = self.words((words - _UNKNOWN).clamp_min(0))
        return x + (words == _UNKNOWN)[..., None] * self.unknown

    def _convolve(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2)).relu().transpose(1, 2)

    def encode_table(self, table: TokenTable, rows: Tensor) -> Tensor:
        """Encodes rows of a table of words, in batches of like length; with gradients where they are enabled.

        Returns:
            ``(k, width)`` float32 vectors in the order of the ``(k,)`` rows.
        """
        batches = [batch.to(rows.device) for batch in length_batches(table.lengths[rows], _BUDGET)]
        if not batches:
            return torch.zeros(0, self.width, device=rows.device)
        vectors = torch.cat([self(table.padded(rows[batch])[0]) for batch in batches])
        order = torch.empty_like(rows)
        order[torch.cat(batches)] = torch.arange(len(rows), device=rows.device)
        return vectors[order]

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, texts: Sequence[str], device: torch.device | None = None) -> Tensor:
        """Encodes texts without gradients and without dropout; equal texts are encoded once.

        Returns:
            ``(n, width)`` float32 vectors on ``device``.
        """
        device = device or self.device
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        table = self.tokenise(list(distinct)).to(device)
        training = self.training
        self.eval()
        try:
            vectors = self.encode_table(table, torch.arange(len(distinct), device=device))
        finally:
            self.train(training)
        return vectors[torch.tensor([distinct[text] for text in texts], dtype=torch.long, device=device)]
