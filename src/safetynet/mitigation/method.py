"""The one interface of all methods: what it needs, which knobs it has, and the repaired model it gives.

A method changes a copy of the adapter, a copy of the model, or what happens while the model answers; the
subject's model is as it was whenever no `Repaired` of it is open.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from safetynet.errors import InputError
from safetynet.mitigation.subject import Need, Subject

Form = Literal["adapter", "checkpoint", "run_time"]
Knobs = Mapping[str, float]


@dataclass(frozen=True)
class Knob:
    """A setting that can be swept."""

    about: str
    default: float
    grid: tuple[float, ...]
    """From weak to strong."""
    low: float
    high: float
    whole: bool = False
    """Takes whole numbers only."""
    listed: bool = False
    """Takes the values of the grid only."""

    def check(self, name: str, value: float) -> float:
        """The value itself.

        Raises:
            InputError: if it is out of range.
        """
        if self.listed and value not in self.grid:
            values = ", ".join(f"{one:g}" for one in self.grid)
            raise InputError(f"{name}: {value:g} given; it takes {values}.")
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            raise InputError(f"{name}: {value:g} given; it takes {kind} from {self.low:g} to {self.high:g}.")
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Repaired:
    """A model without the backdoor, or with it contained; `open` it to use it."""

    method: str
    knobs: Knobs
    form: Form
    """`adapter`: the subject's base under another adapter; `checkpoint`: other weights, a model of its own;
    `run_time`: the subject's model, watched or changed while it answers."""
    open: Callable[[], AbstractContextManager[Any]]
    """Gives, while entered, a model with `generate`, `forward` and `device`, in evaluation mode. Open one
    at a time of one subject. Run-time methods may change `generate` alone: `forward_too` tells."""
    forward_too: bool = True
    """False where only `generate` is repaired, so that likelihoods are those of the unrepaired model."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What was done, in numbers and words for the model card."""

    @property
    def savable(self) -> bool:
        """Whether it can be saved as a normal adapter or checkpoint."""
        return self.form != "run_time"


@dataclass(frozen=True)
class Method:
    """A way to repair a model."""

    name: str
    about: str
    """One sentence, for help and tables."""
    apply: Callable[[Subject, Knobs, int], Repaired]
    """Subject, complete knobs within range, seed. Call `repair`, which checks them."""
    needs: frozenset[Need]
    knobs: Mapping[str, Knob]
    """The first is the strength, which a sweep varies."""
    control: bool = False
    """Not meant to remove backdoors; shows what a change of that kind does anyway."""
    paper: str = ""

    @property
    def strength(self) -> str:
        """Name of the knob that a sweep varies."""
        return next(iter(self.knobs))

    def missing(self, subject: Subject) -> frozenset[Need]:
        """What it needs and the subject lacks."""
        return self.needs - subject.has

    def settings(self, chosen: Knobs | None = None) -> dict[str, float]:
        """All knobs: the chosen ones, checked, and the others at their defaults.

        Raises:
            InputError: for an unknown knob or a value out of range.
        """
        chosen = chosen or {}
        unknown = sorted(set(chosen) - set(self.knobs))
        if unknown:
            raise InputError(
                f"{self.name}: there is no knob {unknown[0]!r}; there are: {', '.join(self.knobs)}."
            )
        return {
            name: knob.check(f"{self.name}.{name}", chosen.get(name, knob.default))
            for name, knob in self.knobs.items()
        }

    def sweep(self, varied: Sequence[str] = ()) -> Iterator[dict[str, float]]:
        """Settings over the grids of the varied knobs, by default the strength's, from weak to strong."""
        names = list(varied) or [self.strength]
        for values in itertools.product(*(self.knobs[name].grid for name in names)):
            yield self.settings(dict(zip(names, values, strict=True)))
