"""Several runs side by side: families, triggers, behaviours, adapter settings and seeds, on relative depth.

    runs       which runs are seeds of one setting, what they lack, whether they may be compared
    speed      steps and poisoned rows until ASR 50% and 95%
    places     layer profiles, centre and spread, attention against MLP against experts, heads
    agreement  rank correlation of layer profiles, with permutation tests
    outcomes   how reliably it fires, how detectable and how removable it is
    seeds      intervals over seeds, and whether groups differ by more than seeds do
    tables     all of it, by name
    paper      the tables that stand beside the figures, in LaTeX, Markdown and CSV

In: recipes and tables of runs. Out: tidy tables. Reads no file, draws nothing, imports no stage.
"""

from collections.abc import Sequence

import pandas as pd
from scipy.stats import false_discovery_control

from safetynet.comparison import agreement, outcomes, places, speed
from safetynet.comparison.runs import ComparedRun, check, grouped, overview
from safetynet.comparison.seeds import groups_differ

__all__ = ["ComparedRun", "check", "compare", "grouped"]


def compare(runs: Sequence[ComparedRun]) -> dict[str, pd.DataFrame]:
    """Everything that the runs' tables allow, as tables by name; empty ones are left out.

    Args:
        runs: checked and grouped.

    Raises:
        InputError: if the runs have different metrics or detectors.
    """
    profiles = places.profiles(runs)
    by_run = {
        "runs": overview(runs),
        "curves": speed.curves(runs),
        "speeds": speed.speeds(runs),
        "profiles": profiles,
        "heads": places.heads(runs),
        "outcomes": outcomes.outcomes(runs),
    }
    tables = dict(by_run)
    if len(profiles):
        tables |= {"centres": places.centres(profiles), "shares": places.shares(profiles)}
        tables["profiles_by_group"] = places.profiles_by_group(profiles)
        tables["agreement"] = agreement.agreement(profiles)
        tables["distinct"] = agreement.distinct(profiles)
        tables["centres_by_group"] = places.centres_by_group(tables["centres"])
        tables["shares_by_group"] = places.shares_by_group(tables["shares"])
        tables["heads_by_group"] = places.heads_by_group(tables["heads"])
    if len(by_run["speeds"]):
        tables["speeds_by_group"] = speed.by_group(by_run["speeds"])
    if len(by_run["outcomes"]):
        tables["outcomes_by_group"] = outcomes.by_group(by_run["outcomes"])
    tables["differences"] = differences(tables)
    return {name: table for name, table in tables.items() if len(table)}


def differences(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """For each number of a run: does it differ between groups by more than between seeds?

    Returns:
        Columns quantity, groups, runs, p (permutation test, `seeds.groups_differ`) and q (Benjamini and
        Hochberg 1995, over all lines). Runs without the quantity are left out of its test.
    """
    quantities: list[tuple[str, pd.DataFrame, pd.Series]] = []  # name, runs, their numbers
    for threshold, part in _parts(tables, "speeds", "threshold"):
        # A seed that never got there counts with its last measurement: leaving the slow out would hide them.
        reached = part["steps"].fillna(part["last_step"])
        quantities.append((f"steps until ASR {100 * threshold:g}%", part, reached))
    for (view, direction), part in _parts(tables, "centres", ["view", "direction"]):
        quantities += [(f"{name}, {view}, {direction}", part, part[name]) for name in ("centre", "spread")]
    for (which, direction), part in _parts(tables, "shares", ["part", "direction"]):
        if which == "attention":  # the MLP's share is the rest
            quantities.append((f"share of attention, {direction}", part, part["share"]))
    for (_, measure), part in _parts(tables, "outcomes", ["aspect", "measure"]):
        quantities.append((str(measure), part, part["value"]))

    lines = []
    for quantity, part, numbers in quantities:
        measured = part.assign(number=numbers).dropna(subset="number")
        # One run says nothing of the spread between its group's seeds.
        sizes = measured["group"].value_counts()
        measured = measured[measured["group"].isin(sizes.index[sizes >= 2])]
        groups, seeds = measured["group"].tolist(), measured["seed"].tolist()
        p = groups_differ(measured["number"].tolist(), groups, agreement.blocks(groups, seeds))
        if p == p:  # NaN where there are not two such groups
            about = {"quantity": quantity, "groups": len(set(groups)), "runs": len(measured)}
            lines.append(about | {"p": p})
    table = pd.DataFrame(lines)
    return table.assign(q=false_discovery_control(table["p"])) if len(table) else table


def _parts(tables: dict[str, pd.DataFrame], name: str, by: str | list[str]) -> list[tuple]:
    table = tables.get(name)
    return [] if table is None or table.empty else list(table.groupby(by, sort=False))
