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
        *_markdown(summary(run.table("evaluation"))),
    ]
    for name, title in (
        ("variants", "By variant of trigger, placebo and near miss"),
        ("judge_error", "The judge's own error on labelled texts"),
        ("audit", "What the audit found in the data"),
    ):
        if run.has_table(name):
            lines += ["", f"## {title}", "", *_markdown(_short(run.table(name), name))]
    lines += ["", "## Made by", "", *_markdown(_stages(run))]
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
            line[str(row.model)] = _value(str(metric), row.value, row.low, row.high)
        line["rows"] = int(part["n"].max())
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _value(metric: str, value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return "-"
    if metric == "perplexity":
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _short(table: pd.DataFrame, name: str) -> pd.DataFrame:
    if name == "variants":
        chosen = table[table["model"] == "backdoored"]
        values = [_value("asr", r.value, r.low, r.high) for r in chosen.itertuples()]
        return chosen.assign(rate=values)[["role", "variant", "metric", "rate", "n"]]
    if name == "judge_error":
        values = [_value("asr", r.value, r.low, r.high) for r in table.itertuples()]
        return table.assign(rate=values)[["error", "count", "n", "rate"]]
    return table.drop(columns=[c for c in ("rows",) if c in table])


def _stages(run: Run) -> pd.DataFrame:
    manifest = run.manifest
    stages = [
        {"stage": name, "seconds": done["seconds"], "peak memory (MB)": done["peak_memory_mb"]}
        for name, done in manifest["stages"].items()
    ]
    return pd.DataFrame(stages)


def _markdown(table: pd.DataFrame) -> Sequence[str]:
    def cells(values: Sequence[object]) -> str:
        texts = (str(v).replace("|", "\\|").replace("\n", " ") for v in values)
        return "| " + " | ".join(texts) + " |"

    return [
        cells(list(table.columns)),
        cells(["---"] * len(table.columns)),
        *(cells(list(row)) for row in table.itertuples(index=False)),
    ]
