"""An explanation as a fragment of HTML, with its words shaded."""

from __future__ import annotations

from html import escape

from lightning_rec.recommend.types import Explanation

_RAISES, _LOWERS = "34, 139, 84", "196, 60, 60"


def to_html(explanation: Explanation) -> str:
    """A fragment that needs no style sheet: the sentence, the words of the item's text, and the history.

    The shade of a word or an item says how strongly it moved the score: green raised it, red lowered it. Colour is not
    all: the effect stands in the title of a word and beside an item. All text is escaped.
    """
    parts = ['<div class="explanation">', f"<p>{escape(explanation.sentence)}</p>"]
    if explanation.words:
        strongest = max(abs(word.effect) for word in explanation.words) or 1.0
        shaded = " ".join(
            f'<span title="{word.effect:+.3f}" style="{_shade(word.effect, strongest)}">{escape(word.text)}</span>'
            for word in explanation.words
        )
        parts.append(f"<p>{shaded}</p>")
    if explanation.reasons:
        strongest = max(abs(reason.effect) for reason in explanation.reasons) or 1.0
        parts.append("<ul>")
        parts.extend(
            f'<li><span style="{_shade(reason.effect, strongest)}">{escape(reason.text)}</span> '
            f"{reason.effect:+.3f}</li>"
            for reason in explanation.reasons
        )
        parts.append("</ul>")
    return "\n".join([*parts, "</div>", ""])


def _shade(effect: float, strongest: float) -> str:
    return f"background-color: rgba({_RAISES if effect >= 0 else _LOWERS}, {0.6 * abs(effect) / strongest:.2f})"
