"""Means over groups with their intervals, beside the same of a control. In: arrays. Out: tidy tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from safetynet.statistics import bootstrap_ratios


def estimates(
    keys: Mapping[str, Sequence[Any]],
    values: np.ndarray,
    control: np.ndarray | None = None,
    name: str = "value",
    beside: str = "control",
) -> pd.DataFrame:
    """One row per site: mean over groups, 95 % bootstrap interval over groups, and the control's.

    Args:
        keys: columns that identify the sites, K entries each.
        values: (groups, K).
        control: (groups, K) of the control; None where there is none.
        name: of the column that holds the mean.
        beside: of the column that holds the control's mean.

    Returns:
        Columns: `keys`, `name`, low, high, n (groups), `beside`, `beside`_low, `beside`_high (NaN without).
    """
    mean, low, high = means(values)
    table = pd.DataFrame(dict(keys) | {name: mean, "low": low, "high": high, "n": len(values)})
    bounds = (np.nan,) * 3 if control is None else means(control)
    return table.assign(**dict(zip((beside, f"{beside}_low", f"{beside}_high"), bounds, strict=True)))


def means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(groups, K) to mean and 95 % bootstrap interval over groups, (K,) each; no interval below 2 groups."""
    return bootstrap_ratios(values.T, np.ones(len(values)))


def by_head(layers: int, heads: int) -> dict[str, list[int]]:
    """Key columns `layer` and `head` of values that run through the heads of one layer after the other."""
    return {"layer": np.repeat(range(layers), heads).tolist(), "head": list(range(heads)) * layers}
