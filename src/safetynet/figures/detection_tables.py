"""Detection's tables, brought into one form: checked columns, known words, detectors in their order.

In: a DataFrame, a list of records, or a dict of lists. Out: DataFrames that the charts are built from.
Draws nothing and computes no result.
"""

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures.checks import Measurements, require, to_frame
from safetynet.figures.intervention_tables import Form
from safetynet.figures.values import numbers

FUSED = "fused"
SETS = ("fired", "not_fired", "clean", "placebo", "near_miss", "refused")
"""Rows that figures show, in this order; others stay in the tables."""
ROC = Form("detection_roc", ("fpr", "tpr", "positives", "negatives"), (), ("detector", "rows"))
DISTRIBUTION = Form("detection_distribution", ("surprise", "share", "n", "rate"), (), ("detector", "rows"))
LAYERS = Form("detection_layers", ("auroc", "low", "high", "n"), ("layer",), ("detector", "rows"))
OVERHEAD = Form(
    "detection_overhead",
    ("plain", "guarded", "ratio", "low", "high", "repeats", "prompt_tokens", "new_tokens"),
    ("batch",),
)
ANSWERS = Form(
    "detection_answers", ("value", "low", "high", "n", "tokens", "share"), (), ("rows",),
    words={"watched": ("prompt", "answer", "both")},
)  # fmt: skip


def detectors_of(table: pd.DataFrame) -> list[str]:
    """Names of detectors, the fused monitor first, then as they appear."""
    return sorted(dict.fromkeys(table["detector"]), key=lambda name: name != FUSED)


def evasion(data: Measurements) -> pd.DataFrame:
    """The matrix of attacked and tested detectors.

    Args:
        data: attacked, tested, metric and value (a fraction); strength, rows, low and high where known, and
            own, whether the tested detector is among the attacked ones; by default where both have one name.

    Returns:
        attacked (with its strength), tested, own, panel (metric and rows), value, low, high.

    Raises:
        InputError: if a column or all rows are missing, or a value is no fraction.
    """
    frame = to_frame(data, "evasion_matrix")
    require(frame, "evasion_matrix", ["attacked", "tested", "metric", "value"])
    frame = frame.reset_index(drop=True)
    out = pd.DataFrame({name: frame[name].astype(str) for name in ("attacked", "tested")})
    same = out["attacked"].map(_whole) == out["tested"].map(_whole)
    out["own"] = frame["own"].astype(bool) if "own" in frame else same
    if "strength" in frame and frame["strength"].nunique() > 1:
        out["attacked"] += [
            "" if pd.isna(value) or float(value) == 0 else f", {float(value):g}"
            for value in frame["strength"]
        ]
    rows = (
        [f", {row}" if row else "" for row in frame["rows"].fillna("")]
        if "rows" in frame
        else [""] * len(frame)
    )
    out["panel"] = [metric + row for metric, row in zip(frame["metric"].astype(str), rows, strict=True)]
    for name in ("value", "low", "high"):
        given = frame[name] if name in frame else [None] * len(frame)
        out[name] = numbers(given, f"evasion_matrix, field {name}")
    wrong = out.index[(out["value"] < 0) | (out["value"] > 1)]
    if len(wrong):
        raise InputError(
            f"evasion_matrix, row {wrong[0]}: value is {out['value'][wrong[0]]:g}; give a fraction"
        )
    return out


def _whole(name: str) -> str:
    """A detector's name with its view."""
    return name if ":" in name else f"{name}:last"
