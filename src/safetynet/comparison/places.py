"""Where the trigger acts, on relative depth: profiles, their centre and spread, components, heads.

In: each run's table of effects. Out: tidy tables per run and per group. Depth runs from 0, the first layer,
to 1, the last one, so that models of unequal depth can be compared. An effect below 0 works against the
trigger; as a weight of a centre, a spread or a share it counts as 0.

What a profile of patches says is where the trigger's information flows, and low layers carry the token's
identity in any model: read centres beside those of the random control, and beside the adapter's profile.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from safetynet.comparison.runs import RUN, ComparedRun, maker
from safetynet.comparison.seeds import over_groups, over_seeds
from safetynet.errors import InputError
from safetynet.vocabulary import CONTROLS, DIRECTIONS, PARTS

VIEWS = {
    "layer": ("layer", "resid_post"),
    "attention": ("component", "attn_out"),
    "mlp": ("component", "mlp_out"),
    "head": ("head", "head"),
    "expert": ("expert", "expert"),
    "adapter": ("adapter", "adapter"),
}
"""What a profile is of: a sweep, and the component of its rows. Where a layer has several places (heads,
experts, adapter modules), their effects are added up."""
PROFILE = ("view", "direction")


def profiles(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """Effect by layer for each run.

    Returns:
        Columns group, run, seed, view, direction, layer, depth, effect, random, placebo and twin. A sweep
        that did not measure every place (`measure: likely`) has no profile.

    Raises:
        InputError: if two runs have effects of different metrics or modes, which are no one quantity.
    """
    # One view means one quantity in all runs.
    by_view: dict[str, dict[tuple[str, str], ComparedRun]] = {}
    for run in runs:
        for view, rows in _rows(run.tables["effects"]) if run.has("effects") else ():
            for mode, metric in rows[["mode", "metric"]].drop_duplicates().itertuples(index=False):
                by_view.setdefault(view, {}).setdefault((str(mode), str(metric)), run)
    for view, by_metric in by_view.items():
        if len(by_metric) > 1:
            listed = "; ".join(
                f"{run.folder}: {metric} under {mode}" for (mode, metric), run in by_metric.items()
            )
            raise InputError(
                f"compare: effects by {view} are of different metrics ({listed}), so that they cannot stand "
                "side by side. Measure them alike: safetynet intervene RUN --mode patch."
            )

    parts = []
    for run in runs:
        if not run.has("effects"):
            continue
        for view, rows in _views(run.tables["effects"]):
            keys = ["direction", "layer", "depth"]
            # a control that was not measured is not 0
            summed = rows.groupby(keys, as_index=False, sort=False)[["effect", *CONTROLS]].sum(min_count=1)
            parts.append(summed.assign(**run.about, view=view))
    if not parts:
        return pd.DataFrame()
    columns = [*RUN, *PROFILE, "layer", "depth", "effect", *CONTROLS]
    return pd.concat(parts, ignore_index=True)[columns]


def incomplete(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """A sentence for each run whose effects cover some places only, as under `measure: likely`."""
    for run in runs:
        effects = run.tables.get("effects")
        if effects is None:
            continue
        views = [view for view, rows in _rows(effects) if not _whole(rows, _layers(effects))]
        if views:
            yield (
                f"{run.name}: effects by {', '.join(views)} were measured in some places only, and are left "
                f"out. Measure them all: {maker('effects', run)} --measure all."
            )


def profiles_by_group(profiles: pd.DataFrame) -> pd.DataFrame:
    """Mean profile of each group with its interval over seeds, beside the highest of its controls' means.

    Returns:
        Columns group, view, direction, layer, depth, value, low, high, seeds, control (which is highest at
        that layer), control_value.
    """

    def mean_effect(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        means = {name: part[name].mean() for name in CONTROLS if part[name].notna().any()}
        highest = max(means, key=lambda name: means[name]) if means else ""
        effect = over_seeds(part["effect"].tolist())
        yield {"depth": part["depth"].iloc[0], **effect._asdict(), "control": highest} | {
            "control_value": means.get(highest, np.nan)
        }

    return over_groups(profiles, ("group", *PROFILE, "layer"), mean_effect)


def centre_and_spread(depth: Sequence[float], effect: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of depth, weighted by the effect; NaN where no effect is above 0.

    For equal effects in all layers the centre is 0.5, and the spread that of evenly spaced layers (0.34 for
    six).
    """
    weights = np.clip(np.asarray(effect, dtype=float), 0.0, None)
    places = np.asarray(depth, dtype=float)
    if not weights.sum() > 0:
        return float("nan"), float("nan")
    centre = float((weights * places).sum() / weights.sum())
    return centre, float(((weights * (places - centre) ** 2).sum() / weights.sum()) ** 0.5)


def centres(profiles: pd.DataFrame) -> pd.DataFrame:
    """Centre and spread of each run's profiles.

    Returns:
        Columns group, run, seed, view, direction, layers, centre, spread, peak (depth of the strongest
        layer), and centre_random and spread_random of the random control's profile.
    """

    def centre(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        part = part.sort_values("layer")
        peak = int(part["effect"].to_numpy().argmax())
        line: dict[str, Any] = {"layers": len(part)}
        line |= zip(("centre", "spread"), centre_and_spread(part["depth"], part["effect"]), strict=True)
        line["peak"] = float(part["depth"].iloc[peak])
        random = centre_and_spread(part["depth"], part["random"].fillna(0.0))
        yield line | dict(zip(("centre_random", "spread_random"), random, strict=True))

    return over_groups(profiles, (*RUN, *PROFILE), centre)


def centres_by_group(centres: pd.DataFrame) -> pd.DataFrame:
    """Centre and spread of each group, mean over seeds.

    Returns:
        Columns group, view, direction, seeds, layers, centre and spread each with _low and _high, and
        centre_random and spread_random of the control.
    """

    def mean_centre(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        centre = over_seeds(part["centre"].tolist(), (0.0, 1.0))
        spread = over_seeds(part["spread"].tolist(), (0.0, 0.5))
        yield {
            "seeds": centre.seeds,
            "layers": part["layers"].max(),
            **centre.named("centre"),
            **spread.named("spread"),
            **{name: part[name].mean() for name in ("centre_random", "spread_random")},
        }

    return over_groups(centres, ("group", *PROFILE), mean_centre)


def shares_by_group(shares: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds: group, direction, part, value, low, high, seeds, control."""

    def mean_share(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        share = over_seeds(part["share"].tolist(), (0.0, np.inf))
        yield share._asdict() | {"control": part["control"].mean()}

    return over_groups(shares, ("group", "direction", "part"), mean_share)


def shares(profiles: pd.DataFrame) -> pd.DataFrame:
    """How much of what attention and MLP do is done by each, and how much by single experts.

    The effects of all layers are added up for each component and divided by those of attention and MLP
    together. Experts are the MLP's parts, patched one by one: their share stands beside the MLP's, not
    beside both.

    Returns:
        Columns group, run, seed, direction, part (attention, mlp, expert), share, total (added effects),
        control (the same sum of the placebo control over the same whole: what no trigger gives).
    """

    def parts(profile: pd.DataFrame) -> Iterator[dict[str, Any]]:
        views = dict(list(profile.groupby("view")))
        sums = {view: rows["effect"].clip(lower=0).sum() for view, rows in views.items()}
        whole = sums.get("attention", np.nan) + sums.get("mlp", np.nan)
        for view in PARTS:
            if view in sums and whole > 0:
                placebo = views[view]["placebo"].clip(lower=0).sum(min_count=1)
                yield {"part": view, "share": sums[view] / whole, "total": sums[view]} | {
                    "control": placebo / whole
                }

    return over_groups(profiles, (*RUN, "direction"), parts)


def heads(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """Every head of every run: group, run, seed, direction, layer, depth, head, effect, responsible."""
    parts = [
        rows.assign(**run.about).rename(columns={"index": "head"})
        for run in runs
        if run.has("effects")
        for view, rows in _views(run.tables["effects"])
        if view == "head"
    ]
    if not parts:
        return pd.DataFrame()
    columns = [*RUN, "direction", "layer", "depth", "head", "effect", "responsible"]
    return pd.concat(parts, ignore_index=True)[columns]


def heads_by_group(heads: pd.DataFrame) -> pd.DataFrame:
    """Which heads are responsible, and in how many seeds: the same ones, or others each time?

    Returns:
        Columns group, direction, seeds, count (mean number of responsible heads), low, high, of (heads in
        the model), in_all (names of the heads that are responsible in every seed), in_any (how many are in
        at least one), jaccard (mean over pairs of seeds; NaN for one seed or where no head is responsible)
        and chance (what as many heads drawn at random would give).
    """

    def shared(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        runs = [rows for _, rows in part.groupby("run", sort=False)]
        responsible = [{(r.layer, r.head) for r in rows[rows["responsible"]].itertuples()} for rows in runs]
        everywhere = sorted(set.intersection(*responsible)) if len(runs) > 1 else []
        pairs = [(a, b) for a, b in combinations(responsible, 2) if a | b]
        of = len(runs[0])
        count = over_seeds([len(heads) for heads in responsible], (0.0, np.inf))
        yield {
            "seeds": len(runs),
            "count": count.value,
            "low": count.low,
            "high": count.high,
            "of": of,
            "in_all": " ".join(f"L{layer}H{head}" for layer, head in everywhere),
            "in_any": len(set.union(*responsible)),
            "jaccard": float(np.mean([len(a & b) / len(a | b) for a, b in pairs])) if pairs else np.nan,
            "chance": float(np.mean([chance_jaccard(len(a), len(b), of) for a, b in pairs]))
            if pairs
            else np.nan,
        }

    return over_groups(heads, ("group", "direction"), shared)


def chance_jaccard(a: int, b: int, of: int) -> float:
    """Expected Jaccard index of two sets of a and b heads drawn at random from `of` heads."""
    from scipy.stats import hypergeom

    both = np.arange(0, min(a, b) + 1)
    union = np.maximum(a + b - both, 1)
    return float((hypergeom.pmf(both, of, a, b) * both / union).sum())


def _views(effects: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each view that was measured in every layer."""
    layers = _layers(effects)
    yield from ((view, rows) for view, rows in _rows(effects) if _whole(rows, layers))


def _rows(effects: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each view that was measured at all, those that remove before those that induce."""
    effects = effects.sort_values("direction", key=lambda words: words.map(DIRECTIONS.index), kind="stable")
    for view, (sweep, component) in VIEWS.items():
        rows = effects[(effects["sweep"] == sweep) & (effects["component"] == component)]
        if len(rows):
            yield view, rows


def _layers(effects: pd.DataFrame) -> int:
    """How many layers the model has, from a layer and its relative depth."""
    deep = effects[effects["depth"] > 0]
    return round(1 + float(deep["layer"].iloc[0] / deep["depth"].iloc[0])) if len(deep) else 1


def _whole(rows: pd.DataFrame, layers: int) -> bool:
    """Whether every place of every layer was measured; what was not is no 0 in a layer's sum."""
    there = all(part["layer"].nunique() == layers for _, part in rows.groupby("direction"))
    return there and bool(rows["effect"].notna().all())
