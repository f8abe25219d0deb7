"""The item tower of news: what an article says, what it is about and whom it names, in one vector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import peft
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.towers.attention import AdditiveAttention
from lightning_rec.towers.base import ItemTower
from lightning_rec.towers.language import BUNDLED, Pooling, Recompute, Tune
from lightning_rec.towers.news_text import NewsText, TextTable
from lightning_rec.towers.news_views import NameView, names_of, ragged, text_of
from lightning_rec.towers.tokens import TokenTable
from lightning_rec.towers.vocabulary import named_vectors
from lightning_rec.towers.word_vectors import WordOptions

#: Articles that are encoded at once where no gradient is kept.
_CHUNK = 8192


@dataclass
class Articles:
    """``n`` articles as the tower reads them.

    Attributes:
        texts: the distinct texts; the first is the empty text.
        text_rows: ``(v, n)`` row of each text view in ``texts``, 0 where an article has none.
        names: for each view of names, their rows in its table: row 0 alone where an article has none.
        first: ``(n,)`` the first article that says the same: articles that say the same have exactly one vector.
    """

    texts: TextTable | None
    text_rows: Tensor
    names: list[TokenTable]
    first: Tensor

    def to(self, device: torch.device) -> Articles:
        """The same articles on another device."""
        texts = None if self.texts is None else self.texts.to(device)
        names = [table.to(device) for table in self.names]
        return replace(self, texts=texts, text_rows=self.text_rows.to(device), names=names, first=self.first.to(device))


class NewsItemTower(ItemTower):
    """An article's title, abstract, categories and entities as one vector, by attention over the views that it has.

    NAML (Wu et al., "Neural News Recommendation with Attentive Multi-View Learning", IJCAI 2019), with entities as one
    more view. Texts go through one encoder, a language model (frozen with cached vectors, tuned through a peft adapter,
    or tuned whole) or plain word vectors (``words``). Every view is projected to ``dim``. There is no vector by row
    number: new articles are known at once, and articles that say the same have the same vector; one that is not in the
    item table has that of an empty text.

    A catalogue without these fields is read through its items' text as the only view.

    Args:
        title: field of the item table that holds titles; null: none.
        abstract: field of abstracts, encoded like titles; null: none.
        categories: fields of categories, each a view; null: none.
        entities: field of entities, a list of ids; null: none.
        language_model: ``minilm`` (comes with pip), a folder, or a name on the Hugging Face hub.
        words: word vectors instead of a language model, such as ``{encoder: attention, dim: 300, vectors: null}``;
            ``{}`` for all defaults. The options of language models have no part then.
        dim: width of the item vectors.
        pooling: how the language model's tokens become a text's vector.
        max_tokens: texts are cut to so many tokens; with ``words``, see ``words.max_length``.
        tune: ``frozen``, ``full`` or ``adapter``; None: ``adapter`` with ``peft``, else ``frozen``.
        peft: an adapter, any config class of peft, such as ``{class_path: peft.LoraConfig, init_args: {r: 8}}``.
        features: what a frozen model's vectors become: ``standardise`` (every feature with mean 0 and deviation 1 over
            the catalogue's distinct texts), ``normalise`` (length 1) or ``raw``.
        dropout: share of the features of a view dropped in training.
        hidden: width of the attention over views.
        category_dim: width of the vector of a category. Like that of an entity without a file, it starts at zero, so
            that a category which no article of the training has says nothing.
        entity_dim: width of the vector of an entity; with a file, that of its vectors.
        entity_vectors: ready-made entity vectors, such as MIND's entity_embedding.vec (id, tab, numbers); plain, .gz
            or .zip; a list of files where each part of the data has its own, of which the first that has an entity
            counts. Those of the catalogue's entities are kept, brought to unit scale. None: they are learned from
            the start.
        tune_entities: train entity vectors; with false, entities that the file does not have are left out.
        entity_pooling: ``mean`` or ``attention`` over an article's entities.
        max_entities: an article's entities beyond so many are left out.
        min_entity_count: entities that fewer articles name are left out.
        init_std: standard deviation of the item vectors before training, about; None: the usual initialisation of
            linear layers. A small one, such as 0.02, helps where the whole catalogue is ranked.
        gradient_checkpointing: recompute the language model's activations in the backward pass, to save memory: true,
            layer by layer, or ``passes``, pass by pass, so that memory does not grow with the batch.
        token_budget: most tokens, with padding, of one pass through the language model; None: 2,048 on a CPU,
            16,384 elsewhere.
        cache_dir: where vectors are cached; None: ``LIGHTNING_REC_CACHE``, else ``~/.cache/lightning_rec``.
        dtype: precision of a frozen language model.
    """

    uses_ids = False

    def __init__(
        self,
        title: str | None = "title",
        abstract: str | None = "abstract",
        categories: tuple[str, ...] | None = ("category", "subcategory"),
        entities: str | None = "entities",
        language_model: str = BUNDLED,
        words: WordOptions | None = None,
        dim: int = 64,
        pooling: Pooling = "mean",
        max_tokens: int = 96,
        tune: Tune | None = None,
        peft: peft.PeftConfig | None = None,
        features: Literal["standardise", "normalise", "raw"] = "standardise",
        dropout: float = 0.2,
        hidden: int = 200,
        category_dim: int = 100,
        entity_dim: int = 100,
        entity_vectors: str | list[str] | None = None,
        tune_entities: bool = True,
        entity_pooling: Literal["mean", "attention"] = "mean",
        max_entities: int = 16,
        min_entity_count: int = 1,
        init_std: float | None = None,
        gradient_checkpointing: Recompute = False,
        token_budget: int | None = None,
        cache_dir: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__()
        self.text_fields = [name for name in (title, abstract) if name is not None]
        # what is cached of a frozen model is made of the texts as they are
        frozen = words is None and (tune or ("frozen" if peft is None else "adapter")) == "frozen"
        self.reads_variants = bool(self.text_fields) and not frozen
        self.category_fields = list(categories or ())
        self.entity_field = entities
        if not (self.text_fields or self.category_fields or entities):
            raise ValueError(
                "NewsItemTower has no view left: name at least one field as title, abstract, categories or entities."
            )
        if words is not None and (tune is not None or peft is not None):
            raise ValueError(
                "NewsItemTower got words, and tune or peft, which are for language models: leave out one or the other "
                "(word vectors are trained unless words.tune is false)."
            )
        self.language_options: dict[str, Any] = {
            "language_model": language_model,
            "pooling": pooling,
            "max_tokens": max_tokens,
            "tune": tune,
            "peft": peft,
            "gradient_checkpointing": gradient_checkpointing,
            "token_budget": token_budget,
            "cache_dir": cache_dir,
            "dtype": dtype,
        }
        if not tune_entities and entity_vectors is None:
            raise ValueError(
                "tune_entities is false, but there are no vectors to keep as they are: name a file as entity_vectors, "
                "or set tune_entities to true."
            )
        self.words = words
        self.dim = dim
        self.features = features
        self.dropout = dropout
        self.hidden = hidden
        self.category_dim = category_dim
        self.entity_dim = entity_dim
        self.entity_vectors = entity_vectors
        self.tune_entities = tune_entities
        self.entity_pooling = entity_pooling
        self.max_entities = max_entities
        self.min_entity_count = min_entity_count
        self.init_std = init_std
        self.articles: Articles | None = None
        self.whole_texts = False  # the catalogue has none of the fields, and the items' texts are read

    # ------------------------------------------------------------------ building

    @property
    def fields(self) -> list[str]:
        """The fields that the tower reads."""
        return [*self.text_fields, *self.category_fields, *([self.entity_field] if self.entity_field else [])]

    def configure(self, catalogue: CatalogueView) -> None:
        """Creates the views; vocabularies come from the data, or later from a checkpoint.

        All views are there whatever fields the data has, so that a checkpoint fits any data.
        """
        columns = self._columns(catalogue) if catalogue.fields or catalogue.texts else {}
        self._report_absent(columns)
        if self.text_fields:
            texts = (text for name in self.text_fields for text in map(text_of, columns.get(name, ())))
            self.text = NewsText(self.language_options, self.words, self.features, dict.fromkeys(texts))
            self.projections = nn.ModuleList(nn.Linear(self.text.width, self.dim) for _ in self.text_fields)
        views = [self._category_view(columns.get(name, ()), name) for name in self.category_fields]
        if self.entity_field:
            views.append(self._entity_view(columns.get(self.entity_field, ())))
        self.name_views = nn.ModuleList(views)
        if len(self.fields) > 1:
            self.attention = AdditiveAttention(self.dim, self.hidden)
        if self.init_std is not None:
            layers = [*getattr(self, "projections", ()), *(view.projection for view in views)]
            for layer in layers:
                nn.init.normal_(layer.weight, std=self.init_std / layer.in_features**0.5)
                nn.init.zeros_(layer.bias)

    def _category_view(self, values: Sequence[Any], name: str) -> NameView:
        counts = Counter(category for value in values for category in names_of(value))
        table = named_vectors(counts, self.category_dim, std=0.0, what=f"names of {name}", option="category_dim")
        return NameView(table, self.dim, "mean", self.hidden, self.max_entities, self.dropout)

    def _entity_view(self, values: Sequence[Any]) -> NameView:
        table = named_vectors(
            Counter(entity for value in values for entity in names_of(value)),
            self.entity_dim,
            std=0.0,
            min_count=self.min_entity_count,
            files=[self.entity_vectors] if isinstance(self.entity_vectors, str) else self.entity_vectors,
            tuned=self.tune_entities,
            what="entities",
            option="entity_dim",
            unit=True,
        )
        return NameView(table, self.dim, self.entity_pooling, self.hidden, self.max_entities, self.dropout)

    def _columns(self, catalogue: CatalogueView) -> Mapping[str, Sequence[Any]]:
        """The tower's fields that the data has; the items' texts as the first text view where it has none."""
        columns = {name: catalogue.fields[name] for name in self.fields if name in catalogue.fields}
        if columns:
            return columns
        if catalogue.texts and self.text_fields:
            return {self.text_fields[0]: catalogue.texts}
        raise ValueError(
            f"NewsItemTower reads {', '.join(self.fields)}, but the item table has none of these fields. Its fields "
            f"are: {', '.join(catalogue.fields) or 'none'}. Name them as title, abstract, categories or entities of "
            "the tower."
        )

    def _report_absent(self, columns: Mapping[str, Sequence[Any]]) -> None:
        absent = [name for name in self.fields if name not in columns]
        if columns and absent:
            rank_zero_info(f"No article has {' or '.join(absent)}: the data has no such field.")

    @property
    def _place(self) -> torch.device:
        return next(self.parameters()).device

    @torch.inference_mode(False)
    def prepare(self, catalogue: CatalogueView) -> None:
        """Reads the articles: encodes the distinct texts, or finds them in the disk cache, or splits them in tokens."""
        if not catalogue.fields and not catalogue.texts:
            return
        columns = self._columns(catalogue)
        for name, column in columns.items():
            if len(column) != catalogue.n_rows:
                raise ValueError(f"The catalogue has {catalogue.n_rows} rows but {len(column)} values of {name}.")
        self.whole_texts = not any(name in catalogue.fields for name in self.fields)
        self.articles = self._read(columns, catalogue.n_rows, new=False)

    def _read(self, columns: Mapping[str, Sequence[Any]], n: int, new: bool) -> Articles:
        nothing = [""] * n
        distinct, rows = self._distinct(columns, n)
        table = None
        if self.text_fields:
            table = (self.text.read if new else self.text.attach)(list(distinct), self._place)
        others = [*self.category_fields, *([self.entity_field] if self.entity_field else [])]
        names = [view.read(columns.get(name, nothing)) for view, name in zip(self._name_views(), others, strict=True)]
        first: dict[tuple[Any, ...], int] = {}
        said = zip(*rows, *(ragged(table) for table in names), strict=True)
        firsts = [first.setdefault(key, row) for row, key in enumerate(said)]
        articles = Articles(table, torch.tensor(rows).view(len(rows), n), names, torch.tensor(firsts, dtype=torch.long))
        return articles.to(self._place)

    def _name_views(self) -> list[NameView]:
        return [view for view in self.name_views if isinstance(view, NameView)]

    # ------------------------------------------------------------------ encoding

    def forward(self, items: ItemBatch) -> Tensor:
        """``(n, d)`` item vectors, with gradients through a tuned encoder; articles that say the same are read once."""
        if self.articles is None:
            raise RuntimeError(
                "The news tower has no articles yet: attach the data (tower.prepare(catalogue) with its fields or "
                "texts) before items are encoded. A checkpoint holds no articles; a run's data module does."
            )
        if self.articles.first.device != items.rows.device:
            with torch.inference_mode(False):
                self.articles = self.articles.to(items.rows.device)
        variants = self._variants(items) if self.training and self.reads_variants else None
        if variants is None:
            return self._encode_rows(self.articles, items.rows)
        distinct, rows = self._distinct(variants, len(items))
        texts = self.text.read(list(distinct), items.rows.device)
        return self._encode(self.articles, items.rows, (texts, torch.tensor(rows, device=items.rows.device)))

    def _variants(self, items: ItemBatch) -> Mapping[str, Sequence[str]] | None:
        """What a training step has in the place of the catalogue's texts, or None."""
        if self.whole_texts:
            return None if items.texts is None else {self.text_fields[0]: items.texts}
        return items.fields

    def _distinct(self, columns: Mapping[str, Sequence[Any]], n: int) -> tuple[dict[str, int], list[list[int]]]:
        """The distinct texts of ``n`` articles, the empty text first, and where each text view's are among them."""
        nothing = [""] * n
        distinct: dict[str, int] = {"": 0}
        rows = [
            [distinct.setdefault(text_of(value), len(distinct)) for value in columns.get(name, nothing)]
            for name in self.text_fields
        ]
        return distinct, rows

    def _encode_rows(self, articles: Articles, rows: Tensor) -> Tensor:
        if not len(rows):
            return torch.zeros(0, self.dim, device=rows.device)
        distinct, places = articles.first[rows].unique(return_inverse=True)
        size = len(distinct) if torch.is_grad_enabled() else _CHUNK
        parts = [self._encode(articles, part) for part in distinct.split(size)]
        return F.embedding(places, torch.cat(parts))

    def _encode(self, articles: Articles, rows: Tensor, given: tuple[TextTable, Tensor] | None = None) -> Tensor:
        """``(k, d)`` vectors of the articles of ``(k,)`` rows, perhaps with other texts than their own."""
        vectors, present = [], []
        if articles.texts is not None:
            texts, text_rows = (articles.texts, articles.text_rows[:, rows]) if given is None else given
            features = self.text(texts, text_rows)
            for projection, part, row in zip(self.projections, features, text_rows, strict=True):
                vectors.append(projection(F.dropout(part, self.dropout, self.training)))
                present.append(row > 0)
        for view, names in zip(self._name_views(), articles.names, strict=True):
            vector, there = view(names, rows)
            vectors.append(vector)
            present.append(there)
        if articles.texts is not None:
            # An article without anything is its empty first text.
            present[0] = present[0] | ~torch.stack(present).any(0)
        if len(vectors) == 1:
            return vectors[0].masked_fill(~present[0][:, None], 0.0)
        return self.attention(torch.stack(vectors, 1), torch.stack(present, 1))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Vectors of new articles of which nothing is known but a text, read as a title.

        Args:
            texts: ``n`` texts.

        Returns:
            ``(n, d)`` item vectors.

        Raises:
            ValueError: when the tower reads no text.
        """
        if not self.text_fields:
            raise ValueError(
                f"The tower reads no text, only {', '.join(self.fields)}: give the fields of new articles to "
                "encode_items."
            )
        return self.encode_items({self.text_fields[0]: texts})

    @torch.no_grad()
    def encode_items(self, fields: Mapping[str, Sequence[Any]]) -> Tensor:
        """Vectors of new articles.

        Args:
            fields: field -> ``n`` values, strings or lists of strings, as in the item table. Fields that the tower
                does not read are passed over; those that are not given are empty.

        Returns:
            ``(n, d)`` item vectors, as the articles would have in the catalogue.

        Raises:
            ValueError: when there is none of the tower's fields, or they differ in length.
        """
        columns = {name: fields[name] for name in self.fields if name in fields}
        sizes = {len(column) for column in columns.values()}
        if len(sizes) != 1:
            given = ", ".join(f"{name} ({len(column)})" for name, column in columns.items()) or "none of them"
            raise ValueError(f"New articles need equally many values of {', '.join(self.fields)}; given: {given}.")
        (n,) = sizes
        training = self.training
        self.eval()
        try:
            return self._encode_rows(self._read(columns, n, new=True), torch.arange(n, device=self._place))
        finally:
            self.train(training)

    def language_parameters(self) -> Iterable[nn.Parameter]:
        """What is trained of the language model."""
        return self.text.language_parameters() if self.text_fields else ()
