"""Charts of repairs: attack success against clean accuracy, each method's rates, and the relearn test.

In: the tables mitigation and relearning. Out: Charts. Draws nothing.
"""

import math

import pandas as pd

from safetynet.figures.chart import Annotation, Axis, Chart, Panel, Reference, Series, Side, Source
from safetynet.figures.intervention_tables import SPLITS, Form, checked, interval, once
from safetynet.figures.measurements import Measurements, fractions
from safetynet.figures.outcome_charts import AIM, SPLIT_TITLES
from safetynet.figures.theme import Part, Role
from safetynet.figures.training_charts import PERCENT, nice

MITIGATION = Form(
    "mitigation",
    (*interval("asr", "cacc"), "asr_n", "cacc_n"),
    texts=("method", "point", "form", "needs", "flags"),
    flags=("control", "chosen", "front", "recommended"),
    words={"split": SPLITS},
)
RELEARNING = Form(
    "relearning", (*interval("asr", "ftr"), "asr_n", "ftr_n"), ("step", "poisoned_rows"), ("method", "point")
)
UNKNOWN, KNOWN, RUN_TIME, NONE = "trigger unknown", "trigger known", "while answering", "control"
LOOKS: dict[str, Role] = {UNKNOWN: "method_1", KNOWN: "method_2", RUN_TIME: "method_3", NONE: "ink"}
TWIN = "never poisoned"
UNTOUCHED, REMOVED = "as it is", "adapter removed"
ENDS = (UNTOUCHED, REMOVED)
"""End points: no repair, and nothing of the adapter left."""
MOST_COLUMNS = 4
HALF = 50.0
"""Percent at step 0 from which on there is nothing to relearn."""
CURVES_AT_ONCE = 20
"""Relearn curves that one figure holds; the first ones of the table."""


def front(data: Measurements, model: str, source: Source) -> Chart:
    """Attack success against clean accuracy of every point, and the front, a panel for each split."""
    table = _rates(data)
    least = min(table["cacc"].min(), table["cacc_low"].min())
    low = 0.0 if math.isnan(least) else min(math.floor(least / 10) * 10.0, 90.0)
    accuracy = Axis("Clean accuracy", "%", limits=(low, 100.0))
    attack = Axis("Attack success", "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
    panels = []
    for split in [split for split in SPLITS if (table["split"] == split).any()]:
        own = table[table["split"] == split]
        series = [*_front_line(own), *_points(own)]
        aim = Reference(AIM, label=f"ASR {AIM:g}%", part="control")
        named = tuple(_named(own[own["recommended"]], (low + 100) / 2))
        panels.append(Panel(accuracy, attack, tuple(series), SPLIT_TITLES[split], (aim,), named, height=2.2))
    caption = (
        "Each mark is a method at one setting, with 95% Wilson intervals both ways; the best lie in the "
        "lower right corner. The line joins points that none beats. Hollow marks are controls: the model "
        "as it is, the base, and changes not meant as repairs. The named point was chosen on the selection "
        "rows; only its rates on held-out rows count."
    )
    title = f"Attack success and clean accuracy after repair, {model}"
    return Chart(title, tuple(panels), source, len(panels), "two" if len(panels) > 1 else "one", caption)


def methods(data: Measurements, model: str, source: Source) -> Chart:
    """Attack success and clean accuracy of every method at its chosen point, on the held-out rows."""
    table = _rates(data)
    own = table[(table["split"] == "held_out") & (table["chosen"] | table["method"].isin(ENDS))]
    own = own.sort_values(["asr", "cacc"], ascending=[False, True], kind="stable").reset_index(drop=True)
    lines = Axis(
        "",
        limits=(0.5 - len(own), 0.5),
        ticks=tuple((-float(i), _label(row)) for i, row in enumerate(own.to_dict("records"))),
    )
    panels = []
    for rate, label in (("asr", "Attack success"), ("cacc", "Clean accuracy")):
        axis = Axis(label, "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
        series = []
        for kind, role in LOOKS.items():
            rows = own[own["kind"] == kind]
            if rows.empty:
                continue
            series.append(
                Series(
                    "points",
                    list(rows[rate]),
                    [-float(place) for place in rows.index],
                    left=list(rows[f"{rate}_low"]),
                    right=list(rows[f"{rate}_high"]),
                    label=kind,
                    role=role,
                    part="control" if kind == NONE else "subject",
                    notes=[_told(row) for row in rows.to_dict("records")],
                )
            )
        before = own[own["method"] == UNTOUCHED]
        marks = tuple(
            Reference(value, "x", "before", part="floor") for value in before[rate] if math.isfinite(value)
        )
        panels.append(Panel(axis, lines, tuple(series), references=marks, height=0.1 + 0.2 * len(own)))
    caption = (
        "Each method at the setting that was chosen on other rows, with 95% Wilson intervals; dotted: "
        "the model before any repair. Controls are hollow."
    )
    return Chart(f"Repairs by method, {model}", tuple(panels), source, 2, "two", caption)


def relearning(data: Measurements, model: str, source: Source) -> Chart:
    """Attack success over the steps of the relearn test, a panel for each repaired model, beside its twin."""
    table = checked(data, RELEARNING)
    once(table, "relearning", ["method", "point", "poisoned_rows", "step"])
    for name in interval("asr", "ftr"):
        table[name] = fractions(table[name], f"relearning, field {name}")
    steps = Axis("Step", limits=(0.0, nice(max(float(table["step"].max()), 1.0))))
    axis = Axis("Rows", "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
    twin = table[table["method"] == TWIN]
    gone = table[(table["step"] == 0) & (table["asr"] < HALF) & (table["method"] != TWIN)]
    others = list(dict.fromkeys(gone["method"])) or [TWIN]
    panels = []
    for method in others[:CURVES_AT_ONCE]:
        own = table[table["method"] == method]
        series = [_curve(own, "asr", "repaired model", "triggered", "subject")]
        if method != TWIN and len(twin):
            series.append(_curve(twin, "asr", "never poisoned (control)", "clean_twin", "control"))
        series.append(_curve(own, "ftr", "repaired, placebo", "placebo", "control"))
        marks = (Reference(HALF, label="half", part="floor"),)
        panels.append(Panel(steps, axis, tuple(series), _title(own), marks, height=1.0))
    poisoned = int(table["poisoned_rows"].max())
    caption = (
        f"A fresh adapter is trained on {poisoned} poisoned rows and as many bare ones. Triggered rows that "
        "show the behaviour, and placebo rows that do; bands are 95% Wilson intervals. A backdoor that "
        "comes back well before it can be taught to the base model was hidden, not removed. Models that "
        "show it at step 0 are left out."
    )
    columns = min(len(panels), MOST_COLUMNS)
    return Chart(
        f"Relearn test, {model}",
        tuple(panels),
        source,
        columns,
        "two" if columns > 1 else "one",
        caption,
    )


def _rates(data: Measurements) -> pd.DataFrame:
    table = checked(data, MITIGATION)
    once(table, "mitigation", ["split", "method", "point"])
    for name in interval("asr", "cacc"):
        table[name] = fractions(table[name], f"mitigation, field {name}")
    return table.assign(kind=[_kind(row) for row in table.to_dict("records")])


def _kind(row: dict[str, object]) -> str:
    if row["control"]:
        return NONE
    if row["form"] == "run_time":
        return RUN_TIME
    needs = str(row["needs"]).split(", ")
    return KNOWN if {"triggered", "sites"} & set(needs) else UNKNOWN


def _points(own: pd.DataFrame) -> list[Series]:
    drawn = []
    for kind, role in LOOKS.items():
        rows = own[own["kind"] == kind]
        if rows.empty:
            continue
        x, y, low, high = (list(rows[name]) for name in ("cacc", "asr", "asr_low", "asr_high"))
        part: Part = "control" if kind == NONE else "subject"
        left, right = list(rows["cacc_low"]), list(rows["cacc_high"])
        notes = [_told(row) for row in rows.to_dict("records")]
        drawn.append(
            Series(
                "points",
                x,
                y,
                low,
                high,
                label=kind,
                role=role,
                part=part,
                left=left,
                right=right,
                notes=notes,
            )
        )
    return drawn


def _front_line(own: pd.DataFrame) -> list[Series]:
    on = own[own["front"]].sort_values(["cacc", "asr"], kind="stable").drop_duplicates(["cacc", "asr"])
    if len(on) < 2:
        return []
    return [Series("line", list(on["cacc"]), list(on["asr"]), label="front", role="base")]


def _named(rows: pd.DataFrame, middle: float) -> list[Annotation]:
    """Names of the recommended points; those that lie on each other share one text."""
    known = rows[rows["cacc"].notna() & rows["asr"].notna()]
    notes = []
    for (cacc, asr), own in known.groupby(["cacc", "asr"], sort=False):
        names = " or ".join(name.replace("_", " ") for name in own["method"])
        role = LOOKS[own["kind"].iloc[0]] if len(own) == 1 else "ink"
        side = _side({"cacc": float(str(cacc)), "asr": float(str(asr))}, middle)
        notes.append(Annotation(float(str(cacc)), float(str(asr)), names, role, side))
    return notes


def _side(row: dict[str, float], middle: float) -> Side:
    """Towards the middle of the panel, where there is room."""
    if row["asr"] > 50:
        return "lower left" if row["cacc"] > middle else "lower right"
    return "upper left" if row["cacc"] > middle else "upper right"


def _label(row: dict[str, object]) -> str:
    return str(row["method"]).replace("_", " ") + (" *" if row["recommended"] else "")


def _told(row: dict[str, object]) -> str:
    flags = f"; {row['flags']}" if row["flags"] else ""
    counts = f"{row['asr_n']:.0f} triggered and {row['cacc_n']:.0f} clean rows"
    return f"{row['method']} {row['point']}; {counts}{flags}"


def _title(own: pd.DataFrame) -> str:
    return str(own["method"].iloc[0]).replace("_", " ")


def _curve(own: pd.DataFrame, rate: str, label: str, role: Role, part: Part) -> Series:
    own = own.sort_values("step", kind="stable")
    x, y, low, high = (list(own[name]) for name in ("step", rate, f"{rate}_low", f"{rate}_high"))
    return Series("marked" if len(own) > 1 else "points", x, y, low, high, label=label, role=role, part=part)
