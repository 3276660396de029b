"""Charts that put groups of runs side by side: speed, places, components, agreement, outcomes.

In: the comparison's tables. Out: Charts. Draws nothing.
A filled mark is a group's mean with its 95% interval over seeds, a faint one a single seed, a hollow one the
control. A group of one seed has a mark without interval, and its name says so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from safetynet.figures.chart import Axis, Chart, Panel, Reference, Series, Shade
from safetynet.figures.glyphs import shortened
from safetynet.figures.panels import (
    PERCENT,
    Frame,
    Look,
    Row,
    grid_of,
    grid_panel,
    interval,
    nice,
    number,
    read,
    series_of,
    with_interval,
)
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.theme import Role
from safetynet.tables import Data

MEAN: Look = ("mean over seeds", "ink", "subject")
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
PART_LOOKS: dict[str, Look] = {
    "attention": ("attention", "method_1", "subject"),
    "mlp": ("MLP", "method_2", "subject"),
    "expert": ("single experts", "method_3", "subject"),
}
PERCENT_OF = replace(PERCENT, label="Percent", unit="")
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
            marks = _marks(part[part["censored"] == 0], names, MEAN)
            bound: Look = ("not reached by every seed", "ink", "control")
            marks += _marks(part[part["censored"] > 0], names, bound)
            marks += _marks(seeds, names, ("one seed", "ink", "raw"))
            panels += _panel(axis, names, marks, f"until ASR {100 * threshold:g}%")
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
    return Chart("Injection speed", tuple(panels), 2, "two", caption)


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
    ends = groups[["value", "low", "high", "control_value"]].to_numpy().ravel()
    finite = [value for value in ends if math.isfinite(value)]
    # A hundredth beyond is drawn in the margin.
    low, high = math.floor(4 * min(0.0, *finite) + 0.04) / 4, math.ceil(4 * max(1.0, *finite) - 0.04) / 4
    axis = Axis("Effect", limits=(low, high))

    def note(row: Row) -> str:
        return f"layer {row['layer']}, {row['seeds']:.0f} seeds, control: {row['control']}"

    panels = []
    for group, group_rows in groups.groupby("group", sort=False):
        seeds = runs[runs["group"] == group]
        series = []
        for direction, role in DIRECTION_ROLES.items():
            part = group_rows[group_rows["direction"] == direction].sort_values("depth")
            if part.empty:
                continue
            mean: Look = (direction, role, "subject")
            series.append(series_of("marked", part, "depth", "value low high", mean, note))
            if part["control_value"].notna().any():
                control: Look = (f"{direction}, highest control", role, "control")
                series.append(series_of("line", part, "depth", "control_value", control))
            for _, run in seeds[seeds["direction"] == direction].groupby("run", sort=False):
                series.append(
                    series_of("line", run.sort_values("depth"), "depth", "effect", ("", role, "raw"))
                )
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
        marks = []
        for direction, role in DIRECTION_ROLES.items():
            part = table[(table["view"] == view) & (table["direction"] == direction)]
            part = part.assign(centre_random_low=math.nan, centre_random_high=math.nan)
            up = DODGE / 2 if direction == "remove" else -DODGE / 2
            centre: Look = (f"centre, {direction}", role, "subject")
            random: Look = ("random sites (control)", role, "control")
            marks += _marks(part, names, centre, interval("centre"), up)
            marks += _marks(part, names, random, interval("centre_random"), up)
        panels += _panel(DEPTH, names, marks, VIEW_TITLES[view])
    caption = (
        "Centre of the effect: mean relative depth, weighted by the effect (0 first layer, 1 last). "
        f"{READING}Hollow marks are the control, the same interventions at random other layers; equal "
        "effects everywhere have centre 0.5. The spread stands in the table."
    )
    return Chart("Centre of the effect on relative depth", tuple(panels), 3, "two", caption)


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
    key = "group direction part"
    groups = read("shares_by_group", by_group, columns, key, "value low high control")
    runs = read("shares", by_run, "group run direction part share", percent="share")
    names = _names(groups)
    top = max(100.0, nice(max(groups["value"].max(), 0.0)))
    axis = Axis("Share of attention and MLP", "%", limits=(0.0, top))
    panels = []
    for direction in DIRECTION_ROLES:
        marks = []
        for place, (name, look) in enumerate(PART_LOOKS.items()):
            means, seeds = (t[(t["direction"] == direction) & (t["part"] == name)] for t in (groups, runs))
            up = DODGE * (1 - place)
            marks += _marks(means, names, look, up=up)
            marks += _marks(seeds, names, ("", look[1], "raw"), "share", up)
        panels += _panel(axis, names, marks, direction, LINE * 1.7)
    control = groups["control"].max()
    caption = (
        "Effects of attention, MLP and single experts added up over layers, as shares of attention and MLP "
        f"together; experts are the MLP's parts. {READING}The control, a placebo against another placebo, "
        f"gives at most {'an unknown share' if math.isnan(control) else f'{control:.0f}%'} of the "
        "same whole."
    )
    return Chart("Attention, MLP and experts", tuple(panels), 2, "two", caption)


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
    names = {name: shortened(name, NAME) for name in [*table["first"], *table["second"]]}
    kinds = both["view"] + ", " + both["direction"]
    kinds_shown = [kind for kind in AGREED if (kinds == kind).any()] or list(dict.fromkeys(kinds))[:1]
    frame = Frame("two", min(3, len(kinds_shown)))

    def text(row: Row) -> str:
        rho = f"{row['rho']:.1f}".replace("-0.0", "0.0").replace("-", "−")
        return rho + ("*" if row["q"] < 0.05 and row["seeds"] > 1 else "")

    def note(row: Row) -> str:
        rho = with_interval(row, "rho low high")
        return f"ρ {rho}; {row['pairs']:.0f} pairs of runs, p {number(row['p'])}, q {number(row['q'])}"

    panels = []
    for kind in kinds_shown:
        grid = grid_of(
            both[kinds == kind],
            ("first", names),
            ("second", dict(reversed(names.items()))),
            "rho",
            Shade("Spearman's ρ"),
            texts=text,
            notes=note,
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
        control: Look = ("control, in brackets", "ink", "control")
        marks = _marks(group_rows, names, MEAN, up=DODGE / 2)
        marks += _marks(group_rows, names, control, interval("control"), -DODGE / 2)
        title = f"{measure} ({group_rows['control_is'].iloc[0]})"
        panels += _panel(PERCENT_OF, names, marks, title, LINE * 1.2)
    caption = (
        f"{READING}Hollow marks are the control that stands in brackets. AUROC is in percent too. "
        "Detection: the fused monitor on prompts that fired. Removal: the one chosen on other prompts."
    )
    title = "How reliable, how detectable, how removable"
    return Chart(title, tuple(panels), min(3, len(panels)), "two", caption)


def _names(table: pd.DataFrame) -> dict[str, str]:
    """Groups from top to bottom, each with the name of its line, which says so of a lone seed."""
    seeds = table.groupby("group", sort=False)["seeds"].max()
    lone = " (1 seed)"
    return {
        str(group): shortened(str(group), NAME) if n > 1 else shortened(str(group), NAME - len(lone)) + lone
        for group, n in seeds.items()
    }


def _panel(
    axis: Axis, names: Mapping[str, str], marks: Sequence[Series], title: str, line: float = LINE
) -> list[Panel]:
    """A panel with one line for each group, `line` inches high; none where there is nothing to draw."""
    if not marks:
        return []
    ticks = tuple((-float(place), name) for place, name in enumerate(names.values()))
    y = Axis("", limits=(0.6 - len(names), 0.4) if len(names) > 1 else (-0.5, 0.5), ticks=ticks)
    references = (Reference(0.5, "x"),) if axis is DEPTH else ()
    return [Panel(axis, y, tuple(marks), title, references, height=0.15 + line * len(names))]


def _marks(
    rows: pd.DataFrame, names: Mapping[str, str], look: Look, columns: str = "", up: float = 0.0
) -> list[Series]:
    """A mark for each row on its group's line, with its interval where it has one; none without rows."""
    columns = columns or ("value low high" if "low" in rows else "value")
    value, *ends = columns.split()
    rows = rows[rows[value].notna()]
    if rows.empty:
        return []
    line = {group: up - place for place, group in enumerate(names)}

    def note(row: Row) -> str:
        mean = f": {with_interval(row, columns)}, {row['seeds']:g} seeds" if ends else ""
        return f"{row['group']}{mean}"

    return [series_of("points", rows.assign(line=rows["group"].map(line)), columns, "line", look, note)]
