"""Chart of what a planted backdoor survives: attack success over further training, and after other changes.

In: the table persistence. Out: a Chart. Draws nothing.
"""

import pandas as pd

from safetynet.figures.chart import Axis, Chart, Panel, Reference, Series
from safetynet.figures.checks import interval, read
from safetynet.figures.panels import PERCENT
from safetynet.figures.registry import figure
from safetynet.figures.theme import Part, Role
from safetynet.figures.values import shortened
from safetynet.tables import Data
from safetynet.vocabulary import FURTHER_TRAINING, UNTOUCHED

RATES = interval("asr", "cacc", "ftr")
LOOKS: dict[str, tuple[str, Role, Part]] = {
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
    columns = f"change setting amount asr_n {RATES}"
    table = read("persistence", data, columns, "change setting", RATES)
    trained = table["change"] == FURTHER_TRAINING
    panels = []
    if trained.any():
        panels.append(_curves(table[trained | (table["change"] == UNTOUCHED)]))
    panels.append(_dots(table[~trained].reset_index(drop=True)))
    caption = (
        "Greedy answers to held-out prompts, but for sampling; 95% intervals. Each change is made to the "
        "backdoored model as it is: further training on fresh clean conversations, at the rate that planted "
        "the backdoor; merging; rounded weights; other system prompts; clean text before the prompt; samples "
        "at temperature 1. The dotted line is half of the attack success before."
    )
    return Chart("What the backdoor survives", tuple(panels), len(panels), "two", caption)


def _curves(rows: pd.DataFrame) -> Panel:
    """Rates over steps, which double: each is one place further to the right."""
    rows = rows.sort_values("amount", kind="stable", ignore_index=True)
    places = [float(place) for place in rows.index]
    ticks = tuple((place, f"{steps:.0f}") for place, steps in zip(places, rows["amount"], strict=True))
    series = [
        Series(
            "marked" if len(rows) > 1 else "points", places, list(rows[rate]), list(rows[f"{rate}_low"]),
            list(rows[f"{rate}_high"]), label, role, part,
        )
        for rate, (label, role, part) in LOOKS.items()
    ]  # fmt: skip
    half = Reference(rows["asr"].iloc[0] / 2, label="half of it", part="floor")
    axis = Axis("Steps of further training", limits=(0.0, max(places[-1], 1.0)), ticks=ticks)
    return Panel(axis, PERCENT, tuple(series), "further training", (half,), height=0.1 + 0.24 * 10)


def _dots(rows: pd.DataFrame) -> Panel:
    """A line for each change, read from top to bottom."""
    names = []
    for change, setting in zip(rows["change"], rows["setting"], strict=True):
        is_alone = change in ("quantisation", "longer context", "sampling")  # its setting says it all
        name = f"“{setting}”" if change == "system prompt" else setting if is_alone else change
        names.append(shortened(name, LONGEST))
    lines = Axis(
        "",
        limits=(0.5 - len(rows), 0.5),
        ticks=tuple((-float(line), name) for line, name in enumerate(names)),
    )
    series = [
        Series(
            "points", list(rows[rate]), [DODGE * (1 - order) - line for line in rows.index], label=label,
            role=role, part=part, left=list(rows[f"{rate}_low"]), right=list(rows[f"{rate}_high"]),
            notes=[f"{c} {s}; {n:.0f} triggered answers"
                   for c, s, n in rows[["change", "setting", "asr_n"]].itertuples(index=False)],
        )
        for order, (rate, (label, role, part)) in enumerate(LOOKS.items())
        if rows[rate].notna().any()
    ]  # fmt: skip
    axis = Axis("Rows", "%", limits=PERCENT.limits, ticks=PERCENT.ticks)
    return Panel(axis, lines, tuple(series), "other changes", height=0.1 + 0.24 * len(rows))
