"""What charts of several subjects share: tables as they need them, series and grids of a table's rows, axes.

In: a DataFrame, a list of records, or a dict of lists. Out: checked DataFrames; Series, Grids, Panels, Axes.
Draws nothing and computes no result. What a column may hold is declared in `safetynet.tables`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import theme
from safetynet.figures.chart import Axis, Grid, Kind, Panel, Reference, Series, Shade
from safetynet.figures.glyphs import shortened
from safetynet.figures.theme import Part, Role
from safetynet.tables import Data, checked

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
Look = tuple[str, Role, Part]
"""Legend text of a series, and the role and part that decide its colour, marker and dash."""
Row = Mapping[str, Any]
Names = tuple[str, Mapping[Any, str]]
"""A column, and its values in the order of an axis with what is written at each."""


def read(name: str, data: Data, columns: str, key: str = "", percent: str = "") -> pd.DataFrame:
    """Some columns of a table that `safetynet.tables` declares.

    Args:
        name: of the table.
        data: its rows.
        columns: names of those that are shown, with blanks between.
        key: names of those that identify a row, which may be there once.
        percent: names of fractions that are given as percent.

    Raises:
        InputError: naming the table, the column and the row, if there are no rows, a column is missing, a
            word is unknown, a value is of another kind, or a row is there twice.
    """
    table = checked(name, data, columns.split())
    once(table, name, key.split())
    return table.assign(**{column: 100 * table[column] for column in percent.split()})


def interval(*names: str) -> str:
    """Columns of values with their intervals."""
    return " ".join(f"{name}{end}" for name in names for end in ("", "_low", "_high"))


def once(table: pd.DataFrame, name: str, key: Sequence[str]) -> None:
    """Check that each place is measured once.

    Raises:
        InputError: naming the place that the table holds twice.
    """
    twice = table[table.duplicated(list(key))] if key else table[:0]
    if len(twice):
        place = ", ".join(f"{column} {twice[column].iloc[0]!s}" for column in key)
        raise InputError(f"{name}: {place} is there more than once; give one row for each")


def series_of(
    kind: Kind, rows: pd.DataFrame, x: str, y: str, look: Look, note: Callable[[Row], str] | None = None
) -> Series:
    """A series of a table's rows.

    Args:
        kind: of the series.
        rows: one for each point, in their order.
        x: column of the values along x, or the columns of value, low and high, with blanks between.
        y: the same along y.
        look: of the series.
        note: what the interactive figure says of a row.
    """
    xs, *x_ends = (list(rows[name]) for name in x.split())
    ys, *y_ends = (list(rows[name]) for name in y.split())
    (left, right), (low, high) = x_ends or ((), ()), y_ends or ((), ())
    notes = [note(row) for row in rows.to_dict("records")] if note else ()
    return Series(kind, xs, ys, low, high, *look, left, right, notes)


def curve(
    rows: pd.DataFrame,
    x: str,
    y: str,
    look: Look,
    note: Callable[[Row], str] | None = None,
    kind: Kind = "marked",
) -> Series:
    """The rows as a curve over `x`, in its order; as a point with error bars where there is one row."""
    return series_of(
        kind if len(rows) > 1 else "points", rows.sort_values(x, kind="stable"), x, y, look, note
    )


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


def grid_of(
    rows: pd.DataFrame,
    x: Names,
    y: Names,
    value: str,
    shade: Shade,
    mark: str = "",
    **cells: Callable[[Row], object],
) -> Grid:
    """A grid of a table's rows; where there is no row, a cell is empty.

    Args:
        rows: one for each cell that was measured.
        x: of the columns, from left to right.
        y: of the rows of cells, from below upwards.
        value: the column that the colours show.
        shade: the colour scale.
        mark: legend text of the dots.
        cells: what a row gives to its cell, by the grid's fields `marked`, `texts` and `notes`.
    """
    (across, columns), (up, lines) = x, y
    by_place = {(row[across], row[up]): row for row in rows.to_dict("records")}

    def matrix(cell: Callable[[Row], Any], blank: object) -> list[list[Any]]:
        by_cell = {place: cell(row) for place, row in by_place.items()}
        return [[by_cell.get((left, below), blank) for left in columns] for below in lines]

    values = matrix(lambda row: float(row[value]), math.nan)
    fields: dict[str, Any] = {
        field: matrix(cell, False if field == "marked" else "") for field, cell in cells.items()
    }
    return Grid(list(columns.values()), list(lines.values()), values, shade, mark=mark, **fields)


def layers_of(layers: Iterable[int]) -> Names:
    """Layers from below upwards, the embedding as layer -1."""
    return "layer", {layer: "emb" if layer < 0 else str(layer) for layer in sorted(set(layers))}


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


def lines_of(names: Iterable[str], label: str = "") -> Axis:
    """An axis of names that are read from top to bottom: the first lies at 0, the next one at -1."""
    ticks = tuple((-float(line), name) for line, name in enumerate(names))
    return Axis(label, limits=(0.5 - len(ticks), 0.5), ticks=ticks)


def percent(label: str) -> Axis:
    """An axis of rates."""
    return replace(PERCENT, label=label)


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


def number(value: float) -> str:
    """A number in a note."""
    return f"{value:.3g}".replace("-", "−")


def with_interval(row: Row, columns: str) -> str:
    """A value with its interval, as far as it is known, from the columns of value, low and high."""
    value, low, high = (row[name] for name in columns.split())
    return number(value) + ("" if math.isnan(low) else f" ({number(low)} to {number(high)})")
