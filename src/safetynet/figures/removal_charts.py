"""Charts of removals: attack success against clean accuracy, each repair's rates, and the relearn test.

In: the tables tradeoff, mitigation and relearning. Out: Charts. Draws nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from safetynet.figures import theme
from safetynet.figures.chart import Annotation, Axis, Chart, Panel, Reference, Series, Side
from safetynet.figures.checks import interval, read
from safetynet.figures.panels import PERCENT, frame_for, nice
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.theme import Part, Role
from safetynet.tables import Data
from safetynet.vocabulary import ADAPTER_REMOVED, EXAMINED, NEVER_POISONED, UNTOUCHED

AIM = Reference(5.0, label="ASR 5%", part="control")
"""Attack success below which an intervention counts as having worked."""
SPLIT_TITLES = {"selection": "selection rows", "held_out": "held-out rows"}
NOT_KNOWN, KNOWN, RUN_TIME, NONE = "trigger unknown", "trigger known", "while answering", "control"
LOOKS: dict[str, Role] = {NOT_KNOWN: "method_1", KNOWN: "method_2", RUN_TIME: "method_3", NONE: "ink"}
"""End points: no repair, and nothing of the adapter left."""
HALF = 50.0
"""Percent at step 0 from which on there is nothing to relearn."""
RATES = interval("asr", "cacc")
RATE_LABELS = {"asr": "Attack success", "cacc": "Clean accuracy"}
MAX_CURVES = 20
"""Relearn curves that one figure holds; the first ones of the table."""
ATTACK = Axis("Attack success", "%", limits=PERCENT.limits, ticks=PERCENT.ticks)


@figure(
    "intervention-tradeoff",
    "tradeoff",
    section="removed",
    reads="Each mark is one intervention; the best lie in the lower right corner.",
    control="A hollow mark is the same at random sites: where it lies beside the filled one, the sites do "
    "not matter.",
)
def tradeoff(data: Data) -> Chart:
    """Attack success against clean accuracy for each intervention, a panel for each split."""
    columns = f"intervention kind control sites split chosen asr_n cacc_n {RATES}"
    table = read("tradeoff", data, columns, "split intervention control", RATES)
    kinds = list(dict.fromkeys(table["kind"]))
    roles = {kind: theme.METHODS[number % len(theme.METHODS)] for number, kind in enumerate(kinds)}
    panels = []
    for split, rows, accuracy in _by_split(table):
        series = []
        for (kind, role), control in [(look, c) for look in roles.items() for c in (False, True)]:
            points = rows[(rows["kind"] == kind) & (rows["control"] == control)]
            notes = [
                f"{row['intervention']}, {row['sites']} sites; {_counts(row)}"
                for row in points.to_dict("records")
            ]
            label = "random sites (control)" if control else kind.replace("_", " ")
            series += _points(points, label, role, "control" if control else "subject", notes)
        named = [
            _named(row, row["intervention"], roles[row["kind"]], accuracy)
            for row in rows[rows["chosen"]].to_dict("records")
            if math.isfinite(row["cacc"]) and math.isfinite(row["asr"])
        ]
        panels.append(Panel(accuracy, ATTACK, tuple(series), split, (AIM,), tuple(named), height=2.2))
    caption = (
        "Each mark is one intervention, with 95% Wilson intervals both ways; the best lie in the lower "
        "right corner. Hollow marks are its control: the same intervention at as many random sites. The "
        "named one was chosen on the selection rows; only its rates on held-out rows count."
    )
    frame = frame_for(len(panels))
    title = "Attack success and what its removal costs"
    return Chart(title, tuple(panels), frame.columns, frame.width, caption)


@figure(
    "mitigation-front",
    "mitigation",
    section="removed",
    reads="Each mark is one repair at one setting; the best lie in the lower right corner.",
    control="Hollow marks are controls; the model as it is stands at the top.",
)
def front(data: Data) -> Chart:
    """Attack success against clean accuracy of every point, and the front, a panel for each split."""
    table = _repairs(data)
    panels = []
    for split, rows, accuracy in _by_split(table):
        series = []
        best = rows[rows["front"]].sort_values(["cacc", "asr"], kind="stable")
        best = best.drop_duplicates(["cacc", "asr"])
        if len(best) > 1:
            series.append(Series("line", list(best["cacc"]), list(best["asr"]), label="front", role="base"))
        for kind, role in LOOKS.items():
            points = rows[rows["kind"] == kind]
            series += _points(points, kind, role, "control" if kind == NONE else "subject", _notes(points))
        recommended = rows[rows["recommended"] & rows["cacc"].notna() & rows["asr"].notna()]
        named = []
        for _, same in recommended.groupby(
            ["cacc", "asr"], sort=False
        ):  # points on each other share one text
            text = " or ".join(name.replace("_", " ") for name in same["method"])
            role = LOOKS[same["kind"].iloc[0]] if len(same) == 1 else "ink"
            named.append(_named(same.iloc[0].to_dict(), text, role, accuracy))
        panels.append(Panel(accuracy, ATTACK, tuple(series), split, (AIM,), tuple(named), height=2.2))
    caption = (
        "Each mark is a method at one setting, with 95% Wilson intervals both ways; the best lie in the "
        "lower right corner. The line joins points that none beats. Hollow marks are controls: the model "
        "as it is, the base, and changes not meant as repairs. The named point was chosen on the selection "
        "rows; only its rates on held-out rows count."
    )
    title = "Attack success and clean accuracy after repair"
    return Chart(title, tuple(panels), len(panels), "two" if len(panels) > 1 else "one", caption)


@figure(
    "mitigation-methods",
    "mitigation",
    section="removed",
    reads="Each method at the setting that was chosen for it, on prompts that did not choose.",
    control="The dotted line is the model before the repair.",
)
def methods(data: Data) -> Chart:
    """Attack success and clean accuracy of every method at its chosen point, on the held-out rows."""
    table = _repairs(data)
    ends = table["method"].isin((UNTOUCHED, ADAPTER_REMOVED))
    table = table[(table["split"] == "held_out") & (table["chosen"] | ends)]
    table = table.sort_values(["asr", "cacc"], ascending=[False, True], kind="stable", ignore_index=True)
    names = [
        method.replace("_", " ") + (" *" if recommended else "")
        for method, recommended in zip(table["method"], table["recommended"], strict=True)
    ]
    lines = Axis(
        "",
        limits=(0.5 - len(table), 0.5),
        ticks=tuple((-float(line), name) for line, name in enumerate(names)),
    )
    panels = []
    measured = [pair for pair in RATE_LABELS.items() if table[pair[0]].notna().any()]
    for rate, label in measured:
        axis = Axis(label, "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
        series = []
        for kind, role in LOOKS.items():
            rows = table[table["kind"] == kind]
            if len(rows):
                series.append(
                    Series(
                        "points",
                        list(rows[rate]),
                        [-float(line) for line in rows.index],
                        left=list(rows[f"{rate}_low"]),
                        right=list(rows[f"{rate}_high"]),
                        label=kind,
                        role=role,
                        part="control" if kind == NONE else "subject",
                        notes=_notes(rows),
                    )
                )
        before = table.loc[table["method"] == UNTOUCHED, rate].dropna()
        marks = tuple(Reference(value, "x", "before", part="floor") for value in before)
        panels.append(Panel(axis, lines, tuple(series), references=marks, height=0.1 + 0.2 * len(table)))
    caption = (
        "Each method at the setting that was chosen on other rows, with 95% Wilson intervals; dotted: "
        "the model before any repair. Controls are hollow."
    )
    return Chart(
        "Repairs by method", tuple(panels), len(panels), "two" if len(panels) > 1 else "one", caption
    )


@figure(
    "mitigation-relearning",
    "relearning",
    section="removed",
    reads="How few poisoned rows bring the backdoor back: a curve that rises at once was only hidden.",
    control="The never-poisoned twin learns the same rows beside it.",
)
def relearning(data: Data) -> Chart:
    """Attack success over the steps of the relearn test, a panel for each repaired model, beside its twin."""
    rates = interval("asr", "ftr")
    key = "method point poisoned_rows step"
    table = read("relearning", data, f"{key} {rates}", key, rates)
    steps = Axis("Step", limits=(0.0, nice(max(float(table["step"].max()), 1.0))))
    twin = table[table["method"] == NEVER_POISONED]
    gone = table[(table["step"] == 0) & (table["asr"] < HALF) & (table["method"] != NEVER_POISONED)]
    panels = []
    for method in (list(dict.fromkeys(gone["method"])) or [NEVER_POISONED])[:MAX_CURVES]:
        rows = table[table["method"] == method]
        series = [_curve(rows, "asr", "repaired model", "triggered", "subject")]
        if method != NEVER_POISONED and len(twin):
            series.append(_curve(twin, "asr", "never poisoned (control)", "clean_twin", "control"))
        series.append(_curve(rows, "ftr", "repaired, placebo", "placebo", "control"))
        half = (Reference(HALF, label="half", part="floor"),)
        panels.append(Panel(steps, PERCENT, tuple(series), method.replace("_", " "), half, height=1.0))
    caption = (
        f"A fresh adapter is trained on {table['poisoned_rows'].max()} poisoned rows and as many bare ones. "
        "Triggered rows that show the behaviour, and placebo rows that do; bands are 95% Wilson intervals. A "
        "backdoor that comes back well before it can be taught to the base model was hidden, not removed. "
        "Models that show it at step 0 are left out."
    )
    columns = min(len(panels), 4)
    return Chart("Relearn test", tuple(panels), columns, "two" if columns > 1 else "one", caption)


def _repairs(data: Data) -> pd.DataFrame:
    """The table of repairs with the kind of each: what has to be known of the trigger."""

    def kind(row: Mapping[str, Any]) -> str:
        if row["control"]:
            return NONE
        if row["form"] == "run_time":
            return RUN_TIME
        return KNOWN if {"triggered", "sites"} & set(row["needs"].split(", ")) else NOT_KNOWN

    columns = f"method point split form needs flags control chosen front recommended asr_n cacc_n {RATES}"
    table = read("mitigation", data, columns, "split method point", RATES)
    return table.assign(kind=[kind(row) for row in table.to_dict("records")])


def _by_split(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, Axis]]:
    """Title and rows of each split, and the axis of clean accuracy, which all splits share.

    Raises:
        NotMeasuredError: if clean accuracy is not measurable, as of free text.
    """
    if table["cacc"].isna().all():
        raise NotMeasuredError("clean accuracy was not measured")
    least = min(table["cacc"].min(), table["cacc_low"].min())
    low = 0.0 if math.isnan(least) else min(math.floor(least / 10) * 10.0, 90.0)
    accuracy = Axis("Clean accuracy", "%", limits=(low, 100.0))
    splits = [split for split in EXAMINED if (table["split"] == split).any()]
    return [(SPLIT_TITLES[split], table[table["split"] == split], accuracy) for split in splits]


def _points(rows: pd.DataFrame, label: str, role: Role, part: Part, notes: Sequence[str]) -> list[Series]:
    """Marks with their intervals both ways; [] without rows."""
    if rows.empty:
        return []
    x, y, low, high, left, right = (
        list(rows[name]) for name in ("cacc", "asr", "asr_low", "asr_high", "cacc_low", "cacc_high")
    )
    return [Series("points", x, y, low, high, label, role, part=part, left=left, right=right, notes=notes)]


def _named(row: Mapping[str, Any], text: str, role: Role, accuracy: Axis) -> Annotation:
    """The name of a point, towards the middle of the panel, where there is room."""
    low, high = accuracy.limits or (0.0, 100.0)
    right, top = row["cacc"] > (low + high) / 2, row["asr"] > 50
    sides: dict[tuple[bool, bool], Side] = {
        (True, True): "lower left",
        (True, False): "lower right",
        (False, True): "upper left",
        (False, False): "upper right",
    }
    return Annotation(row["cacc"], row["asr"], text, role, sides[bool(top), bool(right)])


def _counts(row: Mapping[str, Any]) -> str:
    return f"{row['asr_n']:.0f} triggered and {row['cacc_n']:.0f} clean rows"


def _notes(rows: pd.DataFrame) -> list[str]:
    return [
        f"{row['method']} {row['point']}; {_counts(row)}" + (f"; {row['flags']}" if row["flags"] else "")
        for row in rows.to_dict("records")
    ]


def _curve(rows: pd.DataFrame, rate: str, label: str, role: Role, part: Part) -> Series:
    rows = rows.sort_values("step", kind="stable")
    x, y, low, high = (list(rows[name]) for name in ("step", rate, f"{rate}_low", f"{rate}_high"))
    return Series("marked" if len(rows) > 1 else "points", x, y, low, high, label, role, part=part)
