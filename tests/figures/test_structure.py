"""Every figure of a run compared with a stored reference by structure: axes, series and labels, not pixels.

`SAFETYNET_WRITE_REFERENCES=1 pytest tests/figures/test_structure.py` writes the references anew; read
the difference before it is committed.
"""

import json
import os
import warnings
from pathlib import Path

import matplotlib
import pytest

from safetynet.figures import figures_of, paper, screen

REFERENCES = Path(__file__).parent / "references"


def number(value):
    return float(f"{value:.4g}")


def on_paper(chart):
    """Of each pair of axes: titles, labels, scales, limits, ticks, and how much of each kind is drawn."""
    with warnings.catch_warnings(), matplotlib.rc_context(paper.SETTINGS):
        warnings.simplefilter("ignore")  # a sign that the font lacks
        figure = paper.draw(chart)
        figure.canvas.draw()
    return {
        "width": number(figure.get_size_inches()[0]),
        "legend": [text.get_text() for legend in figure.legends for text in legend.get_texts()],
        "axes": [
            {
                "title": axes.get_title(loc="left"),
                "x": [axes.get_xlabel(), axes.get_xscale(), *map(number, axes.get_xlim())],
                "y": [axes.get_ylabel(), axes.get_yscale(), *map(number, axes.get_ylim())],
                "x ticks": [text.get_text() for text in axes.get_xticklabels()],
                "y ticks": [text.get_text() for text in axes.get_yticklabels()],
                "lines": len(axes.lines),
                "collections": sorted(type(one).__name__ for one in axes.collections),
                "texts": [text.get_text() for text in axes.texts][:40],
            }
            for axes in figure.axes
        ],
    }


def on_screen(chart):
    """Of each trace its kind, name and number of values; of each axis its title."""
    page = screen.draw(chart)
    found = page.to_plotly_json()
    axes = {name: axis for name, axis in found["layout"].items() if name[:5] in ("xaxis", "yaxis")}
    return {
        "traces": [
            [trace["type"], trace.get("name", ""), len(trace["z" if "z" in trace else "x"])]
            for trace in found["data"]
        ],
        "axes": {name: (axis.get("title") or {}).get("text", "") for name, axis in sorted(axes.items())},
    }


@pytest.fixture(scope="module")
def drawn(tables, inside):
    """Every figure of a whole run, by name."""
    made = {"evaluation": tables["evaluation"]} | inside
    training, dynamics = tables["training"], tables["dynamics"]
    for name in ("backdoored", "clean_twin"):
        own = training[training["run"] == name.replace("_", " ")]
        made[f"history_{name}"] = own.drop(columns="run")
        made[f"dynamics_{name}"] = dynamics[dynamics["model"] == name]
    figures, faults = figures_of(made, Path("figures"), "qwen/backdoor", "qwen")
    assert faults == []
    return {figure.name: figure for figure in figures}


@pytest.fixture(scope="module")
def structures(drawn):
    return {
        name: {"title": figure.chart.title, "source": str(figure.chart.source)}
        | {"paper": on_paper(figure.chart), "screen": on_screen(figure.chart)}
        for name, figure in drawn.items()
    }


def test_every_figure_has_the_structure_of_its_reference(structures):
    if os.environ.get("SAFETYNET_WRITE_REFERENCES"):
        REFERENCES.mkdir(exist_ok=True)
        for name, structure in structures.items():
            text = json.dumps(structure, indent=1, ensure_ascii=False)
            (REFERENCES / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        pytest.skip("references were written")
    stored = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in REFERENCES.glob("*.json")}
    assert set(stored) == set(structures)
    for name, structure in structures.items():
        assert json.loads(json.dumps(structure)) == stored[name], name


def test_paper_and_screen_show_the_same_panels_and_series(structures, drawn):
    for name, structure in structures.items():
        chart = drawn[name].chart
        shown = [axes for axes in structure["paper"]["axes"] if axes["title"] or axes["x ticks"]]
        assert len(shown) >= len(chart.panels), name
        legend = set(structure["paper"]["legend"])
        traces = {trace[1] for trace in structure["screen"]["traces"]}
        assert {label for label in legend if label} <= {t.replace("&#36;", "$") for t in traces}, name
