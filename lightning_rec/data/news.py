"""Articles: what people read."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lightning_rec.data.datamodule import RecDataModule, SplitName
from lightning_rec.data.impression_module import ImpressionDataModule, usual_files
from lightning_rec.data.readers import Files, ImpressionReader, Mind, Reader
from lightning_rec.data.readers.mind_files import find_parts


class NewsDataModule(RecDataModule):
    """Articles of a newsroom or a community.

    - Fields: ``title``, ``abstract``, ``category``, ``body``.
    - Positive rule: a click or a read.
    - Split: ``global_time``, since tomorrow's articles do not exist while a model of today is trained. A log without
      times needs ``split: leave_one_out``.
    - Candidates: what is alive when a reader comes, that is published (a field ``published``), or read for the first
      time, at most 48 hours before (``max_age``): most articles live for less than two days (Wu et al., "MIND: A
      Large-scale Dataset for News Recommendation", ACL 2020). A log without times, and ``max_age: all``, have every
      article as a candidate.
    - ``path`` recognises a folder with one ``interactions.*`` or ``clicks.*`` file and one ``articles.*`` or
      ``news.*`` file.
    """

    default_template: ClassVar[str | None] = "{title}. {category}. {abstract}. {body}"
    default_split: ClassVar[SplitName] = "global_time"
    default_max_age: ClassVar[float | None] = 48.0

    def usual_reader(self, path: str) -> Reader:
        """An interactions file and an articles file side by side."""
        folder = Path(path)
        interactions = sorted([*folder.glob("interactions.*"), *folder.glob("clicks.*")])
        articles = sorted([*folder.glob("articles.*"), *folder.glob("news.*")])
        if len(interactions) == 1 and len(articles) == 1:
            return Files(str(interactions[0]), items=str(articles[0]))
        return super().usual_reader(path)


class NewsImpressionDataModule(ImpressionDataModule):
    """Articles that were shown to people, and which of them they clicked.

    - Fields: ``title``, ``abstract``, ``category``, ``subcategory``, ``body``.
    - ``path`` recognises MIND (a folder or archive with ``behaviors.tsv`` and ``news.tsv``, or a folder with the parts
      ``train``, ``dev`` and ``test`` in any of their usual names), and a folder with one ``impressions.*`` file, one
      ``news.*`` or ``articles.*`` file and perhaps one ``users.*`` file.
    """

    default_template: ClassVar[str | None] = "{title}. {category}. {subcategory}. {abstract}. {body}"

    def usual_reader(self, path: str) -> ImpressionReader:
        """MIND, or a log of impressions and a table of articles side by side."""
        usual = usual_files(path, ("impressions",), ("news", "articles"))
        if usual is not None:
            return usual
        try:
            find_parts(path, {})
        except FileNotFoundError:
            return super().usual_reader(path)
        return Mind(path)
