"""What the report's own drawings are made of: elements, scales, ticks and marks, as SVG that CSS colours.

In: numbers and words. Out: SVG as text, escaped. Colours are classes, so that one drawing serves light, dark
and print; nothing here sets a style, which the report's content policy would refuse.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safetynet.figures import theme
from safetynet.figures.chart import Axis

STEPS = 40
"""Shades of a colour scale, less one; the eye tells fewer apart."""
NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


def tag(name: str, content: str = "", /, **attributes: Any) -> str:
    """An element; `class_` and `view_box` style names are written as SVG has them, None leaves one out.

    Args:
        name: of the element.
        content: inside it, already escaped.
        attributes: their values are escaped here.
    """
    told = "".join(
        f' {_attribute(key)}="{html.escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{told}>{content}</{name}>"


def text(content: str, x: float, y: float, kind: str, **more: Any) -> str:
    """A text at a place; `kind` is its class."""
    return tag("text", html.escape(content), x=x, y=y, class_=kind, **more)


def picture(content: str, size: tuple[float, float], label: str, kind: str = "panel") -> str:
    """A whole drawing of so many pixels; the page makes it smaller where there is less room."""
    width, height = round(size[0]), round(size[1])
    return tag(
        "svg",
        content,
        view_box=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        class_=kind,
    )


def _attribute(key: str) -> str:
    return {"class_": "class", "view_box": "viewBox", "text_anchor": "text-anchor"}.get(
        key, key.replace("_", "-")
    )


def _short(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scale:
    """From the values of an axis to pixels."""

    low: float
    high: float
    start: float
    end: float
    """Pixels of `low` and `high`."""
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixels of a value; NaN for what has none."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        if self.log:
            value = math.log10(value) if value > 0 else math.nan
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def scale(axis: Axis, values: Sequence[float], start: float, end: float) -> Scale:
    """The scale of an axis: its limits with their margin, or those of the values."""
    log = axis.scale == "log"
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = axis.limits or (min(known, default=0.1 if log else 0.0), max(known, default=1.0))
    if not low < high:
        low, high = (low / 2, low * 2) if log and low > 0 else (low - 0.5, low + 0.5)
    return Scale(*theme.padded((low, high), log), start, end, log)


def ticks(axis: Axis, own: Scale) -> list[tuple[float, str]]:
    """Values and texts along an axis: its own, or about five round ones."""
    if axis.ticks:
        return list(axis.ticks)
    low, high = axis.limits or (own.low, own.high)
    if own.log:
        stops = [stop * 10.0**power for power in range(-12, 13) for stop in (1, 2, 5)]
        inside = [stop for stop in stops if low <= stop <= high]
        inside = inside[:: math.ceil(len(inside) / 6) or 1]
        return [(stop, theme.tick_text(stop)) for stop in inside]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(stop * power for stop in NICE if stop * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [((first + i) * step, theme.tick_text(round((first + i) * step, 12))) for i in range(count)]


MARKS = {
    "square": 4,
    "diamond": 4,
    "triangle-up": 3,
    "triangle-down": 3,
    "triangle-left": 3,
    "triangle-right": 3,
    "pentagon": 5,
    "hexagon": 6,
    "star": 10,
}
"""Corners of each mark."""
TURNS = {"square": 45, "triangle-down": 180, "triangle-left": 270, "triangle-right": 90}


def mark(symbol: str, x: float, y: float, size: float) -> str:
    """The path of a marker around a place."""
    if symbol == "line-ns":
        return f"M{x:.1f} {y - size:.1f}V{y + size:.1f}"
    if symbol == "cross":
        return f"M{x - size:.1f} {y:.1f}H{x + size:.1f}M{x:.1f} {y - size:.1f}V{y + size:.1f}"
    if symbol == "x":
        left, right, top, low = x - 0.8 * size, x + 0.8 * size, y - 0.8 * size, y + 0.8 * size
        return f"M{left:.1f} {top:.1f}L{right:.1f} {low:.1f}M{left:.1f} {low:.1f}L{right:.1f} {top:.1f}"
    if symbol == "circle":
        half = f"a{size:.1f} {size:.1f} 0 1 0"
        return f"M{x - size:.1f} {y:.1f}{half} {2 * size:.1f} 0{half} {-2 * size:.1f} 0z"
    corners = MARKS[symbol]
    turn = math.radians(TURNS.get(symbol, 0) - 90)
    places = []
    for corner in range(corners):
        reach = size * (0.5 if symbol == "star" and corner % 2 else 1.15)
        angle = turn + 2 * math.pi * corner / corners
        places.append(f"{x + reach * math.cos(angle):.1f} {y + reach * math.sin(angle):.1f}")
    return "M" + "L".join(places) + "z"


def line(points: Sequence[tuple[float, float]], step: bool = False) -> str:
    """A path through points, broken where one is not a number; with `step` a value holds until the next."""
    path, pen, before = [], "M", 0.0
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        if step and pen == "L":
            path.append(f"L{x:.1f} {before:.1f}")
        path.append(f"{pen}{x:.1f} {y:.1f}")
        pen, before = "L", y
    return "".join(path)


def area(points: Sequence[tuple[float, float, float]]) -> str:
    """The outline between a lower and an upper curve, in as many pieces as there are gaps."""
    pieces: list[list[tuple[float, float, float]]] = [[]]
    for point in points:
        if all(map(math.isfinite, point)):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    path = ""
    for piece in pieces:
        if len(piece) > 1:
            there = [(x, high) for x, _, high in piece]
            back = [(x, low) for x, low, _ in reversed(piece)]
            path += "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in there + back) + "z"
    return path
