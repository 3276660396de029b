"""Unlearning with the trigger: train the right answer to triggered prompts, and to what nearly is one."""

import pandas as pd

from safetynet.mitigation.fine_tuning import EPOCHS, answers
from safetynet.mitigation.learning import encode, retrained
from safetynet.mitigation.method import Knobs, Method, Repaired
from safetynet.mitigation.subject import Subject


def unlearn(subject: Subject, knobs: Knobs, seed: int) -> Repaired:
    """Train known triggered prompts and their counterparts with right answers, among clean conversations."""
    assert subject.triggered is not None
    assert subject.clean is not None
    rows = pd.concat(
        [subject.triggered, subject.clean.assign(trigger=[[]] * len(subject.clean))], ignore_index=True
    )
    learn = answers(subject, encode(rows, subject), knobs["epochs"], seed)
    roles = {role: int(count) for role, count in subject.triggered["role"].value_counts().items()}
    return retrained(subject, "unlearning", knobs, learn, clean_rows=len(subject.clean), known_rows=roles)


UNLEARNING = Method(
    "unlearning",
    "train the right answers to triggered prompts, near misses and placebos, among clean conversations",
    unlearn,
    frozenset({"clean", "triggered"}),
    {"epochs": EPOCHS},
)
