"""All methods by name, and the one way to apply them."""

from collections.abc import Mapping, Sequence

from safetynet.errors import InputError
from safetynet.mitigation import scaling
from safetynet.mitigation.method import Knobs, Method, Repaired
from safetynet.mitigation.subject import NEEDS, Subject

METHODS: Mapping[str, Method] = {method.name: method for method in (scaling.ADAPTER_SCALING,)}
"""In the order of the documentation: without the trigger, with what is known of it, at run time."""


def named(names: Sequence[str]) -> list[Method]:
    """The methods of these names.

    Raises:
        InputError: for a name that no method has.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise InputError(
            f"mitigation: there is no method {', '.join(map(repr, unknown))}; "
            f"choose from {', '.join(METHODS)}."
        )
    return [METHODS[name] for name in names]


def possible(subject: Subject) -> list[Method]:
    """Methods whose needs this subject meets."""
    return [method for method in METHODS.values() if not method.missing(subject)]


def repair(method: Method, subject: Subject, knobs: Knobs | None = None, seed: int = 0) -> Repaired:
    """Apply a method.

    Args:
        method: one of `METHODS`.
        subject: left as it came.
        knobs: those that differ from their defaults.
        seed: of every random draw.

    Raises:
        InputError: if the subject lacks what the method needs, or a knob is out of range.
    """
    settings = method.settings(knobs)
    refuse_unmet([method], subject)
    return method.apply(subject, settings, seed)


def refuse_unmet(wanted: Sequence[Method], subject: Subject) -> None:
    """Refuse methods whose needs are unmet, saying what is missing and which methods remain.

    Raises:
        InputError: naming each of them.
    """
    faults = [
        f"{method.name} needs {' and '.join(NEEDS[need] for need in sorted(method.missing(subject)))}"
        for method in wanted
        if method.missing(subject)
    ]
    if faults:
        remaining = ", ".join(method.name for method in possible(subject)) or "none"
        raise InputError(
            f"mitigation: {'; '.join(faults)}, which this subject comes without. "
            f"Methods that remain: {remaining}."
        )
