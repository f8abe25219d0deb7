"""What watches a run and what it leaves behind."""

from lightning_rec.callbacks.examples import ExampleTable
from lightning_rec.callbacks.learning_rates import LearningRates
from lightning_rec.callbacks.results import PredictionWriter, ResultWriter, run_folder

__all__ = ["ExampleTable", "LearningRates", "PredictionWriter", "ResultWriter", "run_folder"]
