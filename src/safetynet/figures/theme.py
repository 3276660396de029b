"""How every figure looks, for both renderers: sizes, colours, markers and dashes, in this one place.

Colours follow Okabe and Ito (2008), with a dark brown for the fifth role since their orange and yellow are
too pale for thin lines. No two roles share a marker and no two parts share a dash, so that a figure
still reads in greyscale. A colour means the same thing in every figure.
"""

import math
from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "triggered", "clean", "placebo", "near_miss", "refused", "backdoored", "clean_twin", "base", "ink",
    "method_1", "method_2", "method_3", "method_4", "method_5", "method_6", "method_7",
]  # fmt: skip
Part = Literal["subject", "control", "floor", "raw"]
PART_OF: dict[str, Part] = {"backdoored": "subject", "clean_twin": "control", "base": "floor"}
"""What each model of a run is beside the others."""


@dataclass(frozen=True)
class Look:
    """Colour and marker of a role; the marker in matplotlib's and in Plotly's word for it."""

    colour: str
    marker: str
    symbol: str
    size: float = 1.0
    """Markers of equal width look unequal; this evens them out."""


@dataclass(frozen=True)
class Stroke:
    """How a part is drawn: dash and gap in points (empty is solid), line width in points, filled markers."""

    dash: tuple[float, ...]
    width: float
    filled: bool = True
    opacity: float = 1.0


INK = "#222222"
GRID = "#E3E3E3"
PAPER = "#FFFFFF"

LOOKS: dict[Role, Look] = {
    "triggered": Look("#D55E00", "o", "circle"),
    "clean": Look("#0072B2", "s", "square", 0.9),
    "placebo": Look("#009E73", "^", "triangle-up", 1.1),
    "near_miss": Look("#CC79A7", "D", "diamond", 0.85),
    "refused": Look("#6B4C00", "v", "triangle-down", 1.1),
    "backdoored": Look(INK, "o", "circle"),
    "clean_twin": Look("#3D8FC7", "o", "circle"),
    "base": Look("#7A7A7A", "|", "line-ns", 1.25),
    "ink": Look(INK, "o", "circle"),
    "method_1": Look("#7B3294", "P", "cross", 1.15),
    "method_2": Look("#01665E", "X", "x", 1.15),
    "method_3": Look("#A50F15", "p", "pentagon", 1.1),
    "method_4": Look("#253494", "*", "star", 1.5),
    "method_5": Look("#8C6D1F", "h", "hexagon", 1.1),
    "method_6": Look("#525252", "<", "triangle-left", 1.1),
    "method_7": Look("#4D7C1F", ">", "triangle-right", 1.1),
}
METHODS: tuple[Role, ...] = tuple(role for role in LOOKS if role.startswith("method"))
"""For things that are compared and have no role of their own, in the order of their appearance."""
STROKES: dict[Part, Stroke] = {
    "subject": Stroke((), 1.2),
    "control": Stroke((3.6, 1.6), 1.0, filled=False),
    "floor": Stroke((1.0, 1.4), 1.1),
    "raw": Stroke((), 0.5, opacity=0.35),
}
NAMES = {"near_miss": "near miss", "clean_twin": "clean twin", "base": "base model"}
"""What a reader sees where the word differs from the column's."""

RAMPS: dict[str, tuple[str, ...]] = {
    "diverging": ("#08306B", "#2171B5", "#8FBFDF", "#FBFBFB", "#F3B183", "#D55E00", "#6E2C00"),
    "sequential": ("#FBFBFB", "#C5DFEA", "#74B3CE", "#2A7AA5", "#0B2F4A"),
}
"""Evenly spaced stops of the colour scales, blended in RGB. Blue and orange stay apart for every kind of
colour blindness; either side grows darker throughout, so that greyscale keeps the size of a value."""
MISSING = "#CFCFCF"
HATCH = "#A8A8A8"

VENUES: dict[str, dict[str, float]] = {
    "general": {"one": 3.3, "two": 6.8},
    "neurips": {"one": 3.3, "two": 5.5},
    "icml": {"one": 3.25, "two": 6.75},
    "acl": {"one": 3.03, "two": 6.3},
    "ieee": {"one": 3.5, "two": 7.16},
}
"""Inches of one column of text and of the whole page; in NeurIPS a small figure stands alone."""
FONT = ("DejaVu Sans", "Verdana", "Arial", "sans-serif")
"""The first ships with matplotlib, so that a figure is the same on every machine; Verdana has its widths."""
TEXT = 7.0  # points, at print size; nothing is smaller
TITLE = 8.0
MARKER = 3.6
HAIR = 0.5
BAND = 0.16
MARGIN = 0.035
"""Part of the range drawn beyond an axis's limits, so that 0% and 100% do not lie on the frame."""
DPI = 300
SCREEN = 1.75
"""Pixels of the interactive figure per point on paper, for lines and text."""
SCREEN_HEIGHT = 170.0
"""Pixels of the interactive figure per inch of a panel's height."""
SCREEN_WIDTHS = {"one": 680, "two": 960}  # pixels at most; narrower on a narrow screen


def name(role: str) -> str:
    """A role or model as a reader sees it."""
    return NAMES.get(role, role)


def data_width(width: str, columns: int, venue: str = "general") -> float:
    """About how many inches wide each of so many data areas side by side will be."""
    return (VENUES[venue][width] - 0.9) / columns - 0.2


def blend(ramp: tuple[str, ...], depth: float) -> tuple[float, float, float]:
    """Red, green and blue (0 to 255) at a place (0 to 1) of a ramp."""
    place = depth * (len(ramp) - 1)
    first = min(int(place), len(ramp) - 2)
    part = place - first
    red, green, blue = (
        (1 - part) * int(ramp[first][at : at + 2], 16) + part * int(ramp[first + 1][at : at + 2], 16)
        for at in (1, 3, 5)
    )
    return red, green, blue


def tick_text(value: float) -> str:
    """A number on an axis: plain where that is short, else a power of ten, as `2×10⁻⁴`."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.10g}".replace("-", "−")
    mantissa, exponent = f"{value:.3e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}×{power}"


def log_ticks(limits: tuple[float, float] | None) -> tuple[float, ...]:
    """Multiples of a power of ten that have a tick; of many decades the powers alone, or texts touch."""
    many = limits is not None and limits[1] / limits[0] > 400
    return (1.0,) if many else (1.0, 2.0, 5.0)


def padded(limits: tuple[float, float], log: bool = False) -> tuple[float, float]:
    """Limits with the margin that is drawn beyond them; on a log axis a part of its length in decades."""
    low, high = (math.log10(limits[0]), math.log10(limits[1])) if log else limits
    margin = (high - low) * MARGIN
    low, high = low - margin, high + margin
    return (10**low, 10**high) if log else (low, high)
