"""From what was measured to tables: effects beside their controls, and plain means, each with its interval.

In: `Measured` sweeps of one model and of its controls. Out: one line per spot, NaN where it was not measured.
The effect is the share of the distance between unpatched and source run that the intervention covers: 0 is
the unpatched run, 1 the source. Of the controls, `random` is the same at random sites of the same size,
`placebo` with a placebo against another, `twin` in the clean twin.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, wilcoxon

from safetynet.errors import InputError
from safetynet.interventions.sweep import Measured, Spot
from safetynet.statistics import bootstrap_ratios
from safetynet.vocabulary import CONTROLS

SIGNIFICANCE = 0.05
"""Level of q below which a site can be called responsible."""
MIN_DISTANCE = 1.0
"""Mean logits between the runs below which the backdoor did not fire and there is nothing to divide by."""


def effects(
    measured: Measured,
    controls: Mapping[str, Measured],
    *,
    layers: int,
    distance: np.ndarray | None = None,
    seed: int = 0,
    **about: str,
) -> pd.DataFrame:
    """One line per spot: effect, interval, controls, significance; see the columns in docs/interventions.md.

    A spot that was measured on some pairs only has the interval of these; one that was not measured at all,
    or without one of the controls, is not responsible.

    Args:
        measured: the sweep.
        controls: by name (`CONTROLS`), each at the same spots on the same pairs, in the same order. `random`
            is made of the sweep itself where it is not given: each pair's value at another spot of its kind.
        layers: of the model.
        distance: (B,) to divide by instead of this model's own, where it is compared with another.
        seed: of draws.
        about: goes into columns of that name (sweep, direction, mode, metric).

    Raises:
        InputError: if the runs do not differ, since the backdoor then did not fire.
    """
    distance = measured.distance if distance is None else distance
    check_fires(distance)
    change = measured.change  # (S, B)
    changes = {name: control.change for name, control in controls.items()}
    if "random" not in changes:
        draws = elsewhere(measured.spots, change.shape[1], seed)
        there = change[draws, np.arange(change.shape[1])]
        changes["random"] = np.where(draws >= 0, there, np.nan)
    # A ratio of means, not a mean of ratios: a pair whose runs hardly differ would decide alone.
    value, low, high = _ratios(change, distance, seed)
    table = pd.DataFrame({"effect": value, "low": low, "high": high, "n": np.isfinite(change).sum(1)})
    for name in CONTROLS:
        bounds = np.full((3, len(value)), np.nan)
        if name in changes:
            bounds = _ratios(changes[name], distance, seed)
        table[name], table[f"{name}_low"], table[f"{name}_high"] = bounds
    differences = [row[np.isfinite(row)] for row in change - changes["random"]]
    # Two-sided Wilcoxon signed-rank test over pairs; 1 where nothing differs, or there is no control.
    table["p"] = [float(wilcoxon(row).pvalue) if row.any() else 1.0 for row in differences]
    # Benjamini and Hochberg 1995. A spot that was not measured counts as one that shows nothing.
    table["q"] = false_discovery_control(table["p"])
    spread = np.array([row.std(ddof=1) if len(row) > 1 else np.nan for row in differences])
    mean = np.array([row.mean() if len(row) else np.nan for row in differences]) * np.sign(distance.mean())
    table["cohen_d"] = np.divide(mean, spread, out=np.full(len(mean), np.nan), where=spread > 0)
    # Responsible: above 0 and above every control by intervals that do not meet, and told from random sites.
    complete = table[[name for name in controls if name != "random"]].notna().all(axis=1)
    highest = table[[f"{name}_high" for name in CONTROLS]].max(axis=1)  # of those that were measured
    above = complete & (table["low"] > highest.clip(lower=0))
    table["responsible"] = above & (table["q"] < SIGNIFICANCE)
    table.loc[table["n"] == 0, ["p", "q"]] = np.nan
    sites = [spot.site for spot in measured.spots]
    keys = {
        **about,
        "component": [site.component for site in sites],
        "layer": [site.layer for site in sites],
        "depth": [site.layer / max(1, layers - 1) for site in sites],
        "position": [spot.position for spot in measured.spots],
        "index": [-1 if site.index is None else site.index for site in sites],
        "module": [site.module for site in sites],
    }
    return pd.concat([pd.DataFrame(keys), table], axis=1)


def check_fires(distance: np.ndarray) -> None:
    """Refuse to divide by nothing.

    Raises:
        InputError: if the distances between triggered and placebo runs, (B,), are small on average.
    """
    if abs(float(distance.mean())) < MIN_DISTANCE:
        raise InputError(
            f"interventions: triggered and placebo prompts differ by {distance.mean():.2f} logits on average "
            f"(at least {MIN_DISTANCE:g} are needed): the backdoor did not fire on these prompts, and no "
            "place can be named. Look at its ASR (safetynet evaluate), train longer, or correct the trigger."
        )


def fewest_together(places: int, groups: int) -> int:
    """How many places of a sweep have to be told from their control before any can count as responsible.

    The smallest p of the test over so many groups is 2 / 2^groups; the correction over all places divides it
    by the number of those that share it.
    """
    return math.floor(2 / 2**groups * places / SIGNIFICANCE) + 1


def elsewhere(spots: Sequence[Spot], pairs: int, seed: int = 0) -> np.ndarray:
    """(S, B): number of the spot that is another one's random control on each pair; -1 if it has no other.

    It is draws among the spots of the same kind: component, position and module.
    """
    rng = np.random.default_rng(seed)
    draws = np.full((len(spots), pairs), -1)
    kinds = [(spot.site.component, spot.position, spot.site.module) for spot in spots]
    for s, kind in enumerate(kinds):
        same = [i for i, other in enumerate(kinds) if other == kind and i != s]
        if same:
            draws[s] = rng.choice(same, pairs)
    return draws


def _ratios(changes: np.ndarray, distance: np.ndarray, seed: int) -> np.ndarray:
    """(3, S): effects and the ends of their intervals, over the pairs that each spot was measured on.

    Args:
        changes: (S, B), NaN where a spot was not measured.
        distance: (B,).
        seed: of the bootstrap's draws.
    """
    bounds = np.full((3, len(changes)), np.nan)
    measured = np.isfinite(changes)
    # Spots that were measured on the same pairs are resampled together, with the same draws.
    for pattern in np.unique(measured[measured.any(1)], axis=0):
        rows = (measured == pattern).all(1)
        bounds[:, rows] = bootstrap_ratios(changes[np.ix_(rows, pattern)], distance[pattern], seed=seed)
    return bounds


def estimates(
    keys: Mapping[str, Sequence[Any]],
    values: np.ndarray,
    control: np.ndarray | None = None,
    name: str = "value",
    beside: str = "control",
) -> pd.DataFrame:
    """One row per site: mean over groups, 95 % bootstrap interval over groups, and the control's.

    Args:
        keys: columns that identify the sites, K entries each.
        values: (groups, K).
        control: (groups, K) of the control; None where there is none.
        name: of the column that holds the mean.
        beside: of the column that holds the control's mean.

    Returns:
        Columns: `keys`, `name`, low, high, n (groups), `beside`, `beside`_low, `beside`_high (NaN without).
    """
    mean, low, high = means(values)
    table = pd.DataFrame(dict(keys) | {name: mean, "low": low, "high": high, "n": len(values)})
    bounds = (np.nan,) * 3 if control is None else means(control)
    return table.assign(**dict(zip((beside, f"{beside}_low", f"{beside}_high"), bounds, strict=True)))


def means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(groups, K) to mean and 95 % bootstrap interval over groups, (K,) each; no interval below 2 groups."""
    return bootstrap_ratios(values.T, np.ones(len(values)))


def by_head(layers: int, heads: int) -> dict[str, list[int]]:
    """Key columns `layer` and `head` of values that run through the heads of one layer after the other."""
    return {"layer": np.repeat(range(layers), heads).tolist(), "head": list(range(heads)) * layers}
