"""Draw a grid for paper with matplotlib: coloured cells, dots and texts in them, and the colour bars.

In: a Grid and the axes it belongs on. Out: nothing; the axes hold it. Writes no file.
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from safetynet.figures import theme
from safetynet.figures.chart import Chart
from safetynet.figures.grid import Grid, Shade

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

DOT = (1.2, 2.8)
"""Points that the dot of a marked cell measures, at least and at most."""


def draw(axes: "Axes", grid: Grid, inches: float) -> None:
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
        for shown_on_dark in (False, True):
            own = [(x, y) for x, y in cells if grid.shade.dark(grid.values[y][x]) is shown_on_dark]
            axes.plot(
                [x for x, _ in own],
                [y + height for _, y in own],
                linestyle="none",
                marker=marker,
                markersize=size,
                markeredgewidth=0.0 if marker == "o" else 0.7,
                color=theme.PAPER if shown_on_dark else theme.INK,
                zorder=3,
            )
    for y, row in enumerate(grid.texts):
        for x, text in enumerate(row):
            colour = theme.PAPER if grid.shade.dark(grid.values[y][x]) else theme.INK
            axes.text(x, y, text, color=colour, ha="center", va="center_baseline", clip_on=True)
    axes.set(xlim=(-0.5, across - 0.5), ylim=(-0.5, up - 0.5))


def bars(figure: "Figure", chart: Chart, axes: Sequence["Axes"]) -> None:
    """One colour bar for each scale of the chart, beside the panels that use it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shades = dict.fromkeys(panel.grid.shade for panel in chart.panels if panel.grid is not None)
    for shade in shades:
        owners = [
            (panel, own)
            for panel, own in zip(chart.panels, axes, strict=True)
            if panel.grid is not None and panel.grid.shade == shade
        ]
        beyond = [panel.grid.beyond() for panel, _ in owners if panel.grid is not None]
        below, above = (any(side) for side in zip(*beyond, strict=True))
        bar = figure.colorbar(
            ScalarMappable(Normalize(*shade.limits), _colours(shade)),
            ax=[own for _, own in owners],
            extend={(True, True): "both", (True, False): "min", (False, True): "max"}.get(
                (below, above), "neither"
            ),
            ticks=MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]),
            format=FuncFormatter(lambda value, _: theme.tick_text(value)),
            aspect=18 if len(owners) == 1 else 30,
            pad=0.02,
            fraction=0.04,
        )
        height = (
            sum(panel.height for panel, _ in owners) / chart.columns
            if len(owners) > 1
            else owners[0][0].height
        )
        bar.set_label(textwrap.fill(shade.text, max(int(height / 0.065), 10)))
        bar.outline.set_linewidth(theme.HAIR)
        bar.ax.grid(visible=False)


def _colours(shade: Shade) -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(shade.ramp, theme.RAMPS[shade.ramp])
