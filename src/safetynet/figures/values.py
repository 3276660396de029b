"""Texts as figures need them: tokens as one can see them, names that fit.

In: texts. Out: texts. Draws nothing.
"""

import re
import unicodedata
from collections.abc import Iterable

from safetynet.text.printable import printable

_BYTES = re.compile(r"(⟨[0-9a-f]{2}(?: [0-9a-f]{2})*⟩)")
"""Parts of a character, as `Serialiser.piece` writes them; the blanks in there are none of the token's."""
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


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


def unknown(thing: str, name: str, field: str, given: object, allowed: Iterable[str]) -> str:
    """The sentence that refuses a word."""
    return f"{thing} {name!r}: {field} is {given!r}; allowed are {', '.join(allowed)}"
