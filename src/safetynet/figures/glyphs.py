"""Characters in figures: tokens as one can see them, texts that fit, and what the figures' font lacks.

In: texts, or a chart. Out: texts; the fonts that a chart needs, and the chart with ⟨5c0f⟩ for 小 where no
font of this machine has that character: an empty box says nothing. Charts of ASCII are left alone, and are
the same on every machine. Draws nothing.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import regex

from safetynet.figures import theme
from safetynet.figures.chart import Chart, Grid
from safetynet.text.printable import printable

_BYTES = re.compile(r"(⟨[0-9a-f]{2}(?: [0-9a-f]{2})*⟩)")
"""Parts of a character, as `Serialiser.piece` writes them; the blanks in there are none of the token's."""
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}

PREFERRED = (
    "Noto Sans CJK",
    "Noto Sans",
    "Source Han Sans",
    "WenQuanYi",
    "Microsoft YaHei",
    "PingFang",
    "Hiragino",
)
"""Beginnings of the names of fonts that are tried before others."""

_UNSEEN = regex.compile(r"\p{Default_Ignorable_Code_Point}")


def visible(token: str) -> str:
    """A token with its blanks and controls made visible, so that none is invisible or reorders the others.

    Example:
        >>> visible(" if")
        '␣if'
    """
    parts = (
        part if _BYTES.fullmatch(part) else "".join(VISIBLE.get(sign, printable(sign)) for sign in part)
        for part in _BYTES.split(token)
    )
    return "".join(parts) or "∅"


def width(text: str) -> int:
    """How many letters wide a text is; Chinese characters, and others of their width, are two."""
    return len(text) + sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)


def shortened(text: str, most: int) -> str:
    """A text at most `most` letters wide, its end replaced by an ellipsis where it is wider."""
    if width(text) <= most:
        return text
    short = text[: most - 1]
    while width(short) > most - 1:
        short = short[:-1]
    return short + "…"


def fitted(chart: Chart) -> tuple[Chart, list[str]]:
    """The chart with every character that can be drawn, and the families that draw them, in their order."""
    signs = {sign for text in _texts(chart) if not text.isascii() for sign in text}
    families, lacking = _fonts(frozenset(sign for sign in signs if not sign.isascii()))
    if not lacking:
        return chart, families
    runs = regex.compile("[" + "".join(map(regex.escape, sorted(lacking))) + "]+")

    def numbers(run: regex.Match[str]) -> str:
        return f"⟨{' '.join(f'{ord(sign):04x}' for sign in run[0])}⟩"

    return _changed(chart, lambda text: text if text.isascii() else runs.sub(numbers, text)), families


@cache
def _fonts(signs: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Families that have these characters, the figures' own first, and the characters that none has."""
    from matplotlib import font_manager

    path = str(font_manager.findfont(theme.FONT[0]))
    lacking = {s for s in signs if not _UNSEEN.match(s) and ord(s) not in _characters(path)}
    families = [theme.FONT[0]]
    fonts = font_manager.fontManager.ttflist
    # Last Resort, which matplotlib brings along, has a box for every character.
    entries = {font.name: font for font in fonts if font.style == "normal" and "Last Resort" not in font.name}
    for name in sorted(entries, key=lambda name: (not name.startswith(PREFERRED), name)) if lacking else ():
        has = {sign for sign in lacking if ord(sign) in _characters(entries[name].fname)}
        if has:
            families.append(name)
            lacking -= has
        if not lacking:
            break
    return families, frozenset(lacking)


@cache
def _characters(path: str) -> frozenset[int]:
    """Code points that a font file has; none where it cannot be opened, or has no outlines."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (RuntimeError, OSError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable and "Color" not in Path(path).name else frozenset()


def _texts(thing: Any) -> Iterator[str]:
    if isinstance(thing, str):
        yield thing
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for field in dataclasses.fields(thing):
            yield from _texts(getattr(thing, field.name))
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from _texts(part)


def _changed(thing: Any, change: Callable[[str], str]) -> Any:
    if isinstance(thing, str):
        return change(thing)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        new = {name: _changed(value, change) for name, value in fields.items()}
        if isinstance(thing, Grid) and thing.texts:  # numbers are longer than what they stand for
            room = max(width(text) for row in thing.texts for text in row)
            new["texts"] = [[shortened(text, room) for text in row] for row in new["texts"]]
        return dataclasses.replace(thing, **new)
    if isinstance(thing, (tuple, list)):
        return type(thing)(_changed(part, change) for part in thing)
    return thing
