"""What an experiment consists of: every option and default of every stage."""

from safetynet.recipe.loading import load, overridden, with_options
from safetynet.recipe.schema import (
    Backdoor,
    Behaviour,
    Data,
    Detection,
    Evaluation,
    Evasion,
    Interventions,
    JudgeSpec,
    Mitigation,
    Model,
    Output,
    Recipe,
    Report,
    Section,
    Training,
    Trigger,
)

__all__ = [
    "Backdoor",
    "Behaviour",
    "Data",
    "Detection",
    "Evaluation",
    "Evasion",
    "Interventions",
    "JudgeSpec",
    "Mitigation",
    "Model",
    "Output",
    "Recipe",
    "Report",
    "Section",
    "Training",
    "Trigger",
    "load",
    "overridden",
    "with_options",
]
