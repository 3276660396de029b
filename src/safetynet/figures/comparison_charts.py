"""Charts that put groups of runs side by side: speed, places, components, agreement, outcomes.

In: the comparison's tables. Out: Charts. Draws nothing.
A filled mark is a group's mean with its 95% interval over seeds, a faint one a single seed, a hollow one the
control. A group of one seed has a mark without interval, and its name says so.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from safetynet.figures.chart import Axis, Chart, Grid, Panel, Reference, Series, Shade
from safetynet.figures.checks import interval, read
from safetynet.figures.panels import PERCENT, Frame, grid_panel, matrix, nice, number, values, with_interval
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.theme import Part, Role
from safetynet.figures.values import shortened
from safetynet.tables import Data

SEED = "one seed"
MEAN = "mean over seeds"
RANDOM = "random sites (control)"
LINE = 0.2
"""Inches of a group's line."""
DODGE = 0.22
NAME = 26
VIEW_TITLES = {
    "layer": "whole layers",
    "attention": "attention",
    "mlp": "MLP",
    "head": "heads",
    "expert": "experts",
    "adapter": "adapter",
}
DIRECTION_ROLES: dict[str, Role] = {"remove": "backdoored", "induce": "triggered"}
PART_ROLES: dict[str, Role] = {"attention": "method_1", "mlp": "method_2", "expert": "method_3"}
PART_NAMES = {"attention": "attention", "mlp": "MLP", "expert": "single experts"}
PERCENT_OF = Axis("Percent", limits=PERCENT.limits, ticks=PERCENT.ticks)
DEPTH = Axis("Relative depth", limits=(0.0, 1.0), ticks=((0.0, "0"), (0.5, "0.5"), (1.0, "1")))
READING = (
    "Marks are means over seeds with 95% intervals over seeds; faint marks are single seeds, and a group "
    "of one has no interval, so that nothing is claimed of it. "
)
AGREED = ("layer, remove", "layer, induce", "attention, remove", "mlp, remove", "adapter, remove")
"""The profiles whose agreement is shown."""


@figure(
    "compare-speed",
    "speeds_by_group",
    "speeds",
    section="comparison",
    reads="Filled: mean over seeds; faint: single seeds; hollow: some seed never got there, so that this "
    "is a lower bound.",
)
def speed(by_group: Data, by_run: Data) -> Chart:
    """Steps and poisoned rows until each threshold of attack success."""
    columns = "group threshold unit value low high seeds censored twin"
    groups = read("speeds_by_group", by_group, columns, "group threshold unit")
    runs = read("speeds", by_run, "group run threshold steps rows")
    names = _names(groups)
    panels = []
    for unit, label in (("steps", "Steps"), ("rows", "Poisoned rows")):
        for threshold in sorted(set(groups["threshold"])):
            part = groups[(groups["unit"] == unit) & (groups["threshold"] == threshold)]
            seeds = runs.assign(value=runs[unit])[runs["threshold"] == threshold]
            ends = [part["value"].max(), part["high"].max(), seeds["value"].max()]
            axis = Axis(label, limits=(0.0, nice(max(filter(math.isfinite, ends), default=1.0))))
            curves = [
                _marks(part[part["censored"] == 0], names, label=MEAN),
                _marks(part[part["censored"] > 0], names, label="not reached by every seed", part="control"),
                _marks(seeds, names, label=SEED, part="raw"),
            ]
            panels.append(_lines(axis, names, curves, f"until ASR {100 * threshold:g}%"))
    twin = groups["twin"].max()
    control = (
        "no run has a clean twin"
        if math.isnan(twin)
        else f"the clean twin, which reaches at most {100 * twin:.0f}% at any step"
    )
    caption = (
        f"{READING}Attack success on held-out prompts, linear between two measurements. A hollow mark is a "
        f"lower bound: some seed never got there. The control is {control}."
    )
    return Chart("Injection speed", tuple(filter(None, panels)), 2, "two", caption)


@figure(
    "compare-profiles",
    "profiles_by_group",
    "profiles",
    section="comparison",
    reads="One panel per group; a layer counts where the band is clear of the dashed line, the highest of "
    "its controls.",
)
def profiles(by_group: Data, by_run: Data, view: str = "layer") -> Chart:
    """Effect over relative depth, a panel for each group, with bands over seeds."""
    columns = "group view direction layer depth value low high seeds control control_value"
    groups = read("profiles_by_group", by_group, columns, "group view direction layer")
    runs = read("profiles", by_run, "group run view direction layer depth effect")
    groups, runs = groups[groups["view"] == view], runs[runs["view"] == view]
    if groups.empty:
        raise NotMeasuredError(f"profiles_by_group: column view has no row with {view!r}")
    values = groups[["value", "low", "high", "control_value"]].to_numpy().ravel()
    finite = [value for value in values if math.isfinite(value)]
    # a hundredth beyond is drawn in the margin
    ends = math.floor(4 * min(0.0, *finite) + 0.04) / 4, math.ceil(4 * max(1.0, *finite) - 0.04) / 4
    axis = Axis("Effect", limits=ends)
    panels = []
    for group, group_rows in groups.groupby("group", sort=False):
        seeds = runs[runs["group"] == group]
        series = []
        for direction, role in DIRECTION_ROLES.items():
            part = group_rows[group_rows["direction"] == direction].sort_values("depth")
            if part.empty:
                continue
            x, mean, low, high = (list(part[name]) for name in ("depth", "value", "low", "high"))
            notes = [f"layer {r.layer}, {r.seeds:.0f} seeds, control: {r.control}" for r in part.itertuples()]
            series.append(Series("marked", x, mean, low, high, direction, role, notes=notes))
            if part["control_value"].notna().any():
                label, highest = f"{direction}, highest control", list(part["control_value"])
                series.append(Series("line", x, highest, label=label, role=role, part="control"))
            for _, run in seeds[seeds["direction"] == direction].groupby("run", sort=False):
                run = run.sort_values("depth")
                curve = list(run["depth"]), list(run["effect"])
                series.append(Series("line", *curve, role=role, part="raw"))
        title = shortened(str(group), NAME) + ("" if group_rows["seeds"].max() > 1 else " (one seed)")
        panels.append(Panel(DEPTH, axis, tuple(series), title, height=1.1))
    caption = (
        f"Effect of patching {VIEW_TITLES[view]} by relative depth: solid means over seeds with 95% "
        "intervals over seeds as bands, single seeds faint. 1 removes (or brings about) all of the "
        "trigger's effect. The control, dashed, is the highest at each layer of random other layers, "
        "placebo against placebo, and the clean twin. Low layers carry the token's identity in any model."
    )
    title = f"Where the trigger acts, {VIEW_TITLES[view]}"
    return Chart(title, tuple(panels), min(3, len(panels)), "two", caption)


@figure(
    "compare-centres",
    "centres_by_group",
    section="comparison",
    reads="Left is early in the network.",
    control="Hollow marks are the same interventions at random other places.",
)
def centres(by_group: Data) -> Chart:
    """Centre of the effect on relative depth, a panel for each profile, beside the random control's."""
    columns = "group view direction seeds centre_random spread_random " + interval("centre", "spread")
    table = read("centres_by_group", by_group, columns, "group view direction")
    names = _names(table)
    panels = []
    for view in VIEW_TITLES:
        group_rows = table[table["view"] == view]
        points = []
        for direction, role in DIRECTION_ROLES.items():
            part = group_rows[group_rows["direction"] == direction]
            up = DODGE / 2 if direction == "remove" else -DODGE / 2
            bounds = part.assign(value=part["centre"], low=part["centre_low"], high=part["centre_high"])
            points.append(_marks(bounds, names, label=f"centre, {direction}", role=role, up=up))
            random = part.assign(value=part["centre_random"], low=math.nan, high=math.nan)
            points.append(_marks(random, names, label=RANDOM, role=role, part="control", up=up))
        panels.append(_lines(DEPTH, names, points, VIEW_TITLES[view]))
    caption = (
        "Centre of the effect: mean relative depth, weighted by the effect (0 first layer, 1 last). "
        f"{READING}Hollow marks are the control, the same interventions at random other layers; equal "
        "effects everywhere have centre 0.5. The spread stands in the table."
    )
    return Chart("Centre of the effect on relative depth", tuple(filter(None, panels)), 3, "two", caption)


@figure(
    "compare-components",
    "shares_by_group",
    "shares",
    section="comparison",
    reads="Attention and MLP add up to 100%; experts are parts of the MLP.",
)
def components(by_group: Data, by_run: Data) -> Chart:
    """Shares of attention, MLP and single experts, a panel for each direction."""
    columns = "group direction part value low high seeds control"
    groups = read("shares_by_group", by_group, columns, "group direction part")
    runs = read("shares", by_run, "group run direction part share")
    names = _names(groups)
    top = max(100.0, nice(100 * max(groups["value"].max(), 0.0)))
    axis = Axis("Share of attention and MLP", "%", limits=(0.0, top))
    panels = []
    for direction in DIRECTION_ROLES:
        group_rows, seeds = groups[groups["direction"] == direction], runs[runs["direction"] == direction]
        bars = []
        for place, (name, role) in enumerate(PART_ROLES.items()):
            up = DODGE * (1 - place)
            shares = group_rows[group_rows["part"] == name]
            percents = shares.assign(**{c: 100 * shares[c] for c in ("value", "low", "high")})
            bars.append(_marks(percents, names, label=PART_NAMES[name], role=role, up=up))
            each = seeds.assign(value=100 * seeds["share"])[seeds["part"] == name]
            bars.append(_marks(each, names, role=role, part="raw", up=up))
        panels.append(_lines(axis, names, bars, direction, LINE * 1.7))
    control = groups["control"].max()
    caption = (
        "Effects of attention, MLP and single experts added up over layers, as shares of attention and MLP "
        f"together; experts are the MLP's parts. {READING}The control, a placebo against another placebo, "
        f"gives at most {'an unknown share' if math.isnan(control) else f'{100 * control:.0f}%'} of the "
        "same whole."
    )
    return Chart("Attention, MLP and experts", tuple(filter(None, panels)), 2, "two", caption)


@figure(
    "compare-agreement",
    "agreement",
    section="comparison",
    reads="Rank correlation of each two groups' layer profiles.",
    control="The diagonal is between seeds of one group: what others can be compared with.",
)
def agreement(data: Data) -> Chart:
    """Rank correlation of layer profiles of each two groups; between seeds of one group on the diagonal."""
    columns, key = "view direction first second rho low high pairs seeds p q", "view direction first second"
    table = read("agreement", data, columns, key)
    flipped = table.rename(columns={"first": "second", "second": "first"})
    both = pd.concat([table, flipped[flipped["first"] != flipped["second"]]], ignore_index=True)
    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    kinds = both["view"] + ", " + both["direction"]
    kinds_shown = [kind for kind in AGREED if (kinds == kind).any()] or list(dict.fromkeys(kinds))[:1]
    frame = Frame("two", min(3, len(kinds_shown)))

    def text(row: Mapping[str, Any]) -> str:
        rho = f"{row['rho']:.1f}".replace("-0.0", "0.0").replace("-", "−")
        return rho + ("*" if row["q"] < 0.05 and row["seeds"] > 1 else "")

    def note(row: Mapping[str, Any]) -> str:
        rho = with_interval(row["rho"], row["low"], row["high"])
        return f"ρ {rho}; {row['pairs']:.0f} pairs of runs, p {number(row['p'])}, q {number(row['q'])}"

    panels = []
    for kind in kinds_shown:
        group_rows = both[kinds == kind]
        places = ("first", names, "second", names[::-1])
        grid = Grid(
            [shortened(name, NAME) for name in names],
            [shortened(name, NAME) for name in names[::-1]],
            values(group_rows, places, "rho"),
            Shade("Spearman's ρ"),
            texts=matrix(group_rows, places, text, ""),
            notes=matrix(group_rows, places, note, ""),
        )
        view, _, direction = kind.partition(", ")
        title = f"{VIEW_TITLES.get(view, view)}, {direction}"
        panels.append(grid_panel(grid, ("", ""), frame, title, line=0.24))
    caption = (
        "Mean rank correlation of layer profiles on relative depth over pairs of runs; the diagonal is "
        "between seeds of one group. The control is a permutation test that exchanges layers (*: q < 0.05 "
        "after Benjamini and Hochberg). It does not control for what any model shows: patches lose effect "
        "with depth."
    )
    return Chart("Agreement of mechanisms", tuple(panels), frame.columns, "two", caption)


@figure(
    "compare-outcomes",
    "outcomes_by_group",
    section="comparison",
    reads="How reliable, detectable and removable the backdoor of each group is.",
    control="Each stands beside the control in brackets.",
)
def outcomes(by_group: Data) -> Chart:
    """How reliable, detectable and removable the backdoor is, by group, each beside its control."""
    columns = "group aspect measure control_is seeds value low high " + interval("control")
    percent = "value low high " + interval("control")
    table = read("outcomes_by_group", by_group, columns, "group measure", percent)
    table = table[table["value"].notna()]
    names = _names(table)
    panels = []
    for measure, group_rows in table.groupby("measure", sort=False):
        beside = group_rows[["group", "seeds"]].assign(
            value=group_rows["control"], low=group_rows["control_low"], high=group_rows["control_high"]
        )
        marks = [
            _marks(group_rows, names, label=MEAN, up=DODGE / 2),
            _marks(beside, names, label="control, in brackets", part="control", up=-DODGE / 2),
        ]
        title = f"{measure} ({group_rows['control_is'].iloc[0]})"
        panels.append(_lines(PERCENT_OF, names, marks, title, LINE * 1.2))
    caption = (
        f"{READING}Hollow marks are the control that stands in brackets. AUROC is in percent too. "
        "Detection: the fused monitor on prompts that fired. Removal: the one chosen on other prompts."
    )
    chart = tuple(panel for panel in panels if panel is not None)
    return Chart("How reliable, how detectable, how removable", chart, min(3, len(chart)), "two", caption)


def _names(table: pd.DataFrame) -> dict[str, str]:
    """Groups from top to bottom, and what stands on their lines: a lone seed is told."""
    seeds = table.groupby("group", sort=False)["seeds"].max()
    lone = " (1 seed)"
    return {
        str(group): shortened(str(group), NAME) if n > 1 else shortened(str(group), NAME - len(lone)) + lone
        for group, n in seeds.items()
    }


def _lines(
    axis: Axis, names: Mapping[str, str], lines_drawn: Sequence[Series | None], title: str, line: float = LINE
) -> Panel | None:
    """A panel with one line for each group; None where nothing is to be drawn."""
    series = tuple(line_series for line_series in lines_drawn if line_series is not None)
    if not series:
        return None
    ticks = tuple((-float(place), name) for place, name in enumerate(names.values()))
    y = Axis("", limits=(0.6 - len(names), 0.4) if len(names) > 1 else (-0.5, 0.5), ticks=ticks)
    references = (Reference(0.5, "x"),) if axis is DEPTH else ()
    return Panel(axis, y, series, title, references, height=0.15 + line * len(names))


def _marks(
    rows: pd.DataFrame,
    names: Mapping[str, str],
    *,
    label: str = "",
    role: Role = "ink",
    part: Part = "subject",
    up: float = 0.0,
) -> Series | None:
    """A mark for each row on its group's line, with its interval where it has one; None without rows."""
    rows = rows[rows["value"].notna()]
    if rows.empty:
        return None
    place = {group: float(at) for at, group in enumerate(names)}
    y = [up - place[group] for group in rows["group"]]
    interval = {}
    notes = list(rows["group"])
    if "low" in rows:
        interval = {"left": list(rows["low"]), "right": list(rows["high"])}
        seeds = rows["seeds"] if "seeds" in rows else [math.nan] * len(rows)
        cells = zip(rows["group"], rows["value"], rows["low"], rows["high"], seeds, strict=True)
        notes = [f"{group}: {with_interval(v, low, high)}, {n:g} seeds" for group, v, low, high, n in cells]
    return Series(
        "points", list(rows["value"]), y, label=label, role=role, part=part, notes=notes, **interval
    )
