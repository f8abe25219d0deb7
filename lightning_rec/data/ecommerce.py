"""Shops: what people bought and reviewed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lightning_rec.data.datamodule import RecDataModule
from lightning_rec.data.readers import AmazonReviews, Reader, SequenceFiles


class EcommerceDataModule(RecDataModule):
    """Products of a shop.

    - Fields: ``title``, ``brand``, ``categories``, ``description``.
    - Positive rule: three stars or more; an interaction without stars (a purchase, a click) is positive.
    - ``path`` recognises a folder with ``*.inter.json`` and ``*.item.json``, and a folder with Amazon reviews and
      metadata (``meta*.jsonl`` or ``meta*.json``, gzipped or not).
    """

    default_template: ClassVar[str | None] = "{title}. {brand}. {categories}. {description}"
    default_min_rating: ClassVar[float | None] = 3.0

    def usual_reader(self, path: str) -> Reader:
        """Sequence files in JSON, or Amazon reviews."""
        folder = Path(path)
        sequences = sorted(folder.glob("*.inter.json"))
        if len(sequences) == 1:
            items = sequences[0].with_name(sequences[0].name.replace(".inter.json", ".item.json"))
            return SequenceFiles(str(sequences[0]), str(items) if items.exists() else None)
        lines = sorted(file for file in folder.glob("*.json*") if not file.name.startswith("meta"))
        metadata = sorted(folder.glob("meta*.json*"))
        if lines:
            return AmazonReviews([str(file) for file in lines], [str(file) for file in metadata] or None)
        return super().usual_reader(path)
