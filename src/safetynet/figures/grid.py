"""A heat map described as data: values over named columns and rows, and the colour scale that they share.

In: numbers and names. Out: frozen dataclasses that both renderers draw, and the rows of their table.
Nothing here knows matplotlib or Plotly, and nothing here computes a result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from safetynet.errors import InputError
from safetynet.figures import theme
from safetynet.figures.values import numbers, unknown

Ramp = Literal["diverging", "sequential"]
NOTICEABLE = 0.1
"""From this part of the scale on, negative values carry a dash: greyscale does not tell the sides apart."""


@dataclass(frozen=True)
class Shade:
    """A colour scale with the label of its bar. Grids of one chart with equal shades share one bar."""

    label: str
    unit: str = ""
    limits: tuple[float, float] = (-1.0, 1.0)
    """Values beyond are drawn in the colour of the end, and the bar shows that there are some."""
    ramp: Ramp = "diverging"
    """`diverging`, white at 0, for what has a sign; `sequential`, white at the lower end, for sizes."""

    def __post_init__(self) -> None:
        low, high = self.limits
        if self.ramp not in get_args(Ramp):
            raise InputError(unknown("colour scale", self.label, "ramp", self.ramp, get_args(Ramp)))
        if not low < high or (self.ramp == "diverging" and low != -high):
            raise InputError(
                f"colour scale {self.label!r}: limits {self.limits} must rise, and lie evenly around 0 "
                "where the scale diverges"
            )

    @property
    def text(self) -> str:
        """Label with its unit in brackets."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def depth(self, value: float) -> float:
        """Where a value lies on the scale, 0 to 1."""
        low, high = self.limits
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def dark(self, value: float) -> bool:
        """Whether text on this value's colour has to be white; False for NaN."""
        return not math.isnan(value) and theme.dark(theme.RAMPS[self.ramp], self.depth(value))


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
            given = getattr(self, field)
            if not given and field != "values":
                continue
            if [len(row) for row in given] != [len(self.columns)] * len(self.rows):
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
        known = [value for row in self.values for value in row if not math.isnan(value)]
        low, high = self.shade.limits
        return any(value < low for value in known), any(value > high for value in known)

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
