import itertools
import math
from functools import partial

import pandas as pd
import pytest

from safetynet import figures
from safetynet.errors import InputError
from safetynet.figures import FIGURES, figures_of, save_all

draw = partial(figures.draw, model="qwen", run="qwen/backdoor")
DETECTORS = ("ranks:last", "fused", "skyline linear_probe:last")
SETS = ("fired", "clean", "placebo", "refused", "near_miss:typo")
PAIRS = [
    (kind.tables[0], name) for name, kind in FIGURES.items() if name.startswith(("detection", "evasion"))
]
TABLES = tuple(dict.fromkeys(table for table, _ in PAIRS))


@pytest.fixture
def watched():
    """The tables of detection, made by hand."""
    roc = [
        {"detector": d, "rows": r, "fpr": fpr, "tpr": tpr, "positives": 200, "negatives": 1000}
        for d, r in itertools.product(DETECTORS, ("fired", "placebo"))
        for fpr, tpr in ((0.0, 0.0), (0.0, 0.5), (0.02, 0.9), (1.0, 1.0))
    ]
    shares = [
        {"detector": d, "rows": r, "surprise": at, "share": share, "n": 100, "rate": 0.01}
        for d, r in itertools.product(DETECTORS[:2], SETS)
        for at, share in ((0.0, 1.0), (2.0, 0.6), (7.0, 0.3), (40.0, 0.1))
    ]
    layers = [
        {"detector": "ranks:last", "rows": r, "layer": layer, "auroc": 0.6, "low": 0.5, "high": 0.7, "n": 200}
        for r, layer in itertools.product(("fired", "placebo"), range(4))
    ]
    overhead = [
        {"batch": size, "prompt_tokens": 40, "new_tokens": 24, "plain": 0.4, "guarded": 0.41, "ratio": ratio,
         "low": 0.99, "high": 1.08, "repeats": 3}
        for size, ratio in ((1, 1.05), (16, 1.02))
    ]  # fmt: skip
    answers = [
        {"watched": w, "rows": r, "value": 0.5, "low": 0.4, "high": 0.6, "n": 100, "share": 0.2,
         "tokens": 3.0 if r == "fired" else math.nan}
        for w, r in itertools.product(("prompt", "answer", "both"), SETS)
    ]  # fmt: skip
    matrix = [
        {"attacked": a, "strength": s, "tested": t, "metric": "tpr", "rows": "fired",
         "value": 0.1 if t.startswith(a) else 0.9, "low": 0.0, "high": 1.0}
        for (a, s), t in itertools.product(
            (("none", 0), ("ranks", 1), ("ranks", 10), ("mahalanobis", 1)), ("ranks:last", "mahalanobis:last")
        )
    ]  # fmt: skip
    made = (roc, shares, layers, overhead, answers, matrix)
    return {name: pd.DataFrame(lines) for name, lines in zip(TABLES, made, strict=True)}


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_every_figure_says_how_to_read_it_and_what_its_control_is(watched, table, name):
    chart = draw(name, watched[table]).chart
    assert "control" in chart.caption
    assert chart.caption.endswith(".")
    assert "  " not in chart.caption
    assert str(chart.source) == f"run qwen/backdoor, table {table}"


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_an_empty_table_and_a_missing_column_are_refused_by_table_and_column(watched, table, name):
    with pytest.raises(InputError, match=f"^{table}: there are no rows; give at least one$"):
        draw(name, watched[table].head(0))
    first = {"detection_overhead": "batch", "detection_answers": "watched", "evasion_matrix": "tested"}
    column = first.get(table, "detector")
    with pytest.raises(InputError, match=f"^{table}: column {column} is missing; there are "):
        draw(name, watched[table].drop(columns=[column]))


@pytest.mark.parametrize(("table", "column"), [("detection_roc", "tpr"), ("evasion_matrix", "value")])
def test_percents_instead_of_fractions_are_refused(watched, table, column):
    spoilt = watched[table].assign(**{column: 90.0})
    with pytest.raises(InputError, match=f"{table}.*{column}.*90.*give (a fraction|fractions)"):
        draw(dict(PAIRS)[table], spoilt)


def test_the_low_end_of_the_roc_lies_on_a_log_axis_and_what_has_no_logarithm_at_its_end(watched):
    chart = draw("detection-roc", watched["detection_roc"]).chart
    whole, low = chart.panels
    assert (whole.x.scale, low.x.scale) == ("linear", "log")
    fired = low.series[0]
    assert fired.label == "triggered, fired"
    assert fired.x[:2] == (0.1, 0.1)
    assert fired.y[:2] == (0.0, 50.0)
    assert len(low.series) == 2


def test_the_fused_monitor_comes_first_and_skylines_keep_their_name(watched):
    titles = [panel.title for panel in draw("detection-roc-detectors", watched["detection_roc"]).chart.panels]
    assert titles == ["fused", "ranks:last", "skyline linear_probe:last"]


def test_a_distribution_ends_at_the_axis_with_what_lies_beyond_and_meets_the_alarms_line(watched):
    panel = draw("detection-distributions", watched["detection_distribution"]).chart.panels[0]
    assert panel.series[0].x == (0.0, 2.0, 7.0, 8.0)
    assert panel.series[0].y[-1] == 10.0
    [line] = panel.references
    assert (line.value, line.along, line.label) == (2.0, "x", "alarm at 1%")
    assert [series.label for series in panel.series] == [
        "triggered, fired",
        "clean",
        "placebo (control)",
        "refused",
    ]


def test_overhead_is_in_percent_beside_plain_generate(watched):
    extra, times = draw("detection-overhead", watched["detection_overhead"]).chart.panels
    assert extra.series[0].x == pytest.approx((5.0, 2.0))
    assert extra.series[0].left == pytest.approx((-1.0, -1.0))
    assert extra.x.limits[0] < 0
    assert [series.label for series in times.series] == ["under the guard", "plain generate (control)"]
    assert times.series[1].x == (400.0, 400.0)


def test_tokens_until_alarm_stand_above_each_way_of_watching(watched):
    titles = [panel.title for panel in draw("detection-answers", watched["detection_answers"]).chart.panels]
    assert titles == [f"{way}: 3 tokens until alarm" for way in ("prompt", "answer", "both")]


def test_rows_that_one_way_of_watching_lacks_are_left_out_and_no_alarm_has_no_tokens(watched):
    table = watched["detection_answers"]
    table = table[(table["watched"] != "answer") | (table["rows"] != "fired")]
    table = table.assign(tokens=table["tokens"].mask(table["watched"] == "prompt"))
    panels = draw("detection-answers", table).chart.panels
    assert [panel.title for panel in panels] == ["prompt", "answer", "both: 3 tokens until alarm"]
    assert [len(panel.series) for panel in panels] == [4, 3, 4]


def test_the_evasion_matrix_brackets_a_detector_that_was_attacked_itself(watched):
    [panel] = draw("evasion-matrix", watched["evasion_matrix"]).chart.panels
    grid = panel.grid
    assert grid.rows == ["mahalanobis, 1", "ranks, 10", "ranks, 1", "none"]
    assert grid.columns == ["ranks:last", "mahalanobis:last"]
    assert grid.texts[3] == ["90", "90"]
    assert grid.texts[2] == ["[10]", "90"]
    assert grid.texts[0] == ["90", "[10]"]
    assert [text for _, text in panel.y.ticks] == grid.rows
    bare = watched["evasion_matrix"][["attacked", "tested", "metric", "value"]].drop_duplicates(
        ["attacked", "tested"]
    )
    assert draw("evasion-matrix", bare).chart.panels[0].grid.rows == ["mahalanobis", "ranks", "none"]
    known = draw("evasion-matrix", bare.assign(own=[True] + [False] * (len(bare) - 1))).chart.panels[0].grid
    assert sum(text.startswith("[") for line in known.texts for text in line) == 1
    with pytest.raises(InputError, match="is there more than once"):
        draw("evasion-matrix", pd.concat([bare, bare]))


def test_a_detector_of_another_view_is_not_the_attacked_one():
    matrix = {"attacked": ["mahalanobis"] * 2, "tested": ["mahalanobis:last", "mahalanobis:mean"]}
    [panel] = draw("evasion-matrix", matrix | {"metric": ["tpr"] * 2, "value": [0.1, 0.9]}).chart.panels
    assert panel.grid.texts == [["[10]", "90"]]


@pytest.mark.parametrize(("detectors", "columns"), [(4, 2), (16, 1)])
def test_evasion_matrices_too_wide_for_their_texts_lie_one_above_the_other(detectors, columns):
    tested = [f"extremes:view number {i}" for i in range(detectors)]
    matrix = {"attacked": ["nothing"] * detectors, "tested": tested, "value": [1.0] * detectors}
    both = pd.concat([pd.DataFrame(matrix).assign(metric=metric) for metric in ("auroc", "tpr")])
    chart = draw("evasion-matrix", both).chart
    assert len(chart.panels) == 2 and chart.columns == columns
    assert all([text for _, text in panel.x.ticks] == tested for panel in chart.panels)


def test_everything_that_is_there_is_drawn_in_all_formats(watched, tmp_path):
    few = {name: watched[name] for name in ("detection_overhead", "evasion_matrix")}
    drawn, faults = figures_of(few | {"detection": pd.DataFrame()}, tmp_path, "qwen/backdoor", "qwen")
    assert faults == []
    assert {path.name for path in save_all(drawn)} == {
        f"{name}.{suffix}"
        for name in ("detection-overhead", "evasion-matrix")
        for suffix in ("png", "pdf", "svg", "html", "csv")
    } | {"plotly.min.js"}
