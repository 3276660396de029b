"""Values as figures need them: numbers without infinities, tokens as one can see them.

In: whatever a table holds. Out: floats and texts. Draws nothing.
"""

import math
from collections.abc import Iterable

import pandas as pd

from safetynet.errors import InputError

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
    shown = "".join(
        VISIBLE.get(sign, sign if sign.isprintable() else sign.encode("unicode_escape").decode())
        for sign in token
    )
    return shown or "∅"


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters, its end replaced by an ellipsis where it is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def unknown(thing: str, name: str, field: str, given: object, allowed: Iterable[str]) -> str:
    """The sentence that refuses a word."""
    return f"{thing} {name!r}: {field} is {given!r}; allowed are {', '.join(allowed)}"
