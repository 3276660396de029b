"""Where the trigger acts, on profiles whose centre, spread and shares can be computed by hand."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from safetynet.comparison import places
from safetynet.comparison.places import centre_and_spread, chance_jaccard
from safetynet.errors import InputError

DEPTHS = np.linspace(0, 1, 6).tolist()


@pytest.mark.parametrize(
    ("effect", "centre", "spread"),
    [
        ([1, 0, 0, 0, 0, 0], 0.0, 0.0),
        ([0, 0, 0, 0, 0, 2], 1.0, 0.0),
        ([1, 0, 0, 0, 0, 1], 0.5, 0.5),
        ([1, 1, 1, 1, 1, 1], 0.5, np.std(DEPTHS)),
        ([3, 0, 0, 0, 0, 1], 0.25, np.sqrt(0.75 * 0.0625 + 0.25 * 0.5625)),
        ([1, 0, 0, 0, 0, -9], 0.0, 0.0),
    ],
)
def test_centre_and_spread_are_weighted_by_the_effect(
    effect: list[float], centre: float, spread: float
) -> None:
    assert centre_and_spread(DEPTHS, effect) == pytest.approx((centre, spread))


def test_no_effect_has_no_place() -> None:
    assert np.isnan(centre_and_spread(DEPTHS, [0, -1, 0, 0, 0, 0])).all()


def test_centres_stand_beside_those_of_random_places(subject: Callable) -> None:
    found = places.centres(places.profiles([subject()])).set_index(["view", "direction"])
    line = found.loc[("attention", "remove")]
    assert (line["centre"], line["spread"], line["peak"]) == (0.0, 0.0, 0.0)
    assert line["centre_random"] == pytest.approx(0.5)  # the same effect everywhere


def test_places_of_one_layer_are_added_up(subject: Callable) -> None:
    found = places.profiles([subject()])
    heads = found[(found["view"] == "head") & (found["direction"] == "remove")]
    assert heads["effect"].tolist() == [0.5, 0, 0, 0, 0, 0]
    assert heads["random"].tolist() == pytest.approx([0.4] * 6)


def test_a_control_that_was_not_measured_is_not_taken_for_none(subject: Callable, tables: Callable) -> None:
    without = tables()["effects"].assign(twin=np.nan)
    found = places.profiles([subject(effects=without)])
    assert found["twin"].isna().all()
    assert (places.profiles_by_group(found)["control"] == "random").all()


def test_shares_are_of_what_attention_and_mlp_do_together(subject: Callable) -> None:
    found = places.shares(places.profiles([subject()])).set_index(["direction", "part"])
    assert found.loc[("remove", "attention"), "share"] == pytest.approx(0.6 / 0.8)
    assert found.loc[("remove", "mlp"), "share"] == pytest.approx(0.2 / 0.8)  # what is negative counts as 0
    assert found.loc[("remove", "mlp"), "control"] == pytest.approx(6 * 0.01 / 0.8)


def test_profiles_of_a_group_are_means_over_seeds(subject: Callable, tables: Callable) -> None:
    other = tables()["effects"]
    other["effect"] = other["effect"] + 0.2
    found = places.profiles_by_group(
        places.profiles([subject(seed=0), subject(seed=1, effects=other), subject(seed=2, effects=other)])
    )
    first = found[(found["view"] == "layer") & (found["layer"] == 0)].iloc[0]
    assert first["value"] == pytest.approx(1.0 + 0.4 / 3)
    assert first["low"] < 1.0 + 0.4 / 3 < first["high"]
    assert (first["control"], first["control_value"]) == ("random", pytest.approx(0.2))


def test_heads_are_the_same_or_others_in_each_seed(subject: Callable, tables: Callable) -> None:
    def responsible(*chosen: tuple[int, int]) -> pd.DataFrame:
        table = tables()["effects"]
        marked = [(layer, head) in chosen for layer, head in zip(table["layer"], table["index"], strict=True)]
        return table.assign(responsible=marked)

    seeds = [
        subject(seed=0, effects=responsible((0, 1), (2, 0))),
        subject(seed=1, effects=responsible((0, 1), (3, 0))),
    ]
    found = places.heads_by_group(places.heads(seeds)).set_index("direction").loc["remove"]
    assert (found["count"], found["of"], found["in_all"], found["in_any"]) == (2.0, 12, "L0H1", 3)
    assert found["jaccard"] == pytest.approx(1 / 3)
    assert found["chance"] == pytest.approx(chance_jaccard(2, 2, 12))


def test_chance_is_what_drawn_heads_have_in_common() -> None:
    assert chance_jaccard(1, 1, 4) == pytest.approx(1 / 4)
    assert chance_jaccard(4, 4, 4) == pytest.approx(1.0)
    assert chance_jaccard(0, 2, 4) == 0.0


def test_one_seed_has_no_head_in_every_seed(subject: Callable) -> None:
    found = places.heads_by_group(places.heads([subject()]))
    assert (found["in_all"] == "").all()
    assert found[["low", "high", "jaccard"]].isna().all(axis=None)


def test_effects_of_other_metrics_or_modes_are_refused(subject: Callable, tables: Callable) -> None:
    other = tables()["effects"].assign(mode="mean")
    with pytest.raises(InputError, match=r"effects by layer are of different metrics .*seed-1.* under mean"):
        places.profiles([subject(), subject(seed=1, effects=other)])


def test_a_sweep_of_some_layers_is_left_out_and_told(subject: Callable, tables: Callable) -> None:
    table = tables()["effects"]
    fast = table[~((table["component"] == "attn_out") & (table["layer"] > 1))]
    one = subject(effects=fast)
    assert "attention" not in set(places.profiles([one])["view"])
    [said] = places.incomplete([one])
    assert "effects by attention were measured in some places only" in said
    assert "safetynet intervene results/qwen-miniature/seed-0" in said
