"""What watches a run and what it leaves behind."""

from lightning_rec.callbacks.adversarial import AdversarialTraining
from lightning_rec.callbacks.averaging import WeightAveraging
from lightning_rec.callbacks.examples import ExampleTable
from lightning_rec.callbacks.learning_rates import LearningRates
from lightning_rec.callbacks.results import PredictionWriter, ResultWriter, run_folder

__all__ = [
    "AdversarialTraining",
    "ExampleTable",
    "LearningRates",
    "PredictionWriter",
    "ResultWriter",
    "WeightAveraging",
    "run_folder",
]
