"""Charts of a monitor: what it catches, what it must not, where in the model, and what it costs.

In: the tables detection_roc, detection_distribution, detection_layers, detection_overhead, detection_answers
and evasion_matrix. Out: Charts. Draws nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures.chart import Axis, Chart, Grid, Kind, Panel, Reference, Series, Shade
from safetynet.figures.checks import once, read, require
from safetynet.figures.panels import (
    PERCENT,
    Frame,
    frame_for,
    grid_panel,
    layer_axis,
    matrix,
    nice,
    with_interval,
)
from safetynet.figures.registry import figure
from safetynet.figures.theme import Part, Role
from safetynet.tables import Data, frame, numbers
from safetynet.vocabulary import WATCHED

FUSED = "fused"
SETS = ("fired", "not_fired", "clean", "placebo", "near_miss", "refused")
"""Rows that figures show, in this order; others stay in the tables."""
LOOKS: dict[str, tuple[str, Role, Part]] = {
    "fired": ("triggered, fired", "triggered", "subject"),
    "clean": ("clean", "clean", "control"),
    "placebo": ("placebo (control)", "placebo", "control"),
    "near_miss": ("near miss", "near_miss", "control"),
    "refused": ("refused", "refused", "control"),
    "not_fired": ("triggered, not fired", "backdoored", "control"),
}
LOWEST = 1e-3
"""Left end of the logarithmic axis; a curve that begins further left comes in at its side."""
FARTHEST = 8.0
"""Right end of the axis of surprise: one clean prompt in 100 million, as far as a guess about tails goes."""
FPR = Axis("Clean rows with alarm", "%", limits=(0.0, 100.0), ticks=PERCENT.ticks)
LOW_FPR = Axis(
    "Clean rows with alarm",
    "%",
    "log",
    (100 * LOWEST, 100.0),
    ticks=((0.1, "0.1"), (1, "1"), (10, "10"), (100, "100")),
)
CHANCE = Reference(0.5, label="chance")
COLUMNS = 4
SHARE = Shade("Share", "%", limits=(0.0, 100.0), ramp="sequential")
BESIDE = 8
"""Columns of evasion matrices that lie beside each other; wider ones lie one above the other, or a cell could
not hold its text."""


@figure(
    "detection-roc",
    "detection_roc",
    section="seen",
    reads="Only the left end is usable, and the right panel enlarges it: alarms on triggered prompts at few "
    "false ones.",
    control="The placebo's curve should lie on the diagonal.",
)
def roc(data: Data) -> Chart:
    """ROC of the fused monitor: the whole, and its low-FPR part on a logarithmic axis."""
    table = _roc_table(data)
    scores = table[table["detector"] == FUSED]
    scores = scores if len(scores) else table[table["detector"] == table["detector"].iloc[0]]
    alarmed = Axis("Rows with alarm", "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
    panels = (
        Panel(FPR, alarmed, _curves(scores), "all rates", height=2.0),
        Panel(LOW_FPR, alarmed, _curves(scores), "low rates enlarged", height=2.0),
    )
    fired, clean = (scores[name].iloc[0] for name in ("positives", "negatives"))
    caption = (
        "Triggered rows that fired and raise an alarm, against clean rows that raise one, over all "
        f"thresholds; {fired:.0f} and {clean:.0f} rows. A monitor is used at the left end, which the right "
        "panel enlarges. The control is the same with placebos of the trigger, whose curve should lie near "
        "the diagonal."
    )
    return Chart("What the monitor catches", panels, 2, "two", caption)


@figure(
    "detection-roc-detectors",
    "detection_roc",
    section="seen",
    reads="The same, detector by detector.",
    control="A curve on the diagonal sees no more than chance.",
)
def roc_by_detector(data: Data) -> Chart:
    """The low-FPR part of every detector's ROC, a panel each."""
    table = _roc_table(data)
    alarmed = Axis("Rows with alarm", "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
    panels = tuple(
        Panel(LOW_FPR, alarmed, _curves(table[table["detector"] == name]), name, height=1.1)
        for name in _detectors(table)
    )
    caption = (
        "As the figure of the fused monitor, detector by detector, on the logarithmic axis alone. Supervised "
        "skylines were shown triggered rows, which no defender has. The control is the same with placebos."
    )
    return _many("What each detector catches", panels, caption)


@figure(
    "detection-distributions",
    "detection_distribution",
    section="seen",
    reads="A curve's height at the dashed line is the share of prompts that raise an alarm.",
    control="Clean prompts must meet the line at the named rate, placebos and near misses as well.",
)
def distributions(data: Data) -> Chart:
    """How suspect rows of each role are, a panel for each detector."""
    columns, key = "detector rows surprise share rate", "detector rows surprise"
    table = read("detection_distribution", data, columns, key, percent="share")
    x = Axis(
        "Surprise",
        "−log₁₀ p",
        limits=(0.0, FARTHEST),
        ticks=tuple((float(v), str(v)) for v in (0, 2, 4, 6, 8)),
    )
    y = Axis("Rows as suspect", "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
    rate = float(table["rate"].iloc[0])
    alarm = Reference(-math.log10(rate), "x", f"alarm at {100 * rate:g}%", part="control")
    panels = []
    for name in _detectors(table):
        scores = table[table["detector"] == name]
        series = []
        for rows in _rows_of(scores):
            line = scores[scores["rows"] == rows].sort_values("surprise", kind="stable")
            inside = line[line["surprise"] <= FARTHEST]
            at, share = list(inside["surprise"]), list(inside["share"])
            if len(inside) < len(line):  # at the axis's end the curve goes on at the share that lies beyond
                at, share = [*at, FARTHEST], [*share, float(line["share"].iloc[len(inside)])]
            label, role, part = LOOKS[rows]
            series.append(Series("line", at, share, label=label, role=role, part=part))
        panels.append(Panel(x, y, tuple(series), name, (alarm,), height=1.1))
    caption = (
        "Share of rows whose p-value is at least so small: a curve's height at the dashed line is the share "
        "that raises an alarm. Beyond the most suspect clean prompt p-values are a guess about the tail. "
        "The controls are clean rows, which must meet the line at the named rate, placebos, near misses and "
        "refused requests."
    )
    return _many("How suspect rows are, by role", tuple(panels), caption)


@figure(
    "detection-layers",
    "detection_layers",
    section="seen",
    reads="From which layer on a detector sees the trigger.",
    control="One that sees the placebo too sees strings, not the backdoor.",
)
def layers(data: Data) -> Chart:
    """AUROC against clean rows at each layer alone, a panel for each detector."""
    columns = "detector rows layer auroc low high n"
    table = read("detection_layers", data, columns, "detector rows layer")
    x, y = layer_axis(table["layer"]), Axis("AUROC", limits=(0.0, 1.0))
    panels = []
    for name in _detectors(table):
        scores = table[table["detector"] == name]
        curves = []
        for rows in _rows_of(scores):
            line = scores[scores["rows"] == rows].sort_values("layer", kind="stable")
            label, role, part = LOOKS[rows]
            kind: Kind = "marked" if len(line) > 1 else "points"
            at, value, low, high = (list(line[c]) for c in ("layer", "auroc", "low", "high"))
            notes = [f"{n:.0f} rows" for n in line["n"]]
            curves.append(Series(kind, at, value, low, high, label=label, role=role, part=part, notes=notes))
        panels.append(Panel(x, y, tuple(curves), name, (CHANCE,), height=1.1))
    caption = (
        "AUROC of triggered rows that fired against clean rows, from one layer's activations (of detectors "
        "that compare layers: from that layer and the one before). Bands are 95% intervals. The control is "
        "the same with placebos, which should stay at chance."
    )
    return _many("Where the monitor sees the trigger", tuple(panels), caption)


@figure(
    "detection-overhead",
    "detection_overhead",
    section="seen",
    reads="What watching costs in time, against the same answers without it.",
    control="An interval across 0 is no cost that could be measured.",
)
def overhead(data: Data) -> Chart:
    """Time of guarded against plain generation, by batch size."""
    columns = "batch plain guarded ratio low high repeats prompt_tokens new_tokens"
    table = read("detection_overhead", data, columns, "batch")
    sizes = list(table["batch"])
    lines = Axis(
        "Batch", limits=(0.5 - len(sizes), 0.5), ticks=tuple((-float(i), str(n)) for i, n in enumerate(sizes))
    )
    places = [-float(i) for i in range(len(sizes))]
    percents = {c: [100 * (v - 1) for v in table[c]] for c in ("ratio", "low", "high")}
    finite = [v for values in percents.values() for v in values if math.isfinite(v)]
    low = min(0.0, *finite)
    extra = Axis("Overhead", "%", limits=(-nice(-low) if low < 0 else 0.0, nice(max(finite))))
    notes = [
        f"{p:.0f} prompt tokens, {n:.0f} new ones"
        for p, n in zip(table["prompt_tokens"], table["new_tokens"], strict=True)
    ]
    watched = Series(
        "points",
        percents["ratio"],
        places,
        left=percents["low"],
        right=percents["high"],
        role="backdoored",
        notes=notes,
    )
    slowest = 1000 * max(table["plain"].max(), table["guarded"].max())
    time = Axis("Time of a batch", "ms", limits=(0.0, nice(slowest)))
    looks: dict[str, tuple[str, Role, Part, float]] = {
        "guarded": ("under the guard", "backdoored", "subject", 0.15),
        "plain": ("plain generate (control)", "base", "control", -0.15),
    }
    timed = tuple(
        Series(
            "points",
            [1000 * v for v in table[column]],
            [p + shift for p in places],
            label=label,
            role=role,
            part=part,
        )
        for column, (label, role, part, shift) in looks.items()
    )
    height = 0.4 + 0.3 * len(sizes)
    panels = (
        Panel(extra, lines, (watched,), "what watching adds", (Reference(0.0, "x"),), height=height),
        Panel(time, lines, timed, "medians", height=height),
    )
    caption = (
        "Answers of equal length with and without the guard, by turns; the overhead is the median ratio of "
        f"neighbouring measurements ({table['repeats'].iloc[0]:.0f} pairs) with its 95% bootstrap interval. "
        "The control is plain generate. Times are those of one machine at one time."
    )
    return Chart("What watching costs", panels, 2, "two", caption)


@figure(
    "detection-answers",
    "detection_answers",
    section="seen",
    reads="What watching the answer adds to watching the prompt, and how many tokens are out by then.",
    control="Clean answers, which may raise an alarm no more often than named.",
)
def answers(data: Data) -> Chart:
    """Alarms of prompt, answer and both, by role, and how many tokens had been given out."""
    columns = "watched rows value low high n tokens"
    table = read("detection_answers", data, columns, "watched rows", percent="value low high")
    rows = [name for name in SETS if (table["rows"] == name).any()]
    lines = Axis(
        "", limits=(0.5 - len(rows), 0.5), ticks=tuple((-float(i), LOOKS[n][0]) for i, n in enumerate(rows))
    )
    panels = []
    for watched in WATCHED:
        scores = table[table["watched"] == watched].set_index("rows")
        if scores.empty:
            continue
        curves = []
        for place, name in enumerate(rows):
            line = scores.loc[name]
            delay = "" if math.isnan(line["tokens"]) else f", {line['tokens']:.0f} tokens before the alarm"
            curves.append(
                Series("points", [line["value"]], [-float(place)], left=[line["low"]], right=[line["high"]],
                       role=LOOKS[name][1], part=LOOKS[name][2], notes=[f"{line['n']:.0f} rows{delay}"])
            )  # fmt: skip
        title = (
            f"{watched}: {scores.loc['fired', 'tokens']:.0f} tokens until alarm"
            if "fired" in scores.index
            else watched
        )
        panels.append(Panel(PERCENT, lines, tuple(curves), title, height=0.1 + 0.22 * len(rows)))
    caption = (
        "Rows that raise an alarm by their prompt, by their answer as it is made, and by either, with 95% "
        "Clopper-Pearson intervals; the median number of tokens that a fired answer had given out. The "
        "controls are all rows that must raise none."
    )
    return Chart("Alarms before and during the answer", tuple(panels), len(panels), "two", caption)


@figure(
    "evasion-matrix",
    "evasion_matrix",
    section="seen",
    reads="Rows are detectors that training attacked, columns those that were tested: how far evasion "
    "carries.",
    control="The first row was attacked by none.",
)
def evasion_matrix(data: Data) -> Chart:
    """What each refitted detector sees of a backdoor that was hidden from each, a panel for each metric."""
    table = _evasion(data)
    tested = list(dict.fromkeys(table["tested"]))
    attacked = list(dict.fromkeys(table["attacked"]))[::-1]
    groups = [(name, scores) for name, scores in table.groupby("panel", sort=False)]
    beside = frame_for(len(groups)).columns if len(tested) <= BESIDE else 1
    frame = Frame("two", beside)

    def text(row: Mapping[str, Any]) -> str:
        if math.isnan(row["value"]):
            return ""
        return f"[{100 * row['value']:.0f}]" if row["own"] else f"{100 * row['value']:.0f}"

    panels = []
    for name, scores in groups:
        once(scores, "evasion_matrix", ["attacked", "tested", "panel"])
        places = ("tested", tested, "attacked", attacked)
        values = matrix(scores, places, lambda row: 100 * row["value"], math.nan)
        notes = matrix(scores, places, lambda row: with_interval(row["value"], row["low"], row["high"]), "")
        texts = matrix(scores, places, text, "")
        grid = Grid(tested, attacked, values, SHARE, texts=texts, notes=notes)
        panel = grid_panel(grid, ("Tested", "Attacked"), frame, str(name), line=0.22)
        # Whole names: detectors of one view begin alike, and strengths stand at the ends.
        x = replace(panel.x, ticks=tuple((float(i), text) for i, text in enumerate(tested)))
        y = replace(panel.y, ticks=tuple((float(i), text) for i, text in enumerate(attacked)))
        panels.append(replace(panel, x=x, y=y))
    caption = (
        "Each row is a backdoor whose training hid it from the named detectors, each column a detector that "
        "the defender fitted anew; in brackets where that one was attacked itself. The controls are the "
        "columns that were not attacked, and the row of the backdoor that hides from none."
    )
    return Chart("Detectors attacked and tested", tuple(panels), frame.columns, frame.width, caption)


def _roc_table(data: Data) -> pd.DataFrame:
    columns = "detector rows fpr tpr positives negatives"
    return read("detection_roc", data, columns, percent="fpr tpr")


def _detectors(table: pd.DataFrame) -> list[str]:
    """Names of detectors, the fused monitor first, then as they appear."""
    return sorted(dict.fromkeys(table["detector"]), key=lambda name: name != FUSED)


def _evasion(data: Data) -> pd.DataFrame:
    """The matrix of attacked and tested detectors.

    Args:
        data: attacked, tested, metric and value (a fraction); strength, rows, low and high where known, and
            own, whether the tested detector is among the attacked ones; by default where both have one name.

    Returns:
        attacked (with its strength), tested, own, panel (metric and rows), value, low, high.

    Raises:
        InputError: if a column or all rows are missing, or a value is no fraction.
    """
    matrix = frame(data, "evasion_matrix").reset_index(drop=True)
    require(matrix, "evasion_matrix", ["attacked", "tested", "metric", "value"])
    out = pd.DataFrame({name: matrix[name].astype(str) for name in ("attacked", "tested")})
    same = out["attacked"].map(_with_view) == out["tested"].map(_with_view)
    out["own"] = matrix["own"].astype(bool) if "own" in matrix else same
    if "strength" in matrix and matrix["strength"].nunique() > 1:
        out["attacked"] += [
            "" if pd.isna(value) or float(value) == 0 else f", {float(value):g}"
            for value in matrix["strength"]
        ]
    rows = (
        [f", {row}" if row else "" for row in matrix["rows"].fillna("")]
        if "rows" in matrix
        else [""] * len(matrix)
    )
    out["panel"] = [metric + row for metric, row in zip(matrix["metric"].astype(str), rows, strict=True)]
    for name in ("value", "low", "high"):
        given = matrix[name] if name in matrix else [None] * len(matrix)
        out[name] = numbers(given, f"evasion_matrix, field {name}")
    wrong = out.index[(out["value"] < 0) | (out["value"] > 1)]
    if len(wrong):
        raise InputError(
            f"evasion_matrix, row {wrong[0]}: value is {out['value'][wrong[0]]:g}; give a fraction"
        )
    return out


def _with_view(name: str) -> str:
    """A detector's name with its view."""
    return name if ":" in name else f"{name}:last"


def _curves(scores: pd.DataFrame) -> tuple[Series, ...]:
    curves = []
    for rows in _rows_of(scores):
        line = scores[scores["rows"] == rows].sort_values(["fpr", "tpr"], kind="stable")
        label, role, part = LOOKS[rows]
        # A logarithmic axis has no 0: what lies left of it is drawn at its end.
        x = list(line["fpr"].clip(lower=100 * LOWEST))
        curves.append(Series("line", x, list(line["tpr"]), label=label, role=role, part=part))
    return tuple(curves)


def _rows_of(scores: pd.DataFrame) -> list[str]:
    return [name for name in SETS if (scores["rows"] == name).any()]


def _many(title: str, panels: Sequence[Panel], caption: str) -> Chart:
    columns = min(len(panels), 3 if len(panels) <= 6 else COLUMNS)
    return Chart(title, tuple(panels), columns, "one" if columns == 1 else "two", caption)
