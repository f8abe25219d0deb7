"""The text of a user at an impression: profile, titles of the newest history, earlier feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.impressions import Impressions, earlier_events, history_slices
from lightning_rec.data.text import Cleaner, Template, clean_value, make_cleaner, user_text


class ImpressionTextMaker:
    """Makes texts of users as they are just before an impression.

    Args:
        template: over the fields of the user table, ``{titles}`` (of the newest history) and ``{feedback}`` (what the
            user wrote at strictly earlier impressions, the newest first).
        impressions: the log, with ``parts`` and histories.
        user_ids: raw id of each user row.
        catalogue: gives the titles.
        users: table with ``user_id`` and profile fields, or None.
        limit: number of events whose titles are read, and of feedback texts; the newest are kept. An item without
            title and text adds nothing.
        cleaning: names of the cleaning steps for profile fields and feedback; titles are cleaned by the catalogue.

    Raises:
        ValueError: the template names a field that there is not.
    """

    def __init__(
        self,
        template: str,
        impressions: Impressions,
        user_ids: Sequence[str],
        catalogue: Catalogue,
        users: Dataset | None,
        limit: int,
        cleaning: Sequence[str],
    ) -> None:
        self.template = Template(template)
        self.impressions = impressions
        self.user_ids = user_ids
        self.catalogue = catalogue
        self.limit = limit
        self._titles: dict[int, str] = {}
        profile = [] if users is None else [name for name in users.column_names if name != "user_id"]
        allowed = [*profile, "titles", *(["feedback"] if impressions.feedback is not None else [])]
        missing = sorted(set(self.template.fields) - set(allowed))
        if missing:
            raise ValueError(
                f"user_template names {', '.join(missing)}, but the fields are {', '.join(sorted(allowed))}. "
                "Correct the template, or give the reader a user table or feedback."
            )
        cleaner = make_cleaner(cleaning)
        self._profiles: dict[str, dict[str, Any]] = {}
        fields = [name for name in self.template.fields if name in profile]
        if users is not None and fields:
            columns = [[clean_value(value, cleaner) for value in users[name][:]] for name in fields]
            for user, *values in zip(users["user_id"][:], *columns, strict=True):
                self._profiles[user] = dict(zip(fields, values, strict=True))
        self._feedback: list[str] | None = None
        if "feedback" in self.template.fields:
            self._read_feedback(cleaner)

    def _read_feedback(self, cleaner: Cleaner) -> None:
        written = self.impressions.feedback
        assert written is not None
        owner = np.array([number for number, text in enumerate(written) if text.strip()], dtype=np.int64)
        texts = [cleaner(written[number]) for number in owner.tolist()]
        events, self._starts, self._ends = earlier_events(self.impressions, owner)
        self._feedback = [texts[event] for event in events.tolist()]

    def __call__(self, numbers: NDArray[np.int64]) -> list[str]:
        """Texts of the users of some impressions."""
        starts, ends = history_slices(self.impressions, numbers, self.limit)
        users = self.impressions.users[numbers]
        texts = []
        for number, user, start, end in zip(
            numbers.tolist(), users.tolist(), starts.tolist(), ends.tolist(), strict=True
        ):
            values = dict(self._profiles.get(self.user_ids[user], {}))
            if self._feedback is not None:
                last = int(self._ends[number])
                newest = self._feedback[max(int(self._starts[number]), last - self.limit) : last]
                values["feedback"] = " ".join(reversed(newest))
            titles = [self._title(row) for row in self.impressions.history[start:end].tolist()]
            texts.append(user_text(values, (), titles, self.template, self.limit))
        return texts

    def _title(self, row: int) -> str:
        title = self._titles.get(row)
        if title is None:
            title = self._titles[row] = self.catalogue.title(row)
        return title
