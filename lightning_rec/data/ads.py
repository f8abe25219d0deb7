"""Advertising: what was shown beside a page and clicked, or not."""

from __future__ import annotations

from typing import ClassVar

from lightning_rec.data.impression_batches import ShownCandidates
from lightning_rec.data.impression_module import ImpressionDataModule, usual_files
from lightning_rec.data.readers import ImpressionReader


class AdsDataModule(ImpressionDataModule):
    """Advertisements that were shown to people.

    - Fields: ``title``, ``text``, ``advertiser``, ``category``. Other attributes of ads and advertisers can be named in
      a ``template`` of your own.
    - What people wrote about ads (``feedback``) can be named in a ``user_template``; an impression knows only what was
      written at strictly earlier ones.
    - A training sample is a whole impression, so that the rate of clicks is learned and not only their order.
    - ``path`` recognises a folder with one ``impressions.*``, ``displays.*`` or ``clicks.*`` file, one ``ads.*`` file
      and perhaps one ``users.*`` file.
    """

    default_template: ClassVar[str | None] = "{title}. {text}. {advertiser}. {category}"
    default_candidates: ClassVar[ShownCandidates] = "whole"
    default_group_field: ClassVar[str | None] = "advertiser"

    def usual_reader(self, path: str) -> ImpressionReader:
        """A log of impressions and a table of ads side by side."""
        return usual_files(path, ("impressions", "displays", "clicks"), ("ads",)) or super().usual_reader(path)
