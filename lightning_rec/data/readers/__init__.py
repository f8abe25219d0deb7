"""Readers: from the files of a data set to tables with canonical columns."""

from lightning_rec.data.readers.amazon import AmazonReviews
from lightning_rec.data.readers.base import (
    BadRow,
    BadRowError,
    ImpressionReader,
    RawData,
    RawImpressions,
    Reader,
    ReadReport,
)
from lightning_rec.data.readers.files import Files
from lightning_rec.data.readers.hub import HubDataset
from lightning_rec.data.readers.impressions import ImpressionFiles
from lightning_rec.data.readers.mind import Mind
from lightning_rec.data.readers.movielens import MovieLens
from lightning_rec.data.readers.sequences import SequenceFiles
from lightning_rec.data.readers.sessions import EventSessions

__all__ = [
    "AmazonReviews",
    "BadRow",
    "BadRowError",
    "EventSessions",
    "Files",
    "HubDataset",
    "ImpressionFiles",
    "ImpressionReader",
    "Mind",
    "MovieLens",
    "RawData",
    "RawImpressions",
    "ReadReport",
    "Reader",
    "SequenceFiles",
]
