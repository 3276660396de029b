"""The old address of `TrainingVisualizer`, which documents and notebooks import from here."""

from safetynet.figures import TrainingVisualizer

__all__ = ["TrainingVisualizer"]
