"""Values as figures need them: numbers without infinities, tokens as one can see them.

In: whatever a table holds. Out: floats and texts. Draws nothing.
"""

import math
import re
import unicodedata
from collections.abc import Iterable

import pandas as pd

from safetynet.errors import InputError

_BYTES = re.compile(r"(⟨[0-9a-f]{2}(?: [0-9a-f]{2})*⟩)")
"""Parts of a character, as `Serialiser.piece` writes them; the blanks in there are none of the token's."""
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def numbers(values: Iterable[object], where: str) -> tuple[float, ...]:
    """Floats of any sequence; None and NaN become NaN, infinities too since no axis can show them.

    Raises:
        InputError: if a value is no number; `where` names the field in the message.
    """
    floats: list[float] = []
    for row, value in enumerate(values):
        try:
            number = math.nan if value is None or value is pd.NA else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise InputError(f"{where}, row {row}: {value!r} is not a number; give a number or NaN") from None
        floats.append(number if math.isfinite(number) else math.nan)
    return tuple(floats)


def visible(token: str) -> str:
    """A token with its blanks and controls made visible, so that none is invisible or reorders the others.

    Example:
        >>> visible(" if")
        '␣if'
    """
    return "".join(part if _BYTES.fullmatch(part) else _shown(part) for part in _BYTES.split(token)) or "∅"


def _shown(text: str) -> str:
    return "".join(
        VISIBLE.get(sign, sign if sign.isprintable() else sign.encode("unicode_escape").decode())
        for sign in text
    )


def width(text: str) -> int:
    """How many letters wide a text is; Chinese characters, and others of their width, are two."""
    return len(text) + sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)


def shortened(text: str, most: int) -> str:
    """A text at most `most` letters wide, its end replaced by an ellipsis where it is wider."""
    if width(text) <= most:
        return text
    kept = text[: most - 1]
    while width(kept) > most - 1:
        kept = kept[:-1]
    return kept + "…"


def unknown(thing: str, name: str, field: str, given: object, allowed: Iterable[str]) -> str:
    """The sentence that refuses a word."""
    return f"{thing} {name!r}: {field} is {given!r}; allowed are {', '.join(allowed)}"
