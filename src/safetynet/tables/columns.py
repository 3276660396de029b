"""How a table is declared: its columns, what they hold, and makers that keep each declaration to one line."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from safetynet.vocabulary import DIRECTIONS

Kind = Literal["number", "whole", "text", "flag", "list"]


@dataclass(frozen=True)
class Column:
    """What one column holds. A number may be NaN (not measured), other kinds only where `empty` is true."""

    kind: Kind
    meaning: str
    words: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    empty: bool = False
    """Whether a cell may be missing; of words, whether it may be ""."""
    optional: bool = False
    """Whether the column may be missing."""


@dataclass(frozen=True)
class Table:
    """What one table holds."""

    stage: str
    """That writes it, as `run.stage` declares it; `sweep` for a sweep."""
    row: str
    """What one row is."""
    columns: Mapping[str, Column]
    further: Mapping[str, str] = field(default_factory=dict)
    """Columns named by the data: how their names begin, and what they hold."""


def number(meaning: str, low: float = -math.inf, high: float = math.inf) -> Column:
    """A measured number, NaN where it was not measured."""
    return Column("number", meaning, low=low, high=high)


def fraction(meaning: str) -> Column:
    """A number from 0 to 1."""
    return Column("number", meaning, low=0, high=1)


def whole(meaning: str, *, empty: bool = False) -> Column:
    """A whole number."""
    return Column("whole", meaning, empty=empty)


def text(meaning: str, *, empty: bool = False) -> Column:
    """A text."""
    return Column("text", meaning, empty=empty)


def word(meaning: str, words: Iterable[str], *, empty: bool = False) -> Column:
    """A text out of a vocabulary."""
    return Column("text", meaning, tuple(words), empty=empty)


def flag(meaning: str, *, empty: bool = False) -> Column:
    """True or false."""
    return Column("flag", meaning, empty=empty)


def listed(meaning: str, *, empty: bool = False) -> Column:
    """A list."""
    return Column("list", meaning, empty=empty)


def interval(name: str, value: Column) -> dict[str, Column]:
    """A value with its 95% interval."""
    ends = {"_low": "lower end", "_high": "upper end"}
    return {name: value} | {
        f"{name}{end}": replace(value, meaning=f"{what} of its 95% interval") for end, what in ends.items()
    }


def ends(low: float = -math.inf, high: float = math.inf) -> dict[str, Column]:
    """The interval of a table whose value has one name of its own."""
    return {
        "low": number("lower end of the 95% interval", low, high),
        "high": number("upper end of the 95% interval", low, high),
    }


STEP = whole("optimiser steps taken")
EPOCH = number("the same in epochs", 0)
LAYER = whole("layer, from 0")
DEPTH = fraction("layer over the last layer's number: 0 the first layer, 1 the last")
DIRECTION = word("remove: the triggered run receives; induce: the placebo run does", DIRECTIONS)
