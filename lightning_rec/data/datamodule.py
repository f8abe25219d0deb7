"""The life of the data, shared by every domain: read, index, filter, split, batch.

A domain (or you) overrides a few hooks of :class:`RecDataModule`: which files it recognises, its text template and its
positive rule. See ``ecommerce.py``, ``video.py`` and ``news.py`` for three complete examples.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lightning_rec.data.augment_history import HistoryAugmentation
from lightning_rec.data.augment_text import TextAugmentation
from lightning_rec.data.batch import CatalogueView
from lightning_rec.data.catalogue import Catalogue, encode_ids, ids_hash
from lightning_rec.data.cold import ColdItems, check_cold_items, cold_rows, hold_out
from lightning_rec.data.collate import CandidateMode, Int, KnownItems, Supervision, TrainDataset, training_samples
from lightning_rec.data.evaluation import EvaluationDataset, asked_users, user_rows
from lightning_rec.data.freshness import asked_at, lifetimes, recent_counts
from lightning_rec.data.histories import build_histories
from lightning_rec.data.interactions import number_column
from lightning_rec.data.loaders import ServedDataModule
from lightning_rec.data.readers.base import RawData, Reader
from lightning_rec.data.sampling import NegativeSampler
from lightning_rec.data.split import Split, global_time, known_by, leave_one_out, refit
from lightning_rec.data.summary import describe
from lightning_rec.data.text import DEFAULT_CLEANING
from lightning_rec.data.user_text import UserTextMaker, profile_only

SplitName = Literal["leave_one_out", "global_time"]


class RecDataModule(ServedDataModule):
    """Reads a catalogue and a log, splits the log by user and serves batches.

    Args:
        reader: what reads the files, such as ``lightning_rec.data.readers.Files``. May be left out when ``path`` names
            files that the domain recognises.
        path: a folder or file of a data set that the domain recognises (see the domain's class).
        template: how an item's fields become one text, such as ``"{title}. {brand}. {description}"``; fields that an
            item lacks are skipped. None takes the domain's template.
        cleaning: names of the text cleaning steps, in order (see ``lightning_rec.data.text.CLEANING_STEPS``).
        user_template: how a user's text is made from the fields of the user table, ``{titles}`` (the newest titles of
            the history) and ``{reviews}`` (the newest reviews). None: users have no text.
        user_titles: at most so many of the newest titles, and as many reviews, go into a user's text.
        min_rating: the positive rule: an interaction with a lower rating is not positive. It is kept out of histories
            and targets, but counts as touched for ``filter_seen``. An interaction without a rating is positive. None
            takes the domain's rule.
        rating_range: lowest and highest possible rating, for rating regression. None takes the range of the
            training ratings.
        repeats: what happens to repeats of one user and item: ``keep`` them all, or only the ``first`` or ``last``.
        min_user_events: drop users with fewer positive interactions, and (with ``min_item_events``) repeat until both
            minimums hold: the k-core. What is dropped counts as touched for ``filter_seen``.
        min_item_events: drop the interactions with items that have fewer. The items stay candidates, as those that
            nobody touched do.
        unknown_items: what happens to interactions whose item the item table lacks: ``drop`` them (counted), or ``add``
            a catalogue row with an empty text.
        split: ``leave_one_out``: the last event of each user is the test, the one before it the validation;
            ``global_time``: everything after ``test_start`` is the test. None takes the domain's.
        min_events: leave-one-out: users with fewer events are trained on but not evaluated.
        validation_start: global time: a share of all events (0.8), a time in seconds or an ISO date.
        test_start: global time: likewise.
        gap: global time: hours before each of the two whose events are neither trained on nor to be found.
        max_age: candidates are the items alive when a user asks: born by then, and at most so many hours ago. An item
            is born at its ``published`` time (a field of the items) or, where it has none or was touched before that,
            at the first interaction with it; ``.inf`` lets it live on from there. ``all``: every item is a candidate,
            whatever the time. A user of validation and test asks at the time of the first event to be found. None
            takes the domain's, where the data has times.
        request_time: the moment for which ``predict`` answers, in seconds or as an ISO date: nothing that happened
            later is known. None: that of the newest interaction.
        recency_half_life: hours in which an interaction loses half its weight in recency popularity.
        fit_on: ``train``; or ``train_validation`` for a last fit once all settings are chosen: there is no validation
            then, so set ``trainer.max_epochs``, ``checkpoint.monitor: null`` and test with ``ckpt_path: last``.
        cold_items: items to hold out of training with all their events, to see how the model ranks what it has never
            met: a share of those with interactions (0.1), a list of ids, or a text file with one id a line. They are
            no training candidates either, nor are other items without training events. Targets and histories of the
            evaluation stay as they are; the figures under ``cold/`` and ``warm/`` are those of the two kinds.
        cold_seed: seed of the choice of a share of the items; the training's own seed does not change it.
        max_history: longest history that the towers read, in events; the newest are kept.
        windows: ``newest``: train on the newest ``max_history`` events of each user; ``all``: cut longer histories
            into windows, so that every event is trained on.
        supervision: ``every`` step of a history is a training target; ``random``: the end of one random prefix a user
            and epoch, for user towers that give one vector a history; ``last``: the newest event only.
        candidates: what a target competes with in training: the whole ``catalogue``, the other targets of the
            ``batch``, or these and ``sampled`` negatives.
        history_augmentation: crop, mask and reorder training histories at random, such as ``{crop: 0.3, mask: 0.3}``.
        text_augmentation: variants of the training texts for tuned language models, such as ``{probability: 0.5}``.
        negatives: number of sampled negatives a step (or a user).
        negative_distribution: ``uniform``, or ``popularity``: in proportion to training counts.
        negatives_per_user: draw ``negatives`` for each user from what that user has not touched. Otherwise they are
            drawn once for the step, and where one is a known positive of a user, it does not count for that user.
        filter_seen: items that a user has touched are not recommended and not ranked in evaluation. A target that was
            touched before is then a miss.
        batch_size: users a training step, on each device.
        eval_batch_size: users a step of validation, test and prediction.
        num_workers: loader processes. Batches are made by array operations, so that 0 is fast enough for most runs.
        predict_users: the users to predict for, as a list or a text file with one id a line. None: all users, those of
            the interactions and then those whom only the reader's user table knows.
        seed: seed of the order of samples and of sampled negatives.
    """

    #: The text template of the domain.
    default_template: ClassVar[str | None] = None
    #: The lowest rating that counts as positive in the domain.
    default_min_rating: ClassVar[float | None] = None
    #: The split of the domain.
    default_split: ClassVar[SplitName] = "leave_one_out"
    #: For how many hours an item of the domain can be recommended; None: always.
    default_max_age: ClassVar[float | None] = None

    def __init__(
        self,
        reader: Reader | None = None,
        path: str | None = None,
        template: str | None = None,
        cleaning: list[str] = list(DEFAULT_CLEANING),  # noqa: B006  # jsonargparse shows it; it is never changed
        user_template: str | None = None,
        user_titles: int = 10,
        min_rating: float | None = None,
        rating_range: tuple[float, float] | None = None,
        repeats: Literal["keep", "first", "last"] = "keep",
        min_user_events: int = 1,
        min_item_events: int = 1,
        unknown_items: Literal["drop", "add"] = "drop",
        split: SplitName | None = None,
        min_events: int = 3,
        validation_start: float | int | str = 0.8,
        test_start: float | int | str = 0.9,
        gap: float = 0.0,
        max_age: float | Literal["all"] | None = None,
        request_time: float | int | str | None = None,
        recency_half_life: float = 24.0,
        fit_on: Literal["train", "train_validation"] = "train",
        cold_items: ColdItems = 0.0,
        cold_seed: int = 0,
        max_history: int = 50,
        windows: Literal["newest", "all"] = "newest",
        supervision: Supervision = "every",
        candidates: CandidateMode = "catalogue",
        history_augmentation: HistoryAugmentation | None = None,
        text_augmentation: TextAugmentation | None = None,
        negatives: int = 0,
        negative_distribution: Literal["uniform", "popularity"] = "uniform",
        negatives_per_user: bool = False,
        filter_seen: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        predict_users: list[str] | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.keep_plain_hyperparameters()
        if reader is None and path is None:
            raise ValueError("The data module needs to know its files: set data.reader, or data.path to a data set.")
        if candidates == "sampled" and negatives < 1:
            raise ValueError("candidates: sampled needs negatives of at least 1.")
        if max_history < 1:
            raise ValueError(f"max_history must be at least 1, but is {max_history}.")
        check_cold_items(cold_items)
        for name, hours in (("max_age", max_age), ("recency_half_life", recency_half_life)):
            if isinstance(hours, float | int) and not hours > 0:
                raise ValueError(f"{name} is a number of hours above 0, not {hours}.")
        self.reader = reader
        self.path = path
        self.template = template
        self.cleaning = cleaning
        self.user_template = user_template
        self.user_titles = user_titles
        self.min_rating = self.default_min_rating if min_rating is None else min_rating
        self.rating_range = rating_range
        self.repeats = repeats
        self.min_user_events = min_user_events
        self.min_item_events = min_item_events
        self.unknown_items = unknown_items
        self.split_name: SplitName = self.default_split if split is None else split
        self.min_events = min_events
        self.validation_start = validation_start
        self.test_start = test_start
        self.gap = gap
        self.max_age = max_age
        self.request_time = request_time
        self.recency_half_life = recency_half_life
        self.fit_on = fit_on
        self.cold_items = cold_items
        self.cold_seed = cold_seed
        self.max_history = max_history
        self.windows = windows
        self.supervision = supervision
        self.candidates = candidates
        self.history_augmentation = history_augmentation
        self.text_augmentation = text_augmentation
        self.negatives = negatives
        self.negative_distribution = negative_distribution
        self.negatives_per_user = negatives_per_user
        self.filter_seen = filter_seen
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.predict_users = predict_users
        self.seed = seed

    # ------------------------------------------------------------------ hooks that a domain or a user overrides

    def usual_reader(self, path: str) -> Reader:
        """The reader for a data set that the domain recognises by its files.

        Raises:
            ValueError: when it recognises none.
        """
        raise ValueError(
            f"{type(self).__name__} recognises no data set at {path}: set data.reader instead of data.path."
        )

    def read(self) -> RawData:
        """Reads the files into tables with the canonical columns."""
        reader = self.reader if self.reader is not None else self.usual_reader(str(self.path))
        return reader.read()

    def positive(self, interactions: Dataset) -> NDArray[np.bool_]:
        """The positive rule: which interactions are positive.

        Args:
            interactions: table with ``user_id``, ``item_id`` and, where the data has it, ``rating``.

        Returns:
            ``(rows,)`` True where an interaction is positive.
        """
        ratings = number_column(interactions, "rating", np.float64)
        if self.min_rating is None or ratings is None:
            return np.ones(len(interactions), dtype=bool)
        return ~(ratings < self.min_rating)

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str | None = None) -> None:
        """Reads, indexes and splits the data once, whatever the stage."""
        if hasattr(self, "split"):
            return
        raw = self.read()
        interactions = raw.interactions
        item_ids = interactions["item_id"]
        self.catalogue = Catalogue.build(
            raw.items,
            item_ids,
            template=self.default_template if self.template is None else self.template,
            cleaning=self.cleaning,
            unknown_items=self.unknown_items,
            optional_fields=self.template is None,
        )
        user_codes, user_ids = encode_ids(interactions["user_id"])
        user_codes, self.user_ids = user_codes + 1, ["", *user_ids]
        self.profile_only = profile_only(raw.users, self.user_ids, raw.report)
        items = self.catalogue.rows(item_ids)
        times = number_column(interactions, "timestamp", np.int64)
        ratings = number_column(interactions, "rating", np.float32)
        known = items > 0
        positive = self.positive(interactions) & known
        self.histories = build_histories(
            user_codes,
            items,
            times,
            ratings,
            user_ids=self.user_ids,
            keep=positive,
            repeats=self.repeats,
            user_min=self.min_user_events,
            item_min=self.min_item_events,
        )
        # what is not positive, or dropped by the k-core, was touched all the same
        touched = known & ~positive
        touched[self.histories.core_dropped] = True
        self.touched = (
            build_histories(user_codes, items, times, ratings, user_ids=self.user_ids, keep=touched)
            if touched.any()
            else None
        )
        max_age = self.default_max_age if self.max_age is None and times is not None else self.max_age
        self.lifetimes = lifetimes(self.catalogue, items, times, max_age)
        self.asked_at = asked_at(times, self.request_time)
        self.split = self._split()
        if self.fit_on == "train_validation":
            self.split = refit(self.split, self.histories)
        cold = cold_rows(self.cold_items, self.cold_seed, self.catalogue.ids, self.histories)
        self.split = hold_out(self.split, self.histories, cold)
        self.train_counts = self.split.train_counts(self.histories, len(self.catalogue))
        self.user_texts: UserTextMaker | None = None
        if self.user_template is not None:
            self.user_texts = UserTextMaker.of(
                raw, self.user_template, self.histories, self.catalogue, self.user_titles, self.cleaning
            )
        self.report = raw.report
        if self.rating_range is None and len(trained := self.split.train_ratings(self.histories)):
            self.rating_range = float(trained.min()), float(trained.max())
        test = self.evaluation_dataset("test")
        missed = test.filtered_targets()
        self.not_alive = 0 if self.lifetimes is None else test.targets_not_alive(self.lifetimes)
        rank_zero_info(
            describe(self.report, self.catalogue, self.histories, self.split, protocol=self.protocol, missed=missed)
        )

    def _split(self) -> Split:
        if self.split_name == "leave_one_out":
            return leave_one_out(self.histories, min_events=self.min_events)
        return global_time(self.histories, self.validation_start, self.test_start, gap=self.gap)

    @property
    def protocol(self) -> str:
        """One sentence on how results are measured, stated beside each of them."""
        seen = "seen items filtered" if self.filter_seen else "seen items kept"
        text = f"{self.split.description.rstrip('.')}; full ranking of {len(self.catalogue) - 1:,} items, {seen}"
        alive = "" if self.lifetimes is None else f"; {self.lifetimes.describe(self.not_alive)}"
        return f"{text}{alive}."

    @cached_property
    def view(self) -> CatalogueView:
        """What towers may know of the data."""
        view = self.catalogue.view(
            counts=torch.from_numpy(self.train_counts),
            n_users=len(self.user_ids),
            users_digest=ids_hash(self.user_ids),
            rating_range=self.rating_range,
            recent_counts=recent_counts(
                self.histories,
                self.split.in_part(self.histories, "train"),
                len(self.catalogue),
                self.recency_half_life,
            ),
        )
        ratings = self.split.train_ratings(self.histories)
        return replace(view, rating_mean=float(ratings.mean(dtype=np.float64)) if len(ratings) else None)

    # ------------------------------------------------------------------ data sets

    def train_dataset(self) -> TrainDataset:
        """The training samples; nothing of validation or test is in them."""
        histories, ends = self.split.training(self.histories)
        samples = training_samples(histories, ends, self.max_history, self.windows)
        if not len(samples):
            raise ValueError(
                "No user has two training events, so there is nothing to learn from. Check min_rating, "
                f"min_user_events, the split ({self.split.description}) and whether the ids of the interactions are "
                "those of the items."
            )
        only = self.split.held_out is not None  # what training does not know is then no negative either
        sampler = None
        if self.candidates == "sampled":
            sampler = NegativeSampler(self.train_counts, self.negative_distribution, trained_only=only)
        return TrainDataset(
            histories,
            samples,
            KnownItems.of(histories, ends),
            n_rows=len(self.catalogue),
            candidates=self.candidates,
            sampler=sampler,
            negatives=self.negatives,
            per_user=self.negatives_per_user,
            supervision=self.supervision,
            user_texts=self.user_texts.over(histories) if self.user_texts else None,
            augmentation=self.history_augmentation,
            variants=self.text_variants(),
            candidate_rows=np.flatnonzero(self.train_counts) if only else None,
        )

    def evaluation_dataset(self, part: Literal["validation", "test"]) -> EvaluationDataset:
        """Users with something to find in ``part``; the history is all that came before it."""
        starts, ends = self.split.bounds(self.histories, part)
        users = self.split.users(self.histories, part)
        return self._evaluation(users, starts[users], ends[users])

    def prediction_dataset(self) -> EvaluationDataset:
        """The users asked for, in order; the history is all that is known of them."""
        self.asked_users = asked_users(self.predict_users, [*self.user_ids[1:], *self.profile_only])
        users = user_rows(self.asked_users, self.user_ids)
        cuts = self.histories.indptr[users + 1]
        if self.request_time is not None and self.asked_at is not None:
            cuts = known_by(self.histories, self.asked_at)[users]
        return self._evaluation(users, cuts, None, self.asked_users)

    def _evaluation(self, users: Int, cuts: Int, ends: Int | None, names: list[str] | None = None) -> EvaluationDataset:
        return EvaluationDataset(
            self.histories,
            users,
            cuts,
            ends,
            max_history=self.max_history,
            filter_seen=self.filter_seen,
            touched=self.touched,
            user_texts=self.user_texts,
            request_time=self.asked_at,
            names=names,
        )
