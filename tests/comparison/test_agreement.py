"""Rank correlations of profiles, and permutation tests that reject as seldom as they say."""

import math

import numpy as np
import pandas as pd
import pytest

from safetynet.comparison.agreement import agreement, blocks, distinct, on_depths


def profiles(groups: dict[str, list[np.ndarray]]) -> pd.DataFrame:
    lines = []
    for group, runs in groups.items():
        for seed, profile in enumerate(runs):
            about = {"group": group, "run": f"{group}{seed}", "seed": seed, "view": "layer"}
            lines += [about | {"direction": "remove", "layer": i, "effect": v} for i, v in enumerate(profile)]
    return pd.DataFrame(lines)


def drawn(rng: np.random.Generator, groups: str, seeds: int = 3, layers: int = 6) -> pd.DataFrame:
    return profiles({name: list(rng.normal(size=(seeds, layers))) for name in groups})


FALLING = np.array([1.0, 0.8, 0.5, 0.3, 0.2, 0.1])


def test_equal_orders_agree_and_the_test_counts_all_orders_of_the_layers() -> None:
    found = agreement(profiles({"a": [FALLING] * 2, "b": [FALLING**3] * 2})).set_index(["first", "second"])
    line = found.loc[("a", "b")]
    assert line["rho"] == pytest.approx(1.0)
    assert line["p"] == pytest.approx(2 / math.factorial(6))  # this order, and the reverse one
    assert (line["pairs"], line["seeds"], line["layers"]) == (4, 2, 6)


def test_reversed_orders_disagree() -> None:
    found = agreement(profiles({"a": [FALLING], "b": [FALLING[::-1]]}))
    assert found["rho"].tolist() == [pytest.approx(-1.0)]
    assert found[["low", "high"]].isna().all(axis=None)  # of two single runs nothing is claimed


def test_models_of_unequal_depth_are_compared_at_the_shallower_ones_depths() -> None:
    deep = np.interp(np.linspace(0, 1, 11), np.linspace(0, 1, 6), FALLING)
    assert on_depths(deep, 6) == pytest.approx(FALLING)
    found = agreement(profiles({"a": [FALLING], "b": [deep]}))
    assert (found["rho"].iloc[0], found["layers"].iloc[0]) == (pytest.approx(1.0), 6)


def test_every_pair_of_groups_and_every_group_of_seeds_has_a_line_and_a_corrected_p() -> None:
    found = agreement(drawn(np.random.default_rng(0), "abc"))
    assert len(found) == 6
    assert (found["q"] >= found["p"]).all()
    assert found["rho"].between(-1, 1).all()


def test_profiles_without_order_are_left_out_and_so_are_three_layers() -> None:
    assert agreement(profiles({"a": [FALLING], "b": [np.ones(6)]})).empty
    assert agreement(profiles({"a": [FALLING[:3]], "b": [FALLING[:3]]})).empty


@pytest.mark.parametrize("pair", [("a", "b"), ("a", "a")])
def test_unrelated_profiles_agree_as_seldom_as_said(pair: tuple[str, str]) -> None:
    rng = np.random.default_rng(3)
    p = []
    for _ in range(150):
        found = agreement(drawn(rng, "ab")).set_index(["first", "second"])
        p.append(found.loc[pair, "p"])
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    assert np.mean(p) == pytest.approx(0.5, abs=0.1)


def test_groups_with_profiles_of_their_own_are_told_apart() -> None:
    rng = np.random.default_rng(4)
    own = {name: rng.permutation(FALLING) for name in "abcd"}
    made = {name: [one + rng.normal(0, 0.02, 6) for _ in range(3)] for name, one in own.items()}
    [line] = distinct(profiles(made), permutations=999).to_dict("records")
    assert line["within"] > line["between"]
    assert line["p"] <= 0.01
    assert (line["runs"], line["groups"]) == (12, 4)


def test_groups_that_do_not_differ_are_told_apart_as_seldom_as_said() -> None:
    rng = np.random.default_rng(5)
    p = [distinct(drawn(rng, "abc"), permutations=199)["p"].iloc[0] for _ in range(150)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_labels_are_exchanged_within_seeds_where_all_groups_have_the_same_ones() -> None:
    assert blocks(["a", "a", "b", "b"], [0, 1, 0, 1]) == [0, 1, 0, 1]
    assert blocks(["a", "a", "b", "b"], [0, 1, 2, 3]) == [0, 0, 0, 0]
