import dataclasses
import warnings
from itertools import combinations

import matplotlib
import pytest
from matplotlib.text import Text

from safetynet.errors import InputError
from safetynet.figures import TrainingVisualizer, draw, theme
from safetynet.figures import paper as renderer


def drawn(chart):
    with matplotlib.rc_context(renderer.SETTINGS):
        return renderer.draw(chart)


@pytest.fixture(scope="module")
def papers(tables, inside):
    """Every figure of a run as matplotlib draws it, by name."""
    training = TrainingVisualizer("qwen")
    figures = [
        training.plot_loss_curves(tables["training"]),
        training.plot_gradient_norm(tables["training"]),
        training.plot_learning_rate(tables["training"]),
        training.plot_accuracy_trends([0.9, 1.0], [0.1, 1.0], [1, 2]),
        training.plot_rates_by_role(tables["dynamics"]),
        training.plot_final_rates(tables["evaluation"]),
    ]
    effects = inside["effects"]
    figures += [
        draw("intervention-layers", effects),
        draw("intervention-positions", effects[effects["direction"] == "remove"]),
        draw("intervention-components", effects),
        draw("intervention-heads", effects[effects["direction"] == "remove"]),
        draw("intervention-adapters", effects),
        draw("intervention-tokens", inside["tokens"]),
        draw("intervention-lens", inside["lens"]),
        draw("intervention-lens-map", inside["lens_map"]),
        draw("intervention-probes", inside["probes"]),
        draw("intervention-attention", inside["attention"]),
        draw("intervention-divergence", inside["divergence"]),
        draw("intervention-drift", inside["drift"]),
        draw("intervention-tradeoff", inside["tradeoff"]),
    ]
    papers = {one.name: drawn(one.chart) for one in figures}
    for paper in papers.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a sign that the font lacks
            paper.canvas.draw()
    return papers


def shown_texts(figure):
    """Texts on the paper, without the labels of ticks beyond an axis's ends, which are never drawn."""
    beyond = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if text not in beyond]


def test_panels_become_axes_with_their_titles_labels_limits_and_ticks(chart):
    left, right = drawn(chart).axes
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == ("left", "right")
    assert (left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("Step", "Rows (%)", "Norm")
    assert left.get_ylim() == pytest.approx((-3.5, 103.5))
    assert list(left.get_yticks()) == [0, 50, 100]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["0", "50", "100"]
    assert right.get_yscale() == "log"


def test_a_series_keeps_its_numbers_its_colour_and_its_gap(chart):
    left, right = drawn(chart).axes
    curve = next(line for line in left.lines if line.get_marker() == "o")
    assert curve.get_color() == theme.LOOKS["triggered"].colour
    assert [str(value) for value in curve.get_ydata()] == ["1.0", "50.0", "nan", "99.0"]
    assert len(left.collections) == 2  # the curve's band and the band of its own
    assert any(line.get_drawstyle() == "steps-post" for line in right.lines)
    assert len(right.collections) == 1  # the interval of the point


def test_text_is_never_smaller_than_seven_points_and_never_leaves_the_paper(papers):
    for name, paper in papers.items():
        for text in shown_texts(paper):
            box = text.get_window_extent()
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= paper.bbox.x1 and box.y1 <= paper.bbox.y1
            assert inside, (name, text.get_text())
            assert text.get_fontsize() >= 7


def test_no_two_texts_overlap(papers):
    for name, paper in papers.items():
        boxes = [(text.get_text(), text.get_window_extent()) for text in shown_texts(paper)]
        for (first, box), (second, other) in combinations(boxes, 2):
            assert not box.overlaps(other), (name, first, second)


@pytest.mark.parametrize("venue", ["neurips", "acl"])
def test_on_the_narrowest_pages_no_two_texts_overlap(venue, tables, inside):
    figures = [
        draw("intervention-tokens", inside["tokens"]),
        draw("intervention-tradeoff", inside["tradeoff"]),
    ]
    figures.append(TrainingVisualizer("qwen").plot_final_rates(tables["evaluation"]))
    for chart in (figure.chart for figure in figures):
        with matplotlib.rc_context(renderer.SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            page = renderer.draw(chart, venue)
            page.canvas.draw()
        assert page.get_figwidth() == theme.VENUES[venue][chart.width]
        boxes = [(text.get_text(), text.get_window_extent()) for text in shown_texts(page)]
        for (first, box), (second, other) in combinations(boxes, 2):
            assert not box.overlaps(other), (venue, first, second)


def test_an_unknown_venue_is_refused_with_those_that_exist(chart):
    with pytest.raises(InputError, match="there is no 'nature'; choose one of general, neurips"):
        renderer.render(chart, ("svg",), venue="nature")


def test_the_legend_lies_above_the_data(papers):
    keyed = {name: paper for name, paper in papers.items() if paper.legends}
    assert len(keyed) == 15
    for name, paper in keyed.items():
        top = max(axes.get_window_extent().y1 for axes in paper.axes)
        assert paper.legends[0].get_window_extent().y0 >= top, name


def test_a_label_that_begins_with_an_underscore_is_in_the_legend(chart):
    (legend,) = drawn(chart).legends
    assert [text.get_text().strip() for text in legend.get_texts()] == [
        "attack <b>&$x$",
        "_usual",
        "floor",
        "schedule",
    ]


def test_a_long_title_is_broken_and_pushes_the_data_down(chart):
    long = dataclasses.replace(chart, title="a title with many words " * 12, width="one", columns=1)
    assert drawn(long).get_figheight() > drawn(dataclasses.replace(long, title="short")).get_figheight()


def test_settings_of_the_user_change_no_figure_and_are_left_as_they_were(chart):
    expected = renderer.render(chart, ("svg",))
    with matplotlib.rc_context({"axes.grid": False, "font.size": 30, "svg.fonttype": "path"}):
        assert renderer.render(chart, ("svg",)) == expected
        assert matplotlib.rcParams["font.size"] == 30
