"""Item towers: a vector by row number, by text, or by both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.towers.adapter_folder import restore_head
from lightning_rec.towers.base import ItemTower
from lightning_rec.towers.fusion import IdFusion, id_table
from lightning_rec.towers.language import BUNDLED, Pooling, Recompute, TextEncoder, Tune
from lightning_rec.towers.mixture import MixtureOfExperts
from lightning_rec.towers.quantisation import Quantisation
from lightning_rec.towers.state_cache import CacheDtype
from lightning_rec.towers.tokens import TokenTable
from lightning_rec.towers.whitening import Whitening


class IdItemTower(ItemTower):
    """One learned vector an item, as in every classic recommender. It knows nothing about a cold item.

    Args:
        dim: width of the vectors.
        init_std: standard deviation of their first values.
    """

    def __init__(self, dim: int = 64, init_std: float = 0.02) -> None:
        super().__init__()
        self.dim = dim
        self.init_std = init_std

    def configure(self, catalogue: CatalogueView) -> None:
        """Creates one vector a row."""
        self.table = id_table(catalogue.n_rows, self.dim, self.init_std)

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, d)`` item vectors."""
        return self.table.weight if items.whole else self.table(items.rows)


class TextItemTower(ItemTower):
    """The text of an item through a pretrained language model and a projection: cold items have vectors too.

    Frozen (the default), the catalogue is encoded once and its vectors are cached on disk; a step is then a matrix
    product. Tuned whole or through a peft adapter, the distinct items of every step go through the language model with
    gradients: choose in-batch or sampled candidates then, not the whole catalogue.

    Args:
        language_model: ``minilm`` (comes with pip), a folder, or a name on the Hugging Face hub.
        dim: width of the item vectors; None: the language model's own width.
        pooling: ``mean`` over tokens, the first (``cls``) or the ``last``; None: what the files of a
            sentence-transformers folder state, with their normalisation and length limit.
        max_tokens: texts are cut to so many tokens.
        tune: ``frozen``, ``full`` or ``adapter``; None: ``adapter`` with ``peft``, else ``frozen``.
        peft: an adapter, any config class of peft, such as ``{class_path: peft.LoraConfig, init_args: {r: 8}}``: LoRA,
            DoRA, rsLoRA, IA3, prefix tuning, prompt tuning; AdaLoRA and bottleneck adapters (Houlsby, Pfeiffer) as
            ``lightning_rec.towers.AdaLoraConfig`` and ``BottleneckConfig``.
        projection: from the language model to ``dim``: ``linear``, ``mlp`` (one hidden layer), ``moe`` (linear experts
            mixed by a gate: the adaptor of UniSRec, Hou et al., KDD 2022) or ``none``.
        features: what a frozen model's vectors become before the projection: ``standardise`` (every feature with
            mean 0 and deviation 1 over the catalogue), ``whiten`` (uncorrelated too: Su et al., 2021), ``normalise``
            (length 1) or ``raw``.
        dropout: share of the language model's features dropped in training.
        init_std: standard deviation of the item vectors before training, about. It is small, like that of id
            vectors, since large first scores have to be unlearned: on MovieLens-100K and Amazon Scientific that takes
            twice the epochs. None: the usual initialisation of a linear layer.
        gradient_checkpointing: recompute the language model's activations in the backward pass, to save memory: true,
            layer by layer, or ``passes``, pass by pass, so that memory does not grow with the batch.
        token_budget: most tokens, with padding, of one pass through the language model; None: 2,048 on a CPU,
            16,384 elsewhere. Fewer need less memory.
        cache_dir: where vectors are cached; None: ``LIGHTNING_REC_CACHE``, else ``~/.cache/lightning_rec``.
        dtype: precision of a frozen language model.
        experts: number of experts of ``projection: moe``.
        whiten_dims: directions that ``features: whiten`` keeps, those with the most variance; None: all.
        whiten_eps: what ``features: whiten`` adds to the variance of each direction, as a share of the mean variance,
            so that those which are mostly noise are not blown up; 0: exact whitening.
        frozen_layers: with ``tune: full`` or an adapter, so many of the lowest layers are left as they are, without
            dropout, and their output for the catalogue is kept on disk: a step runs the layers above only.
        cache_dtype: precision of that output on disk: ``float32``, or ``float16`` in half the room.
        quantisation: weights of a frozen or adapted language model in 8 or 4 bits (``8bit``, ``4bit``), by
            the extra ``quantise``, which an exported artefact of the run needs for new texts as well.
        adapter: a folder with an adapter that was trained before, here or elsewhere, in the place of ``peft``, to go
            on with or, with ``tune: frozen``, to use as it is. A ``head.safetensors`` beside it, which an export
            writes, is the first projection.
    """

    uses_ids = False
    #: Whether features are those of every layer of the language model, as of a side network, or of the last alone.
    reads_layers = False
    vectors: Tensor | None
    feature_mean: Tensor
    feature_scale: Tensor
    measured: Tensor

    def __init__(
        self,
        language_model: str = BUNDLED,
        dim: int | None = 64,
        pooling: Pooling | None = "mean",
        max_tokens: int = 128,
        tune: Tune | None = None,
        peft: peft.PeftConfig | None = None,
        projection: Literal["linear", "mlp", "moe", "none"] = "linear",
        features: Literal["standardise", "whiten", "normalise", "raw"] = "standardise",
        dropout: float = 0.0,
        init_std: float | None = 0.02,
        gradient_checkpointing: Recompute = False,
        token_budget: int | None = None,
        cache_dir: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        experts: int = 8,
        whiten_dims: int | None = None,
        whiten_eps: float = 0.0,
        frozen_layers: int = 0,
        cache_dtype: CacheDtype = "float32",
        quantisation: Quantisation = "none",
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder_options: dict[str, Any] = {
            "language_model": language_model,
            "pooling": pooling,
            "max_tokens": max_tokens,
            "tune": tune,
            "peft": peft,
            "gradient_checkpointing": gradient_checkpointing,
            "token_budget": token_budget,
            "cache_dir": cache_dir,
            "dtype": dtype,
            "frozen_layers": frozen_layers,
            "cache_dtype": cache_dtype,
            "quantisation": quantisation,
            "adapter": adapter,
        }
        # what is cached of a frozen model is made of the texts as they are
        self.reads_variants = (tune or ("frozen" if peft is None and adapter is None else "adapter")) != "frozen"
        self.wanted_dim = dim
        if dim is not None:
            self.dim = dim
        self.projection_kind = projection
        self.features = features
        self.dropout = dropout
        self.init_std = init_std
        self.experts = experts
        self.whiten_dims, self.whiten_eps = whiten_dims, whiten_eps
        self.tokens: TokenTable | None = None

    def configure(self, catalogue: CatalogueView) -> None:
        """Finds the language model (and loads it, unless it is frozen), and creates the projection."""
        self.encoder = TextEncoder(**self.encoder_options)
        self.frozen = self.encoder.tune == "frozen"
        width = self.encoder.width
        if self.features == "whiten":
            if not self.frozen:
                raise ValueError(
                    f"features is whiten, but the language model is tuned (tune is {self.encoder.tune}), so that its "
                    "vectors have no fixed statistics: set features to raw, or tune to frozen."
                )
            self.whitening = Whitening(width, self.whiten_dims, self.whiten_eps)
            width = self.whitening.dims
        if self.projection_kind == "none" and self.wanted_dim not in (None, width):
            raise ValueError(
                f"Without a projection the item vectors have the language model's width, {width}, but dim is "
                f"{self.wanted_dim}: set dim to null or {width}, or projection to linear."
            )
        self.dim = self.wanted_dim or width
        if self.frozen:
            # Made of text and model, cached on disk: no part of a checkpoint.
            self.register_buffer("vectors", None, persistent=False)
            # Part of a checkpoint, so that a new item is seen as training saw the old ones.
            if self.features != "whiten":
                self.register_buffer("feature_mean", torch.zeros(width))
                self.register_buffer("feature_scale", torch.ones(width))
            self.register_buffer("measured", torch.zeros((), dtype=torch.bool))
        self.projection = self._make_projection(width)
        restore_head(self, self.encoder)

    def _make_projection(self, width: int) -> nn.Module:
        if self.projection_kind == "none":
            return nn.Identity()
        if self.projection_kind == "moe":
            return MixtureOfExperts(width, self.dim, self.experts, self.init_std)
        last = nn.Linear(width, self.dim)
        if self.init_std is not None:
            nn.init.normal_(last.weight, std=self.init_std / width**0.5)
            nn.init.zeros_(last.bias)
        if self.projection_kind == "linear":
            return last
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), last)

    @property
    def _place(self) -> torch.device:
        for tensor in (*self.projection.parameters(), *self.buffers()):
            return tensor.device
        return self.encoder.device

    @torch.inference_mode(False)
    def prepare(self, catalogue: CatalogueView) -> None:
        """Encodes the catalogue's texts, or finds them in the disk cache; for a tuned model, tokenises them."""
        if not catalogue.texts:
            return
        if len(catalogue.texts) != catalogue.n_rows:
            raise ValueError(f"The catalogue has {catalogue.n_rows} rows but {len(catalogue.texts)} texts.")
        if not self.frozen:
            self.tokens = self.encoder.with_states(self.encoder.tokenise(catalogue.texts).to(self._place))
            return
        vectors = self.encoder.encode_cached(catalogue.texts, self._place).to(self._place)
        if not self.measured:
            self.measure(vectors[1:] if len(vectors) > 1 else vectors)
        self.vectors = self._shape(vectors)

    def measure(self, vectors: Tensor) -> None:
        """Takes the statistics that ``standardise`` or ``whiten`` need of ``(n, width)`` vectors of a frozen model."""
        if self.features == "whiten":
            self.whitening.measure(vectors)
        elif self.features == "standardise":
            self.feature_mean.copy_(vectors.mean(0))
            self.feature_scale.copy_(1 / vectors.std(0, unbiased=False).clamp_min(1e-6))
        else:
            return
        self.measured.fill_(True)

    def _shape(self, vectors: Tensor) -> Tensor:
        if self.features == "whiten":
            return self.whitening(vectors)
        if self.features == "standardise":
            return (vectors - self.feature_mean) * self.feature_scale
        return F.normalize(vectors, dim=-1) if self.features == "normalise" else vectors

    def _features(self, items: ItemBatch) -> Tensor:
        """``(n, width)`` the language model's features of items."""
        if self.frozen:
            if self.vectors is None:
                raise RuntimeError(_UNPREPARED)
            return self.vectors if items.whole else self.vectors[items.rows]
        if self.tokens is None:
            raise RuntimeError(_UNPREPARED)
        if items.texts is not None and self.training:
            table = self.encoder.tokenise(items.texts).to(items.rows.device)
            return self.encoder.encode_table(table, torch.arange(len(items), device=items.rows.device))
        if self.tokens.tokens.device != items.rows.device:
            self.tokens = self.tokens.to(items.rows.device)
        return self.encoder.encode_table(self.tokens, items.rows)

    def _project(self, features: Tensor) -> Tensor:
        return self.projection(F.dropout(features, self.dropout, self.training))

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, d)`` item vectors, with gradients through a tuned language model."""
        return self._project(self._features(items))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Vectors of items that have no row: new in the shop, known by their text only.

        Args:
            texts: ``n`` item texts, made by the template of the training data.

        Returns:
            ``(n, d)`` item vectors, as an item of the catalogue without training interactions has.
        """
        vectors = self.encoder.encode(texts, self._place)
        training = self.training
        self.eval()
        try:
            return self.from_features(vectors)
        finally:
            self.train(training)

    def from_features(self, features: Tensor) -> Tensor:
        """``(n, d)`` item vectors of ``(n, width)`` vectors of the encoder, of items that have no row."""
        return self._from_text(self._shape(features) if self.frozen else features)

    def _from_text(self, features: Tensor) -> Tensor:
        return self._project(features)

    def language_parameters(self) -> Iterable[nn.Parameter]:
        """What is trained of the language model."""
        return (parameter for parameter in self.encoder.parameters() if parameter.requires_grad)


_UNPREPARED = (
    "The text item tower has no texts yet: attach the data (tower.prepare(catalogue) with catalogue.texts) before "
    "items are encoded. A checkpoint holds no texts; a run's data module or an exported artefact does."
)


class TextIdItemTower(IdFusion, TextItemTower):
    """Text and a learned vector an item together: text carries cold items, the id what text does not say.

    An item without training interactions has no id part, since its id vector was never trained.

    Args:
        **options: see :class:`~lightning_rec.towers.fusion.IdFusion` and :class:`TextItemTower`.
    """

    def configure(self, catalogue: CatalogueView) -> None:
        """Creates the text part, one vector a row, and the fusion."""
        super().configure(catalogue)
        self.add_ids(catalogue)

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, d)`` item vectors; of text alone where an item was never trained on."""
        return self._parts(items, self._features(items))[0]

    def _parts(self, items: ItemBatch, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.with_ids(items, self._project(features))

    def _from_text(self, features: Tensor) -> Tensor:
        return self.without_ids(self._project(features))
