"""Tables as the charts need them: the columns that a figure shows, each place once, rates in percent.

In: a DataFrame, a list of records, or a dict of lists. Out: DataFrames. Draws nothing and computes no result.
What a column may hold is declared in `safetynet.tables`.
"""

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from safetynet.errors import InputError
from safetynet.tables import Data, checked, frame, numbers
from safetynet.vocabulary import METRICS, MODELS, ROLES


def read(name: str, data: Data, columns: str, key: str = "", percent: str = "") -> pd.DataFrame:
    """Some columns of a table that `safetynet.tables` declares.

    Args:
        name: of the table.
        data: its rows.
        columns: names of those that are shown, with blanks between.
        key: names of those that identify a row, which may be there once.
        percent: names of fractions that are given as percent.

    Raises:
        InputError: naming the table, the column and the row, if there are no rows, a column is missing, a
            word is unknown, a value is of another kind, or a row is there twice.
    """
    table = checked(name, data, columns.split())
    once(table, name, key.split())
    return table.assign(**{column: 100 * table[column] for column in percent.split()})


def interval(*names: str) -> str:
    """Columns of values with their intervals."""
    return " ".join(f"{name}{end}" for name in names for end in ("", "_low", "_high"))


def once(table: pd.DataFrame, name: str, key: Sequence[str]) -> None:
    """Check that each place is measured once.

    Raises:
        InputError: naming the place that the table holds twice.
    """
    twice = table[table.duplicated(list(key))] if key else table[:0]
    if len(twice):
        place = ", ".join(f"{column} {twice[column].iloc[0]!s}" for column in key)
        raise InputError(f"{name}: {place} is there more than once; give one row for each")


def rates(data: Data, where: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Measured rates with their intervals: the tidy columns, and a `note` with counts and what else is known.

    Args:
        data: columns model, metric, role, value, low, high and the further `columns`; count, n and note
            where they are known. Rates are fractions. The count of a perplexity is one of tokens.
        where: name of the table, for messages.
        columns: further columns that must be there, such as step.

    Raises:
        InputError: if there is no data, a column is missing, a word is unknown, or a value is no number.
    """
    table = frame(data, where)
    require(table, where, ["model", "metric", "role", "value", "low", "high", *columns])
    out = table[["model", "metric", "role"]].fillna("").astype(str).reset_index(drop=True)
    out["model"] = out["model"].str.replace(" ", "_")
    for field, allowed in (("model", MODELS), ("metric", METRICS), ("role", (*ROLES, ""))):
        known(out, where, field, allowed)
    for field in ("value", "low", "high", *columns):
        out[field] = numbers(table[field], f"{where}, field {field}")
    counts = [
        numbers(table[name], where) if name in table else [math.nan] * len(table) for name in ("count", "n")
    ]
    notes = table["note"].fillna("").astype(str) if "note" in table else [""] * len(table)
    lines = []
    for metric, count, n, note in zip(out["metric"], *counts, notes, strict=True):
        if math.isnan(n):
            size = ""
        elif math.isnan(count) or metric == "perplexity":
            size = f"{n:.0f} rows"
        else:
            size = f"{count:.0f} of {n:.0f} rows"
        lines.append("; ".join(filter(None, (size, note))))
    return out.assign(note=lines)


def fractions(values: Iterable[object], field: str) -> tuple[float, ...]:
    """Rates between 0 and 1 as percent.

    Raises:
        InputError: if a value lies outside 0 to 1, as percentages do.
    """
    checked = numbers(values, field)
    for row, value in enumerate(checked):
        if value < 0 or value > 1:
            raise InputError(
                f"{field}, row {row}: {value:g} is outside 0 to 1; give fractions (0.975), not percent (97.5)"
            )
    return tuple(100 * value for value in checked)


def require(table: pd.DataFrame, where: str, columns: Iterable[str]) -> None:
    """Check that columns are there.

    Raises:
        InputError: naming what is missing and what there is.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        there = ", ".join(sorted(map(str, table.columns)))
        raise InputError(f"{where}: column {', '.join(missing)} is missing; there are {there}")


def known(table: pd.DataFrame, where: str, field: str, allowed: Sequence[str]) -> None:
    """Check the words of a column.

    Raises:
        InputError: naming the first row with another word, and those that are allowed.
    """
    unknown = table.index[~table[field].isin(allowed)]
    if len(unknown):
        given = table[field][unknown[0]]
        choice = ", ".join(filter(None, allowed))
        raise InputError(f"{where}, row {unknown[0]}: {field} is {given!r}; allowed are {choice}")
