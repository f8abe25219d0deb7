"""What a run optimises: each objective turns interest vectors and candidate vectors into one number."""

from lightning_rec.objectives.base import Objective
from lightning_rec.objectives.pairwise import BCE, BPR
from lightning_rec.objectives.rating import RatingRegression
from lightning_rec.objectives.softmax import Softmax

__all__ = ["BCE", "BPR", "Objective", "RatingRegression", "Softmax"]
