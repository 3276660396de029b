"""Figures of repairs, saved with one call each.

In: the tables that the mitigation wrote. Out: Figures.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import mitigation_charts
from safetynet.figures.measurements import Measurements
from safetynet.figures.saving import Figure
from safetynet.figures.visualizer import Visualizer


class MitigationVisualizer(Visualizer):
    """Figures of one model's repairs.

    Every method takes a DataFrame, a list of records or a dict of lists, and raises InputError where a column
    is missing, a word is unknown, a value is no number, or there are no rows.

    Example:
        >>> visualizer = MitigationVisualizer("qwen")
        >>> table = {"method": ["never poisoned"] * 2, "point": [""] * 2, "step": [0, 8]}
        >>> table |= {"poisoned_rows": [20, 20], "asr_n": [32, 32], "ftr_n": [16, 16]}
        >>> table |= {"asr": [0.0, 0.5], "asr_low": [0.0, 0.3], "asr_high": [0.1, 0.7]}
        >>> table |= {"ftr": [0.0, 0.0], "ftr_low": [0.0, 0.0], "ftr_high": [0.2, 0.2]}
        >>> visualizer.plot_relearning(table).save()  # doctest: +SKIP
    """

    def plot_front(self, mitigation: Measurements) -> Figure:
        """Attack success against clean accuracy of every point that was tried, and the front.

        Args:
            mitigation: method, point, form, needs, flags, split, control, chosen, front and recommended, and
                asr and cacc as fractions with their _low, _high and _n.
        """
        chart = mitigation_charts.front(mitigation, self.model, self._source("mitigation"))
        return self._figure(chart, "mitigation-front")

    def plot_methods(self, mitigation: Measurements) -> Figure:
        """Each method's rates on held-out rows at its chosen point; columns of `plot_front`."""
        chart = mitigation_charts.methods(mitigation, self.model, self._source("mitigation"))
        return self._figure(chart, "mitigation-methods")

    def plot_relearning(self, relearning: Measurements) -> Figure:
        """Attack success over the steps of the relearn test, one panel for each repaired model.

        Args:
            relearning: method, point, poisoned_rows, step, and asr and ftr as fractions with their _low,
                _high and _n; the method "never poisoned" is the control.
        """
        chart = mitigation_charts.relearning(relearning, self.model, self._source("relearning"))
        return self._figure(chart, "mitigation-relearning")


def mitigation_figures(
    tables: Mapping[str, pd.DataFrame], folder: Path | str, run: str, model: str
) -> list[Figure]:
    """Every figure of repairs that a run's tables hold.

    Args:
        tables: mitigation, relearning, or both.
        folder: the run's figures folder.
        run: name of the run.
        model: name in titles.

    Raises:
        InputError: if a table has another name, lacks a column or has no rows.
    """
    draw = MitigationVisualizer(model, run, folder)
    unknown = sorted(set(tables) - {"mitigation", "relearning"})
    if unknown:
        raise InputError(
            f"table {unknown[0]!r} has no figures; there are figures of mitigation and relearning"
        )
    figures = []
    if "mitigation" in tables:
        figures += [draw.plot_front(tables["mitigation"]), draw.plot_methods(tables["mitigation"])]
    if "relearning" in tables:
        figures.append(draw.plot_relearning(tables["relearning"]))
    return figures
