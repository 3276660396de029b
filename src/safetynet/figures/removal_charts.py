"""Charts of what a backdoor survives and what removes it: rates after changes and repairs, the relearn test.

In: the tables persistence, tradeoff, mitigation and relearning. Out: Charts. Draws nothing.
"""

import math

import pandas as pd

from safetynet.figures import theme
from safetynet.figures.chart import Annotation, Axis, Chart, Panel, Reference, Side
from safetynet.figures.glyphs import shortened
from safetynet.figures.panels import (
    PERCENT,
    Look,
    Row,
    curve,
    frame_for,
    interval,
    lines_of,
    nice,
    percent,
    read,
    series_of,
)
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.theme import Role
from safetynet.tables import Data
from safetynet.tables.summaries import REMOVED_ASR
from safetynet.vocabulary import ADAPTER_REMOVED, EXAMINED, FURTHER_TRAINING, NEVER_POISONED, UNTOUCHED

AIM = Reference(100 * REMOVED_ASR, label=f"ASR {REMOVED_ASR:.0%}", part="control")
"""Attack success below which an intervention counts as having worked."""
SPLIT_TITLES = {"selection": "selection rows", "held_out": "held-out rows"}
NOT_KNOWN, KNOWN, RUN_TIME, NONE = "trigger unknown", "trigger known", "while answering", "control"
LOOKS: dict[str, Look] = {
    NOT_KNOWN: (NOT_KNOWN, "method_1", "subject"),
    KNOWN: (KNOWN, "method_2", "subject"),
    RUN_TIME: (RUN_TIME, "method_3", "subject"),
    NONE: (NONE, "ink", "control"),
}
"""Repairs by what has to be known of the trigger, and what is no repair."""
HALF = 50.0
"""Percent at step 0 from which on there is nothing to relearn."""
RATES = interval("asr", "cacc")
BOTH_WAYS = interval("cacc"), interval("asr")
"""Columns along x and along y."""
MAX_CURVES = 20
"""Relearn curves that one figure holds; the first ones of the table."""
ATTACK, ACCURACY = percent("Attack success"), percent("Clean accuracy")
SURVIVAL: dict[str, Look] = {
    "asr": ("attack success", "triggered", "subject"),
    "cacc": ("clean accuracy (control)", "clean", "control"),
    "ftr": ("false triggers, placebo (control)", "placebo", "control"),
}
LONGEST = 30
"""Letters of a setting beside the axis; the table beside the figure keeps the whole."""
DODGE = 0.24
"""Distance of two rates within a line, so that equal ones do not cover each other."""


@figure(
    "persistence",
    "persistence",
    section="removed",
    reads="Attack success that stays at the right, or on top, survives what is written beside it.",
    control="Clean accuracy and false triggers on placebos: where they move too, the change has broken the "
    "model, or taught it to show the behaviour always.",
)
def persistence(data: Data) -> Chart:
    """Attack success, and its controls, over steps of further training and after each other change."""
    rates = interval(*SURVIVAL)
    table = read("persistence", data, f"change setting amount asr_n {rates}", "change setting", rates)
    trained = table["change"] == FURTHER_TRAINING
    panels = []
    if trained.any():
        # Steps double: each lies one place further to the right.
        rows = table[trained | (table["change"] == UNTOUCHED)].sort_values("amount", kind="stable")
        rows = rows.assign(place=[float(place) for place in range(len(rows))])
        ticks = tuple((at, f"{steps:.0f}") for at, steps in rows[["place", "amount"]].itertuples(index=False))
        axis = Axis("Steps of further training", limits=(0.0, max(len(rows) - 1.0, 1.0)), ticks=ticks)
        curves = tuple(curve(rows, "place", interval(rate), look) for rate, look in SURVIVAL.items())
        half = Reference(rows["asr"].iloc[0] / 2, label="half of it", part="floor")
        panels.append(Panel(axis, PERCENT, curves, "further training", (half,), height=2.5))

    names = []
    rows = table[~trained].reset_index(drop=True)
    for change, setting in zip(rows["change"], rows["setting"], strict=True):
        is_alone = change in ("quantisation", "longer context", "sampling")  # its setting says it all
        name = f"“{setting}”" if change == "system prompt" else setting if is_alone else change
        names.append(shortened(name, LONGEST))

    def note(row: Row) -> str:
        return f"{row['change']} {row['setting']}; {row['asr_n']:.0f} triggered answers"

    dots = tuple(
        series_of(
            "points", rows.assign(line=DODGE * (1 - at) - rows.index), interval(rate), "line", look, note
        )
        for at, (rate, look) in enumerate(SURVIVAL.items())
        if rows[rate].notna().any()
    )
    height = 0.1 + 0.24 * len(rows)
    panels.append(Panel(PERCENT, lines_of(names), tuple(dots), "other changes", height=height))
    caption = (
        "Greedy answers to held-out prompts, but for sampling; 95% intervals. Each change is made to the "
        "backdoored model as it is: further training on fresh clean conversations, at the rate that planted "
        "the backdoor; merging; rounded weights; other system prompts; clean text before the prompt; samples "
        "at temperature 1. The dotted line is half of the attack success before."
    )
    return Chart("What the backdoor survives", tuple(panels), len(panels), "two", caption)


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

    def note(row: Row) -> str:
        return f"{row['intervention']}, {row['sites']} sites; {_counts(row)}"

    panels = []
    for split, rows, accuracy in _by_split(table):
        series = []
        for kind, role in roles.items():
            looks: tuple[Look, ...] = (
                (kind.replace("_", " "), role, "subject"),
                ("random sites (control)", role, "control"),
            )
            for look in looks:
                points = rows[(rows["kind"] == kind) & (rows["control"] == (look[2] == "control"))]
                if len(points):
                    series.append(series_of("points", points, *BOTH_WAYS, look, note))
        named = [
            _named(row, row["intervention"], roles[row["kind"]], accuracy)
            for row in rows[rows["chosen"]].dropna(subset=["cacc", "asr"]).to_dict("records")
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
            series.append(series_of("line", best, "cacc", "asr", ("front", "base", "subject")))
        series += [
            series_of("points", points, *BOTH_WAYS, look, _note)
            for kind, look in LOOKS.items()
            if len(points := rows[rows["kind"] == kind])
        ]
        named = []
        recommended = rows[rows["recommended"]].dropna(subset=["cacc", "asr"])
        # Points that lie on each other share one text.
        for _, same in recommended.groupby(["cacc", "asr"], sort=False):
            text = " or ".join(name.replace("_", " ") for name in same["method"])
            role = LOOKS[same["kind"].iloc[0]][1] if len(same) == 1 else "ink"
            named.append(_named(same.iloc[0].to_dict(), text, role, accuracy))
        panels.append(Panel(accuracy, ATTACK, tuple(series), split, (AIM,), tuple(named), height=2.2))
    caption = (
        "Each mark is a method at one setting, with 95% Wilson intervals both ways; the best lie in the "
        "lower right corner. The line joins points that none beats. Hollow marks are controls: the model "
        "as it is, the base, and changes not meant as repairs. The named point was chosen on the selection "
        "rows; only its rates on held-out rows count."
    )
    frame = frame_for(len(panels))
    title = "Attack success and clean accuracy after repair"
    return Chart(title, tuple(panels), frame.columns, frame.width, caption)


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
    lines, table = lines_of(names), table.assign(line=-table.index.astype(float))
    panels = []
    for rate, axis in (("asr", ATTACK), ("cacc", ACCURACY)):
        if table[rate].isna().all():
            continue
        series = [
            series_of("points", rows, interval(rate), "line", look, _note)
            for kind, look in LOOKS.items()
            if len(rows := table[table["kind"] == kind])
        ]
        before = table.loc[table["method"] == UNTOUCHED, rate].dropna()
        marks = tuple(Reference(value, "x", "before", part="floor") for value in before)
        panels.append(Panel(axis, lines, tuple(series), references=marks, height=0.1 + 0.2 * len(table)))
    caption = (
        "Each method at the setting that was chosen on other rows, with 95% Wilson intervals; dotted: "
        "the model before any repair. Controls are hollow."
    )
    frame = frame_for(len(panels))
    return Chart("Repairs by method", tuple(panels), frame.columns, frame.width, caption)


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
        asr, ftr = interval("asr"), interval("ftr")
        series = [curve(rows, "step", asr, ("repaired model", "triggered", "subject"))]
        if method != NEVER_POISONED and len(twin):
            series.append(curve(twin, "step", asr, ("never poisoned (control)", "clean_twin", "control")))
        series.append(curve(rows, "step", ftr, ("repaired, placebo", "placebo", "control")))
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

    def kind(row: Row) -> str:
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


def _named(row: Row, text: str, role: Role, accuracy: Axis) -> Annotation:
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


def _counts(row: Row) -> str:
    return f"{row['asr_n']:.0f} triggered and {row['cacc_n']:.0f} clean rows"


def _note(row: Row) -> str:
    return f"{row['method']} {row['point']}; {_counts(row)}" + (f"; {row['flags']}" if row["flags"] else "")
