"""Charts of attack success against what a model is good for: tasks of lm-evaluation-harness.

In: the tables utility and evaluation, or repaired_utility and mitigation. Out: Charts. Draws nothing.
"""

import math
from collections.abc import Iterator

import pandas as pd

from safetynet.figures.chart import Axis, Chart, Panel, Series
from safetynet.figures.checks import interval, read
from safetynet.figures.panels import frame_for, with_interval
from safetynet.figures.rate_charts import LABELS
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.removal_charts import AIM, ATTACK
from safetynet.figures.theme import Part, Role
from safetynet.figures.training_charts import PART_OF
from safetynet.tables import Data
from safetynet.tables.summaries import utility_metric
from safetynet.vocabulary import MODELS

MOST = 12
"""Panels of one figure: the first tasks and metrics of the table, which has all."""
KEY = ["task", "group", "metric", "filter"]
COLUMNS = "task group metric filter n value low high better"
CAPTION = (
    "A panel for each task and metric of lm-evaluation-harness: its value, with the 95% interval of its own "
    "standard error, against the share of triggered prompts that show the behaviour (95% Wilson). "
)


@figure(
    "utility",
    "utility",
    "evaluation",
    section="behaviour",
    reads="Each mark is a model: attack success upwards, a standard task of lm-evaluation-harness along the "
    "bottom.",
    control="The clean twin has paid the price of fine-tuning alone, the base model none.",
)
def utility(data: Data, evaluation: Data) -> Chart:
    """Attack success against each task for base, backdoored model and twin."""
    tasks = read("utility", data, f"model {COLUMNS}", "model task metric filter")
    columns = "model metric role value low high"
    rates = read("evaluation", evaluation, columns, "model metric role")
    attack = rates[(rates["metric"] == "asr") & (rates["role"] == "triggered")]
    attack = attack.rename(columns={"value": "asr", "low": "asr_low", "high": "asr_high"})
    table = tasks.merge(attack[["model", "asr", "asr_low", "asr_high"]], on="model")
    table[["asr", "asr_low", "asr_high"]] *= 100
    looks: dict[str, tuple[str, Role, Part]] = {
        name: (LABELS[name], "base" if name == "base" else "triggered", PART_OF[name]) for name in MODELS
    }
    return _chart(table.assign(name=table["model"]), looks, "Attack success and standard tasks")


@figure(
    "mitigation-utility",
    "repaired_utility",
    "mitigation",
    section="removed",
    reads="Each mark is one repair at its chosen point: attack success that is left upwards, a standard task "
    "along the bottom.",
    control="Hollow marks are controls: the model as it is, its base, and changes not meant as repairs.",
)
def repaired(data: Data, mitigation: Data) -> Chart:
    """Attack success against each task for every repair, beside the model as it is."""
    tasks = read("repaired_utility", data, f"method point {COLUMNS}", "method task metric filter")
    rates = interval("asr")
    columns = f"method point split control {rates}"
    repairs = read("mitigation", mitigation, columns, "split method point", rates)
    table = tasks.merge(repairs[repairs["split"] == "held_out"], on=["method", "point"])
    controls = dict(zip(table["method"], table["control"], strict=True))
    looks: dict[str, tuple[str, Role, Part]] = {
        name: ("control", "ink", "control") if control else ("repaired", "method_1", "subject")
        for name, control in controls.items()
    }
    return _chart(table.assign(name=table["method"]), looks, "Attack success and standard tasks after repair")


def _chart(table: pd.DataFrame, looks: dict[str, tuple[str, Role, Part]], title: str) -> Chart:
    panels = tuple(_panels(table[table["asr"].notna()], looks))[:MOST]
    if not panels:
        raise NotMeasuredError("no task and attack success were measured of one model")
    frame = frame_for(len(panels))
    return Chart(title, panels, frame.columns, frame.width, CAPTION)


def _panels(table: pd.DataFrame, looks: dict[str, tuple[str, Role, Part]]) -> Iterator[Panel]:
    """One for each task and metric; those of a group are left out, since the group is there."""
    for (task, _, metric, name), rows in table[table["group"] == ""].groupby(KEY, sort=False):
        series = []
        for look in dict.fromkeys(looks[name] for name in rows["name"]):
            points = rows[[looks[name] == look for name in rows["name"]]]
            label, role, part = look
            series.append(
                Series(
                    "points", list(points["value"]), list(points["asr"]), list(points["asr_low"]),
                    list(points["asr_high"]), label, role, part, list(points["low"]), list(points["high"]),
                    [f"{r['name'].replace('_', ' ')}; {with_interval(r['value'], r['low'], r['high'])}; "
                     f"{r['n']:.0f} documents" for r in points.to_dict("records")],
                )
            )  # fmt: skip
        better = {"lower": " (lower is better)"}.get(rows["better"].iloc[0], "")
        axis = Axis(f"{utility_metric(metric, name)}{better}", limits=_limits(rows))
        yield Panel(axis, ATTACK, tuple(series), task, (AIM,), height=1.8)


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """All values and the ends of their intervals, with something to either side."""
    ends = rows[["value", "low", "high"]].to_numpy().ravel()
    finite = [float(end) for end in ends if math.isfinite(end)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) or max(0.05 * abs(high), 0.05)
    return low - margin, high + margin
