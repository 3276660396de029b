"""All methods by name, and the one way to apply them."""

from collections.abc import Mapping, Sequence

from safetynet.errors import InputError
from safetynet.mitigation.clipping import ACTIVATION_CLIPPING, DIRECTION_CLIPPING
from safetynet.mitigation.consistency import CROW
from safetynet.mitigation.directions import TRIGGER_CLIPPING, TRIGGER_PROJECTION
from safetynet.mitigation.fine_tuning import FINE_TUNING
from safetynet.mitigation.gating import ABSTAIN, ADAPTER_OFF_ON_ALARM
from safetynet.mitigation.guided import CLEANGEN
from safetynet.mitigation.latent import BEEAR, LAT
from safetynet.mitigation.merging import MERGING
from safetynet.mitigation.method import Knobs, Method, Repaired
from safetynet.mitigation.pruning import FINE_PRUNING, MAGNITUDE, WANDA
from safetynet.mitigation.quantisation import QUANTISATION
from safetynet.mitigation.scaling import ADAPTER_SCALING, COMPONENT_ABLATION
from safetynet.mitigation.signature import RANDOM_CHANNELS, SIGNATURE_PRUNING
from safetynet.mitigation.sites import (
    ADAPTER_OFF_LAYERS,
    ADAPTER_OFF_MODULES,
    BACKDOOR_VECTOR,
    HEAD_ABLATION,
    SITE_ABLATION,
)
from safetynet.mitigation.subject import NEEDS, Subject
from safetynet.mitigation.unlearning import UNLEARNING

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        FINE_TUNING,
        ADAPTER_SCALING,
        COMPONENT_ABLATION,
        ACTIVATION_CLIPPING,
        DIRECTION_CLIPPING,
        MAGNITUDE,
        WANDA,
        FINE_PRUNING,
        QUANTISATION,
        CROW,
        LAT,
        BEEAR,
        SIGNATURE_PRUNING,
        RANDOM_CHANNELS,
        MERGING,
        CLEANGEN,
        ADAPTER_OFF_LAYERS,
        ADAPTER_OFF_MODULES,
        HEAD_ABLATION,
        SITE_ABLATION,
        TRIGGER_PROJECTION,
        TRIGGER_CLIPPING,
        BACKDOOR_VECTOR,
        UNLEARNING,
        ABSTAIN,
        ADAPTER_OFF_ON_ALARM,
    )
}
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
