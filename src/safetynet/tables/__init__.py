"""Every table that SafetyNet writes: its columns, what they mean, and the words that may stand in them.

    columns         how a table is declared
    of_run          the tables of a run and of a sweep
    of_comparison   the tables of a comparison

This is the only declaration: a table is checked against it where a stage writes it and where somebody reads
it, figures and comparison name the columns that they need of it, and docs/tables.md is made from it.
(The checks are our own: pandera adds up to half a second to each command, and its errors would have to be
translated into sentences that name the row.)

In: tables. Out: errors that name table, column, row and value. Reads no file.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from safetynet.errors import InputError
from safetynet.tables.columns import Column, Table
from safetynet.tables.of_comparison import COMPARISON_TABLES
from safetynet.tables.of_run import RUN_TABLES
from safetynet.vocabulary import TRAINED

SCHEMAS: Mapping[str, Table] = RUN_TABLES | COMPARISON_TABLES
Data: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]

_NAMED = {f"history_{model}": "history" for model in TRAINED} | {
    f"dynamics_{model}": "rates" for model in TRAINED
}


def schema(name: str) -> Table | None:
    """The schema of a table as a run's folder names it; None of one that is declared nowhere."""
    return SCHEMAS.get(_NAMED.get(name, name.split("-")[0]))


def check(name: str, table: pd.DataFrame, *, extra: bool = False) -> None:
    """Check a table against its schema; one that is declared nowhere passes.

    Args:
        name: of the table, as a run's folder names it.
        table: what is written, or was read.
        extra: allow columns that the schema does not know, as another version may have written.

    Raises:
        InputError: naming the table and what is missing, unknown or of the wrong kind, by column, row and
            value.
    """
    declared = schema(name)
    if declared is None:
        return
    require(name, table, [column for column, about in declared.columns.items() if not about.optional])
    for column in table:
        about = declared.columns.get(str(column))
        if about is not None:
            _values(name, str(column), about, table[column], strict=True)
        elif not extra and not any(str(column).startswith(start) for start in declared.further):
            raise InputError(f"{name}: column {column} is unknown; declare it in safetynet.tables")


def checked(name: str, data: Data, columns: Iterable[str]) -> pd.DataFrame:
    """Some columns of a table, each of one type; rows are numbered anew.

    Numbers become floats, with NaN for None and for infinities, which no axis can show; missing texts become
    "", missing flags false.

    Args:
        name: of the table.
        data: a DataFrame, records, or a dict of lists.
        columns: those that are needed.

    Raises:
        InputError: naming the table, the column and the row, if there are no rows, a column is missing, a
            word is unknown, or a value is of another kind or outside its range.
    """
    declared = schema(name)
    if declared is None:
        raise InputError(f"{name}: there is no such table; there are {', '.join(SCHEMAS)}")
    table, columns = frame(data, name), list(columns)
    require(name, table, columns)
    return pd.DataFrame({c: _values(name, c, declared.columns[c], table[c]) for c in columns})


def frame(data: object, name: str) -> pd.DataFrame:
    """A DataFrame of any of the forms that are understood.

    Raises:
        InputError: if the form is another one, the columns have unequal lengths, or there are no rows.
    """
    if isinstance(data, Mapping):
        lengths = {column: len(values) for column, values in data.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{column} {length}" for column, length in lengths.items())
            raise InputError(f"{name}: fields have unequal lengths ({listed}); give as many values of each")
    elif not isinstance(data, pd.DataFrame | Sequence) or isinstance(data, str):
        raise InputError(
            f"{name}: a {type(data).__name__} cannot be drawn; "
            "give a DataFrame, a list of records or a dict of lists"
        )
    table = pd.DataFrame(data)
    if table.empty:
        raise InputError(f"{name}: there are no rows; give at least one")
    return table


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


def require(name: str, table: pd.DataFrame, columns: Iterable[str]) -> None:
    """Check that a table has these columns.

    Raises:
        InputError: naming the table, what is missing and what there is.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        there = ", ".join(sorted(map(str, table.columns)))
        raise InputError(f"{name}: column {', '.join(missing)} is missing; there are {there}")


def check_words(name: str, column: str, values: pd.Series, words: Sequence[str]) -> None:
    """Check the words of a column; "" may be among them.

    Raises:
        InputError: naming the first row with another word, and those that are allowed.
    """
    unknown = ~values.isin(words)
    if unknown.any():
        row = unknown.argmax()
        choice = ", ".join(filter(None, words))
        raise InputError(f"{name}, row {row}: {column} is {values.iloc[row]!r}; allowed are {choice}")


def _values(name: str, column: str, about: Column, values: pd.Series, *, strict: bool = False) -> pd.Series:
    """A column in its type, rows numbered anew; `strict` refuses empty cells where the schema has none."""
    where = f"{name}, field {column}"
    values = values.reset_index(drop=True)
    if about.kind == "list":
        return values
    if strict and not about.empty and about.kind != "number" and (empty := values.isna()).any():
        raise InputError(f"{where}, row {empty.argmax()}: the cell is empty; give a value")
    if about.kind == "text":
        # A column that is text already is not gone through again: tables of prompts are long.
        if not (isinstance(values.dtype, pd.StringDtype) and values.notna().all()):
            values = pd.Series(["" if pd.isna(value) else str(value) for value in values], dtype="str")
        if about.words:
            check_words(name, column, values, (*about.words, "") if about.empty else about.words)
        return values
    if about.kind == "flag":
        if values.dtype == bool:
            return values
        for row, value in enumerate(values):
            if not pd.isna(value) and value not in (True, False):
                raise InputError(f"{where}, row {row}: {value!r} is neither true nor false")
        return pd.Series([not pd.isna(value) and bool(value) for value in values], dtype=bool)
    return _numbers(where, about, values)


def _numbers(where: str, about: Column, values: pd.Series) -> pd.Series:
    if pd.api.types.is_numeric_dtype(values):
        floats = values.to_numpy(float, na_value=np.nan)
        floats = np.where(np.isfinite(floats), floats, np.nan)
    else:
        floats = np.array(numbers(values, where), dtype=float)
    # rounding may leave the end of an interval a hair outside
    outside = (floats < about.low - 1e-9) | (floats > about.high + 1e-9)
    if outside.any():
        row = outside.argmax()
        limits = f"{about.low:g} to {about.high:g}"
        hint = "; give fractions (0.975), not percent (97.5)" if limits == "0 to 1" else ""
        raise InputError(f"{where}, row {row}: {floats[row]:g} is outside {limits}{hint}")
    if about.kind == "number":
        return pd.Series(floats)
    # NaN equals nothing, itself included, so that a missing whole number is no whole number either.
    broken = (floats != np.round(floats)) & ~(np.isnan(floats) & about.empty)
    if broken.any():
        row = broken.argmax()
        raise InputError(f"{where}, row {row}: {values.astype(object)[row]!r} is no whole number")
    return pd.Series(floats) if about.empty else pd.Series(floats.astype(int))
