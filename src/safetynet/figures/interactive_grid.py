"""Draw a grid for the screen with Plotly: heat map, dots and texts, and the colour bars of a chart.

In: a Grid. Out: traces and layout as Plotly takes them. Writes no file.
"""

import math
from collections.abc import Sequence
from typing import Any

from safetynet.figures import theme
from safetynet.figures.chart import Chart, Panel
from safetynet.figures.grid import Grid, Shade
from safetynet.figures.plotly_text import escaped

TEXT = 13  # pixels


def shades(chart: Chart) -> list[Shade]:
    """The colour scales of a chart, each once."""
    return list(dict.fromkeys(panel.grid.shade for panel in chart.panels if panel.grid is not None))


def traces(panel: Panel, grid: Grid, scale: int) -> list[dict[str, Any]]:
    """What lies behind missing cells, the cells, the dots of marked ones and the dashes of negative ones.

    Args:
        panel: the axes, whose labels the hover text repeats.
        grid: what to draw.
        scale: number of the colour scale, from 0.
    """
    cells = {
        "type": "heatmap",
        "z": [[None if math.isnan(value) else value for value in row] for row in grid.values],
        "coloraxis": axis_name(scale),
        "customdata": [
            [_hover(panel, grid, x, y) for x in range(len(grid.columns))] for y in range(len(grid.rows))
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    if grid.texts:
        cells |= {"text": [[escaped(text) for text in row] for row in grid.texts], "texttemplate": "%{text}"}
        cells["textfont"] = {"size": 11}
    drawn = [*_behind(grid), cells]
    for symbol, places, height in (("circle", grid.dots(), 0.0), ("line-ew", grid.dashes(), -0.3)):
        if places:
            colours = [theme.PAPER if grid.shade.dark(grid.values[y][x]) else theme.INK for x, y in places]
            drawn.append(_marks(symbol, places, height, colours))
    return drawn


def layout(chart: Chart, domains: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, Any]:
    """Colour scales and their bars, each beside the panels that use it.

    Args:
        chart: the whole figure.
        domains: of each panel, the parts of the page's width and height that it fills.
    """
    found: dict[str, Any] = {}
    for number, shade in enumerate(shades(chart)):
        own = [
            place
            for place, panel in zip(domains, chart.panels, strict=True)
            if panel.grid is not None and panel.grid.shade == shade
        ]
        right = max(x[1] for x, _ in own)
        bottom, top = min(y[0] for _, y in own), max(y[1] for _, y in own)
        stops = theme.RAMPS[shade.ramp]
        found[axis_name(number)] = {
            "cmin": shade.limits[0],
            "cmax": shade.limits[1],
            "colorscale": [[place / (len(stops) - 1), colour] for place, colour in enumerate(stops)],
            "colorbar": {
                "title": {"text": escaped(shade.text), "side": "right", "font": {"size": TEXT}},
                "x": right,
                "xpad": 8,
                "y": bottom,
                "yanchor": "bottom",
                "ypad": 0,
                "len": top - bottom,
                "thickness": 12,
                "nticks": 5,
                "outlinewidth": 0.5,
            },
        }
    return found


def axis_name(number: int) -> str:
    """Plotly's name of a colour scale."""
    return f"coloraxis{number + 1}" if number else "coloraxis"


def _behind(grid: Grid) -> list[dict[str, Any]]:
    """Grey, crossed cells where there is no value."""
    if not grid.missing():
        return []
    gaps = [[1 if math.isnan(value) else None for value in row] for row in grid.values]
    return [
        {
            "type": "heatmap",
            "z": gaps,
            "text": [["⁄" if cell else "" for cell in row] for row in gaps],
            "texttemplate": "%{text}",
            "colorscale": [[0, theme.MISSING], [1, theme.MISSING]],
            "showscale": False,
            "hovertemplate": "not measured<extra></extra>",
            "xgap": 1,
            "ygap": 1,
        }
    ]


def _marks(symbol: str, cells: list[tuple[int, int]], height: float, colours: list[str]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x for x, _ in cells],
        "y": [y + height for _, y in cells],
        "marker": {"symbol": symbol, "size": 6, "color": colours, "line": {"color": colours, "width": 1}},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _hover(panel: Panel, grid: Grid, x: int, y: int) -> str:
    """Each fact on a line of its own, so that a token written from right to left moves no other."""
    value = grid.values[y][x]
    told = "not measured" if math.isnan(value) else f"{value:.4g} {grid.shade.unit}".rstrip()
    lines = [
        f"{panel.x.label} {grid.columns[x]}",
        f"{panel.y.label} {grid.rows[y]}",
        f"{grid.shade.label} {told}",
    ]
    if grid.texts and grid.texts[y][x]:
        lines.append(grid.texts[y][x])
    if grid.notes and grid.notes[y][x]:
        lines.append(grid.notes[y][x])
    return "<br>".join(escaped(line) for line in lines)
