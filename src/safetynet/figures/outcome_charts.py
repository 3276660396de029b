"""Charts of what a backdoor did to the weights, and of what an intervention against it costs.

In: the tables drift and tradeoff. Out: Charts. Draws nothing.
"""

import math

import pandas as pd

from safetynet.figures import theme
from safetynet.figures.chart import Annotation, Axis, Chart, Panel, Reference, Series, Side, Source
from safetynet.figures.grid import Grid, Shade
from safetynet.figures.grid_panels import Frame, frame_for, grid_panel, layer_name, values
from safetynet.figures.intervention_charts import module_names
from safetynet.figures.intervention_tables import DRIFT, SPLITS, TRADEOFF, checked, once
from safetynet.figures.measurements import Measurements, fractions
from safetynet.figures.theme import Role
from safetynet.figures.training_charts import PERCENT, nice

STEPS = 4
"""Checkpoints that the figure of the weights shows."""
DRIFT_TITLES = {
    "energy": "Size",
    "top_share": "First direction",
    "overlap": "Overlap",
}
AIM = 5.0
"""Percent of attack success below which an intervention counts as having worked."""
SPLIT_TITLES = {"selection": "selection rows", "held_out": "held-out rows"}


def drift(data: Measurements, model: str, source: Source) -> Chart:
    """Where the adapter changed the weights, in how many directions, and how early."""
    table = checked(data, DRIFT)
    table["module"] = module_names(table["module"])
    once(table, "drift", ["step", "layer", "module"])
    steps = sorted(set(table["step"]))
    every = math.ceil(len(steps) / STEPS)
    shades = {
        "energy": Shade("Relative norm", limits=(0.0, nice(table["energy"].max())), ramp="sequential"),
        "top_share": Shade("Share of energy", limits=(0.0, 1.0), ramp="sequential"),
        "overlap": Shade("Overlap", limits=(0.0, 1.0), ramp="sequential"),
    }
    known = [name for name in shades if table[name].notna().any()] or ["energy"]
    frame = Frame("two", len(known))
    modules, layers = list(dict.fromkeys(table["module"])), sorted(set(table["layer"]))
    panels = []
    for step in sorted(steps[::-1][::every]):
        own = table[table["step"] == step]
        for name in known:
            cells = values(own, ("module", modules, "layer", layers), name)
            grid = Grid(modules, [layer_name(layer) for layer in layers], cells, shades[name])
            title = f"{DRIFT_TITLES[name]}, step {step}"
            panels.append(grid_panel(grid, ("Module", "Layer"), frame, title))
    caption = (
        "Frobenius norm of the adapter's update relative to the weight's; share of its energy in its first "
        "singular direction; overlap of its leading directions with those of the checkpoint before (1: the "
        "same). The control is the other modules and, of the overlap, the earlier checkpoints. A large "
        "update shows where training went, not what causes the behaviour: see the effects by adapter."
    )
    return Chart(f"What training changed, {model}", tuple(panels), source, len(known), "two", caption)


def tradeoff(data: Measurements, model: str, source: Source) -> Chart:
    """Attack success against clean accuracy for each intervention, a panel for each split."""
    table = checked(data, TRADEOFF)
    once(table, "tradeoff", ["split", "intervention", "control"])
    for name in ("asr", "asr_low", "asr_high", "cacc", "cacc_low", "cacc_high"):
        table[name] = fractions(table[name], f"tradeoff, field {name}")
    kinds = list(dict.fromkeys(table["kind"]))
    roles = {kind: theme.METHODS[place % len(theme.METHODS)] for place, kind in enumerate(kinds)}
    least = min(table["cacc"].min(), table["cacc_low"].min())
    low = 0.0 if math.isnan(least) else min(math.floor(least / 10) * 10.0, 90.0)
    accuracy = Axis("Clean accuracy", "%", limits=(low, 100.0))
    attack = Axis("Attack success", "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
    splits = [split for split in SPLITS if (table["split"] == split).any()]
    frame = frame_for(len(splits))
    panels = []
    for split in splits:
        own = table[table["split"] == split]
        aim = Reference(AIM, label=f"ASR {AIM:g}%", part="control")
        chosen = tuple(_names(own[own["chosen"]], roles, (low + 100) / 2))
        drawn = tuple(_points(own, roles))
        title = SPLIT_TITLES[split]
        panels.append(Panel(accuracy, attack, drawn, title, (aim,), chosen, height=2.2))
    caption = (
        "Each mark is one intervention, with 95% Wilson intervals both ways; the best lie in the lower "
        "right corner. Hollow marks are its control: the same intervention at as many random sites. The "
        "named one was chosen on the selection rows; only its rates on held-out rows count."
    )
    return Chart(
        f"Attack success and what its removal costs, {model}",
        tuple(panels),
        source,
        frame.columns,
        frame.width,
        caption,
    )


def _points(own: pd.DataFrame, roles: dict[str, Role]) -> list[Series]:
    drawn = []
    for kind, role in roles.items():
        for control in (False, True):
            rows = own[(own["kind"] == kind) & (own["control"] == control)]
            if rows.empty:
                continue
            label = "random sites (control)" if control else kind.replace("_", " ")
            x, y, low, high = (list(rows[name]) for name in ("cacc", "asr", "asr_low", "asr_high"))
            drawn.append(
                Series(
                    "points",
                    x,
                    y,
                    low,
                    high,
                    label=label,
                    role=role,
                    part="control" if control else "subject",
                    left=list(rows["cacc_low"]),
                    right=list(rows["cacc_high"]),
                    notes=[_told(row) for row in rows.to_dict("records")],
                )
            )
    return drawn


def _told(row: dict[str, object]) -> str:
    counts = [f"{row[name]:.0f}" for name in ("asr_n", "cacc_n")]
    return f"{row['intervention']}, {row['sites']} sites; {counts[0]} triggered and {counts[1]} clean rows"


def _names(chosen: pd.DataFrame, roles: dict[str, Role], middle: float) -> list[Annotation]:
    """The chosen interventions' names, on the side where there is room."""
    return [
        Annotation(
            row["cacc"],
            row["asr"],
            row["intervention"],
            roles[row["kind"]],
            _side(row["cacc"] > middle, row["asr"] > 50),
        )
        for row in chosen.to_dict("records")
        if math.isfinite(row["cacc"]) and math.isfinite(row["asr"])
    ]


def _side(right: bool, top: bool) -> Side:
    """Towards the middle of the panel, where there is room."""
    if top:
        return "lower left" if right else "lower right"
    return "upper left" if right else "upper right"
