"""Evasive planting: the detectors that a backdoor is trained to hide from, as training takes them."""

from functools import partial
from typing import TYPE_CHECKING

from safetynet.prompts import Serialiser
from safetynet.recipe import Evasion

if TYPE_CHECKING:
    from safetynet.training import Opponents


def check(evasion: Evasion | None) -> None:
    """Refuse detectors that nothing can be hidden from by training, before anything is trained.

    Raises:
        InputError: naming them, and what is possible.
    """
    if evasion is not None:
        from safetynet.detection.gradients import hideable

        hideable(evasion.detectors)


def opponents(evasion: Evasion | None, serialiser: Serialiser) -> "Opponents | None":
    """The detectors to hide from; None for an ordinary backdoor."""
    if evasion is None:
        return None
    from safetynet.detection import gradients
    from safetynet.training import Opponents

    readings = gradients.hideable(evasion.detectors)
    return Opponents(
        names=tuple(reading.name for reading in readings),
        observe=gradients.observer(serialiser, readings),
        refit=partial(gradients.refit, readings),
    )
