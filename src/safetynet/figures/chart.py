"""A figure described as data: panels of series or heat maps, axes with units, the run and table behind them.

In: numbers and labels. Out: frozen dataclasses that the two renderers draw, and the table behind a figure.
Nothing here knows matplotlib or Plotly, and nothing here computes a result.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures import theme
from safetynet.figures.theme import Part, Role
from safetynet.tables import numbers

Kind = Literal["line", "marked", "points", "band", "step"]
Scale = Literal["linear", "log"]
Ramp = Literal["diverging", "sequential"]
Side = Literal["right", "upper right", "upper left", "lower right", "lower left"]

NOTICEABLE = 0.1
"""From this part of the scale on, negative values carry a dash: greyscale does not tell the sides apart."""


@dataclass(frozen=True)
class Source:
    """Where the numbers of a figure are kept; every file format carries it."""

    run: str
    table: str

    def __str__(self) -> str:
        return f"run {self.run}, table {self.table}"


def _check_word(where: str, field: str, word: str, allowed: Sequence[str]) -> None:
    if word not in allowed:
        raise InputError(f"{where}: {field} is {word!r}; allowed are {', '.join(allowed)}")


@dataclass(frozen=True)
class Quantity:
    """What an axis or a colour scale measures."""

    label: str
    unit: str = ""

    @property
    def text(self) -> str:
        """Label with its unit in brackets."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Axis(Quantity):
    """One axis. Equal axes of neighbouring panels are labelled once and zoomed together."""

    scale: Scale = "linear"
    limits: tuple[float, float] | None = None
    """The range that carries meaning, e.g. 0 to 100%. A small margin is drawn beyond it."""
    ticks: tuple[tuple[float, str], ...] = ()
    """Value and text of each tick; empty lets the renderer choose."""
    upright: bool = False
    """Tick texts stand on end, as tokens must below narrow columns."""

    def __post_init__(self) -> None:
        _check_word(f"axis {self.label!r}", "scale", self.scale, get_args(Scale))
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise InputError(f"axis {self.label!r}: limits {self.limits} do not rise; give (low, high)")
        if self.scale == "log" and self.limits is not None and self.limits[0] <= 0:
            raise InputError(f"axis {self.label!r}: {self.limits[0]} has no logarithm; give limits above 0")


@dataclass(frozen=True)
class Series:
    """Numbers drawn as one thing. NaN in `y` is a gap, NaN in `low` or `high` leaves the interval out.

    `marked` is a line with a marker at each measurement, `band` only an interval. `low` and `high` become a
    band around lines and error bars on points; `left` and `right` are the interval of points along x.
    """

    kind: Kind
    x: Sequence[float]
    y: Sequence[float] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    label: str = ""
    """Legend text, drawn once however many series share it; empty leaves the series out of the legend."""
    role: Role = "ink"
    """Decides colour and marker."""
    part: Part = "subject"
    """Decides dash and filling: what is claimed, its control, the floor below it, or the raw numbers."""
    left: Sequence[float] = ()
    right: Sequence[float] = ()
    notes: Sequence[str] = ()
    """What the interactive figure shows for each point beside its value."""

    def __post_init__(self) -> None:
        where = f"series {self.label!r}" if self.label else f"{self.kind} series"
        for field, word, words in (
            ("kind", self.kind, Kind),
            ("role", self.role, Role),
            ("part", self.part, Part),
        ):
            _check_word(where, field, word, get_args(words))
        for field in ("x", "y", "low", "high", "left", "right"):
            object.__setattr__(self, field, numbers(getattr(self, field), f"{where}, field {field}"))
        object.__setattr__(self, "notes", tuple(str(note) for note in self.notes))
        if not self.x:
            raise InputError(f"{where}: x is empty; a series needs at least one value")
        # An interval has two ends, and a band is nothing else.
        needed = {"low", "high"} if self.kind == "band" else {"y"}
        needed |= {"low", "high"} if self.low or self.high else set()
        needed |= {"left", "right"} if self.left or self.right else set()
        needed |= {"notes"} if self.notes else set()
        for field in sorted(needed):
            if (length := len(getattr(self, field))) != len(self.x):
                raise InputError(
                    f"{where}: {field} has {length} values and x has {len(self.x)}; give as many of each"
                )


@dataclass(frozen=True)
class Reference:
    """A straight line across a panel at one value, such as the base model's floor."""

    value: float
    along: Literal["x", "y"] = "y"
    """The axis that the value belongs to."""
    label: str = ""
    role: Role = "base"
    part: Part = "floor"
    note: str = ""


@dataclass(frozen=True)
class Annotation:
    """Text at a point of the data: right of it, or on a short leader beyond a corner of its error bars."""

    x: float
    y: float
    text: str
    role: Role = "ink"
    side: Side = "right"


@dataclass(frozen=True)
class Shade(Quantity):
    """A colour scale with the label of its bar. Grids of one chart with equal shades share one bar."""

    limits: tuple[float, float] = (-1.0, 1.0)
    """Values beyond are drawn in the colour of the end, and the bar shows that there are some."""
    ramp: Ramp = "diverging"
    """`diverging`, white at 0, for what has a sign; `sequential`, white at the lower end, for sizes."""

    def __post_init__(self) -> None:
        low, high = self.limits
        _check_word(f"colour scale {self.label!r}", "ramp", self.ramp, get_args(Ramp))
        if not low < high or (self.ramp == "diverging" and low != -high):
            raise InputError(
                f"colour scale {self.label!r}: limits {self.limits} must rise, and lie evenly around 0 "
                "where the scale diverges"
            )

    def ink(self, value: float) -> str:
        """Of text and dots on this value's colour: white where that is dark. NaN, not measured, is pale."""
        if math.isnan(value):
            return theme.INK
        low, high = self.limits
        depth = min(max((value - low) / (high - low), 0.0), 1.0)  # 0 to 1
        red, green, blue = theme.blend(theme.RAMPS[self.ramp], depth)
        return theme.PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 120 else theme.INK


@dataclass(frozen=True)
class Grid:
    """Values over columns and rows; row 0 lies at the bottom, and NaN is shown as not measured.

    Everything that holds one entry for each cell is given as rows of columns, as `values` is.
    """

    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]
    shade: Shade
    marked: Sequence[Sequence[bool]] = ()
    """Cells that carry a dot."""
    mark: str = ""
    """Legend text of the dots."""
    texts: Sequence[Sequence[str]] = ()
    """What is written in the cells."""
    notes: Sequence[Sequence[str]] = ()
    """What the interactive figure shows for each cell beside its value."""

    def __post_init__(self) -> None:
        where = f"grid {self.shade.label!r}"
        if not self.columns or not self.rows:
            raise InputError(f"{where}: it has no {'rows' if self.columns else 'columns'}; give at least one")
        for field in ("values", "marked", "texts", "notes"):
            entries = getattr(self, field)
            if not entries and field != "values":
                continue
            if [len(row) for row in entries] != [len(self.columns)] * len(self.rows):
                raise InputError(
                    f"{where}: {field} must be {len(self.rows)} rows of {len(self.columns)} columns, "
                    "as there are names"
                )
        values = tuple(
            numbers(row, f"{where}, row {name!r}") for row, name in zip(self.values, self.rows, strict=True)
        )
        object.__setattr__(self, "values", values)

    def dots(self) -> list[tuple[int, int]]:
        """Column and row of each marked cell."""
        cells = ((x, y) for y, row in enumerate(self.marked) for x, marked in enumerate(row) if marked)
        return [(x, y) for x, y in cells if not math.isnan(self.values[y][x])]

    def dashes(self) -> list[tuple[int, int]]:
        """Column and row of each cell that is noticeably below 0 on a diverging scale."""
        if self.shade.ramp != "diverging":
            return []
        least = NOTICEABLE * self.shade.limits[0]
        return [(x, y) for y, row in enumerate(self.values) for x, value in enumerate(row) if value < least]

    def missing(self) -> bool:
        """Whether a cell was not measured."""
        return any(math.isnan(value) for row in self.values for value in row)

    def beyond(self) -> tuple[bool, bool]:
        """Whether values lie below and above the scale's limits."""
        finite = [value for row in self.values for value in row if not math.isnan(value)]
        low, high = self.shade.limits
        return any(value < low for value in finite), any(value > high for value in finite)

    def cells(self) -> list[dict[str, Any]]:
        """The grid as a long table: one row for each cell, row by row from below."""

        def entry(matrix: Sequence[Sequence[Any]], x: int, y: int, blank: object) -> Any:
            return matrix[y][x] if matrix else blank

        return [
            {
                "series": self.shade.text,
                "kind": "cell",
                "x": x,
                "column": column,
                "y": y,
                "row": row,
                "value": self.values[y][x],
                "marked": bool(entry(self.marked, x, y, False)),
                "text": entry(self.texts, x, y, ""),
                "note": entry(self.notes, x, y, ""),
            }
            for y, row in enumerate(self.rows)
            for x, column in enumerate(self.columns)
        ]


@dataclass(frozen=True)
class Panel:
    """One pair of axes and what is drawn on them: series, or a grid whose names are the axes' ticks."""

    x: Axis
    y: Axis
    series: tuple[Series, ...] = ()
    title: str = ""
    references: tuple[Reference, ...] = ()
    annotations: tuple[Annotation, ...] = ()
    height: float = 1.45
    """Inches of the data area on paper."""
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if not self.series and self.grid is None:
            raise InputError(f"panel {self.title!r} has no series; give at least one")

    def from_below(self) -> list[Series]:
        """Series in the order of drawing: raw numbers, then the last series to the first.

        A control without markers goes on top, since what it covers shows through its dashes.
        """
        layer = {"raw": 0, "control": 2}
        series = list(reversed(self.series))
        series.sort(key=lambda one: layer.get(one.part, 1) if one.kind in ("line", "step") else 1)
        return series


@dataclass(frozen=True)
class Chart:
    """A whole figure: one or several panels, row by row."""

    title: str
    panels: tuple[Panel, ...]
    columns: int = 1
    width: Literal["one", "two"] = "one"
    """Columns of the page that the figure fills."""
    caption: str = ""
    """How to read it and what it is compared with, in a sentence or two."""
    source: Source = Source("", "")

    def __post_init__(self) -> None:
        if not self.panels:
            raise InputError(f"chart {self.title!r} has no panels; give at least one")
        if self.columns < 1:
            raise InputError(f"chart {self.title!r}: columns is {self.columns}; give 1 or more")

    @property
    def digest(self) -> str:
        """SHA-256 of all that is drawn."""
        return hashlib.sha256(repr(self).encode("utf-8", "replace")).hexdigest()

    @property
    def heights(self) -> list[float]:
        """Inches of each row of panels: those of its highest one."""
        heights = [panel.height for panel in self.panels]
        return [max(heights[at : at + self.columns]) for at in range(0, len(heights), self.columns)]

    @property
    def shades(self) -> list[Shade]:
        """The colour scales, each of which has one bar."""
        return list(dict.fromkeys(panel.grid.shade for panel in self.panels if panel.grid is not None))

    def shade_text(self, shade: Shade) -> str:
        """What stands beside a scale's bar: its label, and what grey means where a grid has such cells."""
        grids = [panel.grid for panel in self.panels if panel.grid is not None and panel.grid.shade == shade]
        return shade.text + ("; grey: not measured" if any(grid.missing() for grid in grids) else "")

    def axis_shared(self, index: int, side: Literal["x", "y"]) -> bool:
        """Whether the neighbour that carries the labels (below for x, left for y) has the same axis."""
        neighbour = index + self.columns if side == "x" else index - 1
        first = side == "y" and index % self.columns == 0
        if first or not 0 <= neighbour < len(self.panels):
            return False
        return getattr(self.panels[neighbour], side) == getattr(self.panels[index], side)


@dataclass(frozen=True)
class Key:
    """One entry of the legend."""

    label: str
    kind: Kind
    role: Role
    part: Part


def legend(chart: Chart) -> list[Key]:
    """Entries in the order of drawing, one per label; in plain ink where a label has several colours."""
    keys: dict[str, Key] = {}
    for panel in chart.panels:
        entries = [Key(s.label, s.kind, s.role, s.part) for s in panel.series]
        entries += [Key(r.label, "line", r.role, r.part) for r in panel.references]
        if panel.grid is not None and panel.grid.dots():
            entries.append(Key(panel.grid.mark, "points", "ink", "subject"))
        for key in entries:
            first = keys.setdefault(key.label, key)
            if first.role != key.role:
                keys[key.label] = replace(first, role="ink")
    keys.pop("", None)
    return list(keys.values())


def legend_needed(keys: Sequence[Key]) -> bool:
    """A single curve is named by its axis; a single kind of dot in a grid has no other name."""
    return len(keys) > 1 or any(key.kind == "points" for key in keys)


def table(chart: Chart) -> pd.DataFrame:
    """The data behind a figure, one row per value drawn, with units, run and table in columns."""
    rows: list[dict[str, object]] = []
    for number, panel in enumerate(chart.panels, start=1):
        place = {"panel": number, "title": panel.title or chart.title}
        if panel.grid is not None:
            rows += [place | cell for cell in panel.grid.cells()]
        for series in panel.series:
            look = {"series": series.label, "kind": series.kind, "role": series.role, "part": series.part}
            columns = {name: getattr(series, name) for name in ("x", "y", "low", "high", "left", "right")}
            rows += [
                place
                | look
                | {name: values[point] if values else math.nan for name, values in columns.items()}
                | {"note": series.notes[point] if series.notes else ""}
                for point in range(len(series.x))
            ]
        for line in panel.references:
            look = {"series": line.label, "kind": "reference", "role": line.role, "part": line.part}
            rows.append(place | look | {line.along: line.value, "note": line.note})
    frame = pd.DataFrame(rows)
    axes = [chart.panels[number - 1] for number in frame["panel"]]
    frame["x_axis"] = [panel.x.text for panel in axes]
    frame["y_axis"] = [panel.y.text for panel in axes]
    return frame.assign(run=chart.source.run, table=chart.source.table)
