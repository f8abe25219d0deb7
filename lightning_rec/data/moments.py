"""A moment as somebody wrote it into a field of an item."""

from __future__ import annotations

from typing import Any


def moment_text(value: Any) -> str | None:
    """A value as the reader of times takes it; None for what is empty."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if value is None or value != value:  # NaN stands for a missing number
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None
