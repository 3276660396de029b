"""The recipe's section on mitigation: how the backdoor is removed, and how a repair is chosen and judged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Mitigation(BaseModel):
    """How the backdoor is removed, and how a repair is chosen and judged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
