"""The life of a log of impressions: read, index, split, batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lightning_rec.data.augment_history import HistoryAugmentation
from lightning_rec.data.augment_text import TextAugmentation
from lightning_rec.data.batch import CatalogueView
from lightning_rec.data.catalogue import Catalogue, encode_ids, ids_hash
from lightning_rec.data.collate import Int, KnownItems, distinct_pairs
from lightning_rec.data.impression_batches import (
    ImpressionEvaluationDataset,
    ImpressionTrainDataset,
    Known,
    ShownCandidates,
)
from lightning_rec.data.impression_signals import Ages, Popularity
from lightning_rec.data.impression_split import ImpressionSplit, split_impressions
from lightning_rec.data.impression_summary import PartSummary, describe_impressions
from lightning_rec.data.impression_texts import ImpressionTextMaker
from lightning_rec.data.impressions import (
    PARTS,
    Part,
    arrow_column,
    build_impressions,
    item_ids,
    with_click_histories,
)
from lightning_rec.data.loaders import ServedDataModule
from lightning_rec.data.readers.base import ImpressionReader, RawImpressions
from lightning_rec.data.readers.impressions import ImpressionFiles
from lightning_rec.data.text import DEFAULT_CLEANING


class ImpressionDataModule(ServedDataModule):
    """Reads a log of impressions and its items, splits it and serves batches of what was shown and clicked.

    Args:
        reader: what reads the files, such as ``lightning_rec.data.readers.ImpressionFiles``. May be left out when
            ``path`` names files that the domain recognises.
        path: a folder or file of a data set that the domain recognises (see the domain's class).
        template: how an item's fields become one text, such as ``"{title}. {abstract}"``; fields that an item lacks are
            skipped. None takes the domain's template.
        cleaning: names of the text cleaning steps, in order (see ``lightning_rec.data.text.CLEANING_STEPS``).
        user_template: how a user's text is made from the fields of the user table, ``{titles}`` (the newest titles of
            the history) and ``{feedback}`` (what the user wrote at earlier impressions). None: users have no text.
        user_titles: at most so many of the newest titles, and as many feedback texts, go into a user's text.
        unknown_items: what becomes of an item that the item table lacks: ``add`` gives it a row with empty text,
            ``drop`` leaves it out of what was shown and of histories.
        split: ``auto``: the parts of the files where they have some, else by time; ``time``: two moments cut the log;
            ``order``: by the order of the files.
        validation_start: start of validation: a fraction of the labelled impressions, seconds since 1970, or an ISO
            date.
        test_start: start of test, likewise.
        validation_share: the newest share of training that becomes validation where the files have no part for it.
        max_history: longest history in events; the newest are kept.
        candidates: ``sampled``: a training sample is a click and some non-clicks of its impression; ``whole``: it is an
            impression with all its candidates. None takes the domain's way.
        negatives: non-clicks of a sample of ``sampled``.
        max_candidates: most candidates of a sample of ``whole``; clicks are always kept.
        history_augmentation: crop, mask and reorder the histories of training impressions at random, such as
            ``{crop: 0.3, mask: 0.3}``; what was shown and clicked stays as it is.
        text_augmentation: variants of the training texts for tuned language models and word vectors, such as
            ``{probability: 0.5}``.
        popularity_half_life: hours in which a click loses half its weight in the popularity of an item.
        popularity_from: ``past``: the popularity of an item counts all clicks before the request, as a live system
            would, though none of a later part; ``train``: those of the training part only.
        group_field: the field of the items that is their category. None takes the domain's.
        batch_size: samples a training step, on each device.
        eval_batch_size: impressions a step of validation, test and prediction.
        num_workers: loader processes. Batches are made by array operations, so that 0 is fast enough for most runs.
        seed: seed of the order of samples and of drawn non-clicks.
    """

    #: The text template of the domain.
    default_template: ClassVar[str | None] = None
    #: What a training sample is in the domain.
    default_candidates: ClassVar[ShownCandidates] = "sampled"
    #: The field of the items that is their category in the domain.
    default_group_field: ClassVar[str | None] = "category"

    def __init__(
        self,
        reader: ImpressionReader | None = None,
        path: str | None = None,
        template: str | None = None,
        cleaning: list[str] = list(DEFAULT_CLEANING),  # noqa: B006  # jsonargparse shows it; it is never changed
        user_template: str | None = None,
        user_titles: int = 10,
        unknown_items: Literal["add", "drop"] = "add",
        split: ImpressionSplit = "auto",
        validation_start: float | int | str = 0.8,
        test_start: float | int | str = 0.9,
        validation_share: float = 0.1,
        max_history: int = 50,
        candidates: ShownCandidates | None = None,
        negatives: int = 4,
        max_candidates: int | None = None,
        history_augmentation: HistoryAugmentation | None = None,
        text_augmentation: TextAugmentation | None = None,
        popularity_half_life: float = 24.0,
        popularity_from: Literal["past", "train"] = "past",
        group_field: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.keep_plain_hyperparameters()
        if reader is None and path is None:
            raise ValueError("The data module needs to know its files: set data.reader, or data.path to a data set.")
        for name, number, least in (("max_history", max_history, 1), ("negatives", negatives, 0)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, but is {number}.")
        if max_candidates is not None and max_candidates < 1:
            raise ValueError(f"max_candidates must be at least 1, but is {max_candidates}.")
        if not popularity_half_life > 0:
            raise ValueError(f"popularity_half_life is a number of hours above 0, not {popularity_half_life}.")
        self.reader = reader
        self.path = path
        self.template = template
        self.cleaning = cleaning
        self.user_template = user_template
        self.user_titles = user_titles
        self.unknown_items = unknown_items
        self.split_name = split
        self.validation_start = validation_start
        self.test_start = test_start
        self.validation_share = validation_share
        self.max_history = max_history
        self.candidates: ShownCandidates = self.default_candidates if candidates is None else candidates
        self.negatives = negatives
        self.max_candidates = max_candidates
        self.history_augmentation = history_augmentation
        self.text_augmentation = text_augmentation
        self.popularity_half_life = popularity_half_life
        self.popularity_from = popularity_from
        self.group_field = self.default_group_field if group_field is None else group_field
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed

    # ------------------------------------------------------------------ hooks that a domain or a user overrides

    def usual_reader(self, path: str) -> ImpressionReader:
        """The reader for a data set that the domain recognises by its files.

        Raises:
            ValueError: when it recognises none.
        """
        raise ValueError(
            f"{type(self).__name__} recognises no data set at {path}: set data.reader instead of data.path."
        )

    def read(self) -> RawImpressions:
        """Reads the files into tables with the canonical columns."""
        reader = self.reader if self.reader is not None else self.usual_reader(str(self.path))
        return reader.read()

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str | None = None) -> None:
        """Reads, indexes and splits the data once, whatever the stage."""
        if hasattr(self, "parts"):
            return
        raw = self.read()
        self.report = raw.report
        self.catalogue = Catalogue.build(
            raw.items,
            item_ids(raw.impressions),
            template=self.default_template if self.template is None else self.template,
            cleaning=self.cleaning,
            unknown_items=self.unknown_items,
            optional_fields=self.template is None,
        )
        # each id was given once, so that this is no number of interactions
        self.catalogue.report.pop("unknown_interactions", None)
        codes, user_ids = encode_ids(arrow_column(raw.impressions, "user_id"))
        self.user_ids = ["", *user_ids]
        log = build_impressions(raw.impressions, self.catalogue, codes + 1)
        parts, self.split_description = split_impressions(
            log, self.split_name, self.validation_start, self.test_start, self.validation_share
        )
        log.parts = parts
        if not log.has_history:
            with_click_histories(log)
        self.impressions = log
        self.parts = parts
        clicks, _ = log.clicks(parts == 0)
        self.train_counts = np.bincount(log.candidates[clicks], minlength=len(self.catalogue))
        trained = np.zeros(len(self.user_ids), dtype=bool)
        trained[log.users[parts == 0]] = True
        self.known_users = np.where(trained[log.users], log.users, 0)
        self.published = self._published()
        self.user_texts = self._user_texts(raw)
        self.summaries = {part: PartSummary.of(log, self.numbers(part), self._n_known) for part in PARTS}
        rank_zero_info(describe_impressions(self.report, self.catalogue, self.summaries, self.protocol))

    @property
    def _n_known(self) -> int:
        """Catalogue rows that come from the item table, padding included."""
        return len(self.catalogue) if self.catalogue.table is None else len(self.catalogue.table) + 1

    def _published(self) -> NDArray[np.float64]:
        """``(n_rows,)`` times of publication, NaN where unknown."""
        found = np.full(len(self.catalogue), np.nan)
        table = self.catalogue.table
        column = None if table is None else arrow_column(table, "published")
        if column is not None:
            found[1 : len(column) + 1] = np.asarray(pc.fill_null(column.cast("float64"), float("nan")))
        return found

    def _user_texts(self, raw: RawImpressions) -> ImpressionTextMaker | None:
        if self.user_template is None:
            return None
        return ImpressionTextMaker(
            self.user_template,
            self.impressions,
            self.user_ids,
            self.catalogue,
            raw.users,
            limit=self.user_titles,
            cleaning=self.cleaning,
        )

    @property
    def protocol(self) -> str:
        """How results are measured, stated beside each of them."""
        found = [f"{part}: {text}" for part, text in self.summaries.items() if part != "train" and text.impressions]
        sentences = [
            f"{self.split_description.rstrip('.')}; the candidates of each impression are ranked as they were shown, "
            "none sampled"
        ]
        if found:
            sentences.append(f"{found[0][0].upper()}{found[0][1:]}{''.join('; ' + text for text in found[1:])}")
        if self.impressions.times is not None:
            sentences.append(
                "The popularity of a candidate counts the clicks before its request, those of the measured part among "
                "them"
                if self.popularity_from == "past"
                else "The popularity of a candidate counts clicks of the training part only"
            )
        return ". ".join(sentences) + "."

    @cached_property
    def view(self) -> CatalogueView:
        """What towers may know of the data."""
        return self.catalogue.view(
            counts=self.train_counts,
            n_users=len(self.user_ids),
            users_digest=ids_hash(self.user_ids),
            group_field=self.group_field,
            recent_counts=self._recent_counts(),
        )

    def _recent_counts(self) -> NDArray[np.float64] | None:
        """Training clicks of each row, each halved with every half-life between it and the newest."""
        log = self.impressions
        clicks, owner = log.clicks(self.parts == 0)
        if log.times is None or not len(clicks):
            return None
        times = log.times[owner]
        weights = np.exp2((times - times.max()) / (self.popularity_half_life * 3600.0))
        return np.bincount(log.candidates[clicks], weights, len(self.catalogue)).astype(np.float64)

    # ------------------------------------------------------------------ data sets

    def numbers(self, part: Part) -> Int:
        """The impressions of a part, in the order of the files."""
        return np.flatnonzero(self.parts == PARTS.index(part))

    def known(self, part: Part) -> Known:
        """What the impressions of a part may know: nothing of what belongs to a later part."""
        log = self.impressions
        visible = self.parts <= PARTS.index(part)
        known = Known(self.max_history, self.known_users, texts=self.user_texts)
        if log.times is not None:
            clicks, owner = log.clicks(visible if self.popularity_from == "past" else self.parts == 0)
            known.ages = Ages(log, visible, self.published)
            known.popularity = Popularity(log.candidates[clicks], log.times[owner], self.popularity_half_life)
        return known

    def train_dataset(self) -> ImpressionTrainDataset:
        """The training samples; nothing of a later part is in them."""
        log = self.impressions
        clicks, owner = log.clicks(self.parts == 0)
        users, rows = distinct_pairs(log.users[owner], log.candidates[clicks].astype(np.int64))
        indptr = np.zeros(len(self.user_ids) + 1, dtype=np.int64)
        np.cumsum(np.bincount(users, minlength=len(self.user_ids)), out=indptr[1:])
        dataset = ImpressionTrainDataset(
            log,
            self.numbers("train"),
            self.known("train"),
            KnownItems(indptr, rows),
            n_rows=len(self.catalogue),
            candidates=self.candidates,
            negatives=self.negatives,
            max_candidates=self.max_candidates,
            augmentation=self.history_augmentation,
            variants=self.text_variants(),
        )
        if not len(dataset):
            raise ValueError(
                f"There is nothing to learn from: the training part has {len(self.numbers('train')):,} impressions and "
                f"{len(clicks):,} clicks ({self.split_description.rstrip('.')}). Check the labels and the split."
            )
        return dataset

    def evaluation_dataset(self, part: Literal["validation", "test"]) -> ImpressionEvaluationDataset:
        """The labelled impressions of a part, with all their candidates.

        Raises:
            ValueError: there are none in the test part.
        """
        numbers = self.numbers(part)
        labelled = numbers[self.impressions.labelled[numbers]]
        if part == "test" and not len(labelled):
            asked = len(numbers) + len(self.numbers("predict"))
            remedy = (
                f"The {asked:,} impressions that are there have no labels, so there is nothing to measure; predict "
                "works on them."
                if asked
                else "Name a folder or file as the test part, or use validate, or set split: time."
            )
            raise ValueError(f"There are no labelled impressions to test on. {remedy}")
        return ImpressionEvaluationDataset(self.impressions, labelled, self.known(part))

    def prediction_dataset(self) -> ImpressionEvaluationDataset:
        """The impressions of the part ``predict``, or, where there is none, those of the test part.

        Sets ``asked_impressions`` and ``asked_users``: the raw ids of each impression and its user, in the order of the
        files.

        Raises:
            ValueError: there are neither.
        """
        part: Part = "predict" if len(self.numbers("predict")) else "test"
        numbers = self.numbers(part)
        if not len(numbers):
            there = ", ".join(f"{len(self.numbers(name)):,} of {name}" for name in PARTS if len(self.numbers(name)))
            raise ValueError(
                f"There are no impressions to predict: the log has {there or 'none at all'}. Name a folder or file as "
                "the test part of the reader (such as data.reader.test), or set data.split: time."
            )
        self.asked_impressions = [self.impressions.ids[number] for number in numbers.tolist()]
        self.asked_users = [self.user_ids[user] for user in self.impressions.users[numbers].tolist()]
        return ImpressionEvaluationDataset(self.impressions, numbers, self.known(part), labelled=False)


def usual_files(path: str, logs: Sequence[str], items: Sequence[str]) -> ImpressionFiles | None:
    """The reader of a folder with one log, one item table and perhaps one user table, told by their names.

    Args:
        path: the folder.
        logs: names of logs without their endings, such as ``impressions``.
        items: names of item tables, likewise.

    Returns:
        None where there is not one log and one item table.
    """
    folder = Path(path)
    found = [sorted(file for name in names for file in folder.glob(f"{name}.*")) for names in (logs, items, ("users",))]
    if len(found[0]) != 1 or len(found[1]) != 1:
        return None
    users = str(found[2][0]) if len(found[2]) == 1 else None
    return ImpressionFiles(str(found[0][0]), items=str(found[1][0]), users=users)
