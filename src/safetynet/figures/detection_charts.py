"""Charts of a monitor: what it catches, what it must not, where in the model, and what it costs.

In: the tables detection_roc, detection_distribution, detection_layers, detection_overhead, detection_answers
and evasion_matrix. Out: Charts. Draws nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures.chart import Axis, Chart, Panel, Reference, Series, Shade
from safetynet.figures.panels import (
    PERCENT,
    Frame,
    Look,
    Row,
    curve,
    frame_for,
    grid_of,
    grid_panel,
    layer_axis,
    lines_of,
    nice,
    once,
    percent,
    read,
    series_of,
    with_interval,
)
from safetynet.figures.registry import figure
from safetynet.tables import Data, frame, numbers, require
from safetynet.vocabulary import WATCHED

FUSED = "fused"
LOOKS: dict[str, Look] = {
    "fired": ("triggered, fired", "triggered", "subject"),
    "not_fired": ("triggered, not fired", "backdoored", "control"),
    "clean": ("clean", "clean", "control"),
    "placebo": ("placebo (control)", "placebo", "control"),
    "near_miss": ("near miss", "near_miss", "control"),
    "refused": ("refused", "refused", "control"),
}
"""Rows that figures show, in this order; others stay in the tables."""
LOWEST = 1e-3
"""Left end of the logarithmic axis; a curve that begins further left comes in at its side."""
FARTHEST = 8.0
"""Right end of the axis of surprise: one clean prompt in 100 million, as far as a guess about tails goes."""
ALARMED, FPR = percent("Rows with alarm"), percent("Clean rows with alarm")
LOW_FPR = replace(
    FPR,
    scale="log",
    limits=(100 * LOWEST, 100.0),
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
    _, scores = _detectors(_roc_table(data))[0]
    panels = (
        Panel(FPR, ALARMED, _curves(scores), "all rates", height=2.0),
        Panel(LOW_FPR, ALARMED, _curves(scores), "low rates enlarged", height=2.0),
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
    panels = [
        Panel(LOW_FPR, ALARMED, _curves(scores), name, height=1.1) for name, scores in _detectors(table)
    ]
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
    y = percent("Rows as suspect")
    rate = float(table["rate"].iloc[0])
    alarm = Reference(-math.log10(rate), "x", f"alarm at {100 * rate:g}%", part="control")
    panels = []
    for name, scores in _detectors(table):
        series = []
        for look, rows in _by_rows(scores):
            line = rows.sort_values("surprise", kind="stable")
            inside = line["surprise"] <= FARTHEST
            # The first share that lies beyond the axis is drawn at its end.
            line = line.assign(surprise=line["surprise"].where(inside, FARTHEST)).head(inside.sum() + 1)
            series.append(series_of("line", line, "surprise", "share", look))
        panels.append(Panel(x, y, tuple(series), name, (alarm,), height=1.1))
    caption = (
        "Share of rows whose p-value is at least so small: a curve's height at the dashed line is the share "
        "that raises an alarm. Beyond the most suspect clean prompt p-values are a guess about the tail. "
        "The controls are clean rows, which must meet the line at the named rate, placebos, near misses and "
        "refused requests."
    )
    return _many("How suspect rows are, by role", panels, caption)


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
    for name, scores in _detectors(table):
        curves = [
            curve(rows, "layer", "auroc low high", look, lambda row: f"{row['n']:.0f} rows")
            for look, rows in _by_rows(scores)
        ]
        panels.append(Panel(x, y, tuple(curves), name, (CHANCE,), height=1.1))
    caption = (
        "AUROC of triggered rows that fired against clean rows, from one layer's activations (of detectors "
        "that compare layers: from that layer and the one before). Bands are 95% intervals. The control is "
        "the same with placebos, which should stay at chance."
    )
    return _many("Where the monitor sees the trigger", panels, caption)


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
    lines = lines_of(map(str, table["batch"]), "Batch")
    ratio, times = ["ratio", "low", "high"], ["guarded", "plain"]
    table = table.assign(line=[line for line, _ in lines.ticks])
    table[ratio], table[times] = 100 * (table[ratio] - 1), 1000 * table[times]
    finite = [value for value in table[ratio].to_numpy().ravel().tolist() if math.isfinite(value)]
    low = min(0.0, *finite)
    extra = Axis("Overhead", "%", limits=(-nice(-low) if low < 0 else 0.0, nice(max(finite))))

    def note(row: Row) -> str:
        return f"{row['prompt_tokens']:.0f} prompt tokens, {row['new_tokens']:.0f} new ones"

    watched = series_of("points", table, "ratio low high", "line", ("", "backdoored", "subject"), note)
    time = Axis("Time of a batch", "ms", limits=(0.0, nice(table[times].max().max())))
    looks: dict[str, tuple[float, Look]] = {
        "guarded": (0.15, ("under the guard", "backdoored", "subject")),
        "plain": (-0.15, ("plain generate (control)", "base", "control")),
    }
    timed = tuple(
        series_of("points", table.assign(line=table["line"] + up), column, "line", look)
        for column, (up, look) in looks.items()
    )
    height = 0.4 + 0.3 * len(table)
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
    lines = lines_of(label for (label, _, _), _ in _by_rows(table))
    line_of = {label: line for line, label in lines.ticks}

    def note(row: Row) -> str:
        delay = "" if math.isnan(row["tokens"]) else f", {row['tokens']:.0f} tokens before the alarm"
        return f"{row['n']:.0f} rows{delay}"

    panels = []
    for watched in WATCHED:
        scores = table[table["watched"] == watched]
        dots = []
        for (label, role, part), rows in _by_rows(scores):
            rows = rows.assign(line=line_of[label])
            dots.append(series_of("points", rows, "value low high", "line", ("", role, part), note))
        if dots:
            tokens = scores.loc[scores["rows"] == "fired", "tokens"].dropna()
            title = watched + "".join(f": {count:.0f} tokens until alarm" for count in tokens)
            panels.append(Panel(PERCENT, lines, tuple(dots), title, height=0.1 + 0.22 * len(line_of)))
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
    tested = {name: name for name in table["tested"]}
    attacked = {name: name for name in table["attacked"].unique()[::-1]}
    groups = [(name, scores) for name, scores in table.groupby("panel", sort=False)]
    beside = frame_for(len(groups)).columns if len(tested) <= BESIDE else 1
    frame = Frame("two", beside)

    def text(row: Row) -> str:
        if math.isnan(row["value"]):
            return ""
        return f"[{row['percent']:.0f}]" if row["own"] else f"{row['percent']:.0f}"

    panels = []
    for name, scores in groups:
        once(scores, "evasion_matrix", ["attacked", "tested", "panel"])
        grid = grid_of(
            scores.assign(percent=100 * scores["value"]),
            ("tested", tested),
            ("attacked", attacked),
            "percent",
            SHARE,
            texts=text,
            notes=lambda row: with_interval(row, "value low high"),
        )
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


def _detectors(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Names and rows of detectors, the fused monitor first, then as they appear."""
    groups = [(str(name), scores) for name, scores in table.groupby("detector", sort=False)]
    return sorted(groups, key=lambda group: group[0] != FUSED)


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
    require("evasion_matrix", matrix, ["attacked", "tested", "metric", "value"])
    out = pd.DataFrame({name: matrix[name].astype(str) for name in ("attacked", "tested")})
    # A detector that is named without a view watches the last position.
    attacked, tested = (out[name].where(out[name].str.contains(":"), out[name] + ":last") for name in out)
    same = attacked == tested
    out["own"] = matrix["own"].astype(bool) if "own" in matrix else same
    if "strength" in matrix and matrix["strength"].nunique() > 1:
        out["attacked"] += [
            "" if pd.isna(value) or float(value) == 0 else f", {float(value):g}"
            for value in matrix["strength"]
        ]
    out["panel"] = matrix["metric"].astype(str)
    if "rows" in matrix:
        out["panel"] += [f", {rows}" if rows else "" for rows in matrix["rows"].fillna("")]
    for name in ("value", "low", "high"):
        out[name] = numbers(matrix[name], f"evasion_matrix, field {name}") if name in matrix else math.nan
    wrong = out.index[(out["value"] < 0) | (out["value"] > 1)]
    if len(wrong):
        raise InputError(
            f"evasion_matrix, row {wrong[0]}: value is {out['value'][wrong[0]]:g}; give a fraction"
        )
    return out


def _curves(scores: pd.DataFrame) -> tuple[Series, ...]:
    scores = scores.sort_values(["fpr", "tpr"], kind="stable")
    # A logarithmic axis has no 0: what lies left of it is drawn at its end.
    scores = scores.assign(fpr=scores["fpr"].clip(lower=100 * LOWEST))
    return tuple(series_of("line", rows, "fpr", "tpr", look) for look, rows in _by_rows(scores))


def _by_rows(scores: pd.DataFrame) -> list[tuple[Look, pd.DataFrame]]:
    """The sets of rows that figures show, in their order: how each is drawn, and its rows of the table."""
    sets = [(look, scores[scores["rows"] == name]) for name, look in LOOKS.items()]
    return [(look, rows) for look, rows in sets if len(rows)]


def _many(title: str, panels: Sequence[Panel], caption: str) -> Chart:
    columns = min(len(panels), 3 if len(panels) <= 6 else COLUMNS)
    return Chart(title, tuple(panels), columns, "one" if columns == 1 else "two", caption)
