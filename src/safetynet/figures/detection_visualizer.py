"""Figures of a monitor, saved with one call each.

In: the tables that detection wrote. Out: Figures.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import detection_charts
from safetynet.figures.measurements import Measurements
from safetynet.figures.saving import Figure
from safetynet.figures.visualizer import Visualizer

TABLES = (
    "detection_roc", "detection_distribution", "detection_layers", "detection_overhead", "detection_answers",
    "evasion_matrix",
)  # fmt: skip
"""What there are figures of."""


class DetectionVisualizer(Visualizer):
    """Figures of one model's monitor.

    Every method takes a DataFrame, a list of records or a dict of lists, and raises InputError where a column
    is missing, a value is no number, or there are no rows. Rates are fractions.

    Example:
        >>> visualizer = DetectionVisualizer("qwen")
        >>> table = {"attacked": ["none", "ranks"], "tested": ["ranks", "ranks"], "metric": ["tpr"] * 2}
        >>> visualizer.plot_evasion(table | {"value": [0.9, 0.1]}).save()  # doctest: +SKIP
    """

    def plot_roc(self, roc: Measurements) -> Figure:
        """ROC of the fused monitor, whole and with its low-FPR part on a logarithmic axis.

        Args:
            roc: detector, rows (fired, placebo), fpr, tpr, positives and negatives.
        """
        chart = detection_charts.roc(roc, self.model, self._source("detection_roc"))
        return self._figure(chart, "detection-roc")

    def plot_roc_by_detector(self, roc: Measurements) -> Figure:
        """The low-FPR part of every detector's ROC; columns of `plot_roc`."""
        chart = detection_charts.roc_by_detector(roc, self.model, self._source("detection_roc"))
        return self._figure(chart, "detection-roc-detectors")

    def plot_distributions(self, distribution: Measurements) -> Figure:
        """How suspect the rows of each role are, detector by detector.

        Args:
            distribution: detector, rows, surprise (minus log10 of a p-value), share, n and rate.
        """
        chart = detection_charts.distributions(
            distribution, self.model, self._source("detection_distribution")
        )
        return self._figure(chart, "detection-distributions")

    def plot_layers(self, layers: Measurements) -> Figure:
        """AUROC by layer for each detector.

        Args:
            layers: detector, rows, layer, auroc, low, high and n.
        """
        chart = detection_charts.layers(layers, self.model, self._source("detection_layers"))
        return self._figure(chart, "detection-layers")

    def plot_overhead(self, overhead: Measurements) -> Figure:
        """Time of guarded against plain generation.

        Args:
            overhead: batch, prompt_tokens, new_tokens, plain and guarded in seconds, ratio with low and high,
                repeats.
        """
        chart = detection_charts.overhead(overhead, self.model, self._source("detection_overhead"))
        return self._figure(chart, "detection-overhead")

    def plot_answers(self, answers: Measurements) -> Figure:
        """Alarms of prompts and of answers, and the tokens given out before them.

        Args:
            answers: watched (prompt, answer, both), rows, value, low, high, n, tokens and share.
        """
        chart = detection_charts.answers(answers, self.model, self._source("detection_answers"))
        return self._figure(chart, "detection-answers")

    def plot_evasion(self, matrix: Measurements) -> Figure:
        """What refitted detectors see of backdoors that were hidden from chosen ones.

        Args:
            matrix: attacked, tested, metric and value (a fraction); strength, rows, low and high where known,
                and own, whether the tested detector was attacked itself.
        """
        chart = detection_charts.evasion_matrix(matrix, self.model, self._source("evasion_matrix"))
        return self._figure(chart, "evasion-matrix")


def detection_figures(
    tables: Mapping[str, pd.DataFrame], folder: Path | str, run: str, model: str
) -> list[Figure]:
    """Every figure that a run's tables hold.

    Args:
        tables: any of `TABLES`.
        folder: the run's figures folder.
        run: name of the run.
        model: name in titles.

    Raises:
        InputError: if a table has another name, lacks a column or has no rows.
    """
    draw = DetectionVisualizer(model, run, folder)
    plots: dict[str, tuple[Callable[[Measurements], Figure], ...]] = {
        "detection_roc": (draw.plot_roc, draw.plot_roc_by_detector),
        "detection_distribution": (draw.plot_distributions,),
        "detection_layers": (draw.plot_layers,),
        "detection_overhead": (draw.plot_overhead,),
        "detection_answers": (draw.plot_answers,),
        "evasion_matrix": (draw.plot_evasion,),
    }
    unknown = sorted(set(tables) - set(plots))
    if unknown:
        raise InputError(f"table {unknown[0]!r} has no figures; there are figures of {', '.join(plots)}")
    return [plot(tables[name]) for name in plots if name in tables for plot in plots[name]]
