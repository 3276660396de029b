"""Draw a chart for paper with matplotlib: PNG at print resolution, PDF with its fonts, SVG with text as text.

In: a Chart. Out: the bytes of each format, the same on every machine and day. Writes no file.
Labels are drawn letter by letter: a dollar sign or a backslash in one is no formula.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from safetynet.errors import InputError
from safetynet.extras import need
from safetynet.figures import glyphs, theme
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
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

FORMATS = ("png", "pdf", "svg")
MARKERS = 14
"""At most about so many markers along one line; more would hide it."""
DOT = (1.2, 2.8)
"""Points that the dot of a marked cell measures, at least and at most."""
SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": list(theme.FONT[:-1]),
    "font.size": theme.TEXT,
    "text.color": theme.INK,
    "text.parse_math": False,
    "text.usetex": False,
    "axes.edgecolor": theme.INK,
    "axes.labelcolor": theme.INK,
    "axes.labelsize": theme.TEXT,
    "axes.titlesize": theme.TEXT,
    "axes.titlelocation": "left",
    "axes.titlepad": 4.0,
    "axes.labelpad": 3.0,
    "axes.linewidth": theme.HAIR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": theme.GRID,
    "grid.linewidth": theme.HAIR,
    "xtick.color": theme.INK,
    "ytick.color": theme.INK,
    "xtick.labelsize": theme.TEXT,
    "ytick.labelsize": theme.TEXT,
    "xtick.major.width": theme.HAIR,
    "ytick.major.width": theme.HAIR,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": theme.TEXT,
    "legend.frameon": False,
    "lines.scale_dashes": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "safetynet",
    "figure.dpi": theme.DPI,
    "savefig.dpi": theme.DPI,
}


def render(chart: Chart, formats: tuple[str, ...] = FORMATS, venue: str = "general") -> dict[str, bytes]:
    """Bytes of a chart in each of the formats png, pdf and svg, as wide as a venue's columns.

    Raises:
        InputError: if there is no such venue, or matplotlib is not installed.
    """
    need("figures", "matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # Without dates, so that equal charts give equal files.
    title, source, caption = chart.title, str(chart.source), chart.caption
    facts = {"Title": title, "Source": source, "Description": caption}
    of_pdf = {"Title": title, "Subject": source, "Keywords": caption, "CreationDate": None}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "png": (FigureCanvasAgg, facts),
        "pdf": (FigureCanvasPdf, of_pdf),
        "svg": (FigureCanvasSVG, facts | {"Date": None, "Identifier": chart.digest}),
    }
    if venue not in theme.VENUES:
        raise InputError(f"venue: there is no {venue!r}; choose one of {', '.join(theme.VENUES)}.")

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a figure must not depend on somebody's matplotlibrc
        matplotlib.rcParams.update(SETTINGS)  # type: ignore[arg-type]
        figure = draw(chart, venue)
        drawable, _ = glyphs.fitted(chart)
        # In SVG a text stays text, and the reader's fonts draw it.
        printed = figure if drawable is chart else draw(drawable, venue)
        files = {}
        with _glyphs_missing():
            for suffix in formats:
                buffer, (canvas, metadata) = io.BytesIO(), kinds[suffix]
                # savefig would lay everything out once more before it draws; `draw` has done that.
                shape = canvas(figure if suffix == "svg" else printed)
                getattr(shape, f"print_{suffix}")(buffer, metadata=metadata)
                files[suffix] = buffer.getvalue()
    return files


@contextmanager
def _glyphs_missing() -> Iterator[None]:
    """Measuring a text that stays text in SVG: what no font here has is no fault."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


@_glyphs_missing()
def draw(chart: Chart, venue: str = "general") -> "Figure":
    """The chart as a matplotlib figure of its final width; title and legend lie above the data."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        _, families = glyphs.fitted(chart)
        if len(families) > 1:
            matplotlib.rcParams["font.family"] = families

        # The height follows from what lies in it, in inches: title and legend, then the rows of panels.
        width = theme.VENUES[venue][chart.width]
        lines = textwrap.wrap(chart.title, int(width * 72 / (theme.TITLE * 0.6)))
        figure = Figure(figsize=(width, 1.0))
        FigureCanvasAgg(figure)
        key = _legend(figure, legend(chart), width)
        inches = 0.0
        if key is not None:
            box = key.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
            inches = float(box.height / figure.dpi)
        header = 0.02 + 0.15 * len(lines) + inches + 0.06
        trims, numbered = [], list(enumerate(chart.panels))
        for start in range(0, len(numbered), chart.columns):
            row = numbered[start : start + chart.columns]
            # Titles, tick labels and axis labels; those of an axis that the panel below shows stand there.
            labelled = [panel for index, panel in row if not chart.axis_shared(index, "x")]
            upright = [len(text) for panel in labelled if panel.x.upright for _, text in panel.x.ticks]
            titled = any(panel.title for _, panel in row)
            trims.append(0.12 + 0.18 * titled + 0.26 * bool(labelled) + 0.06 * max(upright, default=0))
        total = header + sum(chart.heights) + sum(trims)

        figure.set_size_inches(width, total)
        figure.text(0.06 / width, 1 - 0.04 / total, "\n".join(lines), fontsize=theme.TITLE, va="top")
        if key is not None:
            key.set_bbox_to_anchor((0.0, 1 - (0.04 + 0.15 * len(lines)) / total))
        figure.set_layout_engine("constrained")
        figure.get_layout_engine().set(  # type: ignore[union-attr, call-arg]
            rect=(0, 0, 1, 1 - header / total), w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02
        )
        grid = figure.add_gridspec(len(trims), chart.columns, height_ratios=chart.heights)
        every = [figure.add_subplot(grid[divmod(index, chart.columns)]) for index in range(len(chart.panels))]
        for index, (axes, panel) in enumerate(zip(every, chart.panels, strict=True)):
            if panel.grid is not None:
                _cells(axes, panel.grid, theme.data_width(chart.width, chart.columns, venue))
            _panel(axes, panel, bare_x=chart.axis_shared(index, "x"), bare_y=chart.axis_shared(index, "y"))
        _bars(figure, chart, every)
        figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
        figure.set_layout_engine("none")  # every format gets this layout, measured once
        return figure


def _legend(figure: "Figure", keys: list[Key], width: float) -> "Legend | None":
    """The legend on as few lines as the figure's width allows; none for a single, named curve."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not legend_needed(keys):
        return None
    handles = [
        Patch(facecolor=theme.LOOKS[key.role].colour, alpha=theme.BAND, linewidth=0)
        if key.kind == "band"
        else Line2D([], [], **_line(key) | (_marker(key) if key.kind in ("marked", "points") else {}))
        for key in keys
    ]
    # matplotlib leaves out entries that begin with an underscore
    labels = [" " + key.label if key.label.startswith("_") else key.label for key in keys]
    for columns in range(len(keys), 0, -1):
        entries = figure.legend(
            handles,
            labels,
            loc="upper left",
            ncols=columns,
            borderaxespad=0.0,
            borderpad=0.6,
            handlelength=1.0 if all(key.kind == "points" for key in keys) else 2.2,
            handletextpad=0.5,
            columnspacing=1.3,
            labelspacing=0.35,
        )
        box = entries.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        if box.width / figure.dpi <= width or columns == 1:
            return entries
        entries.remove()
    return None


def _panel(axes: "Axes", panel: Panel, bare_x: bool, bare_y: bool) -> None:
    axes.set_title(panel.title)
    for line in panel.references:
        draw_line = axes.axhline if line.along == "y" else axes.axvline
        draw_line(line.value, zorder=2.5, **_line(line))
    for order, series in enumerate(panel.from_below()):
        _series(axes, series, 3 + order)
    for note in panel.annotations:
        away: dict[str, Any] = {"xytext": (5, 0), "va": "center_baseline"}
        if note.side != "right":  # beyond a corner of the error bars, on a leader
            up, left = note.side.startswith("upper"), note.side.endswith("left")
            away = {
                "xytext": (-10 if left else 10, 14 if up else -14),
                "ha": "right" if left else "left",
                "va": "bottom" if up else "top",
                "arrowprops": {"arrowstyle": "-", "linewidth": theme.HAIR, "shrinkA": 0, "shrinkB": 2},
                "bbox": {"facecolor": theme.PAPER, "linewidth": 0, "pad": 0.5},
            }
        axes.annotate(
            note.text,
            (note.x, note.y),
            textcoords="offset points",
            color=theme.LOOKS[note.role].colour,
            annotation_clip=False,
            zorder=20,  # above all series
            **away,
        )
    _axis(axes, "x", panel.x, bare_x, [value for series in panel.series for value in series.x])
    _axis(axes, "y", panel.y, bare_y, [value for series in panel.series for value in series.y])


def _axis(axes: "Axes", side: Literal["x", "y"], axis: Axis, bare: bool, values: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set(**{f"{side}scale": axis.scale})
    side_axis = axes.xaxis if side == "x" else axes.yaxis
    if axis.ticks:
        side_axis.set_ticks([value for value, _ in axis.ticks], [text for _, text in axis.ticks])
        if not axis.unit and not axis.label:  # names instead of numbers
            axes.tick_params(axis=side, length=0)
        if axis.upright:
            axes.tick_params(axis=side, labelrotation=90)
    else:
        whole = all(value.is_integer() for value in values if math.isfinite(value))
        side_axis.set_major_locator(
            LogLocator(subs=theme.log_ticks(axis.limits), numticks=6)
            if axis.scale == "log"
            else MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole)
        )
        side_axis.set_major_formatter(FuncFormatter(lambda value, _: theme.tick_text(value)))
    side_axis.set_minor_locator(NullLocator())
    if axis.limits is not None:
        axes.set(**{f"{side}lim": theme.padded(axis.limits, axis.scale == "log")})
        axes.spines["bottom" if side == "x" else "left"].set_bounds(*axis.limits)
    if bare:
        axes.tick_params(axis=side, labelbottom=False, labelleft=False)
    else:
        axes.set(**{f"{side}label": axis.text})


def _series(axes: "Axes", series: Series, order: int) -> None:
    colour = theme.LOOKS[series.role].colour
    if series.low and series.kind != "points":
        axes.fill_between(
            series.x,
            series.low,
            series.high,
            step="post" if series.kind == "step" else None,
            color=colour,
            alpha=theme.BAND,
            linewidth=0,
        )
    if series.kind == "band":
        return
    if series.low and series.kind == "points":
        axes.vlines(series.x, series.low, series.high, color=colour, linewidth=0.9, zorder=order)
    if series.left:
        axes.hlines(series.y, series.left, series.right, color=colour, linewidth=0.9, zorder=order)
    style = _line(series) | (_marker(series) if series.kind in ("marked", "points") else {})
    if series.kind == "step":
        style["drawstyle"] = "steps-post"
    every = max(1, math.ceil(len(series.x) / MARKERS)) if series.kind == "marked" else 1
    axes.plot(series.x, series.y, zorder=order, markevery=every, **style)


def _line(thing: Series | Key | Reference) -> dict[str, Any]:
    stroke = theme.STROKES[thing.part]
    return {
        "color": theme.LOOKS[thing.role].colour,
        "linewidth": stroke.width,
        "alpha": stroke.opacity,
        "linestyle": (0, stroke.dash) if stroke.dash else "solid",
        "dash_capstyle": "butt",
    }


def _marker(thing: Series | Key) -> dict[str, Any]:
    look, stroke = theme.LOOKS[thing.role], theme.STROKES[thing.part]
    style: dict[str, Any] = {
        "marker": look.marker,
        "markersize": theme.MARKER * look.size,
        "markeredgewidth": 0.9,
        "markeredgecolor": look.colour,
        "markerfacecolor": look.colour if stroke.filled else theme.PAPER,
    }
    return style | ({"linestyle": "none"} if thing.kind == "points" else {})


def _cells(axes: "Axes", grid: Grid, inches: float) -> None:
    """The cells as vectors, which no viewer blurs.

    Args:
        axes: where.
        grid: what.
        inches: about how wide the data area will be, for the size of the dots.
    """
    import numpy as np

    across, up = len(grid.columns), len(grid.rows)
    values = np.ma.masked_invalid(np.array(grid.values))
    axes.grid(visible=False)
    axes.pcolormesh(
        np.arange(across + 1) - 0.5,
        np.arange(up + 1) - 0.5,
        values,
        cmap=_colours(grid.shade),
        vmin=grid.shade.limits[0],
        vmax=grid.shade.limits[1],
        edgecolors=theme.PAPER,
        linewidth=0.25,
        zorder=1,
    )
    if grid.missing():  # what lies behind the cells shows where there is none
        axes.patch.set(facecolor=theme.MISSING, edgecolor=theme.HATCH, hatch="//////", linewidth=0)
    size = min(max(0.4 * inches * 72 / across, DOT[0]), DOT[1])
    for marker, cells, height in (("o", grid.dots(), 0.0), ("_", grid.dashes(), -0.3)):
        for ink in (theme.INK, theme.PAPER):
            inked = [(x, y) for x, y in cells if grid.shade.ink(grid.values[y][x]) == ink]
            axes.plot(
                [x for x, _ in inked],
                [y + height for _, y in inked],
                linestyle="none",
                marker=marker,
                markersize=size,
                markeredgewidth=0.0 if marker == "o" else 0.7,
                color=ink,
                zorder=3,
            )
    for y, row in enumerate(grid.texts):
        for x, text in enumerate(row):
            ink = grid.shade.ink(grid.values[y][x])
            axes.text(x, y, text, color=ink, ha="center", va="center_baseline", clip_on=True)
    axes.set(xlim=(-0.5, across - 0.5), ylim=(-0.5, up - 0.5))


def _bars(figure: "Figure", chart: Chart, axes: Sequence["Axes"]) -> None:
    """One colour bar for each scale of the chart, beside the panels that use it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    extend = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    for shade in chart.shades:
        panels = [
            (panel.height, panel.grid, panel_axes)
            for panel, panel_axes in zip(chart.panels, axes, strict=True)
            if panel.grid is not None and panel.grid.shade == shade
        ]
        below, above = (any(side) for side in zip(*(grid.beyond() for _, grid, _ in panels), strict=True))
        bar = figure.colorbar(
            ScalarMappable(Normalize(*shade.limits), _colours(shade)),
            ax=[panel_axes for _, _, panel_axes in panels],
            extend=extend[below, above],
            ticks=MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]),
            format=FuncFormatter(lambda value, _: theme.tick_text(value)),
            aspect=18 if len(panels) == 1 else 30,
            pad=0.02,
            fraction=0.04,
        )
        # A bar of one panel is as high as that; one of several is beside all rows.
        height = sum(height for height, _, _ in panels) / (chart.columns if len(panels) > 1 else 1)
        bar.set_label(textwrap.fill(chart.shade_text(shade), max(int(height / 0.065), 10)))
        bar.outline.set_linewidth(theme.HAIR)
        bar.ax.grid(visible=False)


def _colours(shade: Shade) -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(shade.ramp, theme.RAMPS[shade.ramp])
