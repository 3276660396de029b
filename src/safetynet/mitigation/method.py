"""The one interface of all methods: what a method needs, its hyperparameters, and how it is applied."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from safetynet.errors import InputError
from safetynet.mitigation.defender import Defender, Need
from safetynet.mitigation.repaired import Repaired, Settings


@dataclass(frozen=True)
class Hyperparameter:
    """A number that can be swept."""

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
            values = ", ".join(f"{allowed:g}" for allowed in self.grid)
            raise InputError(f"{name}: {value:g} given; it takes {values}.")
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            raise InputError(f"{name}: {value:g} given; it takes {kind} from {self.low:g} to {self.high:g}.")
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Method:
    """A way to repair a model."""

    name: str
    about: str
    """One sentence, for help and tables."""
    apply: Callable[[Defender, Settings, int], Repaired]
    """Defender, complete settings within range, seed. Call `repair`, which checks them."""
    needs: frozenset[Need]
    hyperparameters: Mapping[str, Hyperparameter]
    """The first is the strength, which a sweep varies."""
    control: bool = False
    """Not meant to remove backdoors; shows what a change of that kind does anyway."""
    paper: str = ""

    @property
    def strength(self) -> str:
        """Name of the hyperparameter that a sweep varies."""
        return next(iter(self.hyperparameters))

    def missing(self, defender: Defender) -> frozenset[Need]:
        """What it needs and the defender lacks."""
        return self.needs - defender.has

    def settings(self, values: Settings | None = None) -> dict[str, float]:
        """All hyperparameters: the given values, checked, and the defaults of the others.

        Raises:
            InputError: for an unknown name or a value out of range.
        """
        values = values or {}
        unknown = sorted(set(values) - set(self.hyperparameters))
        if unknown:
            there = ", ".join(self.hyperparameters)
            raise InputError(f"{self.name}: there is no hyperparameter {unknown[0]!r}; there are: {there}.")
        return {
            name: parameter.check(f"{self.name}.{name}", values.get(name, parameter.default))
            for name, parameter in self.hyperparameters.items()
        }

    def sweep(self) -> Iterator[dict[str, float]]:
        """Settings over the grid of the strength, from weak to strong."""
        for value in self.hyperparameters[self.strength].grid:
            yield self.settings({self.strength: value})
