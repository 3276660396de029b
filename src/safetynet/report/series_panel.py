"""One panel of curves and points as SVG, with the words that belong to each of its values.

In: a Panel without a grid. Out: a Drawing.
"""

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from safetynet.figures import theme
from safetynet.figures.chart import Annotation, Panel, Reference, Series
from safetynet.report import svg

WIDTHS = (400.0, 340.0, 256.0)
"""Pixels of a panel that stands alone, among up to four, among more."""
LETTER = 6.2
"""Pixels of a letter of a tick, about."""
MARKERS = 14
"""At most about so many markers along one line; more would hide it."""
SIZE = 3.6
"""Pixels from a marker's middle to its edge."""


@dataclass(frozen=True)
class Drawing:
    """A panel as SVG, and what its interactive layer needs."""

    picture: str
    width: float
    data: dict[str, Any] = field(default_factory=dict)
    """`points`: places and texts; or `grid`: where the cells are and what they hold."""


def width(panels: int) -> float:
    """Pixels of each of so many panels."""
    return WIDTHS[0] if panels == 1 else WIDTHS[1] if panels <= 4 else WIDTHS[2]


def draw(panel: Panel, label: str, wide: float) -> Drawing:
    """A panel of series, so many pixels wide; `label` is what a screen reader says of it."""
    height = 40 + 115 * panel.height
    right, top, bottom = 10.0, 8.0, 36.0
    if any(note.side == "right" and note.x >= _end(panel) for note in panel.annotations):
        right += LETTER * max(len(note.text) for note in panel.annotations)
    ys = [value for one in panel.series for side in (one.y, one.low, one.high) for value in side]
    across = [value for one in panel.series for value in one.x]
    y = svg.scale(panel.y, ys, top + height, top)
    names = svg.ticks(panel.y, y)
    left = (26 if panel.y.text else 8) + LETTER * max((len(name) for _, name in names), default=1)
    x = svg.scale(panel.x, across, left, wide - right)
    parts = [
        *_axes(panel, x, y, names),
        *(_reference(one, x, y) for one in panel.references),
        *(_series(one, x, y) for one in panel.from_below()),
        *(_annotation(one, x, y) for one in panel.annotations),
    ]
    box = (wide, top + height + bottom)
    return Drawing(svg.picture("".join(parts), box, label), wide, {"points": list(_points(panel, x, y))})


def _end(panel: Panel) -> float:
    return panel.x.limits[1] if panel.x.limits else math.inf


def _axes(panel: Panel, x: svg.Scale, y: svg.Scale, names: list[tuple[float, str]]) -> Iterator[str]:
    for value, name in names:
        if panel.y.label or panel.y.unit:
            yield svg.tag("path", d=f"M{x.start:.1f} {y(value):.1f}H{x.end:.1f}", class_="rule")
        yield svg.text(name, x.start - 5, y(value) + 4, "tick", text_anchor="end")
    for value, name in svg.ticks(panel.x, x):
        yield svg.tag("path", d=f"M{x(value):.1f} {y.start:.1f}v4", class_="axis")
        yield svg.text(name, x(value), y.start + 16, "tick", text_anchor="middle")
    yield svg.tag("path", d=f"M{x.start:.1f} {y.start:.1f}H{x.end:.1f}", class_="axis")
    yield svg.text(panel.x.text, (x.start + x.end) / 2, y.start + 32, "label", text_anchor="middle")
    if panel.y.text:
        middle = (y.start + y.end) / 2
        yield svg.text(
            panel.y.text,
            11,
            middle,
            "label",
            text_anchor="middle",
            transform=f"rotate(-90 11 {middle:.1f})",
        )


def _reference(one: Reference, x: svg.Scale, y: svg.Scale) -> str:
    if one.along == "y":
        path = f"M{x.start:.1f} {y(one.value):.1f}H{x.end:.1f}"
    else:
        path = f"M{x(one.value):.1f} {y.start:.1f}V{y.end:.1f}"
    return svg.tag("path", d=path, class_=f"line r-{one.role} p-{one.part}")


def _series(one: Series, x: svg.Scale, y: svg.Scale) -> str:
    places = [(x(a), y(b)) for a, b in zip(one.x, one.y, strict=True)] if one.y else []
    parts = []
    if one.low and one.kind != "points":
        ends = zip(one.x, one.low, one.high, strict=True)
        parts.append(
            svg.tag("path", d=svg.area([(x(a), y(low), y(high)) for a, low, high in ends]), class_="band")
        )
    elif one.low:
        ends = zip(one.x, one.low, one.high, strict=True)
        spans = [
            f"M{x(a):.1f} {y(low):.1f}V{y(high):.1f}" for a, low, high in ends if math.isfinite(low + high)
        ]
        parts.append(svg.tag("path", d="".join(spans), class_="bar"))
    if one.left:
        ends = zip(one.y, one.left, one.right, strict=True)
        spans = [
            f"M{x(low):.1f} {y(b):.1f}H{x(high):.1f}" for b, low, high in ends if math.isfinite(low + high)
        ]
        parts.append(svg.tag("path", d="".join(spans), class_="bar"))
    if one.kind in ("line", "marked", "step"):
        parts.append(svg.tag("path", d=svg.line(places, one.kind == "step"), class_="line"))
    if one.kind in ("marked", "points"):
        every = max(1, math.ceil(len(places) / MARKERS)) if one.kind == "marked" else 1
        look = theme.LOOKS[one.role]
        marks = [
            svg.mark(look.symbol, *place, SIZE * look.size)
            for place in places[::every]
            if all(map(math.isfinite, place))
        ]
        parts.append(svg.tag("path", d="".join(marks), class_="mark"))
    return svg.tag("g", "".join(parts), class_=f"r-{one.role} p-{one.part}")


def _annotation(one: Annotation, x: svg.Scale, y: svg.Scale) -> str:
    a, b = x(one.x), y(one.y)
    if one.side == "right":
        return svg.text(one.text, a + 7, b + 4, f"note r-{one.role}")
    left, up = one.side.endswith("left"), one.side.startswith("upper")
    dx, dy = (-10 if left else 10), (-14 if up else 20)
    leader = svg.tag("path", d=f"M{a:.1f} {b:.1f}l{dx} {dy + (4 if up else -10)}", class_="axis")
    anchor = "end" if left else "start"
    return leader + svg.text(one.text, a + dx, b + dy, f"note r-{one.role}", text_anchor=anchor)


def _points(panel: Panel, x: svg.Scale, y: svg.Scale) -> Iterator[tuple[float, float, str]]:
    """Every value that can be pointed at, from left to right within a series."""
    for one in panel.series:
        if one.part == "raw" or not one.y:
            continue
        for i, (a, b) in enumerate(zip(one.x, one.y, strict=True)):
            if math.isfinite(x(a)) and math.isfinite(y(b)):
                yield round(x(a), 1), round(y(b), 1), _told(panel, one, i)


def _told(panel: Panel, one: Series, i: int) -> str:
    value = f"{_named(panel.y.label)}{_number(one.y[i], panel.y.unit)}"
    if one.low and math.isfinite(one.low[i] + one.high[i]):
        value += f" [{_number(one.low[i])}, {_number(one.high[i])}]"
    place = f"{_named(panel.x.label)}{_number(one.x[i], panel.x.unit)}"
    if one.left and math.isfinite(one.left[i] + one.right[i]):
        place += f" [{_number(one.left[i])}, {_number(one.right[i])}]"
    told = [one.label, place] if not panel.y.text else [one.label, place, value]
    return "\n".join(filter(None, [*told, one.notes[i] if one.notes else ""]))


def _named(label: str) -> str:
    return f"{label} " if label else ""


def _number(value: float, unit: str = "") -> str:
    return theme.tick_text(float(f"{value:.4g}")) + (unit if unit == "%" else f" {unit}" if unit else "")


def legend_mark(role: str, part: str, kind: str) -> str:
    """A small picture of how something is drawn, for the legend."""
    look = theme.LOOKS[role]  # type: ignore[index]
    parts = []
    if kind == "band":
        parts.append(svg.tag("path", d="M1 2H25V12H1z", class_="band"))
    if kind in ("line", "marked", "step"):
        parts.append(svg.tag("path", d="M1 7H25", class_="line"))
    if kind in ("marked", "points"):
        parts.append(svg.tag("path", d=svg.mark(look.symbol, 13, 7, SIZE * look.size), class_="mark"))
    inside = svg.tag("g", "".join(parts), class_=f"r-{html.escape(role)} p-{part}")
    return svg.tag("svg", inside, view_box="0 0 26 14", class_="key", aria_hidden="true")
