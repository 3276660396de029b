"""What charts of several subjects share: grids of a table's rows, ticks that fit, axes, and numbers in notes.

In: checked tables. Out: Grids, Panels and Axes. Draws nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pandas as pd

from safetynet.figures import theme
from safetynet.figures.chart import Axis, Grid, Panel, Reference
from safetynet.figures.values import shortened

LINE = 0.125
"""Inches from one tick text to the next, measured across the line."""
LETTER = 0.06
"""Inches of a letter."""
LONGEST = 14
"""Letters of a tick text; the table beside the figure keeps the whole."""
PERCENT = Axis(
    "Rows",
    unit="%",
    limits=(0.0, 100.0),
    ticks=tuple((float(value), str(value)) for value in (0, 25, 50, 75, 100)),
)
Cell = TypeVar("Cell")


@dataclass(frozen=True)
class Frame:
    """How panels lie on the page, which decides how many ticks fit."""

    width: Literal["one", "two"]
    columns: int

    @property
    def inches(self) -> float:
        """About how wide one data area is."""
        return theme.data_width(self.width, self.columns)


def frame_for(panels: int) -> Frame:
    """One column of the page for one panel; else two, with at most three panels side by side."""
    if panels == 1:
        return Frame("one", 1)
    return Frame("two", 3 if panels % 3 == 0 else 2)


def matrix(
    rows: pd.DataFrame,
    places: tuple[str, Sequence[Any], str, Sequence[Any]],
    cell: Callable[[Mapping[str, Any]], Cell],
    blank: Cell,
) -> list[list[Cell]]:
    """What a grid holds for each cell.

    Args:
        rows: one row for each cell that was measured.
        places: column name and its values from left to right, then those from below upwards.
        cell: what a row gives.
        blank: what stands where there is no row.
    """
    across, lefts, up, belows = places
    cells = {(row[across], row[up]): cell(row) for row in rows.to_dict("records")}
    return [[cells.get((left, below), blank) for left in lefts] for below in belows]


def values(
    rows: pd.DataFrame, places: tuple[str, Sequence[Any], str, Sequence[Any]], column: str
) -> list[list[float]]:
    """One column of the rows as a grid's values, NaN where there is no row; `places` as in `matrix`."""
    return matrix(rows, places, lambda row: float(row[column]), math.nan)


def grid_panel(
    grid: Grid,
    labels: tuple[str, str],
    frame: Frame,
    title: str = "",
    keep: Iterable[int] = (),
    references: tuple[Reference, ...] = (),
    line: float = 0.15,
) -> Panel:
    """A panel whose ticks are the grid's names, as many as fit.

    Args:
        grid: the cells.
        labels: of the axis along x and of the one along y.
        frame: the chart's layout.
        title: of the panel.
        keep: columns whose names must be there even if others have to go.
        references: lines across the panel.
        line: inches that a row is high, as long as the panel stays within 0.9 to 3.4 inches.
    """
    height = min(max(line * len(grid.rows), 0.9), 3.4)
    longest = max(len(name) for name in grid.columns)
    # numbers may be thinned, names may not as long as they can stand on end
    upright = not all(name.lstrip("-").isdigit() for name in grid.columns) and (
        (longest + 1) * LETTER > frame.inches / len(grid.columns)
    )
    each = LINE if upright else (longest + 1) * LETTER
    x = Axis(labels[0], ticks=fitting(grid.columns, frame.inches, each, keep), upright=upright)
    y = Axis(labels[1], ticks=fitting(grid.rows, height, LINE))
    return Panel(x, y, title=title, references=references, height=height, grid=grid)


def fitting(
    names: Sequence[str], inches: float, each: float, keep: Iterable[int] = ()
) -> tuple[tuple[float, str], ...]:
    """Ticks at every name, or at every second, fifth, tenth ... so that none touches the next.

    Args:
        names: of the columns or rows.
        inches: that they fill together.
        each: inches that one tick text needs.
        keep: places that have their tick in any case; those too close to them give way.
    """
    apart = math.ceil(each * len(names) / inches - 1e-9)
    step = next(stop * 10**power for power in range(6) for stop in (1, 2, 5) if stop * 10**power >= apart)
    places_shown: list[int] = []
    for place in (*sorted(keep), *range(0, len(names), step)):
        if all(abs(place - other) >= apart for other in places_shown):
            places_shown.append(place)
    return tuple((float(place), shortened(names[place], LONGEST)) for place in sorted(places_shown))


def layer_axis(layers: Iterable[int]) -> Axis:
    """An axis of layers, with the embedding as layer -1."""
    low, high = min(layers), max(layers)
    step = next(stop for stop in (1, 2, 4, 5, 8, 10, 16, 20, 40, 80, 1000) if (high - low) / stop <= 6)
    ticks = [(float(layer), str(layer)) for layer in range(0, high + 1, step) if layer >= low]
    if low < 0:
        ticks = [(-1.0, "emb"), *ticks[1 if step > 1 else 0 :]]
    return Axis("Layer", limits=(float(low), float(max(high, low + 1))), ticks=tuple(ticks))


def nice(top: float) -> float:
    """The next number upwards with a short name, as the end of an axis; 1 where nothing is above zero."""
    if not top > 0:
        return 1.0
    step = 10 ** math.floor(math.log10(top)) / 2
    return math.ceil(top / step - 1e-9) * step


def from_zero(label: str, values: Iterable[float]) -> Axis:
    """Steps or epochs, from zero so that figures of several runs can be laid side by side."""
    top = max((value for value in values if math.isfinite(value)), default=0.0)
    return Axis(label, limits=(0.0, top if top > 0 else 1.0))


def layer_name(layer: int) -> str:
    """A layer as a row's name."""
    return "emb" if layer < 0 else str(layer)


def number(value: float) -> str:
    """A number in a note."""
    return f"{value:.3g}".replace("-", "−")


def with_interval(value: float, low: float, high: float) -> str:
    """A value with its interval, as far as it is known."""
    return number(value) + ("" if math.isnan(low) else f" ({number(low)} to {number(high)})")
