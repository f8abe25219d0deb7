"""What a run optimises: each objective turns interest vectors and candidate vectors into one number."""

from lightning_rec.objectives.base import Objective, Repeats
from lightning_rec.objectives.calibration import Calibration, undo_sampling
from lightning_rec.objectives.examination import Examination
from lightning_rec.objectives.impression import ClickBCE, ImpressionSoftmax
from lightning_rec.objectives.impression_base import ImpressionObjective
from lightning_rec.objectives.pairwise import BCE, BPR
from lightning_rec.objectives.rating import RatingRegression
from lightning_rec.objectives.rating_head import RatingHead
from lightning_rec.objectives.softmax import Softmax

__all__ = [
    "BCE",
    "BPR",
    "Calibration",
    "ClickBCE",
    "Examination",
    "ImpressionObjective",
    "ImpressionSoftmax",
    "Objective",
    "RatingHead",
    "RatingRegression",
    "Repeats",
    "Softmax",
    "undo_sampling",
]
