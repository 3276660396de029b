import math
import warnings

import matplotlib
import pytest

from safetynet.errors import InputError
from safetynet.figures import Axis, Chart, Grid, Panel, Reference, Shade, Source, paper, save, screen
from safetynet.figures.chart import legend, table
from safetynet.figures.glyphs import visible
from safetynet.figures.theme import MISSING, RAMPS

NAN = float("nan")
ODD = ("$x_1$", "<script>", "_a", "😀", "שלום", "\\frac{1}{2}", "%{x}", "漢")
EFFECT = Shade("Effect", "share")


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.fixture(scope="module")
def grid():
    values = ((0.0, 0.5, NAN, -0.5, 2.0, 0.0, 0.0, 0.0), (1.0,) * 8)
    marked = ((False, True, True) + (False,) * 5, (False,) * 8)
    texts = (ODD, ("",) * 8)
    return Grid(ODD, ("0", "1"), values, EFFECT, marked, "responsible", texts, (("n 40",) * 8,) * 2)


@pytest.fixture(scope="module")
def heat(grid):
    x = Axis("Token", ticks=tuple((float(at), name) for at, name in enumerate(ODD)), upright=True)
    y = Axis("Layer", ticks=((0.0, "0"), (1.0, "1")))
    lines = (Reference(0.5, "x", role="ink"),)
    return Chart(
        "Effects", (Panel(x, y, grid=grid, references=lines),), source=Source("qwen/backdoor", "tokens")
    )


def test_a_grid_whose_parts_do_not_fit_is_refused_by_field():
    with pytest.raises(InputError, match="grid 'Effect': values must be 1 rows of 2 columns"):
        Grid(("a", "b"), ("0",), ((1.0,),), EFFECT)
    with pytest.raises(InputError, match="grid 'Effect': notes must be 1 rows of 1 columns"):
        Grid(("a",), ("0",), ((1.0,),), EFFECT, notes=(("x", "y"),))
    with pytest.raises(InputError, match="grid 'Effect': it has no columns"):
        Grid((), ("0",), ((),), EFFECT)
    with pytest.raises(InputError, match="grid 'Effect', row '0', row 0: 'high' is not a number"):
        Grid(("a",), ("0",), (("high",),), EFFECT)


def test_a_diverging_scale_lies_evenly_around_zero_and_words_are_known():
    with pytest.raises(
        InputError, match=r"colour scale 'Effect': limits \(-1, 2\) must rise, and lie evenly"
    ):
        Shade("Effect", limits=(-1, 2))
    with pytest.raises(InputError, match="ramp is 'rainbow'; allowed are diverging, sequential"):
        Shade("Effect", ramp="rainbow")


def test_colours_grow_darker_away_from_zero_so_that_greyscale_keeps_the_size():
    light = [luminance(colour) for colour in RAMPS["sequential"]]
    assert light == sorted(light, reverse=True)
    below, above = RAMPS["diverging"][3::-1], RAMPS["diverging"][3:]
    for side in (below, above):
        assert [luminance(c) for c in side] == sorted((luminance(c) for c in side), reverse=True)
    for left, right in zip(below[1:], above[1:], strict=True):
        assert (int(left[5:7], 16) > int(left[1:3], 16)) and (int(right[1:3], 16) > int(right[5:7], 16))


def test_only_measured_cells_are_marked_and_only_noticeable_negatives_get_a_dash(grid):
    assert grid.dots() == [(1, 0)]
    assert grid.dashes() == [(3, 0)]
    assert grid.beyond() == (False, True)
    small = Grid(("a",), ("0",), ((-0.05,),), EFFECT)
    assert small.dashes() == []


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" if", "␣if"),
        ("\n", "⏎"),
        ("\t", "⇥"),
        ("", "∅"),
        ("\x00", "\\x00"),
        ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"),
        ("$x_1$", "$x_1$"),
        ("שלום", "שלום"),
    ],
)
def test_blanks_and_controls_of_a_token_become_visible(token, shown):
    assert visible(token) == shown


def test_the_csv_holds_the_whole_matrix_in_long_form(heat, tmp_path):
    frame = table(heat)
    cells = frame[frame["kind"] == "cell"]
    assert len(cells) == 16
    assert list(cells["column"][:8]) == list(ODD)
    second = cells.iloc[1]
    known = (second["x"], second["y"], second["row"], second["value"], second["marked"], second["note"])
    assert known == (1, 0, "0", 0.5, True, "n 40")
    assert math.isnan(cells.iloc[2]["value"])
    assert (second["series"], second["x_axis"], second["table"]) == ("Effect (share)", "Token", "tokens")
    assert frame.iloc[-1]["kind"] == "reference"


def test_paper_shows_cells_texts_dots_gaps_and_a_bar_with_its_unit(heat):
    with matplotlib.rc_context(paper.SETTINGS):
        figure = paper.draw(heat)
    data, bar = figure.axes
    assert bar.get_ylabel().replace("\n", " ") == "Effect (share); grey: not measured"
    assert (data.get_xlim(), data.get_ylim()) == ((-0.5, 7.5), (-0.5, 1.5))  # layer 0 lies at the bottom
    mesh = data.collections[0]
    assert mesh.get_clim() == (-1, 1)
    assert mesh.get_array().mask.tolist()[0] == [False, False, True] + [False] * 5
    assert data.patch.get_hatch()
    assert [text.get_text() for text in data.get_xticklabels()] == list(ODD)
    assert all(text.get_rotation() == 90 for text in data.get_xticklabels())
    assert [text.get_text() for text in data.texts[:8]] == list(ODD)
    dots = [line for line in data.lines if line.get_marker() == "o"]
    assert [tuple(line.get_xdata()) for line in dots if len(line.get_xdata())] == [(1,)]
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["responsible"]


def test_no_sign_that_a_token_may_hold_raises_a_warning_or_changes_a_file(heat, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = save(heat, tmp_path / "one", "heat")
    for one, other in zip(first, save(heat, tmp_path / "other", "heat"), strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix
    drawing = first[2].read_text(encoding="utf-8")
    assert all(sign in drawing for sign in ("$x_1$", "&lt;script&gt;", "😀", "漢"))


def test_the_screen_shows_the_same_cells_with_labels_as_typed(heat):
    figure = screen.draw(heat)
    behind, cells, dots, dashes = figure.data[:4]
    assert next(list(row) for row in cells.z) == [0.0, 0.5, None, -0.5, 2.0, 0.0, 0.0, 0.0]
    assert behind.z[0][2] == 1 and behind.colorscale[0][1] == MISSING
    assert cells.customdata[0][1].split("<br>") == [
        "Token &lt;script&gt;",
        "Layer 0",
        "Effect 0.5 share",
        "&lt;script&gt;",
        "n 40",
    ]
    assert cells.text[0][0] == "&#36;x_1&#36;"
    assert ((dots.x, dots.y), dashes.x) == (((1,), (0,)), (3,))
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax, scale.colorbar.title.text) == (
        -1,
        1,
        "Effect (share); grey: not measured",
    )
    assert list(figure.layout.xaxis.ticktext)[1] == "&lt;script&gt;"
    assert list(figure.layout.xaxis.range) == [-0.5, 7.5]
    assert len(figure.layout.shapes) == 1  # the reference lies above the cells
    assert figure.layout.shapes[0].layer == "above"


def test_grids_with_one_scale_share_a_bar_and_others_have_their_own(grid):
    axis = Axis("")
    other = Grid(("a",), ("0",), ((0.5,),), Shade("Weight", limits=(0, 1), ramp="sequential"))
    panels = tuple(Panel(axis, axis, grid=one) for one in (grid, grid, other))
    chart = Chart("Effects", panels, 3, "two")
    with matplotlib.rc_context(paper.SETTINGS):
        assert len(paper.draw(chart).axes) == 5
    layout = screen.draw(chart).layout
    assert layout.coloraxis.colorbar.title.text == "Effect (share); grey: not measured"
    assert layout.coloraxis2.colorbar.title.text == "Weight"
    assert [key.label for key in legend(chart)] == ["responsible"]


def test_upright_labels_stand_above_the_row_below(grid):
    def gap(label):
        rows = [Axis("Token", ticks=((0.0, f"{label}{row}"),), upright=True) for row in range(2)]
        layout = screen.draw(Chart("Effects", tuple(Panel(x, Axis("Layer"), grid=grid) for x in rows))).layout
        pixels = layout.height - layout.margin.t - layout.margin.b
        return (layout.yaxis.domain[0] - layout.yaxis2.domain[1]) * pixels

    short, long = gap("a"), gap("<|im_start|>assistant")
    assert long - short > 7 * len("<|im_start|>assistan"), "a letter is more than seven pixels wide"
