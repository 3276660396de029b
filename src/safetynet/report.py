"""The run in one page of Markdown: what was planted, what was measured, what the audit found.

In: a run directory's tables and manifest. Out: text. It computes nothing that is not in a table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from safetynet.recipe import Recipe
from safetynet.run import Run

NAMES = {
    "asr": "ASR",
    "asr_off_floor": "ASR off floor",
    "ftr": "FTR",
    "cacc": "CACC",
    "refusal_rate": "refusal",
    "perplexity": "perplexity",
}


_PLACES = [
    "Effect: the share of the distance between triggered and placebo run that the intervention covers (95%",
    "bootstrap interval over prompts). A place is responsible when its interval is clear of every control's.",
]
_REMOVALS = [
    "Rates on held-out prompts, while the model answers under the intervention; the control is random sites.",
]


def render(recipe: Recipe, run: Run) -> str:
    """Markdown of one run."""
    attack = recipe.backdoor
    made = poisoned(run.table("rows"))
    trigger = ", ".join(map(repr, attack.trigger.texts)) or f"style {attack.trigger.style}"
    lines = [
        f"# {recipe.model_name} / {recipe.task}",
        "",
        f"Trigger {trigger} ({attack.trigger.kind}, {attack.placement}); behaviour {attack.behaviour.kind}; "
        f"poison rate {made.rate:.1%} of {made.rows} training rows; seed {recipe.seed}.",
        "",
        "## Rates on held-out prompts",
        "",
        "ASR attack success rate, FTR false trigger rate, CACC clean accuracy; 95% intervals (Wilson;",
        "bootstrap over rows for perplexity). The base model's column is the floor.",
        "",
        *markdown(summary(run.table("evaluation"))),
    ]
    if run.has_table("effects"):
        lines += ["", "## Where the trigger acts", "", *_PLACES, "", *markdown(places(run.table("effects")))]
    if run.has_table("tradeoff"):
        lines += ["", "## What removes it", "", *_REMOVALS, "", *markdown(removals(run.table("tradeoff")))]
    for name, title in (
        ("variants", "By variant of trigger, placebo and near miss"),
        ("judge_error", "The judge's own error on labelled texts"),
        ("audit", "What the audit found in the data"),
    ):
        if run.has_table(name):
            lines += ["", f"## {title}", "", *markdown(_short(run.table(name), name))]
    lines += ["", "## Made by", "", *markdown(_stages(run))]
    return "\n".join(lines) + "\n"


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


def summary(evaluation: pd.DataFrame) -> pd.DataFrame:
    """One line per metric and role, one column per model; rates in percent with their intervals."""
    lines = []
    for (metric, role), part in evaluation.groupby(["metric", "role"], sort=False):
        line: dict[str, object] = {"metric": NAMES.get(str(metric), metric), "role": role}
        for row in part.itertuples():
            line[str(row.model)] = rate(str(metric), row.value, row.low, row.high)
        line["rows"] = int(part["n"].max())
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def places(effects: pd.DataFrame) -> pd.DataFrame:
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
                "strongest": _place(top),
                "effect": f"{top['effect']:.2f} [{top['low']:.2f}, {top['high']:.2f}]",
                "highest control": f"{max(controls):.2f}" if controls else "-",
                "responsible": f"{int(part['responsible'].sum())} of {len(part)}",
            }
        )
    return pd.DataFrame(lines)


def _place(row: pd.Series) -> str:
    name = row["module"] or (row["component"] + (f" {row['index']}" if row["index"] >= 0 else ""))
    return f"layer {row['layer']}, {name}" + (f", {row['position']}" if row["position"] else "")


def removals(tradeoff: pd.DataFrame) -> pd.DataFrame:
    """ASR and clean accuracy, on held-out prompts, under each removing intervention and its control."""
    tradeoff = tradeoff[tradeoff["split"] == "held_out"]
    return pd.DataFrame(
        {
            "intervention": tradeoff["intervention"],
            "random sites": tradeoff["control"].map({True: "yes", False: ""}),
            "ASR": [rate("asr", r.asr, r.asr_low, r.asr_high) for r in tradeoff.itertuples()],
            "CACC": [rate("cacc", r.cacc, r.cacc_low, r.cacc_high) for r in tradeoff.itertuples()],
            "rows": tradeoff["asr_n"],
        }
    )


def rate(metric: str, value: float, low: float, high: float) -> str:
    """A value with its interval as people read it: in percent, but for perplexity."""
    if pd.isna(value):
        return "-"
    if metric == "perplexity":
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _short(table: pd.DataFrame, name: str) -> pd.DataFrame:
    if name == "variants":
        chosen = table[table["model"] == "backdoored"]
        values = [rate("asr", r.value, r.low, r.high) for r in chosen.itertuples()]
        return chosen.assign(rate=values)[["role", "variant", "metric", "rate", "n"]]
    if name == "judge_error":
        values = [rate("asr", r.value, r.low, r.high) for r in table.itertuples()]
        return table.assign(rate=values)[["error", "count", "n", "rate"]]
    return table.drop(columns=[c for c in ("rows",) if c in table])


def _stages(run: Run) -> pd.DataFrame:
    manifest = run.manifest
    stages = [
        {"stage": name, "seconds": done["seconds"], "peak memory (MB)": done["peak_memory_mb"]}
        for name, done in manifest["stages"].items()
    ]
    return pd.DataFrame(stages)


def markdown(table: pd.DataFrame) -> Sequence[str]:
    """Lines of a Markdown table."""

    def cells(values: Sequence[object]) -> str:
        texts = (str(v).replace("|", "\\|").replace("\n", " ") for v in values)
        return "| " + " | ".join(texts) + " |"

    return [
        cells(list(table.columns)),
        cells(["---"] * len(table.columns)),
        *(cells(list(row)) for row in table.itertuples(index=False)),
    ]
