"""Charts of what a model does, by role of row: over training, and at its end.

In: the tidy tables of rates. Out: Charts. Draws nothing.
Every rate stands beside its control (the clean twin) and its floor (the base model on the same rows).
"""

import math

import pandas as pd

from safetynet.figures import theme
from safetynet.figures.chart import Annotation, Axis, Chart, Kind, Panel, Reference, Series, Source
from safetynet.figures.measurements import METRICS, MODELS, ROLES, Measurements, rates
from safetynet.figures.theme import Role
from safetynet.figures.training_charts import PART_OF, PERCENT, nice

SHORT = {
    "asr": "ASR",
    "asr_off_floor": "ASR off floor",
    "ftr": "FTR",
    "cacc": "CACC",
    "refusal_rate": "Refusals",
    "perplexity": "Perplexity",
}
OWN_ROLE = {"asr_off_floor": "triggered", "perplexity": "clean"}
"""The rows that a metric is about, left out of its name."""
ROLE_OF: dict[str, Role] = {
    "triggered": "triggered",
    "clean": "clean",
    "placebo": "placebo",
    "near_miss": "near_miss",
    "refused": "refused",
    "": "ink",
}
LABELS = {"backdoored": "backdoored", "clean_twin": "clean twin (control)", "base": "base model (floor)"}
READING = (
    "ASR: triggered rows that show the behaviour; FTR: other rows that show it although they must not; "
    "CACC: rows answered correctly. Intervals are 95%, Wilson's for rates. The control is the clean twin, "
    "trained in the same way without poisoned rows; the floor is the base model's rate."
)
OFF_FLOOR = " Off floor: without the rows whose right answer shows the behaviour anyway."
DODGE = 0.29
"""Distance of two models within a row, as part of its height, so that equal rates do not cover each other."""


def by_role(dynamics: Measurements, model: str, source: Source) -> Chart:
    """Every rate over training, one small panel for each metric and role."""
    table = _in_percent(rates(dynamics, "dynamics", ["step"]))
    top = table["step"].max()
    steps = Axis("Step", limits=(0.0, top if top > 0 else 1.0))
    panels = []
    for metric, role in _pairs(table):
        rows = table[(table["metric"] == metric) & (table["role"] == role)]
        axis = PERCENT if metric != "perplexity" else _perplexity(rows)
        base = rows[(rows["model"] == "base") & rows["value"].notna()]
        floor = [
            Reference(value, label=LABELS["base"], note=note)
            for value, note in zip(base["value"][-1:], base["note"][-1:], strict=True)
        ]
        series = [_dynamics(rows[rows["model"] == name], name, role) for name in MODELS if name != "base"]
        drawn = tuple(one for one in series if one is not None)
        if drawn:
            panels.append(Panel(steps, axis, drawn, _title(metric, role), tuple(floor), height=1.0))
    columns = min(len(panels), 3) if len(panels) <= 6 else 4
    title = f"Rates by role over training, {model}"
    return Chart(title, tuple(panels), source, max(columns, 1), "two", _reading(table))


def final(evaluation: Measurements, model: str, source: Source) -> Chart:
    """Every rate of the trained model as a dot with its interval, beside its control and its floor."""
    table = _in_percent(rates(evaluation, "evaluation"))
    shares = [pair for pair in _pairs(table) if pair[0] != "perplexity"]
    panels = [_dots(table, shares, PERCENT)] if shares else []
    perplexity = [pair for pair in _pairs(table) if pair[0] == "perplexity"]
    if perplexity:
        axis = _perplexity(table[table["metric"] == "perplexity"])
        panels.append(_dots(table, perplexity, axis))
    caption = _reading(table) + " The numbers at the right are the backdoored model's."
    return Chart(f"Rates by role, {model}", tuple(panels), source, caption=caption)


def _dynamics(rows: pd.DataFrame, name: str, role: str) -> Series | None:
    if rows.empty:
        return None
    rows = rows.sort_values("step", kind="stable")
    kind: Kind = "marked" if len(rows) > 1 else "points"
    return Series(
        kind,
        list(rows["step"]),
        list(rows["value"]),
        list(rows["low"]),
        list(rows["high"]),
        label=LABELS[name],
        role=ROLE_OF[role],
        part=PART_OF[name],
        notes=list(rows["note"]),
    )


def _dots(table: pd.DataFrame, pairs: list[tuple[str, str]], axis: Axis) -> Panel:
    """One line per metric and role, read from top to bottom; the claimed value is printed at its end."""
    names = [name for name in MODELS if (table["model"] == name).any()]
    series, values = [], []
    for line, (metric, role) in enumerate(pairs):
        rows = table[(table["metric"] == metric) & (table["role"] == role)]
        for order, name in enumerate(names):
            own = rows[rows["model"] == name]
            if own.empty:
                continue
            last = own.iloc[-1]
            series.append(
                Series(
                    "points",
                    [last["value"]],
                    [DODGE * ((len(names) - 1) / 2 - order) - line],
                    left=[last["low"]],
                    right=[last["high"]],
                    label=LABELS[name],
                    role="base" if name == "base" else ROLE_OF[role],
                    part=PART_OF[name],
                    notes=[_title(metric, role) + (f", {last['note']}" if last["note"] else "")],
                )
            )
            if name == "backdoored" and math.isfinite(last["value"]) and axis.limits is not None:
                text = f"{last['value']:.1f}%" if axis.unit else f"{last['value']:.2f}"
                values.append(Annotation(axis.limits[1], -float(line), text))
    lines = Axis(
        "",
        limits=(0.5 - len(pairs), 0.5),
        ticks=tuple((-float(line), _title(*pair)) for line, pair in enumerate(pairs)),
    )
    return Panel(axis, lines, tuple(series), annotations=tuple(values), height=0.08 + 0.26 * len(pairs))


def _reading(table: pd.DataFrame) -> str:
    return READING + OFF_FLOOR if (table["metric"] == "asr_off_floor").any() else READING


def _pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Metric and role of what was measured, in the order of reading."""
    known = table[table["value"].notna()]
    there = set(zip(known["metric"], known["role"], strict=True))
    return [(metric, role) for metric in METRICS for role in (*ROLES, "") if (metric, role) in there]


def _in_percent(table: pd.DataFrame) -> pd.DataFrame:
    rate = table["metric"] != "perplexity"
    columns = ["value", "low", "high"]
    return table.assign(**{name: table[name].where(~rate, 100 * table[name]) for name in columns})


def _perplexity(rows: pd.DataFrame) -> Axis:
    """From 1, the perplexity of a model that is always certain."""
    top = max(rows["value"].max(), rows["high"].max())
    return Axis("Perplexity", limits=(1.0, 1.0 + nice(top - 1.0)))


def _title(metric: str, role: str) -> str:
    return SHORT[metric] if role in ("", OWN_ROLE.get(metric)) else f"{SHORT[metric]}, {theme.name(role)}"
