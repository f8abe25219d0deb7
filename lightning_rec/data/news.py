"""Articles: what people read."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lightning_rec.data.datamodule import RecDataModule
from lightning_rec.data.readers import Files, Reader


class NewsDataModule(RecDataModule):
    """Articles of a newsroom or a community.

    - Fields: ``title``, ``abstract``, ``category``, ``body``.
    - Positive rule: a click or a read.
    - ``path`` recognises a folder with one ``interactions.*`` or ``clicks.*`` file and one ``articles.*`` or
      ``news.*`` file.
    """

    default_template: ClassVar[str | None] = "{title}. {category}. {abstract}. {body}"

    def usual_reader(self, path: str) -> Reader:
        """An interactions file and an articles file side by side."""
        folder = Path(path)
        interactions = sorted([*folder.glob("interactions.*"), *folder.glob("clicks.*")])
        articles = sorted([*folder.glob("articles.*"), *folder.glob("news.*")])
        if len(interactions) == 1 and len(articles) == 1:
            return Files(str(interactions[0]), items=str(articles[0]))
        return super().usual_reader(path)
