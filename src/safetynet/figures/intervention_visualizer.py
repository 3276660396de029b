"""Figures of what happens inside a backdoored model, saved with one call each.

In: the tables that the interventions wrote. Out: Figures.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import intervention_charts, outcome_charts, reading_charts
from safetynet.figures.intervention_tables import EFFECTS, SWEEPS, checked
from safetynet.figures.measurements import Measurements
from safetynet.figures.saving import Figure
from safetynet.figures.visualizer import Visualizer


class InterventionVisualizer(Visualizer):
    """Figures of one model's inside.

    Every method takes a DataFrame, a list of records or a dict of lists, and raises InputError where a column
    is missing, a word is unknown, a value is no number, or there are no rows.

    Example:
        >>> visualizer = InterventionVisualizer("qwen")
        >>> table = {"run": ["triggered"] * 2, "layer": [0, 1], "value": [-9.0, -0.1]}
        >>> table |= {"low": [-9.5, -0.2], "high": [-8.5, 0.0], "n": [40, 40]}
        >>> visualizer.plot_lens(table).save()  # doctest: +SKIP
    """

    def plot_layer_profile(self, effects: Measurements) -> Figure:
        """Effect by layer with its interval, its controls as bands, and the responsible layers marked.

        Args:
            effects: rows of the sweep `layer`: sweep, direction, mode, metric, component, layer, position,
                index, module, effect, low, high, n, responsible, and random, placebo and twin with their
                _low and _high (NaN where a control was not measured).
        """
        chart = intervention_charts.layer_profile(effects, self.model, self._source("effects"))
        return self._figure(chart, "intervention-layers")

    def plot_positions(self, effects: Measurements) -> Figure:
        """Effect by layer and position; columns of `plot_layer_profile`, rows of the sweep `position`."""
        return self._map(effects, "position", "intervention-positions")

    def plot_components(self, effects: Measurements) -> Figure:
        """Effect by layer and component; columns of `plot_layer_profile`, rows of the sweep `component`."""
        return self._map(effects, "component", "intervention-components")

    def plot_heads(self, effects: Measurements) -> Figure:
        """Effect by layer and head (index); columns of `plot_layer_profile`, rows of the sweep `head`."""
        return self._map(effects, "head", "intervention-heads")

    def plot_experts(self, effects: Measurements) -> Figure:
        """Effect by layer and expert (index); columns of `plot_layer_profile`, rows of the sweep `expert`."""
        return self._map(effects, "expert", "intervention-experts")

    def plot_adapters(self, effects: Measurements) -> Figure:
        """Effect by layer and adapter; columns of `plot_layer_profile`, rows of the sweep `adapter`."""
        return self._map(effects, "adapter", "intervention-adapters")

    def plot_token_map(self, tokens: Measurements) -> Figure:
        """Effect by layer and token, the first two groups.

        Args:
            tokens: group, direction, component, layer, column, token, role and effect.
        """
        chart = intervention_charts.token_map(tokens, self.model, self._source("tokens"))
        return self._figure(chart, "intervention-tokens")

    def plot_dynamics(self, dynamics: Measurements) -> Figure:
        """Effect by layer over training; as `plot_layer_profile`, with step."""
        chart = intervention_charts.dynamics(dynamics, self.model, self._source("dynamics"))
        return self._figure(chart, "intervention-dynamics")

    def plot_attention(self, attention: Measurements) -> Figure:
        """What the table's first three heads attend to on its first group, triggered beside placebo.

        Args:
            attention: layer, head, group, run, query, key, weight, query_token and key_token.
        """
        chart = reading_charts.attention(attention, self.model, self._source("attention"))
        return self._figure(chart, "intervention-attention")

    def plot_divergence(self, divergence: Measurements) -> Figure:
        """How much each head's attention changes with the trigger, beside placebo against placebo.

        Args:
            divergence: layer, head, value, low, high, n, control, control_low and control_high.
        """
        chart = reading_charts.divergence(divergence, self.model, self._source("divergence"))
        return self._figure(chart, "intervention-divergence")

    def plot_lens(self, lens: Measurements) -> Figure:
        """Log-probability of the target by layer, triggered and placebo.

        Args:
            lens: run, layer (-1 for the embedding), value, low, high and n.
        """
        chart = reading_charts.lens(lens, self.model, self._source("lens"))
        return self._figure(chart, "intervention-lens")

    def plot_lens_map(self, lens_map: Measurements) -> Figure:
        """The likeliest token after each layer and at each position, on the first two groups.

        Args:
            lens_map: group, run, layer, column, token, role, top and probability.
        """
        chart = reading_charts.lens_map(lens_map, self.model, self._source("lens_map"))
        return self._figure(chart, "intervention-lens-map")

    def plot_probes(self, probes: Measurements) -> Figure:
        """AUROC of linear probes by layer, one panel for each label.

        Args:
            probes: label (trigger, fires), layer, auroc, low, high, n, control, control_low and control_high.
        """
        chart = reading_charts.probes(probes, self.model, self._source("probes"))
        return self._figure(chart, "intervention-probes")

    def plot_drift(self, drift: Measurements) -> Figure:
        """Where the adapter changed the weights, at up to four checkpoints.

        Args:
            drift: step, layer, module, energy, top_share and overlap.
        """
        chart = outcome_charts.drift(drift, self.model, self._source("drift"))
        return self._figure(chart, "intervention-drift")

    def plot_tradeoff(self, tradeoff: Measurements) -> Figure:
        """Attack success against clean accuracy for each intervention, one panel for each split.

        Args:
            tradeoff: intervention, kind, control, sites, split, chosen, and asr and cacc as fractions with
                their _low, _high and _n.
        """
        chart = outcome_charts.tradeoff(tradeoff, self.model, self._source("tradeoff"))
        return self._figure(chart, "intervention-tradeoff")

    def _map(self, effects: Measurements, sweep: str, name: str) -> Figure:
        chart = intervention_charts.effect_map(effects, sweep, self.model, self._source("effects"))
        return self._figure(chart, name)


def intervention_figures(
    tables: Mapping[str, pd.DataFrame], folder: Path | str, run: str, model: str
) -> list[Figure]:
    """Every figure that a run's tables hold.

    Args:
        tables: any of effects, dynamics, tokens, lens, lens_map, probes, attention, divergence, drift and
            tradeoff; a table that is not there is not drawn, nor a sweep of which effects has no row.
        folder: the run's figures folder.
        run: name of the run.
        model: name in titles.

    Raises:
        InputError: if a table has another name, lacks a column or has no rows.
    """
    draw = InterventionVisualizer(model, run, folder)
    by_sweep: dict[str, Callable[[Measurements], Figure]] = {
        "layer": draw.plot_layer_profile,
        "position": draw.plot_positions,
        "component": draw.plot_components,
        "head": draw.plot_heads,
        "expert": draw.plot_experts,
        "adapter": draw.plot_adapters,
    }
    by_table: dict[str, Callable[[Measurements], Figure]] = {
        "tokens": draw.plot_token_map,
        "dynamics": draw.plot_dynamics,
        "lens": draw.plot_lens,
        "lens_map": draw.plot_lens_map,
        "probes": draw.plot_probes,
        "attention": draw.plot_attention,
        "divergence": draw.plot_divergence,
        "drift": draw.plot_drift,
        "tradeoff": draw.plot_tradeoff,
    }
    unknown = sorted(set(tables) - {"effects", *by_table})
    if unknown:
        raise InputError(
            f"table {unknown[0]!r} has no figures; there are figures of effects, {', '.join(by_table)}"
        )
    figures: list[Figure] = []
    if "effects" in tables:
        there = set(checked(tables["effects"], EFFECTS)["sweep"])
        figures += [by_sweep[sweep](tables["effects"]) for sweep in SWEEPS if sweep in there]
    return figures + [plot(tables[name]) for name, plot in by_table.items() if name in tables]
