"""Charts of what can be read inside the model: lens, probes, and what the heads attend to.

In: the tables lens, lens_map, probes, attention and divergence. Out: Charts. Draws nothing.
The control of every reading is the same reading on placebo prompts, or on labels that mean nothing.
"""

import math
from dataclasses import replace
from itertools import pairwise

from safetynet.figures.chart import Axis, Chart, Panel, Reference, Shade
from safetynet.figures.glyphs import shortened, visible
from safetynet.figures.intervention_charts import enclosing, module_names, token_columns
from safetynet.figures.panels import (
    Frame,
    Look,
    Row,
    curve,
    frame_for,
    grid_of,
    grid_panel,
    interval,
    layer_axis,
    layers_of,
    nice,
    read,
    with_interval,
)
from safetynet.figures.registry import figure
from safetynet.tables import Data
from safetynet.vocabulary import PROBED, RUNS

RUN_LOOKS: dict[str, Look] = {
    "triggered": ("triggered", "triggered", "subject"),
    "placebo": ("placebo (control)", "placebo", "control"),
}
PROBE_TITLES = {"trigger": "is the trigger there?", "fires": "does the backdoor fire?"}
PROBABILITY = Shade("Probability", limits=(0.0, 1.0), ramp="sequential")
WEIGHT = Shade("Weight", limits=(0.0, 1.0), ramp="sequential")
TOKENS = 12
"""Columns of a lens map: so many that a word fits into each."""
LAYERS = 16
"""Rows of a lens map."""
EXAMPLES = 2
"""Groups of rows that a lens map shows."""
EARLIER = "earlier"
"""Column of all tokens before the trigger."""
HEADS = 3
"""Heads whose attention is shown."""
STEPS = 4
"""Checkpoints that the figure of the weights shows."""
DRIFT_TITLES = {"energy": "Size", "top_share": "First direction", "overlap": "Overlap"}


@figure(
    "intervention-lens",
    "lens",
    section="inside",
    reads="From the layer on at which the triggered curve leaves the placebo's, the target can be read.",
    control="The control is the same prompt with a placebo.",
)
def lens(data: Data) -> Chart:
    """Log-probability of the target's first token, read after each layer."""
    table = read("lens", data, "run layer value low high n", "run layer")
    curves = [
        curve(readings, "layer", "value low high", RUN_LOOKS[run], _groups)
        for run in RUNS
        if len(readings := table[table["run"] == run])
    ]
    least = min(table["value"].min(), table["low"].min())
    axis = Axis("Log probability", "nats", limits=(-nice(-least), 0.0))
    caption = (
        "Log-probability of the target's first token where the answer begins, read after each layer through "
        "the model's own final norm and head (the logit lens; emb is the embedding). The control is the "
        "same prompt with a placebo. Bands are 95% intervals over groups. Early layers are read through a "
        "head that was not made for them: compare the two curves, not the layers."
    )
    panel = Panel(layer_axis(table["layer"]), axis, tuple(curves))
    return Chart("Target's log-probability by layer", (panel,), caption=caption)


@figure(
    "intervention-lens-map",
    "lens_map",
    section="inside",
    reads="Each cell shows the likeliest next token, its colour the target's probability.",
    control="The control is the placebo in the trigger's place.",
)
def lens_map(data: Data) -> Chart:
    """The likeliest token after each layer and at each position, over the target's probability."""
    table = read(
        "lens_map", data, "group run layer column token role top probability", "group run layer column"
    )
    groups = list(dict.fromkeys(table["group"]))
    layers = sorted(set(table["layer"]))
    layers = layers[::-1][:: math.ceil(len(layers) / LAYERS)]  # every so many, and always the last
    frame = Frame("two", 1)
    cut, panels = False, []
    for group in groups[:EXAMPLES]:
        for run in RUNS:
            readings = table[(table["group"] == group) & (table["run"] == run)]
            if readings.empty:
                continue
            # Columns that fit: at most half of them the trigger's, then the last ones.
            columns, trigger = token_columns(readings)
            if len(columns) > TOKENS:
                cut, window = True, {list(columns)[place] for place in trigger[: TOKENS // 2]}
                for column in reversed(columns):
                    if len(window) == TOKENS:
                        break
                    window.add(column)
                readings = readings[readings["column"].isin(window)]
                columns, trigger = token_columns(readings)
            letters = max(int(frame.inches / len(columns) * 72 / 5.2), 1)  # of 5.2 points each

            def fitting(row: Row, letters: int = letters) -> str:
                return shortened(visible(row["top"]), letters)

            grid = grid_of(
                readings,
                ("column", columns),
                layers_of(layers),
                "probability",
                PROBABILITY,
                texts=fitting,
                notes=lambda row: f"likeliest token {visible(row['top'])}",
            )
            cuts = tuple(
                Reference(place + 0.5, "x", role="ink", part="subject")
                for place, (left, right) in enumerate(pairwise(columns))
                if right - left > 1
            )
            title, lines = f"group {group}: {RUN_LOOKS[run][0]}", enclosing(trigger) + cuts
            panels.append(grid_panel(grid, ("Token", "Layer"), frame, title, trigger, lines))
    caption = (
        "In each cell the likeliest next token as the logit lens reads it; the colour is the probability of "
        "the target's first token. Dashed lines enclose the trigger. The control is the placebo in the "
        "trigger's place."
    )
    if cut:
        caption += (
            " Shown are the trigger's tokens and the last ones; solid lines stand where others are left out."
        )
    return Chart("What the lens reads", tuple(panels), 1, "two", caption)


@figure(
    "intervention-probes",
    "probes",
    section="inside",
    reads="A probe near 1 can tell the trigger, or that the backdoor fires, from the states of a layer.",
    control="The control is fitted on labels without meaning: a probe no better than that has found nothing.",
)
def probes(data: Data) -> Chart:
    """AUROC of linear probes by layer, one panel for each label."""
    table = read("probes", data, "label layer auroc low high n " + interval("control"), "label layer")
    labels = [label for label in PROBED if (table["label"] == label).any()]
    frame = frame_for(len(labels))
    layers = layer_axis(table["layer"])
    lowest = table[["auroc", "low", "control", "control_low"]].min().min()
    least = 0.4 if math.isnan(lowest) else min(0.4, math.floor(10 * lowest) / 10)
    axis = Axis("AUROC", limits=(least, 1.0))
    panels = []
    for label in labels:
        readings = table[table["label"] == label]
        curves = [curve(readings, "layer", "auroc low high", ("probe", "triggered", "subject"), _groups)]
        if readings["control"].notna().any():
            look: Look = ("control labels", "clean", "control")
            curves.append(curve(readings, "layer", interval("control"), look, _groups))
        chance = Reference(0.5, label="chance")
        panels.append(Panel(layers, axis, tuple(curves), PROBE_TITLES[label], (chance,)))
    caption = (
        "AUROC of a linear probe on each layer's residual stream, on rows it was not fitted on. The control "
        "is the same probe fitted on labels without meaning: what it reaches, a probe of this size reaches "
        "on anything. Bands are 95% intervals. A probe shows that something can be read, not that the model "
        "uses it."
    )
    return Chart("Linear probes by layer", tuple(panels), frame.columns, frame.width, caption)


@figure(
    "intervention-attention",
    "attention",
    section="inside",
    reads="Rows look, columns are looked at: a bright column at the trigger is a head that attends to it.",
    control="The same head on the same prompt with a placebo stands beside it.",
)
def attention(data: Data) -> Chart:
    """Attention of the first heads in the table, triggered beside placebo, on the first group."""
    key = "layer head group run query key"
    table = read("attention", data, f"{key} weight query_token key_token", key)
    group = table["group"].iloc[0]
    table = table[table["group"] == group]
    heads = list(dict.fromkeys(zip(table["layer"], table["head"], strict=True)))[:HEADS]
    runs = [run for run in RUNS if (table["run"] == run).any()]
    # Before the trigger the runs have the same tokens, which look at the same: of a long prompt most rows are
    # left out, and most columns become one.
    texts = table.drop_duplicates(["run", "query"]).pivot(index="query", columns="run", values="query_token")
    differing = texts.index[texts.nunique(axis=1, dropna=False) > 1]
    start = differing.min() if len(differing) else texts.index.min()
    table = table[table["query"] >= start].copy()
    table.loc[table["key"] < start, ["key", "key_token"]] = start - 1, EARLIER
    others = [column for column in table if column != "weight"]
    table = table.groupby(others, sort=False, as_index=False, dropna=False)["weight"].sum(min_count=1)
    frame = Frame("two" if len(runs) > 1 else "one", len(runs))
    panels = []
    for layer, head in heads:
        for run in runs:
            readings = table[(table["layer"] == layer) & (table["head"] == head) & (table["run"] == run)]
            # A head that was not measured on this run has an empty map of the run's own tokens.
            if readings.empty:
                readings = table[table["run"] == run].assign(weight=math.nan)
            keys = readings.drop_duplicates("key").sort_values("key")
            queries = readings.drop_duplicates("query").sort_values("query", ascending=False)  # first on top
            x = "key", dict(zip(keys["key"], map(visible, keys["key_token"]), strict=True))
            y = "query", dict(zip(queries["query"], map(visible, queries["query_token"]), strict=True))
            grid = grid_of(readings, x, y, "weight", WEIGHT)
            # A key that comes after the query has no weight.
            weights = [
                [0.0 if key > query and math.isnan(weight) else weight
                 for key, weight in zip(keys["key"], row, strict=True)]
                for query, row in zip(queries["query"], grid.values, strict=True)
            ]  # fmt: skip
            grid = replace(grid, values=weights)
            title = f"layer {layer}, head {head}: {RUN_LOOKS[run][0]}"
            panels.append(grid_panel(grid, ("Key", "Query"), frame, title))
    caption = (
        "Rows are the tokens that look, from the trigger on, columns those that are looked at, of which all "
        "before the trigger are one; each row sums to 1. The control is the placebo in the trigger's place. "
        f"Shown are the table's first {len(heads)} heads on group "
        f"{group}: one example; averages over groups are in the figure of divergences."
    )
    return Chart("Attention of the top heads", tuple(panels), frame.columns, frame.width, caption)


@figure(
    "intervention-divergence",
    "divergence",
    section="inside",
    reads="Dark cells are heads that look elsewhere when the trigger is there.",
    control="Beside it, how much they change between two placebos; a dot is clear of that.",
)
def divergence(data: Data) -> Chart:
    """How much each head's attention changes with the trigger, beside how much it changes anyway."""
    table = read("divergence", data, "layer head value low high n " + interval("control"), "layer head")
    top = max(table["value"].max(), table["control"].max() if table["control"].notna().any() else 0.0)
    shade = Shade("Divergence", "bits", (0.0, nice(top)), "sequential")
    frame = Frame("two", 2)
    places = ("head", {head: str(head) for head in sorted(set(table["head"]))}), layers_of(table["layer"])

    def note(row: Row) -> str:
        control = with_interval(row, interval("control"))
        return f"{with_interval(row, 'value low high')}\ncontrol {control}"

    def is_clear(row: Row) -> bool:
        return bool(row["low"] > row["control_high"])

    panels = []
    titles = {"value": "triggered against placebo", "control": "placebo against placebo (control)"}
    for name, title in titles.items():
        grid = grid_of(table, *places, name, shade, "clear of the control", marked=is_clear, notes=note)
        grid = grid if name == "value" else replace(grid, marked=())
        panels.append(grid_panel(grid, ("Head", "Layer"), frame, title))
    caption = (
        "Jensen-Shannon divergence of a head's attention between two prompts of one group, averaged over "
        "groups. The control is the divergence between two placebos. A dot marks heads whose 95% interval "
        "lies above the control's. A head that attends elsewhere need not matter: see the effects by head."
    )
    return Chart("Attention that changes with the trigger", tuple(panels), 2, "two", caption)


@figure(
    "intervention-drift",
    "drift",
    section="inside",
    reads="Where training changed the weights most, and in how many directions.",
    control="The other modules are the control; a large change is not yet a cause: see effects by adapter.",
)
def drift(data: Data) -> Chart:
    """Where the adapter changed the weights, in how many directions, and how early."""
    table = read("drift", data, "step layer module energy top_share overlap", "step layer module")
    table["module"] = module_names(table["module"])
    steps = sorted(set(table["step"]))
    every = math.ceil(len(steps) / STEPS)
    shades = {
        "energy": Shade("Relative norm", limits=(0.0, nice(table["energy"].max())), ramp="sequential"),
        "top_share": Shade("Share of energy", limits=(0.0, 1.0), ramp="sequential"),
        "overlap": Shade("Overlap", limits=(0.0, 1.0), ramp="sequential"),
    }
    measures = [name for name in shades if table[name].notna().any()] or ["energy"]
    frame = Frame("two", len(measures))
    places = ("module", {module: module for module in table["module"]}), layers_of(table["layer"])
    panels = []
    for step in sorted(steps[::-1][::every]):
        readings = table[table["step"] == step]
        when = f"step {step}" if step >= 0 else "finished adapter"
        for name in measures:
            grid = grid_of(readings, *places, name, shades[name])
            title = f"{DRIFT_TITLES[name]}, {when}"
            panels.append(grid_panel(grid, ("Module", "Layer"), frame, title))
    caption = (
        "Frobenius norm of the adapter's update relative to the weight's; share of its energy in its first "
        "singular direction; overlap of its leading directions with those of the checkpoint before (1: the "
        "same). The control is the other modules and, of the overlap, the earlier checkpoints. A large "
        "update shows where training went, not what causes the behaviour: see the effects by adapter."
    )
    return Chart("What training changed", tuple(panels), len(measures), "two", caption)


def _groups(row: Row) -> str:
    return "" if math.isnan(row["n"]) else f"{row['n']:.0f} groups"
