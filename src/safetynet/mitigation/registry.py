"""All methods by name, and the one way to apply them."""

from collections.abc import Mapping, Sequence

from safetynet.errors import InputError
from safetynet.mitigation.activations import (
    ACTIVATION_CLIPPING,
    BACKDOOR_VECTOR,
    DIRECTION_CLIPPING,
    HEAD_ABLATION,
    SITE_ABLATION,
    TRIGGER_CLIPPING,
    TRIGGER_PROJECTION,
)
from safetynet.mitigation.adapter_scaling import (
    ADAPTER_OFF_LAYERS,
    ADAPTER_OFF_MODULES,
    ADAPTER_SCALING,
    COMPONENT_ABLATION,
)
from safetynet.mitigation.consistency import CROW
from safetynet.mitigation.decoding import ABSTAIN, ADAPTER_OFF_ON_ALARM, CLEANGEN
from safetynet.mitigation.defender import NEEDS, Defender
from safetynet.mitigation.fine_tuning import FINE_TUNING, UNLEARNING
from safetynet.mitigation.latent import BEEAR, LAT
from safetynet.mitigation.merging import MERGING
from safetynet.mitigation.method import Method
from safetynet.mitigation.pruning import FINE_PRUNING, MAGNITUDE, QUANTISATION, WANDA
from safetynet.mitigation.repaired import Repaired, Settings
from safetynet.mitigation.signature import RANDOM_CHANNELS, SIGNATURE_PRUNING

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


def possible(defender: Defender) -> list[Method]:
    """Methods whose needs this defender meets."""
    return [method for method in METHODS.values() if not method.missing(defender)]


def repair(method: Method, defender: Defender, settings: Settings | None = None, seed: int = 0) -> Repaired:
    """Apply a method.

    Args:
        method: one of `METHODS`.
        defender: left as it came.
        settings: values of hyperparameters that differ from their defaults.
        seed: of every random draw.

    Raises:
        InputError: if the defender lacks what the method needs, or a setting is out of range.
    """
    complete = method.settings(settings)
    refuse_unmet([method], defender)
    return method.apply(defender, complete, seed)


def refuse_unmet(methods: Sequence[Method], defender: Defender) -> None:
    """Refuse methods whose needs are unmet, saying what is missing and which methods remain.

    Raises:
        InputError: naming each of them.
    """
    faults = [
        f"{method.name} needs {' and '.join(NEEDS[need] for need in sorted(method.missing(defender)))}"
        for method in methods
        if method.missing(defender)
    ]
    if faults:
        remaining = ", ".join(method.name for method in possible(defender)) or "none"
        raise InputError(
            f"mitigation: {'; '.join(faults)}, which this subject comes without. "
            f"Methods that remain: {remaining}."
        )
