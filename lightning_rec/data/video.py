"""Films and series: what people watched and how they rated it."""

from __future__ import annotations

from typing import ClassVar

from lightning_rec.data.datamodule import RecDataModule
from lightning_rec.data.readers import MovieLens, Reader


class VideoDataModule(RecDataModule):
    """Films, series and clips.

    - Fields: ``title``, ``year``, ``genres``, ``tags``, ``overview``.
    - Positive rule: a watch. Whoever rated a film has watched it, whatever the stars; set ``min_rating`` for "liked".
    - ``path`` recognises MovieLens: 100K (original or atomic files), 1M, and the latest small or full sets.
    """

    default_template: ClassVar[str | None] = "{title} ({year}). {genres}. {overview}"

    def usual_reader(self, path: str) -> Reader:
        """MovieLens in any of its forms."""
        return MovieLens(path)
