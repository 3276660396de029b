"""How far mechanisms agree: rank correlation of layer profiles on relative depth, with permutation tests.

In: profiles by run. Out: one line per view, direction and pair of groups, and one per view and direction on
whether groups differ at all. Where two models differ in depth, the deeper one's profile is read off at the
relative depths of the shallower one, so that no layer counts twice.
"""

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement, permutations
from math import factorial

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, rankdata

from safetynet.comparison.seeds import (
    PERMUTATIONS,
    over_seed_pairs,
    p_value,
    permuted_within,
    without_each_seed,
)

LEAST = 4
"""Layers below which ranks say nothing: 3 layers have 6 orders."""
EXACT = 7
"""Up to so many layers all orders are tried."""


def on_depths(effect: np.ndarray, layers: int) -> np.ndarray:
    """A profile, (L,), read off at `layers` evenly spaced relative depths by linear interpolation."""
    if len(effect) == layers:
        return effect
    return np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(effect)), effect)


def ranked(profiles: np.ndarray) -> np.ndarray:
    """Standardised ranks along the last axis, whose products are Spearman's rho; NaN for constants."""
    ranks = rankdata(profiles, axis=-1)
    centred = ranks - ranks.mean(-1, keepdims=True)
    norm = np.sqrt((centred**2).sum(-1, keepdims=True))
    with np.errstate(invalid="ignore"):
        standardised: np.ndarray = centred / np.where(norm > 0, norm, np.nan)
    return standardised


def orders(layers: int, count: int = PERMUTATIONS, seed: int = 0) -> np.ndarray:
    """Orders of layers, (orders, layers): all but the given one where they are few, else `count` drawn."""
    if layers <= EXACT and factorial(layers) <= count:
        return np.array(list(permutations(range(layers)))[1:])
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(layers), (count, 1)), axis=1)


def agreement(profiles: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of the layer profiles of each two groups, and between seeds of one group.

    The test asks whether profiles agree more, in either direction, than if it did not matter which layer is
    which: between groups the layers of all runs of one group are exchanged together, within a group those of
    each run by itself. It says nothing of why they agree: effects of patches fall with depth in any model.

    Args:
        profiles: columns group, run, view, direction, layer, effect.

    Returns:
        Columns view, direction, first, second (equal: between seeds of one group), rho (mean over pairs of
        runs), low, high (95% over seeds; NaN where a group has one), pairs, seeds (of the smaller group),
        layers (that were compared), p and q (Benjamini and Hochberg 1995, over all lines).
    """
    lines = []
    for (view, direction), part in profiles.groupby(["view", "direction"], sort=False):
        groups = {  # profiles of each group's runs, (runs, layers)
            str(group): np.stack([_effect(run) for _, run in runs.groupby("run", sort=False)])
            for group, runs in part.groupby("group", sort=False)
        }
        for first, second in combinations_with_replacement(groups, 2):
            same = first == second
            layers = min(groups[first].shape[1], groups[second].shape[1])
            if layers < LEAST or (same and len(groups[first]) < 2):
                continue
            # Standardised ranks at equal depths, (runs, layers): their products are Spearman's rho.
            a, b = (
                ranked(np.stack([on_depths(profile, layers) for profile in groups[name]]))
                for name in (first, second)
            )
            if np.isnan(a).any() or np.isnan(b).any():  # a profile without any change has no ranks
                continue
            if same:
                # Each pair of runs counts once; under the null every run's layers are mixed by themselves.
                pairs = list(combinations(range(len(a)), 2))
                estimate = without_each_seed(a @ a.T)
                rng = np.random.default_rng(0)
                mixed = np.stack(
                    [rng.permuted(np.tile(profile, (PERMUTATIONS, 1)), axis=1) for profile in a]
                )  # (runs, drawn, layers)
                null = np.mean([(mixed[i] * mixed[j]).sum(1) for i, j in pairs], axis=0)
                count = len(pairs)
            else:
                # The mean over all pairs of runs is the product of the groups' means. Under the null the
                # layers of one group are mixed, in all of its runs alike.
                estimate = over_seed_pairs(a @ b.T)
                null = (b.mean(0)[orders(layers)] * a.mean(0)).sum(1)
                count = len(a) * len(b)
            lines.append(
                {
                    "view": view,
                    "direction": direction,
                    "first": first,
                    "second": second,
                    "rho": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "pairs": count,
                    "seeds": estimate.seeds,
                    "p": p_value(abs(estimate.value), np.abs(null)),
                    "layers": layers,
                }
            )
    table = pd.DataFrame(lines)
    return table.assign(q=false_discovery_control(table["p"])) if len(table) else table


def distinct(profiles: pd.DataFrame, permutations: int = PERMUTATIONS) -> pd.DataFrame:
    """Whether runs of one group resemble each other more than runs of different groups do.

    The statistic is the mean rank correlation of pairs within groups less that between groups (as in Clarke
    1993, doi 10.1111/j.1442-9993.1993.tb00438.x, on correlations instead of ranks of distances). Groups'
    labels are exchanged between runs of the same seed where all groups have the same seeds, else between all
    runs.

    Returns:
        Columns view, direction, within, between, difference, runs, groups, p; no line where fewer than two
        groups have two runs.
    """
    lines = []
    for (view, direction), part in profiles.groupby(["view", "direction"], sort=False):
        runs = part.drop_duplicates("run")[["run", "group", "seed"]]
        sizes = runs["group"].value_counts()
        profile = [_effect(part[part["run"] == run]) for run in runs["run"]]
        layers = min(map(len, profile))
        if (sizes >= 2).sum() < 2 or layers < LEAST:
            continue
        z = ranked(np.stack([on_depths(runs_profiles, layers) for runs_profiles in profile]))
        if np.isnan(z).any():
            continue
        codes = np.unique(runs["group"], return_inverse=True)[1]
        permutation = permuted_within(blocks(runs["group"].tolist(), runs["seed"].tolist()), permutations, 0)
        within, between = _contrast(z @ z.T, codes[None])
        each = _contrast(z @ z.T, codes[permutation])
        lines.append(
            {
                "view": view,
                "direction": direction,
                "within": within[0],
                "between": between[0],
                "difference": within[0] - between[0],
                "runs": len(runs),
                "groups": len(sizes),
                "p": p_value(float(within[0] - between[0]), each[0] - each[1]),
            }
        )
    return pd.DataFrame(lines)


def blocks(groups: Sequence[str], seeds: Sequence[int]) -> list[int]:
    """Blocks within which groups' labels may be exchanged: the seeds, where every group has the same ones."""
    seeds_of = {
        group: sorted(s for g, s in zip(groups, seeds, strict=True) if g == group) for group in groups
    }
    return (
        list(seeds)
        if len({tuple(sorted_seeds) for sorted_seeds in seeds_of.values()}) == 1
        else [0] * len(groups)
    )


def _contrast(rho: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean correlation of pairs of one group and of pairs of two, for each labelling, (labellings, runs)."""
    upper = np.triu_indices(len(rho), 1)
    same = codes[:, upper[0]] == codes[:, upper[1]]  # (labellings, pairs)
    values = rho[upper]
    return (same * values).sum(1) / same.sum(1), (~same * values).sum(1) / (~same).sum(1)


def _effect(rows: pd.DataFrame) -> np.ndarray:
    return rows.sort_values("layer")["effect"].to_numpy(float)
