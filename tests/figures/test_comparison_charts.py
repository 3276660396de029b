"""Figures that put groups side by side: what is drawn, from tables made by hand."""

from functools import partial

import pandas as pd
import pytest

from safetynet import figures
from safetynet.errors import InputError
from safetynet.figures import FIGURES, figures_of, save_all

draw = partial(figures.draw, run="a comparison")
NAN = float("nan")
MEAN = {"value": 0.6, "low": 0.5, "high": 0.7, "seeds": 3}
LONE = {"value": 0.4, "low": NAN, "high": NAN, "seeds": 1}


def both(**more):
    return [{"group": "qwen"} | MEAN | more, {"group": "gemma"} | LONE | more]


@pytest.fixture
def compared():
    """The tables of two groups: qwen with three seeds, gemma with one."""
    speeds, speeds_by_group = [], []
    for threshold in (0.5, 0.95):
        never = threshold == 0.95
        for unit, times in (("steps", 100), ("rows", 320)):
            for line in both(threshold=threshold, unit=unit, twin=0.02):
                scaled = {name: times * line[name] for name in ("value", "low", "high")}
                cut = {"censored": 1, "high": NAN} if never and line["group"] == "gemma" else {"censored": 0}
                speeds_by_group.append(line | scaled | cut)
        for run, group in (("q0", "qwen"), ("q1", "qwen"), ("q2", "qwen"), ("g0", "gemma")):
            cut = never and group == "gemma"
            known = {"group": group, "run": run, "threshold": threshold}
            speeds.append(known | {"steps": NAN if cut else 60.0, "rows": NAN if cut else 192.0})
    directions = ("remove", "induce")
    places = [{"view": view, "direction": one} for view in ("layer", "attention") for one in directions]
    layers = [{"layer": layer, "depth": layer / 5} for layer in range(6)]
    control = {"control": "random", "control_value": 0.3}
    centre = {"centre": 0.3, "centre_low": 0.2, "centre_high": 0.4, "spread": 0.2, "spread_low": 0.1}
    centre |= {"spread_high": 0.3, "centre_random": 0.5, "spread_random": 0.34}
    runs = [("qwen", "q0"), ("qwen", "q1"), ("gemma", "g0")]
    pairs = [("qwen", "qwen", 3), ("qwen", "gemma", 1)]
    made = {
        "speeds": speeds,
        "speeds_by_group": speeds_by_group,
        "profiles": [
            {"group": group, "run": run, "effect": 0.5} | place | layer
            for group, run in runs for place in places for layer in layers
        ],
        "profiles_by_group": [
            line for place in places for layer in layers for line in both(**place, **layer, **control)
        ],
        "centres_by_group": [line | centre for place in places for line in both(**place)],
        "shares": [
            {"group": group, "run": run, "direction": "remove", "part": part, "share": 0.5}
            for group, run in runs for part in ("attention", "mlp")
        ],
        "shares_by_group": [
            line
            for part in ("attention", "mlp")
            for line in both(direction="remove", part=part, control=0.01)
        ],
        "agreement": [
            {"view": "layer", "direction": "remove", "first": first, "second": second, "rho": 0.9, "low": NAN}
            | {"high": NAN, "pairs": 3, "seeds": seeds, "p": 0.01, "q": 0.02}
            for first, second, seeds in pairs
        ],
        "outcomes_by_group": [
            line for measure in ("ASR", "AUROC") for line in both(
                aspect="planted", measure=measure, control=0.0, control_low=0.0, control_high=0.1,
                control_is="base model",
            )
        ],
    }  # fmt: skip
    return {name: pd.DataFrame(lines) for name, lines in made.items()}


OF_TABLE = {kind.tables[0]: name for name, kind in FIGURES.items() if name.startswith("compare")}


def plot(name, tables):
    figure = OF_TABLE[name]
    return draw(figure, *(tables[table] for table in FIGURES[figure].tables))


@pytest.mark.parametrize("name", OF_TABLE)
def test_every_figure_says_how_to_read_it_its_control_and_its_source(compared, name):
    chart = plot(name, compared).chart
    assert "control" in chart.caption
    assert "seed" in chart.caption
    assert chart.caption.endswith(".")
    assert "  " not in chart.caption
    assert str(chart.source) == f"run a comparison, table {name}"


@pytest.mark.parametrize("name", OF_TABLE)
def test_an_empty_table_a_missing_column_and_a_strange_word_are_refused(compared, name):
    with pytest.raises(InputError, match=f"^{name}: there are no rows; give at least one$"):
        plot(name, compared | {name: compared[name].head(0)})
    column = compared[name].columns[-1]
    with pytest.raises(InputError, match=f"^{name}: column {column} is missing; there are "):
        plot(name, compared | {name: compared[name].drop(columns=column)})
    words = [word for word in ("view", "direction", "unit") if word in compared[name]]
    if words:
        with pytest.raises(InputError, match=f"^{name}, row 0: {words[0]} is 'odd'; allowed are "):
            plot(name, compared | {name: compared[name].assign(**{words[0]: "odd"})})


def test_a_group_measured_twice_is_refused(compared):
    twice = pd.concat([compared["outcomes_by_group"]] * 2)
    with pytest.raises(
        InputError, match="outcomes_by_group: group qwen, measure ASR is there more than once"
    ):
        draw("compare-outcomes", twice)


def test_a_lone_seed_is_told_on_its_line_and_has_no_interval(compared):
    [panel, _] = plot("outcomes_by_group", compared).chart.panels
    assert [text for _, text in panel.y.ticks] == ["qwen", "gemma (1 seed)"]
    means = panel.series[0]
    assert means.x == (60.0, 40.0)
    assert means.left[0] == 50.0
    assert means.left[1] != means.left[1]  # NaN draws nothing


def test_speed_has_a_panel_for_each_unit_and_threshold_and_marks_what_was_never_reached(compared):
    chart = plot("speeds_by_group", compared).chart
    assert [(p.x.label, p.title) for p in chart.panels] == [
        (label, f"until ASR {threshold}%") for label in ("Steps", "Poisoned rows") for threshold in (50, 95)
    ]
    late = {series.label: series for series in chart.panels[1].series}
    assert late["not reached by every seed"].x == (40.0,)
    assert late["not reached by every seed"].part == "control"
    assert late["mean over seeds"].x == (60.0,)
    assert len(late["one seed"].x) == 3
    assert "clean twin, which reaches at most 2%" in chart.caption


def test_profiles_have_a_panel_for_each_group_with_band_control_and_single_seeds(compared):
    chart = plot("profiles_by_group", compared).chart
    assert [panel.title for panel in chart.panels] == ["qwen", "gemma (one seed)"]
    drawn = chart.panels[0].series
    assert [s.label for s in drawn if s.part == "subject"] == ["remove", "induce"]
    assert [s.label for s in drawn if s.part == "control"] == [
        "remove, highest control",
        "induce, highest control",
    ]
    assert sum(s.part == "raw" for s in drawn) == 4  # two seeds, two directions
    assert drawn[0].low == (0.5,) * 6
    assert chart.panels[0].x.limits == (0.0, 1.0)


def test_agreement_is_symmetric_and_claims_nothing_of_a_lone_seed(compared):
    [panel] = plot("agreement", compared).chart.panels
    grid = panel.grid
    assert (grid.columns, grid.rows) == (["qwen", "gemma"], ["gemma", "qwen"])
    assert [list(row) for row in grid.texts] == [["0.9", ""], ["0.9*", "0.9"]]


def test_components_are_shares_in_percent(compared):
    [panel] = plot("shares_by_group", compared).chart.panels
    assert {s.label for s in panel.series if s.part == "subject"} == {"attention", "MLP"}
    assert panel.series[0].x == (60.0, 40.0)
    assert panel.x.text == "Share of attention and MLP (%)"


def test_only_what_the_tables_hold_is_drawn_in_all_formats(compared, tmp_path):
    few = {"outcomes_by_group": compared["outcomes_by_group"]}
    drawn, faults = figures_of(few, tmp_path, "few")
    assert faults == []
    assert {path.name for path in save_all(drawn)} == {
        f"compare-outcomes.{suffix}" for suffix in ("png", "pdf", "svg", "html", "csv")
    } | {"plotly.min.js"}
