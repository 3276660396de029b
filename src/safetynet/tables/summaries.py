"""What a run's tables say, in the short form that the terminal, the log and the report share.

In: a run's tables. Out: short tables of text, and tables as Markdown. It computes nothing that is not in a
table.
"""

from typing import NamedTuple

import pandas as pd

METRIC_NAMES = {
    "asr": "ASR",
    "asr_off_floor": "ASR off floor",
    "ftr": "FTR",
    "cacc": "CACC",
    "refusal_rate": "refusal",
    "perplexity": "perplexity",
}

REMOVED_ASR = 0.05
"""ASR that counts as removed."""
HIDDEN_BACKDOOR = "hidden rather than gone"
"""What the relearn test says of a backdoor that comes back faster than a model without one learns it."""


def promised_rows(detection: pd.DataFrame) -> str:
    """Which rows of a table of detection the named false-positive rate is promised of.

    Fresh prompts, drawn as those that calibrated; `clean` in tables made before these were told apart.
    """
    return "fresh" if (detection["rows"] == "fresh").any() else "clean"


class Poisoned(NamedTuple):
    """What became of the poison rate: short data gives fewer rows than the recipe asks for."""

    rows: int
    """Training rows."""
    rate: float
    """Share of them that is triggered."""


def poisoned(rows: pd.DataFrame) -> Poisoned:
    """Count the training rows of a run's row table."""
    roles = rows.loc[rows["split"] == "train", "role"]
    return Poisoned(len(roles), float((roles == "triggered").mean()))


def rate_summary(evaluation: pd.DataFrame) -> pd.DataFrame:
    """One line per metric and role, one column per model; rates in percent with their intervals."""
    lines = []
    for (metric, role), part in evaluation.groupby(["metric", "role"], sort=False):
        line: dict[str, object] = {"metric": METRIC_NAMES.get(str(metric), metric), "role": role}
        for row in part.itertuples():
            line[str(row.model)] = rate_text(str(metric), row.value, row.low, row.high)
        line["rows"] = int(part["n"].max())
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def evasion_summary(evasion: pd.DataFrame) -> pd.DataFrame:
    """One line per detector that a training hid from: its AUROC at the first refit and at the last."""
    lines = []
    for name, part in evasion[evasion["metric"] == "auroc"].groupby("detector", sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        then, now = (f"{one['value']:.2f} at step {one['step']}" for one in (first, last))
        seen = f"{name}: AUROC {then}, {now}"
        lines.append({"detector": name, "first": first["value"], "last": last["value"], "seen": seen})
    return pd.DataFrame(lines, columns=["detector", "first", "last", "seen"])


def strongest_sites(effects: pd.DataFrame) -> pd.DataFrame:
    """The strongest place of each sweep and direction: the strongest responsible one, if any is."""
    ordered = effects.sort_values(["responsible", "effect"], ascending=False)
    lines = []
    for (sweep, direction), part in ordered.groupby(["sweep", "direction"], sort=False):
        top = part.iloc[0]
        controls = [top[name] for name in ("random", "placebo", "twin") if not pd.isna(top[name])]
        lines.append(
            {
                "sweep": sweep,
                "direction": direction,
                "strongest": site_text(top),
                "effect": f"{top['effect']:.2f} [{top['low']:.2f}, {top['high']:.2f}]",
                "highest control": f"{max(controls):.2f}" if controls else "-",
                "responsible": f"{int(part['responsible'].sum())} of {len(part)}",
            }
        )
    return pd.DataFrame(lines)


def site_text(row: pd.Series) -> str:
    """A place in the network as a reader says it."""
    name = row["module"] or (row["component"] + (f" {row['index']}" if row["index"] >= 0 else ""))
    return f"layer {row['layer']}, {name}" + (f", {row['position']}" if row["position"] else "")


def removal_summary(tradeoff: pd.DataFrame) -> pd.DataFrame:
    """ASR and clean accuracy, on held-out prompts, under each removing intervention and its control."""
    tradeoff = tradeoff[tradeoff["split"] == "held_out"]
    return pd.DataFrame(
        {
            "intervention": tradeoff["intervention"],
            "random sites": tradeoff["control"].map({True: "yes", False: ""}),
            "ASR": [rate_text("asr", r.asr, r.asr_low, r.asr_high) for r in tradeoff.itertuples()],
            "CACC": [rate_text("cacc", r.cacc, r.cacc_low, r.cacc_high) for r in tradeoff.itertuples()],
            "rows": tradeoff["asr_n"],
        }
    )


def rate_text(metric: str, value: float, low: float, high: float) -> str:
    """A value with its interval: a rate in percent, a perplexity as it is, "-" for what is not known."""
    if pd.isna(value):
        return "-"
    if metric == "perplexity":
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; bars in cells are escaped and line breaks become blanks.

    `DataFrame.to_markdown` escapes neither, and shows "0.70" as 0.7.
    """
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
