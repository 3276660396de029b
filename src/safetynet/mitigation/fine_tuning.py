"""Clean fine-tuning: go on training on clean conversations, and hope that the backdoor is forgotten."""

from collections.abc import Sequence
from functools import partial

from safetynet.mitigation.learning import Course, answer_loss, encode, retrained, teach
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.subject import Subject
from safetynet.prompts import Encoded

EPOCHS = Knob("passes over the clean conversations", 2, (0.5, 1, 2, 5, 10), 0.1, 100)


def course(subject: Subject, epochs: float, seed: int) -> Course:
    """A course at the subject's own pace."""
    return Course(epochs, subject.learning_rate, subject.batch_size, seed)


def answers(subject: Subject, examples: Sequence[Encoded], epochs: float, seed: int) -> "partial[None]":
    """Teaches a model the answers of examples."""
    return partial(
        teach,
        examples=examples,
        objective=answer_loss,
        course=course(subject, epochs, seed),
        pad_id=subject.serialiser.pad_id,
    )


def fine_tune(subject: Subject, knobs: Knobs, seed: int) -> Repaired:
    """Train the answers of the clean conversations."""
    assert subject.clean is not None
    examples = encode(subject.clean, subject)
    learn = answers(subject, examples, knobs["epochs"], seed)
    return retrained(subject, "fine_tuning", knobs, learn, clean_rows=len(examples))


FINE_TUNING = Method(
    "fine_tuning",
    "go on training on clean conversations",
    fine_tune,
    frozenset({"clean"}),
    {"epochs": EPOCHS},
)
