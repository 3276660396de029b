import math

import pytest

from safetynet.errors import InputError
from safetynet.figures import Axis, Chart, Panel, Series
from safetynet.figures.chart import legend, table

STEP = Axis("Step")


def test_unequal_lengths_are_refused_by_the_name_of_the_field():
    with pytest.raises(InputError, match=r"series 'ASR': y has 1 values and x has 2"):
        Series("line", (1, 2), (1,), label="ASR")
    with pytest.raises(InputError, match=r"high has 0 values and x has 2"):
        Series("line", (1, 2), (1, 2), low=(0, 1), label="ASR")
    with pytest.raises(InputError, match=r"band series: high has 0 values"):
        Series("band", (1,), low=(0,))
    with pytest.raises(InputError, match=r"notes has 1 values and x has 2"):
        Series("line", (1, 2), (1, 2), notes=("one",))


def test_an_empty_series_panel_or_chart_is_refused():
    with pytest.raises(InputError, match="x is empty"):
        Series("line", (), ())
    with pytest.raises(InputError, match="panel 'left' has no series"):
        Panel(STEP, STEP, (), title="left")
    with pytest.raises(InputError, match="chart 'Loss' has no panels"):
        Chart("Loss", ())


def test_unknown_words_are_refused_with_those_that_are_allowed():
    with pytest.raises(InputError, match=r"kind is 'bars'; allowed are line, marked, points, band, step"):
        Series("bars", (1,), (1,))
    with pytest.raises(InputError, match=r"role is 'poisoned'; allowed are triggered, clean"):
        Series("line", (1,), (1,), role="poisoned")
    with pytest.raises(InputError, match=r"part is 'twin'; allowed are subject, control, floor, raw"):
        Series("line", (1,), (1,), part="twin")
    with pytest.raises(InputError, match=r"scale is 'cubic'; allowed are linear, log"):
        Axis("Step", scale="cubic")


def test_limits_must_rise_and_have_a_logarithm_where_the_axis_is_logarithmic():
    with pytest.raises(InputError, match=r"axis 'Step': limits \(1, 1\) do not rise"):
        Axis("Step", limits=(1, 1))
    with pytest.raises(InputError, match=r"axis 'Norm': 0 has no logarithm"):
        Axis("Norm", scale="log", limits=(0, 1))


def test_a_text_among_the_values_is_refused_with_its_row():
    with pytest.raises(InputError, match=r"series 'ASR', field y, row 1: 'high' is not a number"):
        Series("line", (1, 2), (0.5, "high"), label="ASR")


def test_missing_and_infinite_values_become_gaps():
    series = Series("line", (1, 2, 3, 4), (1, None, math.inf, math.nan))
    assert series.y[0] == 1
    assert all(math.isnan(value) for value in series.y[1:])


def test_a_label_used_in_several_panels_stands_in_the_legend_once_and_in_ink_when_its_colours_differ(chart):
    keys = {key.label: key for key in legend(chart)}
    assert list(keys) == ["attack <b>&$x$", "_usual", "floor", "schedule"]
    assert keys["attack <b>&$x$"].role == "ink"
    assert keys["_usual"].role == "clean"
    assert keys["floor"].part == "floor"


def test_equal_axes_are_labelled_at_the_left_and_at_the_bottom_only():
    other = Axis("Perplexity")
    series = (Series("line", (1,), (1,)),)
    panels = tuple(Panel(STEP, y, series) for y in (STEP, STEP, STEP, STEP, other))
    chart = Chart("Rates", panels, columns=3)
    assert [chart.axis_shared(index, "x") for index in range(5)] == [True, True, False, False, False]
    assert [chart.axis_shared(index, "y") for index in range(5)] == [False, True, True, False, False]


def test_the_table_holds_every_value_with_its_units_and_its_source(chart):
    frame = table(chart)
    assert set(frame["run"]) == {"qwen/backdoor"}
    assert set(frame["table"]) == {"dynamics"}
    attack = frame[(frame["panel"] == 1) & (frame["kind"] == "marked")]
    assert attack["y"].fillna(-1).tolist() == [1, 50, -1, 99]
    assert attack["low"].fillna(-1).tolist() == [0, 40, -1, 95]
    assert set(attack["y_axis"]) == {"Rows (%)"}
    floor = frame[frame["kind"] == "reference"].iloc[0]
    assert (floor["series"], floor["y"], floor["note"]) == ("floor", 5.0, "5 of 100 rows")
    assert set(frame[frame["panel"] == 2]["kind"]) == {"step", "points", "line"}


def test_a_control_without_markers_is_drawn_over_what_it_covers_and_raw_numbers_below_all(chart):
    assert [series.part for series in chart.panels[1].from_below()] == ["raw", "subject", "control"]
    assert [series.kind for series in chart.panels[0].from_below()] == ["band", "marked"]
