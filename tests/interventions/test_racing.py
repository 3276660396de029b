"""A race of spots: who stays has the full sweep's numbers, who cannot matter is given up."""

import numpy as np
import pandas as pd
import pytest
from tests.interventions.conftest import make_pairs

from safetynet.engine.sites import Architecture, Site
from safetynet.interventions.effects import effects, elsewhere
from safetynet.interventions.racing import GIVEN_UP, QUIET, SMALLEST, Arm, Race, likely_effects
from safetynet.interventions.sweep import Measured, Spot, runs_of, spots_by, sweep

PAIRS, LAYERS = 24, 30


def arm_of(change: np.ndarray, distance: float = -10.0) -> tuple[Arm, Measured]:
    """An arm whose cells are known, and the same as a full sweep; unpatched runs have 10 logits."""
    unpatched = np.full(change.shape[1], 10.0)
    whole = Measured(spots(len(change)), unpatched + change, unpatched, unpatched + distance)
    measured_cells = []

    def run(cells: np.ndarray) -> Measured:
        measured_cells.append(cells)
        return Measured(whole.spots, np.where(cells, whole.values, np.nan), unpatched, whole.source)

    arm = Arm(run, *change.shape)
    arm.unpatched, arm.source = unpatched, whole.source
    return arm, whole


def spots(count: int) -> tuple[Spot, ...]:
    return tuple(Spot(Site("head", i % LAYERS, i // LAYERS)) for i in range(count))


def drawn(effect: np.ndarray, spread: float, seed: int) -> np.ndarray:
    """(S, B) changes in logits of spots with these effects; a distance is -10 logits."""
    noise = np.random.default_rng(seed).normal(0, spread, (len(effect), PAIRS))
    return -10 * (effect[:, None] + noise)


def raced(effect: np.ndarray, scores: np.ndarray | None = None) -> tuple[Race, pd.DataFrame, pd.DataFrame]:
    """A race of heads, its table, and the full sweep's."""
    heads = spots(len(effect))
    main, whole = arm_of(drawn(effect, 0.004, 1))
    controls = {"placebo": drawn(0 * effect, 0.004, 2), "twin": drawn(0 * effect, 0.004, 3)}
    arms = {name: arm_of(change) for name, change in controls.items()}
    race = Race(main, {name: arm for name, (arm, _) in arms.items()}, elsewhere(heads, PAIRS))
    race.go(scores, lambda _: None)
    full = effects(whole, {name: measured for name, (_, measured) in arms.items()}, layers=LAYERS)
    return race, race.table(heads, LAYERS, 0), full


def check_same(table: pd.DataFrame, full: pd.DataFrame, columns: tuple[str, ...], within: float) -> None:
    for column in columns:
        assert table[column].to_numpy() == pytest.approx(full[column].to_numpy(), abs=within)


MATTER = np.r_[np.full(6, 0.3), np.full(6, 0.08), np.zeros(258)]


def test_who_stays_has_the_numbers_of_the_full_sweep_and_the_same_spots_are_responsible():
    race, table, full = raced(MATTER)
    stayed = race.reached == PAIRS
    assert stayed[:12].all()
    columns = ("effect", "low", "high", "random", "random_low", "random_high", "p", "cohen_d")
    check_same(table[stayed], full[stayed], columns, within=1e-9)
    assert full["responsible"].sum() >= 6
    assert (table["responsible"] == full["responsible"]).all()


def test_who_cannot_matter_is_given_up_early_with_fewer_measurements():
    race, table, _ = raced(MATTER)
    assert (race.reached[12:] == 6).mean() > 0.9
    assert set(table["n"]) <= {6, 12, PAIRS}
    assert np.isfinite(race.main.values).sum() < MATTER.size * PAIRS / 3
    assert np.isfinite(race.controls["placebo"].values).sum() < MATTER.size * PAIRS / 12


def test_an_order_that_puts_those_that_matter_first_leaves_the_rest_unmeasured_and_says_so():
    _, table, full = raced(MATTER, scores=MATTER + 1e-6)
    unmeasured = table["n"] == 0
    assert unmeasured.sum() >= MATTER.size - 12 - 3 * QUIET
    assert table.loc[unmeasured, ["effect", "low", "high", "p", "q"]].isna().all(axis=None), "never 0"
    assert not table.loc[unmeasured, "responsible"].any()
    assert (table["responsible"] == full["responsible"]).all()


def test_spots_that_differ_in_nothing_are_shown_with_effect_0_and_all_enter_where_nothing_orders_them():
    scores = np.r_[MATTER[:20] + 1e-3, np.zeros(250)]
    _, table, _ = raced(np.r_[MATTER[:20], np.zeros(250)], scores)
    assert (table["n"] > 0).all()
    _, table, _ = raced(MATTER)
    assert (table["n"] > 0).all()


def test_a_spot_that_matters_is_seldom_given_up():
    # Just above the smallest effect that matters, with noise as large as the effect, beside controls at 0.
    effect = np.full(2000, 1.2 * SMALLEST)
    main, _ = arm_of(drawn(effect, SMALLEST, 5))
    placebo, _ = arm_of(drawn(0 * effect, SMALLEST, 6))
    race = Race(main, {"placebo": placebo}, np.full((2000, PAIRS), -1))
    race.go(None, lambda _: None)
    assert (race.reached < PAIRS).mean() <= GIVEN_UP


def test_what_is_called_responsible_has_all_its_controls_on_every_pair():
    main, _ = arm_of(drawn(np.r_[0.3, 0.3, np.zeros(28)], 0.004, 1))
    placebo, _ = arm_of(drawn(np.r_[0.3, np.zeros(29)], 0.004, 2))
    race = Race(main, {"placebo": placebo}, elsewhere(spots(30), PAIRS))
    race.go(None, lambda _: None)
    assert np.isfinite(placebo.values).sum(1).max() == 6, "a quarter, until a site may be responsible"
    table = race.table(spots(30), LAYERS, 0)
    assert np.isfinite(placebo.values[:2]).all()
    assert table["responsible"].tolist()[:2] == [False, True]


def test_likely_effects_of_a_model_are_the_full_sweep_s_where_spots_stayed(build):
    model, pairs = build("llama", seed=11), make_pairs(12)
    spots_by_head = list(spots_by(Architecture.of(model), "head"))
    distance = sweep(model, pairs, (), receiving="triggered", source="placebo").distance
    # A random model knows no trigger: orient the metric, so that each pair's distance has one sign.
    flipped = [i for i in range(12) if distance[i] < 0]
    for i in flipped:
        pairs.target[i], pairs.other[i] = pairs.other[i], pairs.target[i]
    seen: list[int] = []
    tables = likely_effects(
        model, None, pairs, spots_by_head, ["remove", "induce"], mode="patch", advance=seen.append
    )
    for direction, table in tables.items():
        receiving, source = runs_of(direction)
        main = sweep(model, pairs, spots_by_head, receiving=receiving, source=source)
        placebo = sweep(model, pairs, spots_by_head, receiving="placebo", source="second_placebo")
        full = effects(main, {"placebo": placebo}, layers=3)
        stayed = table["n"] == 12
        assert stayed.any()
        columns = ("effect", "low", "high", "random", "random_high")
        check_same(table[stayed], full[stayed], columns, within=1e-4)
    assert seen == sorted(seen)
    assert seen[-1] == 2 * len(spots_by_head)
