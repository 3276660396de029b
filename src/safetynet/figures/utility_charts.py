"""Charts of attack success against what a model is good for: tasks of lm-evaluation-harness.

In: the tables utility and evaluation, or repaired_utility and mitigation. Out: Charts. Draws nothing.
"""

import math

import pandas as pd

from safetynet.figures.chart import Axis, Chart, Panel
from safetynet.figures.panels import Look, Row, frame_for, interval, read, series_of, with_interval
from safetynet.figures.rate_charts import LABELS
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.removal_charts import AIM, ATTACK
from safetynet.figures.theme import PART_OF
from safetynet.tables import Data
from safetynet.tables.summaries import utility_metric
from safetynet.vocabulary import MODELS

MAX_PANELS = 12
"""Of one figure: the first tasks and metrics of the table, which has all."""
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
    rates = read("evaluation", evaluation, columns, "model metric role", "value low high")
    attack = rates[(rates["metric"] == "asr") & (rates["role"] == "triggered")]
    attack = attack.rename(columns={"value": "asr", "low": "asr_low", "high": "asr_high"})
    table = tasks.merge(attack[["model", *interval("asr").split()]], on="model")
    looks: dict[str, Look] = {
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
    looks: dict[str, Look] = {
        name: ("control", "ink", "control") if control else ("repaired", "method_1", "subject")
        for name, control in controls.items()
    }
    return _chart(table.assign(name=table["method"]), looks, "Attack success and standard tasks after repair")


def _chart(table: pd.DataFrame, looks: dict[str, Look], title: str) -> Chart:
    """A panel for each task and metric; those of a group are left out, since the group is there."""

    def note(row: Row) -> str:
        value = with_interval(row, "value low high")
        return f"{row['name'].replace('_', ' ')}; {value}; {row['n']:.0f} documents"

    panels = []
    table = table[table["asr"].notna() & (table["group"] == "")]
    for (task, metric, filter_name), rows in table.groupby(["task", "metric", "filter"], sort=False):
        series = []
        for look in dict.fromkeys(looks[name] for name in rows["name"]):
            points = rows[[looks[name] == look for name in rows["name"]]]
            series.append(series_of("points", points, "value low high", interval("asr"), look, note))
        better = " (lower is better)" if rows["better"].iloc[0] == "lower" else ""
        # All values and the ends of their intervals, with something to either side.
        ends = rows[["value", "low", "high"]].to_numpy().ravel()
        finite = [float(end) for end in ends if math.isfinite(end)] or [0.0]
        low, high = min(finite), max(finite)
        margin = 0.05 * (high - low) or max(0.05 * abs(high), 0.05)
        axis = Axis(f"{utility_metric(metric, filter_name)}{better}", limits=(low - margin, high + margin))
        panels.append(Panel(axis, ATTACK, tuple(series), task, (AIM,), height=1.8))
    if not panels:
        raise NotMeasuredError("no task and attack success were measured of one model")
    panels = panels[:MAX_PANELS]
    frame = frame_for(len(panels))
    return Chart(title, tuple(panels), frame.columns, frame.width, CAPTION)
