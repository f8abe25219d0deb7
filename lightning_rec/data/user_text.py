"""A user's text, made from the profile, the reviews and the titles of the newest history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.histories import Histories
from lightning_rec.data.readers.base import RawData, ReadReport
from lightning_rec.data.text import Cleaner, Template, clean_value, make_cleaner, user_text


class UserTextMaker:
    """Makes texts of users at a moment: nothing that came at or after the given offset is in them.

    Args:
        template: over the fields of the user table, ``{titles}`` and ``{reviews}``.
        histories: events by user.
        catalogue: gives the titles.
        users: table with ``user_id`` and profile fields, or None.
        reviews: one review a row of the interactions table, or None.
        limit: number of events whose titles are read, and of reviews; the newest are kept. An item without title and
            text adds nothing.
        cleaning: names of the cleaning steps for profile fields and reviews; titles are cleaned by the catalogue.
    """

    def __init__(
        self,
        template: str,
        histories: Histories,
        catalogue: Catalogue,
        users: Dataset | None,
        reviews: Sequence[str | None] | None,
        limit: int,
        cleaning: Sequence[str],
    ) -> None:
        self.template = Template(template)
        self.histories = histories
        self.catalogue = catalogue
        self.limit = limit
        self._titles: dict[int, str] = {}
        wanted = reviews if "reviews" in self.template.fields else None
        cleaner = make_cleaner(cleaning)
        self.reviews = None if wanted is None else [cleaner(text) if text else "" for text in wanted]
        self.profiles = self._read_profiles(users, cleaner)
        allowed = {"titles", "reviews"} | (set(users.column_names) - {"user_id"} if users is not None else set())
        missing = sorted(set(self.template.fields) - allowed)
        if missing:
            raise ValueError(
                f"user_template names {', '.join(missing)}, but the fields are {', '.join(sorted(allowed))}. "
                "Correct the template, or give the reader a user table."
            )

    @classmethod
    def of(
        cls,
        raw: RawData,
        template: str,
        histories: Histories,
        catalogue: Catalogue,
        limit: int,
        cleaning: Sequence[str],
    ) -> UserTextMaker:
        """Takes the profiles and the reviews out of what was read."""
        reviews = raw.interactions["review"][:] if "review" in raw.interactions.column_names else None
        return cls(template, histories, catalogue, raw.users, reviews, limit, cleaning)

    def _read_profiles(self, users: Dataset | None, cleaner: Cleaner) -> dict[str, Mapping[str, Any]]:
        if users is None:
            return {}
        fields = [name for name in self.template.fields if name in users.column_names]
        columns = [[clean_value(value, cleaner) for value in users[name][:]] for name in fields]
        ids = users["user_id"][:]
        return {user: dict(zip(fields, values, strict=True)) for user, *values in zip(ids, *columns, strict=True)}

    def over(self, histories: Histories) -> UserTextMaker:
        """The same texts, made of other histories of the same users."""
        other = copy(self)
        other.histories = histories
        return other

    def __call__(
        self, users: NDArray[np.int64], ends: NDArray[np.int64], names: Sequence[str] | None = None
    ) -> list[str]:
        """Texts of ``users``, each from its events before the offset in ``ends``.

        Args:
            users: user rows; 0: a user without events.
            ends: offset of the first event of each that is not in the text.
            names: raw ids of the users, by which the profiles of users without a row are found; None: they have none.
        """
        texts = []
        for place, (user, end) in enumerate(zip(users.tolist(), ends.tolist(), strict=True)):
            first = int(self.histories.indptr[user])
            rows = self.histories.items[max(first, end - self.limit) : end].tolist()
            name = self.histories.user_ids[user] if user or names is None else names[place]
            profile = self.profiles.get(name, {})
            reviews = self._newest_reviews(first, end)
            titles = [self._title(row) for row in rows]
            texts.append(user_text(profile, reviews, titles, self.template, self.limit, self.limit))
        return texts

    def _title(self, row: int) -> str:
        """The title of a row; making it takes longer than a look-up, and popular items come again and again."""
        title = self._titles.get(row)
        if title is None:
            title = self._titles[row] = self.catalogue.title(row)
        return title

    def _newest_reviews(self, first: int, end: int) -> list[str]:
        """The newest reviews between two offsets, oldest first. Many events have none."""
        found: list[str] = []
        if self.reviews is not None:
            for event in self.histories.event[first:end][::-1].tolist():
                if len(found) == self.limit:
                    break
                if self.reviews[event]:
                    found.append(self.reviews[event])
        return found[::-1]


def profile_only(users: Dataset | None, user_ids: Sequence[str], report: ReadReport) -> list[str]:
    """Raw ids of the users whom only the user table knows, in its order.

    They have no row among the users: nothing is trained, split or measured on them, and no tower has a vector for them.

    Args:
        users: table with ``user_id``, or None.
        user_ids: raw ids of the users of the interactions.
        report: where they are counted.
    """
    if users is None:
        return []
    known = set(user_ids)
    found = [user for user in dict.fromkeys(users["user_id"][:]) if user and user not in known]
    if found:
        report.note(
            f"{len(found):,} users of the user table have no interactions: nothing is trained or measured on them, "
            "and predict answers them too."
        )
    return found
