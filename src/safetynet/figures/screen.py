"""Draw a chart for the screen with Plotly: an HTML page that asks no network.

In: a Chart. Out: a page as text, the same on every machine and day. Writes no file.
The library lies beside the page, once for a whole folder, or inside it. Every label is escaped; a content
policy in the page forbids the browser to fetch anything but that library.
"""

import html
import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from safetynet.extras import need
from safetynet.figures import theme
from safetynet.figures.chart import (
    Axis,
    Chart,
    Grid,
    Key,
    Panel,
    Reference,
    Series,
    Shade,
    legend,
    legend_needed,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PLOTLY = "plotly.min.js"
"""The library as a folder of pages shares it."""
# 'unsafe-inline' means the script inside this file. A page opened from disk has no origin, so that 'self'
# does not name the library beside it; `file:` does.
POLICY = (
    "default-src 'none'; script-src {sources}'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
MODES = {"points": "markers", "marked": "lines+markers"}
"""Of a trace by the kind of a series; others are lines."""
BUTTONS = ["toImage", "zoom2d", "pan2d", "resetScale2d"]  # none that would send data anywhere
TEXT = 13  # pixels
LETTER, LINE = 8, 16  # pixels that a letter of a label is wide, and a line of them high
FONT = ", ".join(f"'{name}'" if " " in name else name for name in theme.FONT)
TOP = 92  # pixels above the panels: buttons, one line of legend, title of the first row
LEGEND_LINE = 26  # pixels
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="source" content="{source}">
<title>{title}</title>
<style>
body {{ margin: 1.5rem auto; max-width: {width}px; padding: 0 1rem; color: {ink}; background: {paper};
  font: 15px/1.5 {font}; }}
h1 {{ font-size: 1.15rem; font-weight: 600; margin: 0 0 .5rem; }}
figure {{ margin: 0; }}
figcaption {{ max-width: 44rem; }}
.source {{ color: #5c5c5c; font-size: .85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<figure>
{plot}
<figcaption>
<p>{caption}</p>
<p class="source">Drawn from {source}.</p>
</figcaption>
</figure>
</body>
</html>
"""


@cache
def plotly() -> bytes:
    """The library, as Plotly for Python ships it."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().encode()


def render(chart: Chart, self_contained: bool = False) -> str:
    """The chart as an HTML page: with the library inside, or to lie beside `PLOTLY`."""
    need("interactive figures", "plotly")
    plot = draw(chart).to_html(
        full_html=False,
        include_plotlyjs=True if self_contained else PLOTLY,
        include_mathjax=False,
        div_id="chart",  # Plotly would draw a new random name each time
        config={"displaylogo": False, "responsive": True, "modeBarButtons": [BUTTONS]},
    )
    return PAGE.format(
        policy=POLICY.format(sources="" if self_contained else "'self' file: "),
        title=html.escape(chart.title),
        source=html.escape(str(chart.source)),
        caption=html.escape(chart.caption),
        plot=plot,
        width=theme.SCREEN_WIDTHS[chart.width],
        ink=theme.INK,
        paper=theme.PAPER,
        font=FONT,
    )


def draw(chart: Chart) -> "Figure":
    """The chart as a Plotly figure."""
    figure, pixels = _grid(chart)
    # Heat maps come before the lines, which Plotly leaves out of empty axes. Each colour bar lies beside the
    # panels that use it: at the right end of their domains, parts of the page's width and height.
    domains: dict[Shade, list[Any]] = {shade: [] for shade in chart.shades}
    for index, panel in enumerate(chart.panels):
        row, column = divmod(index, chart.columns)
        if panel.grid is not None:
            plot = figure.get_subplot(row + 1, column + 1)
            domains[panel.grid.shade].append((plot.xaxis.domain, plot.yaxis.domain))
            for trace in _grid_traces(panel, panel.grid, chart.shades.index(panel.grid.shade)):
                figure.add_trace(trace, row=row + 1, col=column + 1)
    for number, (shade, areas) in enumerate(domains.items()):
        bottom, top = min(y[0] for _, y in areas), max(y[1] for _, y in areas)
        stops = theme.RAMPS[shade.ramp]
        scale = {
            "cmin": shade.limits[0],
            "cmax": shade.limits[1],
            "colorscale": [[place / (len(stops) - 1), colour] for place, colour in enumerate(stops)],
            "colorbar": {
                "title": {"text": escaped(chart.shade_text(shade)), "side": "right", "font": {"size": TEXT}},
                "x": max(x[1] for x, _ in areas),
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
        figure.update_layout({_axis_name(number): scale})

    for index, panel in enumerate(chart.panels):
        _panel(figure, chart, index, panel)
    keys = legend(chart)
    for key in keys:
        figure.add_trace(_key(key))
    lines = 0  # of the legend, about, where the page is as wide as it gets
    if legend_needed(keys):
        width = sum(len(key.label) * 7.5 + 48 for key in keys)
        lines = math.ceil(width / (theme.SCREEN_WIDTHS[chart.width] - 120))
    top_margin = TOP + LEGEND_LINE * (lines - 1)
    height = round(pixels + top_margin + 56)
    numbered = any(panel.annotations for panel in chart.panels)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 60 if numbered else 30, "t": top_margin, "b": 56},
        font={"family": FONT, "size": TEXT, "color": theme.INK},
        paper_bgcolor=theme.PAPER,
        plot_bgcolor=theme.PAPER,
        hovermode="closest",
        legend={  # below the buttons, so that they never cover it
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1 - 30 / height,
            "yref": "container",
            "yanchor": "top",
            "itemwidth": 34,
        },
        showlegend=legend_needed(keys),
    )
    return figure


def _grid(chart: Chart) -> tuple["Figure", float]:
    """Empty axes for every panel, and how many pixels high they are together."""
    from plotly.subplots import make_subplots

    count, columns, rows = len(chart.panels), chart.columns, len(chart.heights)
    labelled_above = [
        panel.x
        for index, panel in enumerate(chart.panels[: (rows - 1) * columns])
        if not chart.axis_shared(index, "x")
    ]
    # Pixels between rows: for the title below, else also for labels and axis title; upright labels take more.
    upright = max((len(text) for axis in labelled_above if axis.upright for _, text in axis.ticks), default=0)
    gap = 62 + max(LETTER * upright - LINE, 0) if labelled_above else 34
    labelled = any(index % columns and not chart.axis_shared(index, "y") for index in range(count))
    bars = columns > 1 and len(chart.shades) > 1  # between the panels
    height = sum(chart.heights) * theme.SCREEN_HEIGHT + gap * (rows - 1)
    figure: Figure = make_subplots(
        rows=rows,
        cols=columns,
        row_heights=chart.heights,
        specs=[
            [{} if index < count else None for index in range(first, first + columns)]
            for first in range(0, count, columns)
        ],
        horizontal_spacing=(0.36 if bars else 0.28 if labelled else 0.12) / columns,
        vertical_spacing=gap / height if rows > 1 else 0,
    )
    return figure, height


def _panel(figure: "Figure", chart: Chart, index: int, panel: Panel) -> None:
    row, column = divmod(index, chart.columns)
    place = {"row": row + 1, "col": column + 1}
    for series in panel.from_below():
        for trace in _traces(panel, series):
            figure.add_trace(trace, **place)
    for line in panel.references:
        draw_line = figure.add_hline if line.along == "y" else figure.add_vline
        draw_line(line.value, line=_line(line), layer="below" if panel.grid is None else "above", **place)
    if panel.title:
        figure.add_annotation(
            text=escaped(panel.title),
            x=0,
            y=1,
            xref="x domain",
            yref="y domain",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            **place,
        )
    for note in panel.annotations:
        # Plotly wants the logarithm of an annotation's place on a log axis, though not of a curve's.
        x = math.log10(note.x) if panel.x.scale == "log" else note.x
        y = math.log10(note.y) if panel.y.scale == "log" else note.y
        ink, left = {"color": theme.LOOKS[note.role].colour}, note.side.endswith("left")
        style: dict[str, Any] = {"showarrow": False, "xanchor": "left", "xshift": 8}
        if note.side != "right":
            style = {
                "ax": -22 if left else 22,
                "ay": -34 if note.side.startswith("upper") else 34,
                "xanchor": "right" if left else "left",
                "arrowhead": 0,
                "arrowwidth": 1,
                "bgcolor": theme.PAPER,
            }
        figure.add_annotation({"x": x, "y": y, "text": escaped(note.text), "font": ink} | style, **place)
    figure.update_xaxes(_axis(chart, index, "x", panel.x), **place)
    figure.update_yaxes(_axis(chart, index, "y", panel.y), **place)


def _axis(chart: Chart, index: int, side: Literal["x", "y"], axis: Axis) -> dict[str, Any]:
    bare = chart.axis_shared(index, side)
    style: dict[str, Any] = {
        "type": axis.scale,
        "title": {"text": "" if bare else escaped(axis.text), "standoff": 8, "font": {"size": TEXT}},
        "showticklabels": not bare,
        "automargin": True,
        "gridcolor": theme.GRID,
        "linecolor": theme.INK,
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "exponentformat": "power",
        "minexponent": 4,
        "nticks": 6,
    }
    for other, panel in enumerate(chart.panels[:index]):  # equal axes zoom together
        if getattr(panel, side) == axis:
            style["matches"] = side if other == 0 else f"{side}{other + 1}"
            break
    if axis.limits is not None:
        low, high = theme.padded(axis.limits, axis.scale == "log")
        style["range"] = [math.log10(low), math.log10(high)] if axis.scale == "log" else [low, high]
    if axis.scale == "log":
        style["dtick"] = "D2" if len(theme.log_ticks(axis.limits)) > 1 else 1  # 1, 2, 5, or decades
    if (grid := chart.panels[index].grid) is not None:
        style["range"] = [-0.5, len(grid.columns if side == "x" else grid.rows) - 0.5]
        style["showgrid"] = False
        if axis.upright:
            style["tickangle"] = -90
    if axis.ticks:
        style["tickvals"] = [value for value, _ in axis.ticks]
        style["ticktext"] = [escaped(text) for _, text in axis.ticks]
    return style


def _traces(panel: Panel, series: Series) -> list[dict[str, Any]]:
    """The band, where there is one, then the curve."""
    shared = {"type": "scatter", "legendgroup": escaped(series.label), "showlegend": False}
    shape = "hv" if series.kind == "step" else "linear"
    traces: list[dict[str, Any]] = []
    if series.low and series.kind != "points":
        # One closed outline per stretch without gaps; Plotly would fill across a gap.
        stretches: list[list[tuple[float, float, float]]] = [[]]
        for point in zip(series.x, series.low, series.high, strict=True):
            if any(math.isnan(value) for value in point):
                stretches.append([])
            else:
                stretches[-1].append(point)
        fill = theme.LOOKS[series.role].colour + f"{round(theme.BAND * 255):02X}"
        for stretch in filter(None, stretches):
            x, low, high = map(list, zip(*stretch, strict=True))
            edge = {"x": x, "mode": "lines", "line": {"width": 0, "shape": shape}, "hoverinfo": "skip"}
            traces.append(shared | edge | {"y": low})
            traces.append(shared | edge | {"y": high, "fill": "tonexty", "fillcolor": fill})
    if series.kind == "band":
        return traces

    # What the pointer shows: label and axes (one without label holds names, which the notes repeat), then
    # each point's interval and what the series notes about it.
    heading = [f"<b>{escaped(series.label)}</b>"] if series.label else []
    for side, axis in (("x", panel.x), ("y", panel.y)):
        if axis.label:
            heading.append(f"{escaped(axis.label)} %{{{side}:.4~g}} {escaped(axis.unit)}".rstrip())
    facts = []
    for index in range(len(series.x)):
        parts = []
        for along, lows, highs in (
            ("", series.low, series.high),
            ("horizontal " * bool(series.low), series.left, series.right),
        ):
            if lows and math.isfinite(lows[index]):
                parts.append(f"{along}interval {lows[index]:.4g} to {highs[index]:.4g}")
        if series.notes:
            parts.append(escaped(series.notes[index]))
        facts.append("".join(f"<br>{part}" for part in parts))

    curve: dict[str, Any] = {
        "x": _gaps(series.x),
        "y": _gaps(series.y),
        "mode": MODES.get(series.kind, "lines"),
        "line": _line(series) | ({"shape": "hv"} if series.kind == "step" else {}),
        "marker": _marker(series) | {"maxdisplayed": 14 if series.kind == "marked" else 0},
        "opacity": theme.STROKES[series.part].opacity,
        "name": escaped(series.label),
        "customdata": facts,
        "hovertemplate": "<br>".join(heading) + "%{customdata}<extra></extra>",
    }
    if series.low and series.kind == "points":
        curve["error_y"] = _bars(series, series.y, series.low, series.high)
    if series.left:
        curve["error_x"] = _bars(series, series.x, series.left, series.right)
    return [*traces, shared | curve]


def _bars(
    series: Series, centre: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": _gaps([end - value for end, value in zip(high, centre, strict=True)]),
        "arrayminus": _gaps([value - end for end, value in zip(low, centre, strict=True)]),
        "width": 0,
        "thickness": 1.4,
        "color": theme.LOOKS[series.role].colour,
    }


def _key(key: Key) -> dict[str, Any]:
    """A trace without data, so that a label shared by several panels stands in the legend once."""
    trace: dict[str, Any] = {
        "type": "scatter",
        "x": [None],
        "y": [None],
        "name": escaped(key.label),
        "legendgroup": escaped(key.label),
        "mode": MODES.get(key.kind, "lines"),
        "line": _line(key),
        "marker": _marker(key),
        "opacity": theme.STROKES[key.part].opacity,
    }
    if key.kind == "band":
        trace["line"] = {"width": 8, "color": theme.LOOKS[key.role].colour}
        trace["opacity"] = theme.BAND
    return trace


def _line(thing: Series | Key | Reference) -> dict[str, Any]:
    stroke = theme.STROKES[thing.part]
    dash = ",".join(f"{length * theme.SCREEN:g}px" for length in stroke.dash)
    return {
        "color": theme.LOOKS[thing.role].colour,
        "width": stroke.width * theme.SCREEN,
        "dash": dash or "solid",
    }


def _marker(thing: Series | Key) -> dict[str, Any]:
    look, stroke = theme.LOOKS[thing.role], theme.STROKES[thing.part]
    return {
        "symbol": look.symbol,
        "size": theme.MARKER * theme.SCREEN * look.size * 1.2,
        "color": look.colour if stroke.filled else theme.PAPER,
        "line": {"color": look.colour, "width": 1.5},
    }


def _gaps(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _grid_traces(panel: Panel, grid: Grid, scale: int) -> list[dict[str, Any]]:
    """What lies behind missing cells, the cells, the dots of marked ones and the dashes of negative ones.

    Args:
        panel: the axes, whose labels the hover text repeats.
        grid: what to draw.
        scale: number of the colour scale, from 0.
    """
    traces: list[dict[str, Any]] = []
    if grid.missing():  # grey, crossed cells where there is no value
        gaps = [[1 if math.isnan(value) else None for value in row] for row in grid.values]
        traces.append(
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
        )

    def hover(x: int, y: int) -> str:
        # Each fact on a line of its own, so that a token written from right to left moves no other.
        value = grid.values[y][x]
        measured = "not measured" if math.isnan(value) else f"{value:.4g} {grid.shade.unit}".rstrip()
        lines = [
            f"{panel.x.label} {grid.columns[x]}",
            f"{panel.y.label} {grid.rows[y]}",
            f"{grid.shade.label} {measured}",
        ]
        lines += [texts[y][x] for texts in (grid.texts, grid.notes) if texts and texts[y][x]]
        return "<br>".join(escaped(line) for line in lines)

    cells = {
        "type": "heatmap",
        "z": [_gaps(row) for row in grid.values],
        "coloraxis": _axis_name(scale),
        "customdata": [[hover(x, y) for x in range(len(grid.columns))] for y in range(len(grid.rows))],
        "hovertemplate": "%{customdata}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    if grid.texts:
        cells |= {"text": [[escaped(text) for text in row] for row in grid.texts], "texttemplate": "%{text}"}
        cells["textfont"] = {"size": 11}
    traces.append(cells)
    for symbol, places, height in (("circle", grid.dots(), 0.0), ("line-ew", grid.dashes(), -0.3)):
        if places:
            inks = [grid.shade.ink(grid.values[y][x]) for x, y in places]
            marker = {"symbol": symbol, "size": 6, "color": inks, "line": {"color": inks, "width": 1}}
            at = {"x": [x for x, _ in places], "y": [y + height for _, y in places]}
            dots = {"type": "scatter", "mode": "markers", **at, "marker": marker}
            traces.append({**dots, "hoverinfo": "skip", "showlegend": False})
    return traces


def _axis_name(number: int) -> str:
    """Plotly's name of a colour scale."""
    return f"coloraxis{number + 1}" if number else "coloraxis"


def escaped(label: str) -> str:
    """A label that Plotly shows as it was typed; it reads tags, entities, formulas ($) and fields (%{)."""
    safe = html.escape(label, quote=False)
    return safe.replace("$", "&#36;").replace("%{", "&#37;{").replace("\n", "<br>")
