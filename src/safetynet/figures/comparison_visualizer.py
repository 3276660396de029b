"""Figures that put runs side by side, saved with one call each.

In: the tables of a comparison. Out: Figures. `draw_comparison` draws everything that the tables hold.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from safetynet.figures import comparison_charts
from safetynet.figures.chart import Source
from safetynet.figures.measurements import Measurements
from safetynet.figures.saving import Figure


class ComparisonVisualizer:
    """Figures of a comparison.

    Every method takes DataFrames, lists of records or dicts of lists, and raises InputError where a column is
    missing, a word is unknown, a value is no number, or there are no rows.

    Example:
        >>> visualizer = ComparisonVisualizer("two families")
        >>> group = {"group": ["qwen", "gemma"], "aspect": ["planted"] * 2, "measure": ["ASR"] * 2}
        >>> group |= {"value": [0.99, 0.97], "low": [0.97, 0.95], "high": [1.0, 0.99], "seeds": [3, 3]}
        >>> group |= {"control": [0.0, 0.0], "control_low": [0.0, 0.0], "control_high": [0.02, 0.02]}
        >>> group |= {"control_is": ["base model"] * 2}
        >>> visualizer.plot_outcomes(group).save()  # doctest: +SKIP
    """

    def __init__(self, name: str, folder: Path | str | None = None) -> None:
        """Say which comparison this is.

        Args:
            name: that every file carries.
            folder: where figures are saved; `results/comparison/figures` unless given.
        """
        self.name = name
        self.folder = Path("results/comparison/figures") if folder is None else Path(folder)

    def plot_speed(self, by_group: Measurements, by_run: Measurements) -> Figure:
        """Steps and poisoned rows until ASR 50% and 95%.

        Args:
            by_group: group, threshold, unit (steps, rows), value, low, high, seeds, censored and twin.
            by_run: group, run, threshold, steps and rows.
        """
        chart = comparison_charts.speed(by_group, by_run, self._source("speeds_by_group"))
        return Figure(chart, "compare-speed", self.folder)

    def plot_profiles(self, by_group: Measurements, by_run: Measurements, view: str = "layer") -> Figure:
        """Effect over relative depth with bands over seeds, a panel for each group.

        Args:
            by_group: group, view, direction, layer, depth, value, low, high, seeds, control and
                control_value.
            by_run: group, run, view, direction, layer, depth and effect.
            view: layer, attention, mlp, head, expert or adapter.
        """
        chart = comparison_charts.profiles(by_group, by_run, view, self._source("profiles_by_group"))
        return Figure(chart, "compare-profiles", self.folder)

    def plot_centres(self, by_group: Measurements) -> Figure:
        """Centre of the effect on relative depth.

        Args:
            by_group: group, view, direction, seeds, centre and spread with _low and _high, centre_random and
                spread_random.
        """
        chart = comparison_charts.centres(by_group, self._source("centres_by_group"))
        return Figure(chart, "compare-centres", self.folder)

    def plot_components(self, by_group: Measurements, by_run: Measurements) -> Figure:
        """Shares of attention, MLP and single experts.

        Args:
            by_group: group, direction, part, value, low, high, seeds and control, as fractions.
            by_run: group, run, direction, part and share.
        """
        chart = comparison_charts.components(by_group, by_run, self._source("shares_by_group"))
        return Figure(chart, "compare-components", self.folder)

    def plot_agreement(self, agreement: Measurements) -> Figure:
        """Rank correlation of layer profiles of each two groups.

        Args:
            agreement: view, direction, first, second, rho, low, high, pairs, seeds, p and q.
        """
        chart = comparison_charts.agreement(agreement, self._source("agreement"))
        return Figure(chart, "compare-agreement", self.folder)

    def plot_outcomes(self, by_group: Measurements) -> Figure:
        """How reliable, detectable and removable, each beside its control.

        Args:
            by_group: group, aspect, measure, value and control as fractions with their _low and _high (of
            value: low
                and high), seeds and control_is.
        """
        chart = comparison_charts.outcomes(by_group, self._source("outcomes_by_group"))
        return Figure(chart, "compare-outcomes", self.folder)

    def _source(self, table: str) -> Source:
        return Source(self.name, table)


def draw_comparison(tables: Mapping[str, pd.DataFrame], folder: Path | str, name: str) -> list[Path]:
    """Draw and save every figure that a comparison's tables hold.

    Args:
        tables: of `safetynet.comparison.compare`.
        folder: where the figures are saved.
        name: of the comparison.

    Returns:
        The files, five for each figure.
    """
    draw = ComparisonVisualizer(name, folder)
    figures: list[Figure] = []
    if "speeds_by_group" in tables:
        figures.append(draw.plot_speed(tables["speeds_by_group"], tables["speeds"]))
    profiles = tables.get("profiles_by_group")
    if profiles is not None and (profiles["view"] == "layer").any():
        figures.append(draw.plot_profiles(profiles, tables["profiles"]))
    if "centres_by_group" in tables:
        figures.append(draw.plot_centres(tables["centres_by_group"]))
    if "shares_by_group" in tables:
        figures.append(draw.plot_components(tables["shares_by_group"], tables["shares"]))
    if "agreement" in tables:
        figures.append(draw.plot_agreement(tables["agreement"]))
    if "outcomes_by_group" in tables:
        figures.append(draw.plot_outcomes(tables["outcomes_by_group"]))
    return [path for figure in figures for path in figure.save()]
