"""Bring what the plots are given into one form: checked columns, known words, one row per measurement.

In: a DataFrame, a list of records such as the Trainer's log_history, or a dict of lists.
Out: DataFrames that the charts are built from. Draws nothing and computes no result.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures.values import numbers

Measurements: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
MODELS = ("backdoored", "clean_twin", "base")
METRICS = ("asr", "asr_off_floor", "ftr", "cacc", "refusal_rate", "perplexity")
ROLES = ("triggered", "clean", "placebo", "near_miss", "refused")
"""Order in which roles are shown: what must fire first, then what must not, the hardest last."""


def rates(data: Measurements, where: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Measured rates with their intervals: the tidy columns, and a `note` with counts and what else is known.

    Args:
        data: columns model, metric, role, value, low, high and the further `columns`; count, n and note
            where they are known. Rates are fractions. The count of a perplexity is one of tokens.
        where: name of the table, for messages.
        columns: further columns that must be there, such as step.

    Raises:
        InputError: if there is no data, a column is missing, a word is unknown, or a value is no number.
    """
    frame = to_frame(data, where)
    require(frame, where, ["model", "metric", "role", "value", "low", "high", *columns])
    out = frame[["model", "metric", "role"]].fillna("").astype(str).reset_index(drop=True)
    out["model"] = out["model"].str.replace(" ", "_")
    for field, allowed in (("model", MODELS), ("metric", METRICS), ("role", (*ROLES, ""))):
        known(out, where, field, allowed)
    for field in ("value", "low", "high", *columns):
        out[field] = numbers(frame[field], f"{where}, field {field}")
    counts = [
        numbers(frame[name], where) if name in frame else [math.nan] * len(frame) for name in ("count", "n")
    ]
    notes = frame["note"].fillna("").astype(str) if "note" in frame else [""] * len(frame)
    told = zip(out["metric"], *counts, notes, strict=True)
    out["note"] = ["; ".join(filter(None, (_count(*known), note))) for *known, note in told]
    return out


def _count(metric: str, count: float, n: float) -> str:
    if math.isnan(n):
        return ""
    if math.isnan(count) or metric == "perplexity":
        return f"{n:.0f} rows"
    return f"{count:.0f} of {n:.0f} rows"


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


def to_frame(data: object, where: str) -> pd.DataFrame:
    """A DataFrame of any of the forms that are understood.

    Raises:
        InputError: if the form is another one, the columns have unequal lengths, or there are no rows.
    """
    if isinstance(data, Mapping):
        lengths = {field: len(column) for field, column in data.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{field} {length}" for field, length in lengths.items())
            raise InputError(f"{where}: fields have unequal lengths ({listed}); give as many values of each")
    elif not isinstance(data, pd.DataFrame | Sequence) or isinstance(data, str):
        raise InputError(
            f"{where}: a {type(data).__name__} cannot be drawn; "
            "give a DataFrame, a list of records or a dict of lists"
        )
    frame = pd.DataFrame(data)
    if frame.empty:
        raise InputError(f"{where}: there are no rows; give at least one")
    return frame


def require(frame: pd.DataFrame, where: str, columns: Iterable[str]) -> None:
    """Check that rows and columns are there.

    Raises:
        InputError: naming what is missing and what there is.
    """
    if frame.empty:
        raise InputError(f"{where}: there are no rows; give at least one")
    missing = [column for column in columns if column not in frame]
    if missing:
        _missing(where, missing, frame.columns)


def _missing(where: str, columns: Sequence[str], there: Iterable[str]) -> None:
    raise InputError(
        f"{where}: column {', '.join(columns)} is missing; there are {', '.join(sorted(map(str, there)))}"
    )


def known(frame: pd.DataFrame, where: str, field: str, allowed: Sequence[str]) -> None:
    """Check the words of a column.

    Raises:
        InputError: naming the first row with another word, and those that are allowed.
    """
    unknown = frame.index[~frame[field].isin(allowed)]
    if len(unknown):
        given = frame[field][unknown[0]]
        choice = ", ".join(filter(None, allowed))
        raise InputError(f"{where}, row {unknown[0]}: {field} is {given!r}; allowed are {choice}")
