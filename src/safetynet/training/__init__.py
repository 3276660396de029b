"""Training: attach an adapter, train it on rows, keep what happened on the way."""

from safetynet.training.adapters import attach
from safetynet.training.evasive import Opponents
from safetynet.training.fit import TrainingResult, train

__all__ = ["Opponents", "TrainingResult", "attach", "train"]
