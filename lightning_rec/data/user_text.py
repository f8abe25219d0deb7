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
from lightning_rec.data.readers.base import RawData
from lightning_rec.data.text import Template, clean, user_text


class UserTextMaker:
    """Makes texts of users at a moment: nothing that came at or after the given offset is in them.

    Args:
        template: over the fields of the user table, ``{titles}`` and ``{reviews}``.
        histories: events by user.
        catalogue: gives the titles.
        users: table with ``user_id`` and profile fields, or None.
        reviews: one review a row of the interactions table, or None.
        limit: number of titles and of reviews; the newest are kept.
        cleaning: names of the cleaning steps for profile fields and reviews.
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
        self.reviews = None if wanted is None else [clean(text, cleaning) if text else "" for text in wanted]
        self.profiles = self._read_profiles(users, cleaning)
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

    def _read_profiles(self, users: Dataset | None, cleaning: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        if users is None:
            return {}
        fields = [name for name in self.template.fields if name in users.column_names]
        columns = [[_clean_value(value, cleaning) for value in users[name][:]] for name in fields]
        ids = users["user_id"][:]
        return {user: dict(zip(fields, values, strict=True)) for user, *values in zip(ids, *columns, strict=True)}

    def over(self, histories: Histories) -> UserTextMaker:
        """The same texts, made of other histories of the same users."""
        other = copy(self)
        other.histories = histories
        return other

    def __call__(self, users: NDArray[np.int64], ends: NDArray[np.int64]) -> list[str]:
        """Texts of ``users``, each from its events before the offset in ``ends``."""
        texts = []
        for user, end in zip(users.tolist(), ends.tolist(), strict=True):
            first = int(self.histories.indptr[user])
            rows = self.histories.items[max(first, end - self.limit) : end].tolist()
            profile = self.profiles.get(self.histories.user_ids[user], {})
            reviews = self._newest_reviews(first, end)
            titles = [self._title(row) for row in rows]
            texts.append(user_text(profile, reviews, titles, self.template, self.limit, self.limit))
        return texts

    def _title(self, row: int) -> str:
        """The title of a row; making it takes longer than a look-up, and popular items come again and again."""
        title = self._titles.get(row)
        if title is None:
            title = self._titles[row] = self.catalogue.display(row)
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


def _clean_value(value: Any, cleaning: Sequence[str]) -> Any:
    if isinstance(value, str):
        return clean(value, cleaning)
    if isinstance(value, list):
        return [clean(part, cleaning) for part in value if part]
    return value
