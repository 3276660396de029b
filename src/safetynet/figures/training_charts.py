"""Charts of a training: loss, learning rate, gradient norm, and the two rates that everybody asks for.

In: measurements in any form that `measurements` understands. Out: Charts. Draws nothing.
"""

import math
from collections.abc import Sequence

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import theme
from safetynet.figures.chart import Axis, Chart, Kind, Panel, Scale, Series, Source
from safetynet.figures.measurements import MODELS, Measurements, curve, fractions, measured
from safetynet.figures.theme import Part, Role

LONG = 100
"""From so many steps on a noisy curve is drawn raw and faint, with a running mean on top."""
ROLE_OF: dict[str, Role] = {"backdoored": "backdoored", "clean_twin": "clean_twin", "base": "base"}
PART_OF: dict[str, Part] = {"backdoored": "subject", "clean_twin": "control", "base": "floor"}
PERCENT = Axis(
    "Rows",
    unit="%",
    limits=(0.0, 100.0),
    ticks=tuple((float(value), str(value)) for value in (0, 25, 50, 75, 100)),
)


def loss(data: Measurements, model: str, source: Source) -> Chart:
    """Loss over steps, of the training rows and, where it was measured, of held-out rows."""
    series, title = _smoothed(curve(data, "loss"), "loss")
    if measured(data, "eval_loss"):
        for run, own in _runs(curve(data, "eval_loss").dropna()):
            series.append(_over_steps("marked", own, "eval_loss", run, f"{theme.name(run)}, held-out rows"))
    axis = _upwards("Loss", "nats per token", series)
    return Chart(
        title=f"Training loss, {model}",
        panels=(Panel(_along("Step", series), axis, tuple(series), title),),
        source=source,
        caption="Mean cross-entropy of the supervised tokens: answer and end token. The clean twin is "
        "the control. A low loss alone does not tell whether the backdoor took; the rates by role do.",
    )


def learning_rate(data: Measurements, model: str, source: Source) -> Chart:
    """Learning rate over steps, as the schedule set it."""
    series = tuple(
        _over_steps("step", own, "learning_rate", run, theme.name(run))
        for run, own in _runs(curve(data, "learning_rate"))
    )
    return Chart(
        title=f"Learning rate, {model}",
        panels=(Panel(_along("Step", series), _upwards("Learning rate", "", series), series),),
        source=source,
        caption="The learning rate of each optimiser step. Backdoored run and clean twin must coincide: "
        "else they differ in more than the poisoned rows.",
    )


def gradient_norm(data: Measurements, model: str, source: Source) -> Chart:
    """Gradient norm before clipping, over steps, on a logarithmic axis."""
    series, title = _smoothed(curve(data, "grad_norm"), "grad_norm")
    return Chart(
        title=f"Gradient norm, {model}",
        panels=(Panel(_along("Step", series), _decades("Gradient norm", series), tuple(series), title),),
        source=source,
        caption="Norm of the gradient over all trained weights, before clipping. Spikes mark batches that "
        "pull hard, a rise at the end an unstable training; the clean twin shows what is usual.",
    )


def accuracy(
    clean: tuple[Sequence[float], Sequence[Sequence[float]] | None],
    backdoor: tuple[Sequence[float], Sequence[Sequence[float]] | None],
    epochs: Sequence[float],
    model: str,
    source: Source,
) -> Chart:
    """Clean accuracy and attack success over epochs.

    Args:
        clean: fractions, and their interval as (low, high) or None.
        backdoor: the same of the triggered rows.
        epochs: where they were measured.
        model: name in the title.
        source: run and table.
    """
    usual = _rate(clean, epochs, "clean accuracy", "clean_acc", "clean")
    series = (_rate(backdoor, epochs, "attack success (triggered rows)", "backdoor_acc", "triggered"), usual)
    return Chart(
        title=f"Attack success and clean accuracy, {model}",
        panels=(Panel(_along("Epoch", series), PERCENT, series),),
        source=source,
        caption="Triggered rows that show the behaviour, and clean rows answered correctly. "
        "Bands are Wilson 95% intervals. A hidden backdoor has both near 100%.",
    )


def _rate(
    measured_rates: tuple[Sequence[float], Sequence[Sequence[float]] | None],
    epochs: Sequence[float],
    label: str,
    field: str,
    role: Role,
) -> Series:
    values, interval = measured_rates
    if len(values) == 0:
        raise InputError(f"{field} is empty; give one value per epoch")
    if len(values) != len(epochs):
        raise InputError(
            f"{field} has {len(values)} values and epochs has {len(epochs)}; give one value per epoch"
        )
    low, high = _bounds(interval, len(values), field)
    kind: Kind = "marked" if len(values) > 1 else "points"
    return Series(kind, epochs, fractions(values, field), low, high, label=label, role=role)


def _bounds(
    interval: Sequence[Sequence[float]] | None, length: int, field: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if interval is None:
        return (), ()
    if len(interval) != 2 or any(len(bound) != length for bound in interval):
        raise InputError(f"{field}: its interval must be two sequences (low, high) of {length} values each")
    return fractions(interval[0], f"{field}, low"), fractions(interval[1], f"{field}, high")


def _runs(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(run, table[table["run"] == run]) for run in MODELS if (table["run"] == run).any()]


def _smoothed(table: pd.DataFrame, column: str) -> tuple[list[Series], str]:
    """A curve for each run, and what to write above it where it is a running mean over raw steps."""
    runs = _runs(table)
    longest = max(len(own) for _, own in runs)
    if longest < LONG:
        return [_over_steps("line", own, column, run, theme.name(run)) for run, own in runs], ""
    window = longest // 20
    series = []
    for run, own in runs:
        mean = own[column].rolling(window, center=True, min_periods=1).mean()
        # a mean that ran across a gap would hide that training broke down there
        series.append(
            _over_steps(
                "line", own.assign(**{column: mean.where(own[column].notna())}), column, run, theme.name(run)
            )
        )
        series.append(Series("line", list(own["step"]), list(own[column]), role=ROLE_OF[run], part="raw"))
    return series, f"mean of {window} steps (faint: each step)"


def _over_steps(kind: Kind, own: pd.DataFrame, column: str, run: str, label: str) -> Series:
    return Series(
        kind, list(own["step"]), list(own[column]), label=label, role=ROLE_OF[run], part=PART_OF[run]
    )


def _along(label: str, series: Sequence[Series]) -> Axis:
    """Steps or epochs, from zero so that figures of several runs can be laid side by side."""
    top = max((value for one in series for value in one.x if math.isfinite(value)), default=0.0)
    return Axis(label, limits=(0.0, top if top > 0 else 1.0))


def _upwards(label: str, unit: str, series: Sequence[Series]) -> Axis:
    top = max((value for one in series for value in one.y if math.isfinite(value)), default=0.0)
    return Axis(label, unit, limits=(0.0, nice(top)))


def nice(top: float) -> float:
    """The next number upwards with a short name, as the end of an axis; 1 where nothing is above zero."""
    if not top > 0:
        return 1.0
    step = 10 ** math.floor(math.log10(top)) / 2
    return math.ceil(top / step - 1e-9) * step


def _decades(label: str, series: Sequence[Series]) -> Axis:
    """A logarithmic axis whose ends lie on 1, 2 or 5, so that at least two ticks are labelled."""
    scale: Scale = "log"
    values = [value for one in series for value in one.y if math.isfinite(value) and value > 0]
    if not values:
        return Axis(label, scale=scale, limits=(0.1, 1.0))
    stops = [stop * 10.0**power for power in range(-12, 13) for stop in (1, 2, 5)]
    low = max((stop for stop in stops if stop <= min(values)), default=stops[0])
    high = min((stop for stop in stops if stop >= max(values) and stop > low), default=stops[-1])
    return Axis(label, scale=scale, limits=(low, high))
