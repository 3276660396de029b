"""The results of all methods in one table to be read. In: a run's tables. Out: texts."""

import math

import pandas as pd

from safetynet.mitigation.recommendation import REMOVED, UNTOUCHED
from safetynet.mitigation.relearning import LEVELS, TWIN, steps_to

COLUMNS = (
    "method", "point", "ASR", "CACC", "lost", "relearn 50%", "relearn 95%", "seconds", "flags", "rows",
)  # fmt: skip


def overview(marked: pd.DataFrame, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per method, on the judged rows: rates with 95% intervals, relearn steps, seconds, flags.

    Args:
        marked: the run's table mitigation.
        curves: its table relearning.

    Returns:
        `COLUMNS`; lost is in points of clean accuracy, rows is the number of triggered ones.
    """
    held = marked[marked["split"] == "held_out"]
    before = held[held["method"] == UNTOUCHED].iloc[0]
    steps = {} if curves is None else _steps(curves)
    lines = []
    for line in held.to_dict("records"):
        name = str(line["method"])
        relearned = steps.get(TWIN if name == REMOVED else name, ["", ""])
        seconds = line.get("seconds", math.nan)
        lines.append(
            (
                name,
                line["point"],
                rate(line, "asr"),
                rate(line, "cacc"),
                "" if name == UNTOUCHED else f"{100 * (before['cacc'] - line['cacc']):.1f}",
                *relearned,
                "" if pd.isna(seconds) else f"{seconds:.1f}",
                line["flags"],
                f"{line['asr_n']:.0f}",
            )
        )
    return pd.DataFrame(lines, columns=list(COLUMNS))


def rate(line: dict[str, object] | pd.Series, name: str) -> str:
    """A rate with its interval, in percent."""
    value, low, high = (100 * float(str(line[name + end])) for end in ("", "_low", "_high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def _steps(curves: pd.DataFrame) -> dict[str, list[str]]:
    """Steps to each level by method, as texts; beyond the budget as more than it."""
    found = steps_to(curves)
    texts: dict[str, list[str]] = {}
    for method, own in found.groupby("method", sort=False):
        by_level = own.set_index("level")
        texts[str(method)] = [
            f">{by_level.at[level, 'budget']:.0f}"
            if pd.isna(by_level.at[level, "steps"])
            else f"{by_level.at[level, 'steps']:.0f}"
            for level in LEVELS
        ]
    return texts
