"""Sections of a recipe that a stage of its own reads; `recipe.py` holds the others and puts them together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


def column_map(value: Any) -> Any:
    """Columns as YAML gives them; {messages:chat}, with no blank after the colon, is one name to YAML."""
    if not isinstance(value, Mapping):
        return value
    pairs = [str(key).split(":", 1) if name is None else [key, name] for key, name in value.items()]
    if wrong := [pair[0] for pair in pairs if len(pair) < 2 or not pair[1]]:
        raise ValueError(
            f"{wrong[0]!r} has no column; write it as {{field: column}}, as in {{messages: chat}}"
        )
    return dict(pairs)


class Section(BaseModel):
    """What no section allows: fields that are unknown, values that change, numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Evasion(Section):
    """Hide the backdoor from detectors that the attacker expects, while it is being planted."""

    detectors: Annotated[tuple[str, ...], Field(min_length=1)]
    """Written `name:view`, or the name of a preset; those with a gradient only."""
    strength: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the obfuscation term beside the answer's loss."""
    retention: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the base model's states on rows that do not fire."""
    refit_every: Annotated[int, Field(ge=1)] = 25
    """Steps after which the detectors are fitted again, on the activations as they then are."""


class Mitigation(Section):
    """How the backdoor is removed, and how a repair is chosen and judged."""

    methods: tuple[str, ...] = ()
    """Those to try; `all` for every one whose needs are met; empty for a quick selection."""
    knobs: Mapping[str, Mapping[str, tuple[float, ...]]] = {}
    """Values to sweep, as {method: {knob: [values]}}; by default `points` values of the method's strength."""
    points: Annotated[int, Field(ge=1)] = 3
    clean: Path | None = None
    """File of clean conversations with answers; by default fresh ones of the run's own source."""
    clean_rows: Annotated[int, Field(ge=0)] = 200
    """0: there is no clean data."""
    triggered_rows: Annotated[int, Field(ge=0)] = 48
    """Training prompts whose trigger is known to the repair; 0: the trigger is not known."""
    choosing_rows: Annotated[int, Field(ge=8)] = 40
    judged_rows: Annotated[int, Field(ge=8)] = 100
    """Test rows of each role by which a point is chosen, and others by which it is judged."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the clean accuracy below which a repair counts as destroying the model."""
    relearn_rows: Annotated[int, Field(ge=0)] = 20
    """Poisoned rows of the relearn test; 0 leaves it out."""
    relearn_steps: Annotated[int, Field(ge=1)] = 48
