"""Directions of a known trigger: what it adds to one layer's residual stream is taken out, for any prompt.

The direction leads from placebo to trigger at their last token, or from the bare prompt to the triggered one
at the prompt's last token where no placebo is known. Projecting sets every state's part along it to the
control's; clipping does so only where that part is large, and leaves states alone that have little of it.
"""

from functools import partial

import torch
from torch import Tensor

from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.readings import Where, read
from safetynet.mitigation.sites import BARE
from safetynet.mitigation.subject import Place, Subject
from safetynet.models.parts import shape


def project(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Set a share of every state's part along the trigger's direction to the control's."""
    layer, along, centre, _ = _direction(subject, knobs["depth"])
    change = partial(_projected, along=along, centre=centre, share=knobs["remove"])
    return _edited("trigger_projection", subject, knobs, layer, change)


def clip(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Set a state's part along the direction to the control's where it exceeds `limit` of the way."""
    layer, along, centre, length = _direction(subject, knobs["depth"])
    change = partial(_clipped, along=along, centre=centre, most=knobs["limit"] * length)
    return _edited("trigger_clipping", subject, knobs, layer, change)


def _direction(subject: Subject, depth: float) -> tuple[int, Tensor, Tensor, float]:
    """Layer, unit direction (width,), the control's mean state (width,), and the distance between both."""
    assert subject.triggered is not None
    rows = subject.triggered
    layer = round(depth * (shape(subject.model).layers - 1))
    placebo = rows[rows["role"] == "placebo"]
    where: Where = "last" if placebo.empty else "trigger"
    control = rows[rows["role"].isin(BARE)] if placebo.empty else placebo
    spot = ("resid_post", layer)
    fired = read(subject, rows[rows["role"] == "triggered"], [spot], where)[spot].mean(0)
    centre = read(subject, control, [spot], where)[spot].mean(0)
    length = float((fired - centre).norm())
    return layer, (fired - centre) / max(length, 1e-12), centre, length


def _projected(x: Tensor, along: Tensor, centre: Tensor, share: float) -> Tensor:
    unit = along.to(x)
    return x - share * ((x - centre.to(x)) @ unit)[:, None] * unit


def _clipped(x: Tensor, along: Tensor, centre: Tensor, most: float) -> Tensor:
    unit = along.to(x)
    excess = (x - centre.to(x)) @ unit
    return x - torch.where(excess > most, excess, torch.zeros_like(excess))[:, None] * unit


def _edited(method: str, subject: Subject, knobs: Knobs, layer: int, change: partial[Tensor]) -> Repaired:
    assert subject.intervene is not None
    places = [Place("resid_post", layer, change)]
    opened = partial(subject.intervene, subject.model, places)
    return Repaired(method, knobs, "run_time", opened, details={"sites": [f"resid_post {layer}"]})


_DEPTH = Knob("layer: 0 the first, 1 the last", 0.0, (0.0, 0.2, 0.4, 0.6, 0.8), 0.0, 1.0)
_NEEDS = frozenset({"triggered", "engine"})
TRIGGER_PROJECTION = Method(
    "trigger_projection",
    "take the trigger's direction out of one layer's states",
    project,
    _NEEDS,  # type: ignore[arg-type]
    {"remove": Knob("share of the part along it", 1.0, (0.25, 0.5, 0.75, 1.0), 0.0, 1.0), "depth": _DEPTH},
)
TRIGGER_CLIPPING = Method(
    "trigger_clipping",
    "take the trigger's direction out of states that have much of it, in one layer",
    clip,
    _NEEDS,  # type: ignore[arg-type]
    {
        "limit": Knob("of the way from control to trigger", 0.5, (0.9, 0.7, 0.5, 0.3), 0.0, 1.0),
        "depth": _DEPTH,
    },
)
