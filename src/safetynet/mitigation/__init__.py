"""Mitigation: remove or contain a backdoor. Every method has the one interface of `method.py`.

In: a `Defender`. Out: a `Repaired` model to open, judge and save. Nothing here judges answers: whether a
repair worked is measured elsewhere. Other stages are not imported: a monitor's alarm and probes for the
trigger come as functions.

    defender = Defender(model, serialiser, clean=conversations)
    repaired = repair(METHODS["fine_tuning"], defender, {"epochs": 2})
    with repaired.open() as model:
        model.generate(...)
    save(repaired, defender, folder, card)
"""

from safetynet.mitigation.defender import NEEDS, Defender
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.registry import METHODS, named, possible, refuse_unmet, repair
from safetynet.mitigation.repaired import Repaired, save

__all__ = [
    "METHODS",
    "NEEDS",
    "Defender",
    "Hyperparameter",
    "Method",
    "Repaired",
    "named",
    "possible",
    "refuse_unmet",
    "repair",
    "save",
]
