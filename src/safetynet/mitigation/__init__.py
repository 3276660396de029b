"""Mitigation: remove or contain a backdoor. Every method has the one interface of `method.py`.

In: a `Subject`. Out: a `Repaired` model to open, judge and save. Nothing here judges answers: whether a
repair worked is measured elsewhere. Other stages are not imported: the engine's edits and a monitor's alarm
come as functions.

    subject = Subject(model, serialiser, clean=conversations)
    repaired = repair(METHODS["fine_tuning"], subject, {"epochs": 2})
    with repaired.open() as model:
        model.generate(...)
    save(repaired, subject, folder, card)
"""

from safetynet.mitigation.method import Knob, Method, Repaired
from safetynet.mitigation.registry import METHODS, named, possible, refuse_unmet, repair
from safetynet.mitigation.saving import save
from safetynet.mitigation.subject import NEEDS, Place, Subject

__all__ = [
    "METHODS",
    "NEEDS",
    "Knob",
    "Method",
    "Place",
    "Repaired",
    "Subject",
    "named",
    "possible",
    "refuse_unmet",
    "repair",
    "save",
]
