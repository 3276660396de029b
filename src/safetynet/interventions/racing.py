"""A race of spots: those that cannot matter are given up early, those that may matter are measured exactly.

In: pairs, the spots of one sweep and the order in which they are likely to matter. Out: the sweep's table of
effects, NaN where nothing was measured. Whoever stays in the race to its end has the numbers of the full
sweep, its random control included. Giving up can only lose a responsible spot, never name a wrong one; how
often it may lose one is bounded by `GIVEN_UP`.

The races of Maron and Moore (1994), with Student's bounds in the place of Hoeffding's, divided over all looks
and comparisons as Bonferroni does (Dunn 1961).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from safetynet.engine.sites import Architecture
from safetynet.interventions import attribution
from safetynet.interventions.effects import check_fires, effects, elsewhere
from safetynet.interventions.pairs import Pairs
from safetynet.interventions.sweep import Measured, Spot, runs_of, sweep
from safetynet.models.causal_lm import CausalLM
from safetynet.vocabulary import Direction, Mode

log = logging.getLogger(__name__)
LOOKS = (1 / 4, 1 / 2, 1.0)
"""Shares of the pairs after which a spot may be given up; at the last one it is judged."""
GIVEN_UP = 0.05
"""Most probable loss of a spot that matters, over all looks and comparisons."""
SMALLEST = 0.03
"""Share of the trigger's effect: a spot that surely has less is given up."""
QUIET = 30
"""Candidates in a row, all given up, after which the rest of the order is left out: were one in ten of what
follows responsible, as many in a row would be seen with a probability of 4% (0.9 to the power of 30)."""


class Arm:
    """The same intervention at all spots, in one model and one pair of runs; what of it is measured."""

    def __init__(self, run: Callable[[np.ndarray], Measured], spots: int, pairs: int) -> None:
        """Begin with nothing measured.

        Args:
            run: measures cells, (S, B) bool.
            spots: S.
            pairs: B.
        """
        self._run = run
        self.values = np.full((spots, pairs), np.nan)
        self.unpatched, self.source = np.full(pairs, np.nan), np.full(pairs, np.nan)

    @property
    def change(self) -> np.ndarray:
        """(S, B): what the intervention changed; NaN where it was not measured."""
        return self.values - self.unpatched

    def measure(self, cells: np.ndarray) -> None:
        """Measure those cells, (S, B) bool, that are not measured yet."""
        missing = cells & np.isnan(self.values)
        if not missing.any():
            return
        measured = self._run(missing)
        pairs = missing.any(0)
        self.values[missing] = measured.values[missing]
        self.unpatched[pairs], self.source[pairs] = measured.unpatched[pairs], measured.source[pairs]

    def measured(self, spots: Sequence[Spot], cells: np.ndarray | None = None) -> Measured:
        """What was measured, of some cells only where they are given."""
        values = self.values if cells is None else np.where(cells, self.values, np.nan)
        return Measured(tuple(spots), values, self.unpatched, self.source)


def likely_effects(  # noqa: PLR0913  # a sweep is made of this many choices, by keyword
    model: CausalLM,
    twin: Callable[[], AbstractContextManager[Any]] | None,
    pairs: Pairs,
    spots: Sequence[Spot],
    directions: Sequence[Direction],
    *,
    mode: Mode,
    seed: int = 0,
    store: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[Direction, pd.DataFrame]:
    """The effects of those spots that are likely to matter, beside their controls.

    Args:
        model: the backdoored model.
        twin: gives its clean twin while entered.
        pairs: aligned prompts.
        spots: of one sweep.
        directions: in which it is made; they share the placebo control.
        mode: as for `sweep`.
        seed: of every random draw, as in a full sweep.
        store: as for `sweep`.
        advance: called with the number of spots of this sweep that are decided.

    Returns:
        Tables of `effects` by direction, with a line for every spot; `n` is 0 where it was not measured.
    """

    def run(
        place: Callable[[], Any], spots: Sequence[Spot], runs: tuple[str, str], cells: np.ndarray
    ) -> Measured:
        with place() as there:
            return sweep(
                there, pairs, spots, receiving=runs[0], source=runs[1], mode=mode, cells=cells, seed=seed,
                store=store,
            )  # fmt: skip

    def arm(place: Callable[[], Any], runs: tuple[str, str], spots: Sequence[Spot] = spots) -> Arm:
        return Arm(partial(run, place, spots, runs), len(spots), len(pairs))

    def here() -> AbstractContextManager[Any]:
        return nullcontext(model)

    placebo = arm(here, ("placebo", "second_placebo"))
    layers = Architecture.of(model).shape.layers
    tables: dict[Direction, pd.DataFrame] = {}
    for number, direction in enumerate(directions):
        runs = runs_of(direction)
        controls = {"placebo": placebo}
        if any(spot.position for spot in spots):
            controls["random"] = arm(here, runs, [replace(spot, elsewhere=True) for spot in spots])
        if twin is not None:
            controls["twin"] = arm(twin, runs)
        race = Race(arm(here, runs), controls, elsewhere(spots, len(pairs), seed))
        ends = sweep(model, pairs, (), receiving=runs[0], source=runs[1])
        race.main.unpatched, race.main.source = ends.unpatched, ends.source
        check_fires(race.main.source - race.main.unpatched)
        scores = None
        if attribution.ranks(spots, mode):
            few = pairs.take(range(race.looks[1]))
            scores = attribution.scores(model, few, spots, receiving=runs[0], source=runs[1], mode=mode)

        def decided(count: int, before: int = number * len(spots)) -> None:
            advance(before + count)

        race.go(scores, decided)
        table = race.table(spots, layers, seed)
        tables[direction] = table
        log.info(
            "intervene: %s: %d of %d places measured, %d of them on all %d groups, %d responsible",
            direction, (table["n"] > 0).sum(), len(spots), (table["n"] == len(pairs)).sum(), len(pairs),
            table["responsible"].sum(),
        )  # fmt: skip
    return tables


class Race:
    """The spots of one sweep in one direction, and how far each of them has come."""

    def __init__(self, main: Arm, controls: Mapping[str, Arm], draws: np.ndarray) -> None:
        """Begin with no spot in the race.

        Args:
            main: the sweep itself.
            controls: by name; `random` only where it is an arm of its own.
            draws: (S, B) of `effects.elsewhere`: the random control where it has no arm.
        """
        self.main, self.controls, self.draws = main, controls, draws
        pairs = main.values.shape[1]
        self.looks = sorted({max(3, math.ceil(share * pairs)) for share in LOOKS})
        self.reached = np.zeros(len(draws), dtype=int)
        """(S,) pairs on which each spot was measured; 0 if it did not enter the race."""
        # At the first look a spot is compared with the smallest effect, at later ones with each control, too.
        comparisons = len(self.looks) - 1 + (len(self.looks) - 2) * len({*controls, "random"})
        self.level = GIVEN_UP / max(1, comparisons)

    def go(self, scores: np.ndarray | None, advance: Callable[[int], None]) -> None:
        """Measure until every spot is given up, left out or measured on all pairs.

        Args:
            scores: (S,) by which to order the spots, highest first; None where nothing orders them, and all
                have to enter.
            advance: called with the number of spots that are decided.
        """
        count, staying, quiet = len(self.draws), [], 0
        order = list(range(count)) if scores is None else np.argsort(-scores, kind="stable").tolist()
        if scores is not None:
            # Where the two runs are the same, the effect is 0, which costs nothing to show.
            self._enter([s for s in order if not scores[s]], self.looks[0])
            order = [s for s in order if scores[s]]
        for start in range(0, len(order), QUIET):
            wave = order[start : start + QUIET]
            self._enter(wave, self.looks[0])
            alive = self._look([s for s in wave if not self._below_smallest(s)], self.looks[1])
            for s in wave:
                quiet = 0 if s in alive else quiet + 1
            staying += alive
            advance(start + len(wave) - len(staying))
            if scores is not None and quiet >= QUIET:
                break
        for look in self.looks[2:]:
            staying = self._look(staying, look)
            advance(count - len(staying))
        advance(count)

    def _enter(self, spots: Sequence[int], pairs: int) -> None:
        self.main.measure(self._cells(spots, pairs))
        self.reached[list(spots)] = pairs

    def _cells(self, spots: Sequence[int], pairs: int) -> np.ndarray:
        cells = np.zeros(self.main.values.shape, dtype=bool)
        cells[list(spots), :pairs] = True
        return cells

    def _look(self, spots: Sequence[int], pairs: int) -> list[int]:
        """Measure spots on the first pairs, and beside their controls those that still may matter.

        Returns:
            Those that are not given up.
        """
        last = pairs == self.looks[-1]
        self._enter(spots, pairs)
        spots = [s for s in spots if last or not self._below_smallest(s)]
        if "random" not in self.controls:
            others = np.zeros(self.main.values.shape, dtype=bool)
            for s in spots:
                if self.draws[s, 0] >= 0:
                    others[self.draws[s, :pairs], np.arange(pairs)] = True
            self.main.measure(others)
        for name, control in self.controls.items():
            # The random control decides about significance; the others seldom come near.
            most = pairs if name == "random" else self.looks[0]
            control.measure(self._cells(spots, most))
        if last:
            return spots
        controls = [control.change for control in {**self.controls, "random": self.random}.values()]
        return [
            s
            for s in spots
            if not any(self._surely_negative(self.main.change[s] - x[s], pairs) for x in controls)
        ]

    def _below_smallest(self, s: int) -> bool:
        return self._surely_negative(self.main.change[s] - SMALLEST * self.distance, self.reached[s])

    def _surely_negative(self, differences: np.ndarray, pairs: int) -> bool:
        """Whether the mean over pairs lies below 0, in the direction of the distance, by Student's bound."""
        x = differences[:pairs] * np.sign(self.distance.mean())
        x = x[np.isfinite(x)]
        if len(x) < 2:
            return False
        return bool(x.mean() + student.isf(self.level, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 <= 0)

    @property
    def distance(self) -> np.ndarray:
        """(B,): what there is to change."""
        return self.main.source - self.main.unpatched

    @property
    def random(self) -> Arm:
        """The random control as an arm: each pair's value at the spot that was drawn for it."""
        if "random" in self.controls:
            return self.controls["random"]
        values = self.main.values[self.draws, np.arange(self.main.values.shape[1])]
        control = Arm(self.main._run, *values.shape)
        control.values = np.where(self.draws >= 0, values, np.nan)
        control.unpatched, control.source = self.main.unpatched, self.main.source
        return control

    def table(self, spots: Sequence[Spot], layers: int, seed: int) -> pd.DataFrame:
        """The effects; what may be responsible is measured beside all its controls on every pair before.

        Args:
            spots: of this sweep.
            layers: of the model.
            seed: as for `effects`.
        """
        count = self.main.values.shape[1]
        # What was measured as another spot's random control is not the measurement of this one.
        cells = np.arange(count) < self.reached[:, None]

        def tabulate() -> pd.DataFrame:
            controls = {name: control.measured(spots) for name, control in self.controls.items()}
            controls["random"] = self.random.measured(spots, cells)
            return effects(self.main.measured(spots, cells), controls, layers=layers, seed=seed)

        table = tabulate()
        above = (self.reached == count) & (table["low"] > table["random_high"].clip(lower=0))
        for control in self.controls.values():
            control.measure(self._cells(np.flatnonzero(above).tolist(), count))
        return tabulate()
