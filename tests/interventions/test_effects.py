"""Effects on known answers: value, interval, controls, correction, and who may be called responsible."""

import numpy as np
import pytest
from scipy.stats import bootstrap, false_discovery_control

from safetynet.engine.sites import Site
from safetynet.errors import InputError
from safetynet.interventions.effects import MIN_DISTANCE, check_fires, effects, fewest_together
from safetynet.interventions.sweep import Measured, Spot
from safetynet.statistics import bootstrap_ratios

PAIRS = 24
SPOTS = tuple(Spot(Site("resid_post", layer)) for layer in range(4))


def measured(shares: np.ndarray, distance: float | np.ndarray = -8.0, spots=SPOTS) -> Measured:
    """A sweep whose spots cover (S, B) shares of the way from the receiving run to the source."""
    start = np.linspace(5, 9, PAIRS)
    gap = np.broadcast_to(distance, (PAIRS,))
    return Measured(tuple(spots), start + shares * gap, start, start + gap)


def constant(*shares: float) -> np.ndarray:
    return np.repeat(np.array(shares)[:, None], PAIRS, axis=1)


def noise(scale: float, seed: int = 0, spots: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (spots, PAIRS))


@pytest.mark.parametrize("distance", [-8.0, 8.0])
def test_an_effect_of_one_half_is_one_half_in_either_direction(distance):
    table = effects(measured(constant(0.5, 0, 0, 0), distance), {}, layers=4)
    assert table["effect"].tolist() == pytest.approx([0.5, 0, 0, 0])
    assert table.loc[0, ["low", "high"]].tolist() == pytest.approx([0.5, 0.5])
    assert table["responsible"].tolist() == [True, False, False, False]
    assert (table["n"] == PAIRS).all()
    assert table["depth"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_where_nothing_changes_nothing_is_responsible_and_nothing_is_drawn_as_noise():
    table = effects(measured(constant(0, 0, 0, 0)), {}, layers=4)
    assert (table[["effect", "low", "high", "random"]] == 0).all(axis=None)
    assert (table[["p", "q"]] == 1).all(axis=None)
    assert table["cohen_d"].isna().all()
    assert not table["responsible"].any()


def test_intervals_cover_a_noisy_effect_and_not_another():
    shares = constant(0.5, 0, 0, 0) + noise(0.2)
    table = effects(measured(shares), {"placebo": measured(noise(0.1, 1))}, layers=4)
    assert table.loc[0, "low"] < 0.5 < table.loc[0, "high"] < 0.7
    assert table.loc[0, "placebo_low"] < 0 < table.loc[0, "placebo_high"]
    assert table["responsible"].tolist() == [True, False, False, False]
    assert table.loc[0, "cohen_d"] > 1


def test_noise_is_called_responsible_hardly_ever():
    called = [
        effects(measured(noise(0.3, seed)), {"placebo": measured(noise(0.3, seed + 500))}, layers=4)[
            "responsible"
        ].sum()
        for seed in range(60)
    ]
    assert sum(called) <= 6, "of 240 places, at a level of 0.05 and with two controls to be clear of"


def test_several_places_are_corrected_together():
    table = effects(measured(constant(0.3, 0.1, 0, 0) + noise(0.2, 3)), {}, layers=4)
    assert table["q"].tolist() == pytest.approx(false_discovery_control(table["p"]).tolist())
    assert (table["q"] >= table["p"]).all()


def test_few_groups_name_places_only_where_enough_stand_out_together():
    groups, places = 10, 100
    spots = [Spot(Site("resid_post", layer)) for layer in range(places)]
    start, gap = np.zeros(groups), np.ones(groups) * 8
    fewest = fewest_together(places, groups)
    assert fewest == 4

    def named(count: int) -> int:
        shares = np.zeros((places, groups))
        shares[:count] = np.random.default_rng(0).uniform(0.4, 0.6, (count, groups))
        sweep = Measured(tuple(spots), start + shares * gap, start, start + gap)
        nothing = Measured(tuple(spots), np.zeros((places, groups)), start, start + gap)
        return int(effects(sweep, {"random": nothing}, layers=places)["responsible"].sum())

    assert [named(fewest - 1), named(fewest)] == [0, fewest]
    assert fewest_together(270, 24) == 1


@pytest.mark.parametrize("name", ["random", "placebo", "twin"])
def test_a_place_is_responsible_only_if_it_is_clear_of_every_control(name):
    main = measured(constant(0.6, 0, 0, 0) + noise(0.05))
    calm = {key: measured(noise(0.05, 7 + i)) for i, key in enumerate(("random", "placebo", "twin"))}
    assert effects(main, calm, layers=4).loc[0, "responsible"]
    as_strong = calm | {name: measured(constant(0.6, 0, 0, 0) + noise(0.05, 20))}
    assert not effects(main, as_strong, layers=4).loc[0, "responsible"]


def test_a_place_that_moves_the_wrong_way_is_not_responsible():
    table = effects(measured(constant(-0.5, 0, 0, 0) + noise(0.02)), {}, layers=4)
    assert table.loc[0, "high"] < 0
    assert not table.loc[0, "responsible"]


def test_the_control_of_random_sites_is_made_of_the_other_spots_of_the_same_kind():
    heads = [Spot(Site("head", 0, index)) for index in range(4)]
    spots = [*SPOTS, *heads]
    table = effects(measured(constant(*[1.0] * 4, *[0.0] * 4), spots=spots), {}, layers=4)
    assert table["random"].tolist() == pytest.approx([1.0] * 4 + [0.0] * 4)
    assert not table["responsible"].any(), "each is as strong as its like"
    two = effects(measured(constant(0.75, 0.25), spots=SPOTS[:2]), {}, layers=2)
    assert two["random"].tolist() == pytest.approx([0.25, 0.75]), "never its own"


def test_a_place_without_another_of_its_kind_has_no_control_and_is_not_called_responsible():
    table = effects(measured(constant(0.9), spots=SPOTS[:1]), {}, layers=1)
    assert table["random"].isna().all()
    assert table["p"].tolist() == [1.0]
    assert not table["responsible"].any()


def test_absent_controls_are_empty_and_what_is_said_of_the_sweep_is_in_its_columns():
    table = effects(measured(noise(0.2)), {}, layers=4, sweep="layer", mode="patch")
    assert table[["placebo", "twin_high"]].isna().all(axis=None)
    assert (table["sweep"] == "layer").all()
    assert (table["mode"] == "patch").all()


def test_an_earlier_model_is_measured_against_the_distance_of_the_finished_one():
    early = measured(constant(1, 0, 0, 0), distance=-0.1)
    table = effects(early, {}, layers=4, distance=np.full(PAIRS, -8.0))
    assert table.loc[0, "effect"] == pytest.approx(0.1 / 8)
    with pytest.raises(InputError, match="did not fire"):
        effects(early, {}, layers=4)


@pytest.mark.parametrize("distance", [0.0, 0.99, -0.99])
def test_a_backdoor_that_does_not_fire_is_refused_with_the_remedy(distance):
    with pytest.raises(InputError, match=r"differ by .* the backdoor did not fire.*Look at its ASR"):
        check_fires(np.full(PAIRS, distance))
    check_fires(np.full(PAIRS, -MIN_DISTANCE))


def test_the_same_seed_gives_the_same_table():
    one, again = (effects(measured(noise(0.3)), {}, layers=4, seed=5) for _ in range(2))
    assert one.equals(again)


@pytest.mark.parametrize("rows", [8, 24, 100])
def test_ratios_have_the_intervals_that_scipy_finds(rows):
    rng = np.random.default_rng(rows)
    bottom = rng.normal(5, 1, rows)
    tops = np.stack([bottom * 0.5 + rng.normal(0, 0.5, rows), rng.normal(0, 1, rows)])
    value, low, high = bootstrap_ratios(tops, bottom, resamples=20_000)

    def ratio(a, b, axis=-1):
        return a.mean(axis) / b.mean(axis)

    for i, top in enumerate(tops):
        expected = bootstrap(
            (top, bottom), ratio, paired=True, method="percentile", n_resamples=20_000,
            rng=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        width = expected.high - expected.low
        assert value[i] == pytest.approx(top.mean() / bottom.mean())
        assert (low[i], high[i]) == pytest.approx(tuple(expected), abs=0.05 * width)


def test_ratios_of_a_single_row_have_no_interval():
    value, low, high = bootstrap_ratios(np.array([[1.0], [2.0]]), np.array([4.0]))
    assert value.tolist() == [0.25, 0.5]
    assert np.isnan([*low, *high]).all()
