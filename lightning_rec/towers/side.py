"""A side network beside a frozen language model: it reads every layer's states, and only it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.towers.base import ItemTower
from lightning_rec.towers.fusion import IdFusion
from lightning_rec.towers.language import BUNDLED, Pooling, TextEncoder
from lightning_rec.towers.quantisation import Quantisation
from lightning_rec.towers.state_cache import CacheDtype, StateCache, as_stored, rows_of
from lightning_rec.towers.text_cache import hash_texts
from lightning_rec.towers.whitening import Whitening

_CHUNK = 4096


class SideNetwork(nn.Module):
    """A ladder over the hidden states of every layer, narrow and cheap.

    Rung ``i`` mixes what came up the ladder with layer ``i``'s states, made narrow, by a learned gate, and passes the
    mixture through a small residual block (ladder side-tuning: Sung, Cho and Bansal, NeurIPS 2022).

    Args:
        states: number of hidden states, the embeddings' among them.
        width: width of the language model.
        narrow: width of the ladder.
        dim: width of what comes out.
        dropout: share of the ladder's features dropped before each rung's block.
        skip: add a linear map of the last layer's states, which is what a frozen tower has.
        init_std: standard deviation of the output before training, about; None: as linear layers begin.
    """

    def __init__(
        self, states: int, width: int, narrow: int, dim: int, dropout: float, skip: bool, init_std: float | None
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, narrow) for _ in range(states))
        # sigmoid(0): halves of both to begin with
        self.gates = nn.Parameter(torch.zeros(states - 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(narrow),
                nn.Dropout(dropout),
                nn.Linear(narrow, 2 * narrow),
                nn.GELU(),
                nn.Linear(2 * narrow, narrow),
            )
            for _ in range(states - 1)
        )
        self.norm = nn.LayerNorm(narrow)
        self.out = nn.Linear(narrow, dim)
        self.skip = nn.Linear(width, dim, bias=False) if skip else None
        self.dropout = dropout
        if init_std is not None:
            nn.init.normal_(self.out.weight, std=init_std / narrow**0.5)
            nn.init.zeros_(self.out.bias)
            if self.skip is not None:
                nn.init.normal_(self.skip.weight, std=init_std / width**0.5)

    def forward(self, states: Tensor) -> Tensor:
        """``(n, dim)`` vectors of ``(n, states, width)`` hidden states."""
        ladder = self.down[0](states[:, 0])
        shares = self.gates.sigmoid()
        for index, (down, block) in enumerate(zip(list(self.down)[1:], self.blocks, strict=True)):
            ladder = shares[index] * ladder + (1 - shares[index]) * down(states[:, index + 1])
            ladder = ladder + block(ladder)
        out = self.out(self.norm(ladder))
        if self.skip is not None:
            out = out + self.skip(F.dropout(states[:, -1], self.dropout, self.training))
        return out


def _parts_of(rows: np.ndarray[Any, Any], layer: int) -> Iterator[Tensor]:
    """The states of one layer, a few thousand items at a time."""
    for start in range(0, len(rows), _CHUNK):
        yield torch.from_numpy(rows[start : start + _CHUNK, layer].astype(np.float32))


class SideItemTower(ItemTower):
    """The text of an item through a frozen language model and a trained side network: cold items have vectors too.

    The language model runs once over the catalogue. The pooled hidden states of every layer lie on disk, and a step
    trains the side network alone: no pass through the language model, forward or backward (the decoupled form of
    ladder side-tuning, Sung, Cho and Bansal, NeurIPS 2022).

    Args:
        language_model: ``minilm`` (comes with pip), a folder, or a name on the Hugging Face hub.
        dim: width of the item vectors.
        side_width: width of the side network. 64 on MiniLM is 1.5 % of the model's parameters.
        pooling: ``mean`` over tokens, the first (``cls``) or the ``last``; None: what the files of a
            sentence-transformers folder state; its normalisation is left out.
        max_tokens: texts are cut to so many tokens.
        features: what the states become before the side network: ``standardise`` (every feature of every layer with
            mean 0 and deviation 1 over the catalogue), ``whiten`` (uncorrelated within the layer too: see
            :class:`~lightning_rec.towers.whitening.Whitening`) or ``raw``.
        dropout: share of features dropped in training.
        skip: add a linear map of the last layer, which is what a frozen :class:`TextItemTower` has.
        init_std: standard deviation of the item vectors before training, about: see :class:`TextItemTower`.
        memory: megabytes that the states of the catalogue may take in memory; more stay on disk, and a step reads
            those of its items.
        token_budget: most tokens, with padding, of one pass through the language model.
        cache_dir: where states are cached; None: ``LIGHTNING_REC_CACHE``, else ``~/.cache/lightning_rec``.
        cache_dtype: precision of the states on disk, ``float16`` or ``float32``.
        dtype: precision of the language model.
        quantisation: weights of the language model in 8 or 4 bits, by the extra ``quantise``: ``8bit``, ``4bit`` or
            ``none``.
        whiten_eps: what ``features: whiten`` adds to the variance of each direction, as a share of the layer's mean
            variance, so that those which are mostly noise are not blown up; 0: exact whitening.
    """

    uses_ids = False
    reads_layers = True
    states: Tensor | None
    feature_mean: Tensor
    feature_scale: Tensor
    measured: Tensor

    def __init__(
        self,
        language_model: str = BUNDLED,
        dim: int = 64,
        side_width: int = 64,
        pooling: Pooling | None = "mean",
        max_tokens: int = 128,
        features: Literal["standardise", "whiten", "raw"] = "standardise",
        dropout: float = 0.0,
        skip: bool = True,
        init_std: float | None = 0.02,
        memory: int = 1024,
        token_budget: int | None = None,
        cache_dir: str | None = None,
        cache_dtype: CacheDtype = "float16",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantisation: Quantisation = "none",
        whiten_eps: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.encoder_options: dict[str, Any] = {
            "language_model": language_model,
            "pooling": pooling,
            "max_tokens": max_tokens,
            "token_budget": token_budget,
            "cache_dir": cache_dir,
            "cache_dtype": cache_dtype,
            "dtype": dtype,
            "quantisation": quantisation,
        }
        self.side_width = side_width
        self.features = features
        self.whiten_eps = whiten_eps
        self.dropout = dropout
        self.skip = skip
        self.init_std = init_std
        self.memory = memory
        self._mapped: np.ndarray[Any, Any] | None = None

    def configure(self, catalogue: CatalogueView) -> None:
        """Finds the language model, which is loaded when a text must be encoded, and creates the side network."""
        self.encoder = TextEncoder(**self.encoder_options)
        shape = (self.encoder.n_states, self.encoder.width)
        self.side = SideNetwork(*shape, self.side_width, self.dim, self.dropout, self.skip, self.init_std)
        # Made of text and model, cached on disk: no part of a checkpoint.
        self.register_buffer("states", None, persistent=False)
        # Part of a checkpoint, so that a new item is seen as training saw the old ones.
        if self.features == "whiten":
            layers = range(self.encoder.n_states)
            self.whitening = nn.ModuleList(Whitening(self.encoder.width, eps=self.whiten_eps) for _ in layers)
        else:
            self.register_buffer("feature_mean", torch.zeros(shape))
            self.register_buffer("feature_scale", torch.ones(shape))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, catalogue: CatalogueView) -> None:
        """Runs the language model over the catalogue's texts, or finds its states in the disk cache."""
        texts = catalogue.texts
        if not texts:
            return
        if len(texts) != catalogue.n_rows:
            raise ValueError(f"The catalogue has {catalogue.n_rows} rows but {len(texts)} texts.")
        device = self.measured.device
        dtype = self.encoder.cache_dtype

        def fill(array: np.ndarray[Any, Any]) -> None:
            for start in range(0, len(texts), _CHUNK):
                part = self.encoder.encode(texts[start : start + _CHUNK], device, "Encoding texts", layers=True)
                array[start : start + _CHUNK] = as_stored(part, dtype).cpu().numpy()

        shape = (len(texts), self.encoder.n_states, self.encoder.width)
        key = self.encoder.cache_key("layers", dtype, hash_texts(texts))
        self._mapped = StateCache(self.encoder.cache_dir).get(key, shape, dtype, fill)
        if not self.measured and self.features != "raw":
            self._measure(self._mapped)
        self.states = None
        if self._mapped.size * 4 <= self.memory << 20:
            self.states = self._shape(rows_of(self._mapped, torch.arange(len(texts))).to(device))
            self._mapped = None

    def _measure(self, array: np.ndarray[Any, Any]) -> None:
        rows = array[1:] if len(array) > 1 else array  # row 0 is padding
        if self.features == "whiten":
            for layer, whitening in enumerate(self._whitenings):
                whitening.measure_parts(partial(_parts_of, rows, layer))
        else:
            self._standardise(rows)
        self.measured.fill_(True)

    def _standardise(self, rows: np.ndarray[Any, Any]) -> None:
        total = np.zeros(rows.shape[1:])
        squares = np.zeros(rows.shape[1:])
        starts = range(0, len(rows), _CHUNK)
        for start in starts:
            total += rows[start : start + _CHUNK].astype(np.float64).sum(0)
        mean = total / len(rows)
        for start in starts:  # a second pass: the difference of large sums would lose what is small
            squares += ((rows[start : start + _CHUNK].astype(np.float64) - mean) ** 2).sum(0)
        deviation = np.sqrt(squares / len(rows)).clip(1e-6)
        self.feature_mean.copy_(torch.from_numpy(mean))
        self.feature_scale.copy_(torch.from_numpy(1 / deviation))

    def _shape(self, states: Tensor) -> Tensor:
        if self.features == "whiten":
            layers = [whitening(states[:, layer]) for layer, whitening in enumerate(self._whitenings)]
            return torch.stack(layers, dim=1)
        return states if self.features == "raw" else (states - self.feature_mean) * self.feature_scale

    @property
    def _whitenings(self) -> list[Whitening]:
        return cast("list[Whitening]", list(self.whitening))

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, d)`` item vectors.

        Raises:
            RuntimeError: no data set is attached.
        """
        if self.states is not None:
            return self.side(self.states if items.whole else self.states[items.rows])
        if self._mapped is None:
            raise RuntimeError(
                "The side item tower has no texts yet: attach the data (tower.prepare(catalogue) with "
                "catalogue.texts) before items are encoded. A checkpoint holds no texts; a run's data module does."
            )
        return self.side(self._shape(rows_of(self._mapped, items.rows)))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Vectors of items that have no row: new in the shop, known by their text only.

        Args:
            texts: ``n`` item texts, made by the template of the training data.

        Returns:
            ``(n, d)`` item vectors, as the same texts in the catalogue have.
        """
        states = self.encoder.encode(texts, self.measured.device, layers=True)
        training = self.training
        self.eval()
        try:
            return self.from_features(as_stored(states, self.encoder.cache_dtype).float())
        finally:
            self.train(training)

    def from_features(self, features: Tensor) -> Tensor:
        """``(n, d)`` item vectors of ``(n, states, width)`` states of the encoder, of items that have no row."""
        return self.side(self._shape(features))


class SideIdItemTower(IdFusion, SideItemTower):
    """A side network over the item's text and a learned vector an item together.

    What the lower layers know of a text lifts a tower with id vectors on the articles of
    ``configs/news/ibm_watson.yaml``, and does not on MovieLens-100K;
    :class:`~lightning_rec.towers.TextIdItemTower` reads the last layer alone.

    Args:
        **options: see :class:`~lightning_rec.towers.fusion.IdFusion` and :class:`SideItemTower`.
    """

    def configure(self, catalogue: CatalogueView) -> None:
        """Finds the language model, and creates the side network, one vector a row, and the fusion."""
        super().configure(catalogue)
        self.add_ids(catalogue)

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, d)`` item vectors; of text alone where an item was never trained on.

        Raises:
            RuntimeError: no data set is attached.
        """
        return self.with_ids(items, super().forward(items))[0]

    def from_features(self, features: Tensor) -> Tensor:
        """``(n, d)`` item vectors of ``(n, states, width)`` states of the encoder, of items that have no row."""
        return self.without_ids(super().from_features(features))
