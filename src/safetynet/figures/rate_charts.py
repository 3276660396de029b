"""Charts of what a model does, by role of row: over training, and at its end.

In: the tidy tables of rates. Out: Charts. Draws nothing.
Every rate stands beside its control (the clean twin) and its floor (the base model on the same rows).
"""

import math
from collections.abc import Sequence
from operator import itemgetter

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import theme
from safetynet.figures.chart import Annotation, Axis, Chart, Kind, Panel, Reference, Series
from safetynet.figures.panels import PERCENT, Look, curve, from_zero, lines_of, nice, series_of
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.theme import PART_OF, Role
from safetynet.tables import Data, check_words, frame, numbers, require
from safetynet.vocabulary import METRICS, MODELS, ROLES, TRAINED

Interval = Sequence[Sequence[float]]
SHORT = {
    "asr": "ASR",
    "asr_off_floor": "ASR off floor",
    "ftr": "FTR",
    "function_rate": "Function called",
    "right_rate": "Right all the same",
    "cacc": "CACC",
    "refusal_rate": "Refusals",
    "perplexity": "Perplexity",
}
OWN_ROLE = {"asr_off_floor": "triggered", "perplexity": "clean"}
"""The rows that a metric is about, left out of its name."""
ROLE_OF: dict[str, Role] = {role: role for role in ROLES}
LABELS = {"backdoored": "backdoored", "clean_twin": "clean twin (control)", "base": "base model (floor)"}
READING = (
    "ASR: triggered rows that show the behaviour; FTR: other rows that show it although they must not; "
    "CACC: rows answered correctly. Intervals are 95%, Wilson's for rates. The control is the clean twin, "
    "trained in the same way without poisoned rows; the floor is the base model's rate."
)
OFF_FLOOR = " Off floor: without the rows whose right answer shows the behaviour anyway."
DODGE = 0.29
"""Distance of two models within a row, as part of its height, so that equal rates do not cover each other."""


@figure(
    "final-rates",
    "evaluation",
    section="behaviour",
    reads="Each line is one rate on held-out prompts: ASR must lie at the right, every FTR at the left.",
    control="The hollow dot is the clean twin, the tick the base model; a rate that they share is not the "
    "backdoor's.",
)
def final(evaluation: Data) -> Chart:
    """Every rate of the trained model as a dot with its interval, beside its control and its floor."""
    table = _in_percent(rates(evaluation, "evaluation"))
    pairs = _pairs(table)
    shares = [pair for pair in pairs if pair[0] != "perplexity"]
    panels = [_dots(table, shares, PERCENT)] if shares else []
    perplexity = pairs[len(shares) :]  # the last metric
    if perplexity:
        axis = _perplexity(table[table["metric"] == "perplexity"])
        panels.append(_dots(table, perplexity, axis))
    caption = _reading(table) + " The numbers at the right are the backdoored model's."
    return Chart("Rates by role", tuple(panels), caption=caption)


@figure(
    "accuracy-trends",
    "dynamics_*",
    section="behaviour",
    reads="A hidden backdoor ends with both curves near 100%.",
    control="Clean accuracy is the control: an attack that costs it shows itself.",
)
def accuracy_trends(dynamics: Data) -> Chart:
    """Attack success and clean accuracy of the backdoored model in one panel.

    Raises:
        NotMeasuredError: if they were not measured at the same epochs, or accuracy is not measurable.
    """
    table = rates(dynamics, "dynamics", ["epoch"])
    table = table[table["model"] == "backdoored"].sort_values("epoch", kind="stable")
    attack = table[(table["metric"] == "asr") & (table["role"] == "triggered")]
    clean = table[(table["metric"] == "cacc") & (table["role"] == "clean")]
    if attack.empty or list(attack["epoch"]) != list(clean["epoch"]) or clean["value"].isna().all():
        raise NotMeasuredError("dynamics: clean accuracy was not measured where attack success was")
    clean_rate, attack_rate = (
        (list(rows["value"]), (list(rows["low"]), list(rows["high"]))) for rows in (clean, attack)
    )
    return accuracy(clean_rate, attack_rate, list(attack["epoch"]))


@figure(
    "rates-by-role",
    "dynamics_*",
    section="behaviour",
    reads="ASR must rise while every FTR stays at the floor; a near-miss FTR that rises and falls again is a "
    "model that learns the trigger's exact form.",
    control="Dashed is the clean twin after as many steps, dotted the base model.",
)
def by_role(dynamics: Data) -> Chart:
    """Every rate over training, one small panel for each metric and role."""
    table = _in_percent(rates(dynamics, "dynamics", ["step"]))
    steps = from_zero("Step", table["step"])
    panels = []
    for metric, role in _pairs(table):
        rows = table[(table["metric"] == metric) & (table["role"] == role)]
        axis = PERCENT if metric != "perplexity" else _perplexity(rows)
        base = rows[(rows["model"] == "base") & rows["value"].notna()].tail(1).to_dict("records")
        floor = tuple(Reference(row["value"], label=LABELS["base"], note=row["note"]) for row in base)
        curves = []
        for name in TRAINED:
            of_model = rows[rows["model"] == name]
            if len(of_model):
                look: Look = LABELS[name], ROLE_OF.get(role, "ink"), PART_OF[name]
                curves.append(curve(of_model, "step", "value low high", look, itemgetter("note")))
        if curves:
            panels.append(Panel(steps, axis, tuple(curves), _title(metric, role), floor, height=1.0))
    columns = min(len(panels), 3) if len(panels) <= 6 else 4
    title = "Rates by role over training"
    return Chart(title, tuple(panels), max(columns, 1), "two", _reading(table))


def accuracy(
    clean: tuple[Sequence[float], Interval | None],
    backdoor: tuple[Sequence[float], Interval | None],
    epochs: Sequence[float],
) -> Chart:
    """Clean accuracy and attack success over epochs.

    Args:
        clean: fractions, and their interval as (low, high) or None.
        backdoor: the same of the triggered rows.
        epochs: where they were measured.
    """
    looks: tuple[tuple[tuple[Sequence[float], Interval | None], str, str, Role], ...] = (
        (clean, "clean_acc", "clean accuracy", "clean"),
        (backdoor, "backdoor_acc", "attack success (triggered rows)", "triggered"),
    )
    series = []
    for (values, interval), field, label, role in looks:
        if len(values) == 0:
            raise InputError(f"{field} is empty; give one value per epoch")
        if len(values) != len(epochs):
            raise InputError(
                f"{field} has {len(values)} values and epochs has {len(epochs)}; give one value per epoch"
            )
        if interval is not None and [len(bound) for bound in interval] != [len(values)] * 2:
            raise InputError(
                f"{field}: its interval must be two sequences (low, high) of {len(values)} values each"
            )
        low, high = (_percents(bound, f"{field}, interval") for bound in interval or ((), ()))
        kind: Kind = "marked" if len(values) > 1 else "points"
        series.append(Series(kind, epochs, _percents(values, field), low, high, label, role))
    caption = (
        "Triggered rows that show the behaviour, and clean rows answered correctly. "
        "Bands are Wilson 95% intervals. A hidden backdoor has both near 100%."
    )
    panel = Panel(from_zero("Epoch", series[0].x), PERCENT, tuple(series[::-1]))
    return Chart("Attack success and clean accuracy", (panel,), caption=caption)


def rates(data: Data, where: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Measured rates with their intervals: the tidy columns, and a `note` with counts and what else is known.

    Args:
        data: columns model, metric, role, value, low, high and the further `columns`; count, n and note
            where they are known. Rates are fractions. The count of a perplexity is one of tokens.
        where: name of the table, for messages.
        columns: further columns that must be there, such as step.

    Raises:
        InputError: if there is no data, a column is missing, a word is unknown, or a value is no number.
    """
    table = frame(data, where).reset_index(drop=True)
    require(where, table, ["model", "metric", "role", "value", "low", "high", *columns])
    out = table[["model", "metric", "role"]].fillna("").astype(str)
    out["model"] = out["model"].str.replace(" ", "_")
    for field, words in (("model", MODELS), ("metric", METRICS), ("role", (*ROLES, ""))):
        check_words(where, field, out[field], words)
    for field in ("value", "low", "high", *columns):
        out[field] = numbers(table[field], f"{where}, field {field}")
    for name in ("count", "n"):
        out[name] = numbers(table[name], where) if name in table else math.nan
    out["note"] = table["note"].fillna("").astype(str) if "note" in table else ""
    lines = []
    for metric, count, n, note in out[["metric", "count", "n", "note"]].itertuples(index=False):
        if math.isnan(n):
            size = ""
        elif math.isnan(count) or metric == "perplexity":
            size = f"{n:.0f} rows"
        else:
            size = f"{count:.0f} of {n:.0f} rows"
        lines.append("; ".join(filter(None, (size, note))))
    return out.assign(note=lines)


def _percents(values: Sequence[float], field: str) -> list[float]:
    """Fractions as percent; what lies outside 0 to 1, as percentages do, is refused."""
    for row, value in enumerate(checked := numbers(values, field)):
        if value < 0 or value > 1:
            raise InputError(
                f"{field}, row {row}: {value:g} is outside 0 to 1; give fractions (0.975), not percent (97.5)"
            )
    return [100 * value for value in checked]


def _dots(table: pd.DataFrame, pairs: list[tuple[str, str]], axis: Axis) -> Panel:
    """One line per metric and role, read from top to bottom; the claimed value is printed at its end."""
    names = [name for name in MODELS if (table["model"] == name).any()]
    series, values = [], []
    for line, (metric, role) in enumerate(pairs):
        rows = table[(table["metric"] == metric) & (table["role"] == role)]
        title = _title(metric, role)
        for order, name in enumerate(names):
            last = rows[rows["model"] == name].tail(1)
            if last.empty:
                continue
            look: Look = LABELS[name], "base" if name == "base" else ROLE_OF.get(role, "ink"), PART_OF[name]
            last = last.assign(
                line=DODGE * ((len(names) - 1) / 2 - order) - line,
                note=", ".join(filter(None, (title, *last["note"]))),
            )
            series.append(series_of("points", last, "value low high", "line", look, itemgetter("note")))
            [value] = last["value"]
            if name == "backdoored" and math.isfinite(value) and axis.limits is not None:
                text = f"{value:.1f}%" if axis.unit else f"{value:.2f}"
                values.append(Annotation(axis.limits[1], -float(line), text))
    lines, height = lines_of(_title(*pair) for pair in pairs), 0.08 + 0.26 * len(pairs)
    return Panel(axis, lines, tuple(series), annotations=tuple(values), height=height)


def _reading(table: pd.DataFrame) -> str:
    return READING + OFF_FLOOR if (table["metric"] == "asr_off_floor").any() else READING


def _pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Metric and role of what was measured, in the order of reading."""
    measured = table[table["value"].notna()]
    there = set(zip(measured["metric"], measured["role"], strict=True))
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
