"""One heat map as SVG, with what its interactive layer needs to name each cell.

In: a Panel with a grid. Out: a Drawing.
"""

import math
from collections.abc import Iterator
from itertools import groupby

from safetynet.figures import values
from safetynet.figures.chart import Panel
from safetynet.figures.grid import Grid, Shade
from safetynet.report import svg
from safetynet.report.series_panel import LETTER, Drawing

LEAST, MOST = 10.0, 54.0
"""Pixels that a cell is wide."""
WORD = 7.0
"""Pixels of a letter inside a cell."""


def draw(panel: Panel, label: str, room: float) -> Drawing:
    """A heat map of so many pixels, or more where its cells need them; `label` is for screen readers."""
    grid = panel.grid
    assert grid is not None
    left = 26 + LETTER * max(len(name) for _, name in panel.y.ticks)
    wide = min(max((room - left - 8) / len(grid.columns), LEAST), MOST)
    if grid.texts:
        wide = max(wide, WORD * min(max(values.width(word) for row in grid.texts for word in row) + 1, 9))
    high = min(max(130 / len(grid.rows), LEAST if len(grid.rows) > 24 else 15.0), 26.0)
    top, across, down = 6.0, wide * len(grid.columns), high * len(grid.rows)
    below = 8 + LETTER * max(len(name) for _, name in panel.x.ticks) if panel.x.upright else 18.0
    place = _Place(left, top, wide, high, len(grid.rows))
    parts = [
        *_cells(grid, place),
        svg.tag("rect", x=left, y=top, width=across, height=down, class_="rule"),
        *_over(grid, place),
        *_ticks(panel, place, top + down),
        *(_line(place.x(one.value + 0.5), top, down) for one in panel.references if one.along == "x"),
        svg.text(panel.x.label, left + across / 2, top + down + below + 12, "label", text_anchor="middle"),
        svg.text(
            panel.y.label, 11, top + down / 2, "label", text_anchor="middle",
            transform=f"rotate(-90 11 {top + down / 2:.1f})",
        ),
    ]  # fmt: skip
    width = max(left + across + 8, 160.0)
    whole = svg.picture("".join(parts), (width, top + down + below + 18), label, "panel map")
    return Drawing(whole, width, {"grid": _data(grid, place, (panel.x.label, panel.y.label))})


class _Place:
    """Where the cells lie; row 0 is at the bottom."""

    def __init__(self, left: float, top: float, wide: float, high: float, rows: int) -> None:
        self.left, self.top, self.wide, self.high, self.rows = left, top, wide, high, rows

    def x(self, column: float) -> float:
        return self.left + column * self.wide

    def y(self, row: float) -> float:
        return self.top + (self.rows - 1 - row) * self.high


def step(shade: Shade, value: float) -> str:
    """The class of a value's colour."""
    letter = "d" if shade.ramp == "diverging" else "q"
    return f"{letter}{round(shade.depth(value) * svg.STEPS)}"


def _cells(grid: Grid, place: _Place) -> Iterator[str]:
    """Cells row by row; neighbours of one colour are one rectangle."""
    gap = 0.8 if place.wide > 16 else 0.0
    for y, row in enumerate(grid.values):
        # With gaps between the cells each is a rectangle of its own.
        keys = [
            (step(grid.shade, value), x if gap else 0) if math.isfinite(value) else ("", 0)
            for x, value in enumerate(row)
        ]
        x = 0
        for (look, _), run in groupby(keys):
            count = len(list(run))
            yield svg.tag(
                "rect",
                x=place.x(x),
                y=place.y(y),
                width=count * place.wide - gap,
                height=place.high - (0.8 if place.high > 14 else 0),
                class_=look or "missing",
            )
            x += count


def _over(grid: Grid, place: _Place) -> Iterator[str]:
    """Words, dots and dashes on the cells, in the ink that can be read there."""
    for y, row in enumerate(grid.texts):
        for x, word in enumerate(row):
            if word and math.isfinite(grid.values[y][x]):
                ink = f"word on-{step(grid.shade, grid.values[y][x])}"
                word = values.shortened(word, int(place.wide / WORD))
                middle = place.x(x + 0.5), place.y(y) + place.high / 2 + 4
                yield svg.text(word, *middle, ink, text_anchor="middle")
    for x, y in grid.dots():
        ink = f"dot on-{step(grid.shade, grid.values[y][x])}"
        size = min(place.wide, place.high) / 2 - 2
        yield svg.tag(
            "circle", cx=place.x(x + 0.5), cy=place.y(y) + place.high / 2, r=min(3.2, size), class_=ink
        )
    for x, y in grid.dashes():
        ink = f"dash on-{step(grid.shade, grid.values[y][x])}"
        path = f"M{place.x(x + 0.3):.1f} {place.y(y) + place.high * 0.8:.1f}h{place.wide * 0.4:.1f}"
        yield svg.tag("path", d=path, class_=ink)


def _ticks(panel: Panel, place: _Place, bottom: float) -> Iterator[str]:
    for value, name in panel.y.ticks:
        yield svg.text(name, place.left - 5, place.y(value) + place.high / 2 + 4, "tick", text_anchor="end")
    for value, name in panel.x.ticks:
        x = place.x(value + 0.5)
        if panel.x.upright:
            turned = f"rotate(-90 {x + 4:.1f} {bottom + 6:.1f})"
            yield svg.text(name, x + 4, bottom + 6, "tick", text_anchor="end", transform=turned)
        else:
            yield svg.text(name, x, bottom + 15, "tick", text_anchor="middle")


def _line(x: float, top: float, down: float) -> str:
    return svg.tag("path", d=f"M{x:.1f} {top - 3:.1f}v{down + 6:.1f}", class_="line r-ink p-control")


def _data(grid: Grid, place: _Place, labels: tuple[str, str]) -> dict[str, object]:
    """Where the cells are and what they hold, for pointing and for the arrow keys."""
    found: dict[str, object] = {
        "at": [round(one, 2) for one in (place.left, place.top, place.wide, place.high)],
        "labels": labels,
        "columns": list(grid.columns),
        "rows": list(grid.rows),
        "name": grid.shade.text,
        "values": [[float(f"{v:.3g}") if math.isfinite(v) else None for v in row] for row in grid.values],
    }
    return found | ({"notes": [list(row) for row in grid.notes]} if grid.notes else {})
