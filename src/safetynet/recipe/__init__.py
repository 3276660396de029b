"""What an experiment consists of: every option and default of every stage."""

from safetynet.recipe.loading import load, overridden
from safetynet.recipe.schema import (
    Backdoor,
    Behaviour,
    Data,
    Evaluation,
    Evasion,
    JudgeSpec,
    Mitigation,
    Model,
    Output,
    Recipe,
    Section,
    Training,
    Trigger,
)

__all__ = [
    "Backdoor",
    "Behaviour",
    "Data",
    "Evaluation",
    "Evasion",
    "JudgeSpec",
    "Mitigation",
    "Model",
    "Output",
    "Recipe",
    "Section",
    "Training",
    "Trigger",
    "load",
    "overridden",
]
