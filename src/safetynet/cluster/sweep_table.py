"""The results of a sweep in one table: as Parquet and CSV line by line, as Markdown one line for each point.

In: outcomes of points. Out: tables, and the files. It reads run directories and computes no rate anew.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from safetynet.cluster.sweep import Outcome
from safetynet.run import directory as runs
from safetynet.run.directory import write_atomically, write_text
from safetynet.tables import summaries

SHOWN = (
    ("asr", "triggered", "backdoored"),
    ("asr", "triggered", "clean_twin"),
    ("asr", "triggered", "base"),
    ("ftr", "placebo", "backdoored"),
    ("ftr", "near_miss", "backdoored"),
    ("ftr", "clean", "backdoored"),
    ("cacc", "clean", "backdoored"),
    ("cacc", "clean", "clean_twin"),
)
"""Rates in the Markdown table: metric, role and model."""


def results(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Every rate of every point.

    Returns:
        One line per point, model, metric and role: what was varied, `status` (done, failed), the columns of
        the run's table `evaluation` (count, n, value, low, high among them) and `run`, its directory. The
        rates of what removes the backdoor best have the model `backdoored, ` and the intervention. A point
        that failed has one line without rates; `failed` and `reason` say at which step and why, `log` where
        to read on.
    """
    parts = []
    for outcome in outcomes:
        rates = _rates(outcome)
        about = {
            "point": outcome.point.name,
            "family": outcome.point.recipe.model.family,
            "seed": outcome.point.recipe.seed,
            **{  # lists and sections as JSON
                field: json.dumps(value, default=str) if isinstance(value, list | dict) else value
                for field, value in outcome.point.varied.items()
                if field not in ("seed", "model.family")
            },
            "status": "failed" if outcome.failed else "done",
        }
        after = {
            "failed": outcome.failed,
            "reason": outcome.reason,
            "run": str(outcome.folder),
            "log": str(outcome.log),
        }
        for name, value in reversed(about.items()):
            rates.insert(0, name, value)
        parts.append(rates.assign(**after))
    return pd.concat(parts, ignore_index=True)


def write(folder: Path, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Write results.parquet, results.csv and results.md below `folder`; returns the table."""
    table = results(outcomes)
    write_atomically(folder / "results.parquet", lambda path: table.to_parquet(path, index=False))
    write_atomically(folder / "results.csv", lambda path: table.to_csv(path, index=False))
    write_text(folder / "results.md", markdown(outcomes, table))
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One line per point that ended: the rates of `SHOWN` with intervals, and how many rows they are of."""
    lines = []
    for point, part in table[table["status"] == "done"].groupby("point", sort=False):
        line: dict[str, object] = {"point": point}
        cells = part.set_index(["metric", "role", "model"])
        for key in SHOWN:
            if key in cells.index:
                metric, role, model = key
                row = cells.loc[[key]].iloc[0]
                line[f"{summaries.METRIC_NAMES[metric]} {role}, {model}"] = summaries.rate_text(
                    metric, row["value"], row["low"], row["high"]
                )
        line["rows"] = int(part["n"][part["metric"] == "asr"].max())
        lines.append(line)
    return pd.DataFrame(lines).fillna("-")


def markdown(outcomes: Sequence[Outcome], table: pd.DataFrame) -> str:
    """The page: rates by point, then what failed, with the reason and the log."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    ended = len(outcomes) - len(failed)
    lines = [
        f"# Sweep of {len(outcomes)} points: {ended} done, {len(failed)} failed",
        "",
        "Rates on held-out prompts with 95% intervals (Wilson). ASR attack success rate, FTR false trigger",
        "rate, CACC clean accuracy; the clean twin and the base model are the controls. All rates are in",
        "results.parquet.",
        "",
    ]
    if ended:
        lines += [summaries.markdown(summary(table)), ""]
    if failed:
        lines += ["## Failed", "", summaries.markdown(failures(outcomes)), ""]
    return "\n".join(lines)


def failures(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One line per point that failed: the step, the reason, the log."""
    return pd.DataFrame(
        [
            {"point": o.point.name, "step": o.failed, "reason": o.reason, "log": str(o.log)}
            for o in outcomes
            if o.failed
        ],
        columns=["point", "step", "reason", "log"],
    )


def _rates(outcome: Outcome) -> pd.DataFrame:
    if outcome.failed:
        return pd.DataFrame([{"model": "", "metric": "", "role": ""}])
    run = runs.find(outcome.folder)
    table = run.table("evaluation")
    if not run.has_table("tradeoff"):
        return table
    removed = run.table("tradeoff")
    best = removed[(removed["split"] == "held_out") & removed["chosen"]]
    lines = [
        {
            "model": f"backdoored, {row.intervention}",
            "metric": metric,
            "role": role,
            "n": getattr(row, f"{metric}_n"),
            "value": getattr(row, metric),
            "low": getattr(row, f"{metric}_low"),
            "high": getattr(row, f"{metric}_high"),
        }
        for row in best.itertuples()
        for metric, role in (("asr", "triggered"), ("cacc", "clean"))
    ]
    return pd.concat([table, pd.DataFrame(lines)], ignore_index=True) if lines else table
