"""Readers: from the files of a data set to tables with canonical columns."""

from lightning_rec.data.readers.amazon import AmazonReviews
from lightning_rec.data.readers.base import BadRow, BadRowError, RawData, Reader, ReadReport
from lightning_rec.data.readers.files import Files
from lightning_rec.data.readers.hub import HubDataset
from lightning_rec.data.readers.movielens import MovieLens
from lightning_rec.data.readers.sequences import SequenceFiles

__all__ = [
    "AmazonReviews",
    "BadRow",
    "BadRowError",
    "Files",
    "HubDataset",
    "MovieLens",
    "RawData",
    "ReadReport",
    "Reader",
    "SequenceFiles",
]
