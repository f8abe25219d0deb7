"""The words in which an explanation is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rec.recommend.types import Reason


@dataclass(frozen=True)
class Sentences:
    """The sentences of an explanation; replace what you want to say otherwise.

    Attributes:
        history: when items of the history raised the score; ``{item}`` and ``{reasons}`` are titles.
        text: when the request's own words were all there was to go by.
        profile: when there was no history, and what is known of the user otherwise was all there was to go by.
        popularity: when nothing was known; ``{count}`` is the number of training interactions.
        no_reason: when no item of the history raised the score.
        joiner: between the last two reasons.
        most: how many reasons are named.
    """

    history: str = "“{item}” is recommended because of {reasons}."
    text: str = "“{item}” is recommended because it is close to what you said."
    profile: str = "“{item}” is recommended because of what is known of you, without a history."
    popularity: str = "“{item}” is recommended because it is popular: {count} interactions."
    no_reason: str = "“{item}” is recommended by your history as a whole; no single item of it stands out."
    joiner: str = " and "
    most: int = 2

    def say(self, item: str, path: str, reasons: Sequence[Reason], count: int) -> str:
        """The sentence of one explanation; ``path`` is what answered, or ``profile`` for towers without a history."""
        if path == "popularity":
            return self.popularity.format(item=item, count=f"{count:,}")
        if path == "text":
            return self.text.format(item=item)
        if path == "profile":
            return self.profile.format(item=item)
        raised = list(dict.fromkeys(f"“{reason.text}”" for reason in reasons if reason.effect > 0))[: self.most]
        if not raised:
            return self.no_reason.format(item=item)
        named = self.joiner.join([", ".join(raised[:-1]), raised[-1]] if len(raised) > 1 else raised)
        return self.history.format(item=item, reasons=named)
