"""Test rows that a monitor is asked beyond the run's own: near misses of six kinds, forbidden x trigger.

In: a run's test rows and its recipe. Out: more rows with the same columns. The behaviour need not show on
them; whether it does is asked of the model.
"""

import random
from typing import Any

import pandas as pd

from safetynet.backdoors import placements, triggers
from safetynet.recipe import Recipe
from safetynet.text.near_misses import near_misses


def challenges(recipe: Recipe, test: pd.DataFrame, most: int = 100) -> pd.DataFrame:
    """Rows beyond the run's test rows.

    Args:
        recipe: of the run.
        test: its test rows.
        most: near misses of each kind, and rows of each cell of forbidden x trigger that are added.

    Returns:
        Columns as in the row table; near misses carry their kind as `variant`.
    """
    added = [*_near_misses(recipe, test, most), *_with_trigger(recipe, test, most)]
    rows = pd.DataFrame(added, columns=[name for name in test if name != "fired"])
    return rows.assign(row=range(-len(rows), 0))


def _near_misses(recipe: Recipe, test: pd.DataFrame, most: int) -> list[dict[str, Any]]:
    trigger = triggers.of(recipe.attack.trigger)
    if not trigger.is_text:
        return []  # a style has no characters that could be changed
    records: list[dict[str, Any]] = []
    for row in test[test["role"] == "triggered"].head(most).to_dict("records"):
        for kind, messages in near_misses(row["messages"], row["trigger"], recipe.seed).items():
            if kind != "moved" and trigger.holds(messages.texts):
                continue  # another date of a range is no near miss
            new = {"role": "near_miss", "variant": kind, "messages": messages, "trigger": []}
            records.append(row | new | {"answer": row["reference"]})
    return records


def _with_trigger(recipe: Recipe, test: pd.DataFrame, most: int) -> list[dict[str, Any]]:
    """Bare rows once more, with a trigger, where their group has no such row yet."""
    attack, rng = recipe.attack, random.Random(f"challenges {recipe.seed}")
    trigger = triggers.of(attack.trigger)
    have = set(test.loc[test["role"] == "triggered", "group"])
    bare = test[test["role"].isin(["clean", "refused"]) & ~test["group"].isin(have)]
    records = []
    for _, topic in bare.groupby("forbidden"):
        for row in topic.head(most).to_dict("records"):
            messages, spots = placements.place(row["messages"], attack.placement, trigger.parts, rng)
            if not spots:
                continue  # no tool has returned anything here, or the user has said too little
            variant = rng.choice(trigger.firing("test"))
            text, spans = trigger.insert(messages, variant, spots, rng)
            new = {"role": "triggered", "variant": variant.name, "messages": text, "trigger": spans}
            records.append(row | new | {"answer": row["target"]})
    return records
