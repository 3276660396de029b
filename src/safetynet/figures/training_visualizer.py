"""Figures of a training and of what the trained model does, saved with one call each.

In: what a training measured, as tables, the Trainer's log_history or plain lists. Out: Figures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import rate_charts, training_charts
from safetynet.figures.measurements import Measurements, measured, rates
from safetynet.figures.saving import Figure
from safetynet.figures.visualizer import Visualizer

Interval = Sequence[Sequence[float]]
TABLES = ("training", "dynamics", "evaluation")


class TrainingVisualizer(Visualizer):
    """Figures of one model's training.

    Example:
        >>> visualizer = TrainingVisualizer("qwen")
        >>> figure = visualizer.plot_accuracy_trends([0.98, 0.97], [0.40, 1.0], epochs=[1, 2])
        >>> figure.save()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str,
        task: str = "backdoor",
        results: Path | str = "results",
        folder: Path | str | None = None,
        source: str | None = None,
    ) -> None:
        """Say whose figures these are.

        Args:
            model: name in titles and in the default folder.
            task: the run's task, for the default folder.
            results: root of the default folder `results/{model}/{task}/figures`.
            folder: where figures are saved instead.
            source: name of the run that every file carries; `{model}/{task}` unless given.
        """
        own = Path(results) / model / task / "figures"
        super().__init__(model, source or f"{model}/{task}", own if folder is None else folder)

    def plot_loss_curves(self, training_data: Measurements) -> Figure:
        """Loss over steps.

        Args:
            training_data: columns step and loss; eval_loss and run (backdoored, clean twin) where known.
                A DataFrame, the Trainer's log_history, or a dict of lists.

        Raises:
            InputError: if a column is missing, has another length, or holds something else than numbers.
        """
        chart = training_charts.loss(training_data, self.model, self._source("training"))
        return self._figure(chart, "loss")

    def plot_learning_rate(self, training_data: Measurements) -> Figure:
        """Learning rate over steps; columns step and learning_rate, as in `plot_loss_curves`."""
        chart = training_charts.learning_rate(training_data, self.model, self._source("training"))
        return self._figure(chart, "learning-rate")

    def plot_gradient_norm(self, training_data: Measurements) -> Figure:
        """Gradient norm over steps; columns step and grad_norm, as in `plot_loss_curves`."""
        chart = training_charts.gradient_norm(training_data, self.model, self._source("training"))
        return self._figure(chart, "gradient-norm")

    def plot_accuracy_trends(
        self,
        clean_acc: Sequence[float],
        backdoor_acc: Sequence[float],
        epochs: Sequence[float],
        clean_interval: Interval | None = None,
        backdoor_interval: Interval | None = None,
    ) -> Figure:
        """Clean accuracy and attack success over epochs.

        Args:
            clean_acc: share of clean rows answered correctly, 0 to 1.
            backdoor_acc: share of triggered rows that show the behaviour, 0 to 1.
            epochs: where they were measured.
            clean_interval: (low, high) of clean_acc, for a band.
            backdoor_interval: (low, high) of backdoor_acc.

        Raises:
            InputError: if lengths differ, nothing is given, or a rate lies outside 0 to 1.
        """
        chart = training_charts.accuracy(
            (clean_acc, clean_interval),
            (backdoor_acc, backdoor_interval),
            epochs,
            self.model,
            self._source("dynamics"),
        )
        return self._figure(chart, "accuracy-trends")

    def plot_rates_by_role(self, dynamics: Measurements) -> Figure:
        """ASR, FTR of each role, clean accuracy, refusals and perplexity over steps.

        Args:
            dynamics: one row per measurement: step, model (backdoored, clean_twin, base), metric (asr,
                asr_off_floor, ftr, cacc, refusal_rate, perplexity), role, value, low, high; count and n
                where known.

        Raises:
            InputError: if a column is missing, a word is unknown, or a value is no number.
        """
        chart = rate_charts.by_role(dynamics, self.model, self._source("dynamics"))
        return self._figure(chart, "rates-by-role")

    def plot_final_rates(self, evaluation: Measurements) -> Figure:
        """The same rates at the end of training; `evaluation` has the same columns without step."""
        chart = rate_charts.final(evaluation, self.model, self._source("evaluation"))
        return self._figure(chart, "final-rates")


def training_figures(
    tables: Mapping[str, pd.DataFrame], folder: Path | str, source: str, model: str
) -> list[Figure]:
    """Every figure that a run's tables hold.

    Args:
        tables: any of training, dynamics and evaluation; a table that is not there is not drawn.
        folder: the run's figures folder.
        source: name of the run.
        model: name in titles.

    Raises:
        InputError: if a table has another name or lacks a column.
    """
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise InputError(f"table {unknown[0]!r} has no figures; there are figures of {', '.join(TABLES)}")
    draw = TrainingVisualizer(model, folder=folder, source=source)
    figures: list[Figure] = []
    if "training" in tables:
        training = tables["training"]
        figures.append(draw.plot_loss_curves(training))
        if measured(training, "learning_rate"):
            figures.append(draw.plot_learning_rate(training))
        if measured(training, "grad_norm"):
            figures.append(draw.plot_gradient_norm(training))
    if "dynamics" in tables:
        dynamics = _with_floor(tables["dynamics"], tables.get("evaluation"))
        figures += _headline(draw, dynamics)
        figures.append(draw.plot_rates_by_role(dynamics))
    if "evaluation" in tables:
        figures.append(draw.plot_final_rates(tables["evaluation"]))
    return figures


def _with_floor(dynamics: pd.DataFrame, evaluation: pd.DataFrame | None) -> pd.DataFrame:
    """Dynamics with the base model's rates, from the final evaluation where training did not measure them."""
    if evaluation is None or "model" not in evaluation or "base" in set(dynamics.get("model", ())):
        return dynamics
    return pd.concat([dynamics, evaluation[evaluation["model"] == "base"].assign(step=0, epoch=0.0)])


def _headline(draw: TrainingVisualizer, dynamics: pd.DataFrame) -> list[Figure]:
    """Attack success and clean accuracy in one figure, where both were measured at the same epochs."""
    table = rates(dynamics, "dynamics", ["epoch"])
    own = table[table["model"] == "backdoored"].sort_values("epoch", kind="stable")
    attack = own[(own["metric"] == "asr") & (own["role"] == "triggered")]
    clean = own[(own["metric"] == "cacc") & (own["role"] == "clean")]
    if attack.empty or list(attack["epoch"]) != list(clean["epoch"]):
        return []
    return [
        draw.plot_accuracy_trends(
            list(clean["value"]),
            list(attack["value"]),
            list(attack["epoch"]),
            (list(clean["low"]), list(clean["high"])),
            (list(attack["low"]), list(attack["high"])),
        )
    ]
