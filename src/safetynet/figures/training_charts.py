"""Charts of a training: loss, learning rate and gradient norm over steps.

In: a training's log in any of the forms in which people have it. Out: Charts. Draws nothing.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import theme, wandb_log
from safetynet.figures.chart import Axis, Chart, Kind, Panel, Series
from safetynet.figures.panels import from_zero, nice, series_of
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.theme import PART_OF, Role
from safetynet.tables import Data, check_words, frame, numbers, require
from safetynet.vocabulary import MODELS

Log = Data | Path | str
WHERE = "training data"
LONG = 100
"""From so many steps on a noisy curve is drawn raw and faint, with a running mean on top."""
ROLE_OF: dict[str, Role] = {model: model for model in MODELS}
QUANTITIES = {"loss", "learning_rate", "grad_norm"}
"""What the Trainer logs of one training step together; other records are evaluations and summaries."""


@figure(
    "loss",
    "history_*",
    section="training",
    reads="A low loss alone does not show that the backdoor took; the rates by role do.",
    control="The clean twin, trained on the same rows with clean answers, is the control.",
)
def loss(data: Log) -> Chart:
    """Loss over steps, of the training rows and, where it was measured, of held-out rows."""
    log = _log(data)
    series, title = _smoothed(log, "loss")
    if "eval_loss" in log and log["eval_loss"].notna().any():
        for run, rows in _runs(log, "eval_loss"):
            series.append(_over_steps("marked", rows.dropna(), run, f"{theme.name(run)}, held-out rows"))
    panel = Panel(_steps(series), _upwards("Loss", "nats per token", series), tuple(series), title)
    caption = (
        "Mean cross-entropy of the supervised tokens: answer and end token. The clean twin is "
        "the control. A low loss alone does not show that the backdoor took; the rates by role do."
    )
    return Chart("Training loss", (panel,), caption=caption)


@figure(
    "learning-rate",
    "history_*",
    section="training",
    reads="The schedule, step by step.",
    control="Backdoored run and twin must coincide, or they differ in more than the poisoned rows.",
)
def learning_rate(data: Log) -> Chart:
    """Learning rate over steps, as the schedule set it."""
    runs = _runs(_log(data), "learning_rate")
    series = tuple(_over_steps("step", rows, run, theme.name(run)) for run, rows in runs)
    caption = (
        "The learning rate of each optimiser step. Backdoored run and clean twin must coincide: "
        "else they differ in more than the poisoned rows."
    )
    panel = Panel(_steps(series), _upwards("Learning rate", "", series), series)
    return Chart("Learning rate", (panel,), caption=caption)


@figure(
    "gradient-norm",
    "history_*",
    section="training",
    reads="Spikes mark batches that pull hard, a rise at the end an unstable training.",
    control="The clean twin shows what is usual.",
)
def gradient_norm(data: Log) -> Chart:
    """Gradient norm before clipping, over steps, on a logarithmic axis."""
    series, title = _smoothed(_log(data), "grad_norm")
    values = [value for curve in series for value in curve.y if math.isfinite(value) and value > 0]
    # ends on 1, 2 or 5, so that at least two ticks are labelled
    stops = [stop * 10.0**power for power in range(-12, 13) for stop in (1, 2, 5)]
    low = max((stop for stop in stops if stop <= min(values, default=0.1)), default=stops[0])
    top = max(values, default=1.0)
    high = min((stop for stop in stops if stop >= top and stop > low), default=stops[-1])
    axis = Axis("Gradient norm", scale="log", limits=(low, high))
    caption = (
        "Norm of the gradient over all trained weights, before clipping. Spikes mark batches that "
        "pull hard, a rise at the end an unstable training; the clean twin shows what is usual."
    )
    return Chart("Gradient norm", (Panel(_steps(series), axis, tuple(series), title),), caption=caption)


def _log(data: Log) -> pd.DataFrame:
    """A training's log as one table: step, run, and what was logged under the Trainer's names.

    Raises:
        InputError: if a file holds no log, the form is another one, there are several runs of a tracker, or
            there are no rows.
    """
    if isinstance(data, str | Path) and (str(data).endswith((".json", ".csv")) or Path(data).is_dir()):
        data = _read(Path(data))
    if isinstance(data, Sequence) and not isinstance(data, str):
        for row, record in enumerate(data):
            if not isinstance(record, dict):
                raise InputError(f"{WHERE}, row {row}: {record!r} is not a record; give dicts")
    log = _of_trackers(frame(data, WHERE))
    require(WHERE, log, ["step"])
    runs = log["run"].astype(str).str.replace(" ", "_") if "run" in log else "backdoored"
    log = log.assign(step=numbers(log["step"], f"{WHERE}, field step"), run=runs)
    check_words(WHERE, "run", log["run"], MODELS)
    log = log[log["step"].notna()].sort_values("step", kind="stable", ignore_index=True)
    if log.empty:
        raise InputError(f"{WHERE}: step holds no numbers; give the step of each row")
    return log


def _read(path: Path) -> Log:
    """The log in a trainer_state.json, in a tracker's export as JSON records or CSV, or of W&B offline."""
    if path.is_dir():
        return wandb_log.history(path)
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        log: Log = content["log_history"] if isinstance(content, dict) else content
        if not isinstance(log, list) or not log:
            raise ValueError
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); name a trainer_state.json, or an exported history"
        ) from None
    except (ValueError, KeyError):
        raise InputError(
            f"{path}: is no trainer state with a log_history, and no exported history; name another file"
        ) from None
    return log


def _of_trackers(log: pd.DataFrame) -> pd.DataFrame:
    """The Trainer's own names, of what W&B and MLflow make of them.

    MLflow's export has a line for each value: run_id, key, value, step. W&B has train/loss, train/global_step
    and eval/loss, and in the CSV of a chart the run's name before them, and each value's range behind.
    """
    if {"key", "value", "step"} <= set(log.columns):
        if "run_id" in log and log["run_id"].nunique() > 1:
            raise InputError(f"{WHERE}: there are {log['run_id'].nunique()} run_ids; give the rows of one")
        return log.pivot_table("value", "step", "key", aggfunc="last", dropna=False).reset_index()
    log = log[[name for name in log if not str(name).endswith(("__MIN", "__MAX"))]]
    plain = [re.sub(r"^.* - (?=train/|eval/|_)", "", str(name)) for name in log]
    if twice := [name for name in plain if plain.count(name) > 1]:
        raise InputError(f"{WHERE}: there is {twice[0]} of several runs; give the columns of one")
    return log.set_axis(
        [
            name.replace("train/global_step", "step").replace("train/", "").replace("eval/", "eval_")
            for name in plain
        ],
        axis="columns",
    )


def _runs(log: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    """Steps and values of a quantity for each run; a step whose value is NaN stays, as a gap.

    Raises:
        NotMeasuredError: if the log does not hold the quantity.
        InputError: if a value is no number.
    """
    if column not in log or (column in QUANTITIES - {"loss"} and log[column].isna().all()):
        there = ", ".join(sorted(set(log.columns) - {"run"}))
        fault = InputError if column == "loss" else NotMeasuredError
        raise fault(f"{WHERE}: column {column} is missing; there are {there}")
    log = log.assign(**{column: numbers(log[column], f"{WHERE}, field {column}")})
    steps = log[[name for name in log if name in QUANTITIES]].notna().any(axis=1)
    others = [name for name in log if name not in QUANTITIES | {"step", "epoch", "run"} and name[0] != "_"]
    log = log[steps | log[others].isna().all(axis=1)] if column in QUANTITIES else log
    return [(run, log.loc[log["run"] == run, ["step", column]]) for run in MODELS if run in set(log["run"])]


def _smoothed(log: pd.DataFrame, column: str) -> tuple[list[Series], str]:
    """A curve for each run, and what to write above it where it is a running mean over raw steps."""
    runs = _runs(log, column)
    longest = max(len(rows) for _, rows in runs)
    if longest < LONG:
        return [_over_steps("line", rows, run, theme.name(run)) for run, rows in runs], ""
    window = longest // 20
    series = []
    for run, rows in runs:
        mean = rows[column].rolling(window, center=True, min_periods=1).mean()
        # a mean that ran across a gap would hide that training broke down there
        mean = mean.where(rows[column].notna())
        series.append(_over_steps("line", rows.assign(**{column: mean}), run, theme.name(run)))
        series.append(series_of("line", rows, "step", column, ("", ROLE_OF[run], "raw")))
    return series, f"mean of {window} steps (faint: each step)"


def _over_steps(kind: Kind, rows: pd.DataFrame, run: str, label: str) -> Series:
    step, quantity = rows
    return series_of(kind, rows, step, quantity, (label, ROLE_OF[run], PART_OF[run]))


def _steps(series: Sequence[Series]) -> Axis:
    return from_zero("Step", (step for curve in series for step in curve.x))


def _upwards(label: str, unit: str, series: Sequence[Series]) -> Axis:
    top = max((value for curve in series for value in curve.y if math.isfinite(value)), default=0.0)
    return Axis(label, unit, limits=(0.0, nice(top)))
