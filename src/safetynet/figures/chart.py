"""A figure described as data: panels of series or grids, axes with units, the run and table behind them.

In: numbers and labels. Out: frozen dataclasses that the two renderers draw, and the table behind a figure.
Nothing here knows matplotlib or Plotly, and nothing here computes a result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures.grid import Grid
from safetynet.figures.theme import Part, Role
from safetynet.figures.values import numbers, unknown

Kind = Literal["line", "marked", "points", "band", "step"]
Scale = Literal["linear", "log"]
Side = Literal["right", "upper right", "upper left", "lower right", "lower left"]


@dataclass(frozen=True)
class Source:
    """Where the numbers of a figure are kept; every file format carries it."""

    run: str
    table: str

    def __str__(self) -> str:
        return f"run {self.run}, table {self.table}"


@dataclass(frozen=True)
class Axis:
    """One axis. Equal axes of neighbouring panels are labelled once and zoomed together."""

    label: str
    unit: str = ""
    scale: Scale = "linear"
    limits: tuple[float, float] | None = None
    """The range that carries meaning, e.g. 0 to 100%. A small margin is drawn beyond it."""
    ticks: tuple[tuple[float, str], ...] = ()
    """Value and text of each tick; empty lets the renderer choose."""
    upright: bool = False
    """Tick texts stand on end, as tokens must below narrow columns."""

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise InputError(unknown("axis", self.label, "scale", self.scale, get_args(Scale)))
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise InputError(f"axis {self.label!r}: limits {self.limits} do not rise; give (low, high)")
        if self.scale == "log" and self.limits is not None and self.limits[0] <= 0:
            raise InputError(f"axis {self.label!r}: {self.limits[0]} has no logarithm; give limits above 0")

    @property
    def text(self) -> str:
        """Label with its unit in brackets."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


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
        for field, given, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("role", self.role, get_args(Role)),
            ("part", self.part, get_args(Part)),
        ):
            if given not in allowed:
                raise InputError(unknown("series", self.label, field, given, allowed))
        for field in ("x", "y", "low", "high", "left", "right"):
            object.__setattr__(self, field, numbers(getattr(self, field), f"{where}, field {field}"))
        object.__setattr__(self, "notes", tuple(str(note) for note in self.notes))
        self._check_lengths(where)

    def _check_lengths(self, where: str) -> None:
        if not self.x:
            raise InputError(f"{where}: x is empty; a series needs at least one value")
        needed = {"low", "high"} if self.kind == "band" else {"y"}
        if self.low or self.high:
            needed |= {"low", "high"}
        if self.left or self.right:
            needed |= {"left", "right"}
        if self.notes:
            needed.add("notes")
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
        order = [layer.get(one.part, 1) if one.kind in ("line", "step") else 1 for one in self.series]
        return [self.series[index] for index in sorted(range(len(order)), key=lambda i: (order[i], -i))]


@dataclass(frozen=True)
class Chart:
    """A whole figure: one or several panels, row by row."""

    title: str
    panels: tuple[Panel, ...]
    source: Source
    columns: int = 1
    width: Literal["one", "two"] = "one"
    """Columns of the page that the figure fills."""
    caption: str = ""
    """How to read it and what it is compared with, in a sentence or two."""

    def __post_init__(self) -> None:
        if not self.panels:
            raise InputError(f"chart {self.title!r} has no panels; give at least one")
        if self.columns < 1:
            raise InputError(f"chart {self.title!r}: columns is {self.columns}; give 1 or more")

    @property
    def rows(self) -> int:
        """How many rows of panels there are."""
        return math.ceil(len(self.panels) / self.columns)

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
        drawn: list[Key] = [Key(s.label, s.kind, s.role, s.part) for s in panel.series]
        drawn += [Key(r.label, "line", r.role, r.part) for r in panel.references]
        if panel.grid is not None and panel.grid.dots():
            drawn.append(Key(panel.grid.mark, "points", "ink", "subject"))
        for key in drawn:
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
        rows += [place | row for series in panel.series for row in _rows(series)]
        for line in panel.references:
            look = {"series": line.label, "kind": "reference", "role": line.role, "part": line.part}
            rows.append(place | look | {line.along: line.value, "note": line.note})
    frame = pd.DataFrame(rows)
    axes = [chart.panels[number - 1] for number in frame["panel"]]
    frame["x_axis"] = [panel.x.text for panel in axes]
    frame["y_axis"] = [panel.y.text for panel in axes]
    return frame.assign(run=chart.source.run, table=chart.source.table)


def _rows(series: Series) -> list[dict[str, object]]:
    blank: Sequence[float] = [math.nan] * len(series.x)
    return [
        {
            "series": series.label,
            "kind": series.kind,
            "role": series.role,
            "part": series.part,
            "x": x,
            "y": y,
            "low": low,
            "high": high,
            "left": left,
            "right": right,
            "note": note,
        }
        for x, y, low, high, left, right, note in zip(
            series.x,
            series.y or blank,
            series.low or blank,
            series.high or blank,
            series.left or blank,
            series.right or blank,
            series.notes or [""] * len(series.x),
            strict=True,
        )
    ]
