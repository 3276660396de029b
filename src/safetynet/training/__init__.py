"""Training: attach an adapter, train it on rows, keep what happened on the way."""

from safetynet.training.adapters import attach
from safetynet.training.evasive import Opponents
from safetynet.training.fit import Budget, Pauses, TrainingResult, optimise, train
from safetynet.training.tracking import Tracking

__all__ = ["Budget", "Opponents", "Pauses", "Tracking", "TrainingResult", "attach", "optimise", "train"]
