"""A user's text, made from the profile, the reviews and the titles of the newest history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.split import Histories
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
        self.reviews = None if reviews is None else [clean(text, cleaning) if text else "" for text in reviews]
        self.profiles = self._read_profiles(users, cleaning)
        allowed = {"titles", "reviews"} | (set(users.column_names) - {"user_id"} if users is not None else set())
        missing = sorted(set(self.template.fields) - allowed)
        if missing:
            raise ValueError(
                f"user_template names {', '.join(missing)}, but the fields are {', '.join(sorted(allowed))}. "
                "Correct the template, or give the reader a user table."
            )

    def _read_profiles(self, users: Dataset | None, cleaning: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        if users is None:
            return {}
        fields = [name for name in self.template.fields if name in users.column_names]
        columns = [[_clean_value(value, cleaning) for value in users[name][:]] for name in fields]
        ids = users["user_id"][:]
        return {user: dict(zip(fields, values, strict=True)) for user, *values in zip(ids, *columns, strict=True)}

    def __call__(self, users: NDArray[np.int64], ends: NDArray[np.int64]) -> list[str]:
        """Texts of ``users``, each from its events before the offset in ``ends``."""
        texts = []
        for user, end in zip(users.tolist(), ends.tolist(), strict=True):
            start = max(int(self.histories.indptr[user]), end - self.limit)
            rows = self.histories.items[start:end].tolist()
            titles = [self.catalogue.display(row) for row in rows]
            reviews: list[str] = []
            if self.reviews is not None:
                reviews = [self.reviews[event] for event in self.histories.event[start:end].tolist()]
            profile = self.profiles.get(self.histories.user_ids[user], {})
            texts.append(user_text(profile, [text for text in reviews if text], titles, self.template, self.limit, self.limit))
        return texts


def _clean_value(value: Any, cleaning: Sequence[str]) -> Any:
    if isinstance(value, str):
        return clean(value, cleaning)
    if isinstance(value, list):
        return [clean(part, cleaning) for part in value if part]
    return value
