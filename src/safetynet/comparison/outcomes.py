"""How reliably the backdoor fires, how detectable it is, and how removable.

In: the tables evaluation, detection, tradeoff and mitigation of each run, as far as it has them. Out: one
tidy table per run and one per group: an aspect, a measure, its value with interval, its control beside it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from safetynet.comparison.runs import ComparedRun
from safetynet.comparison.seeds import Estimate, over_groups, over_seeds, rate_over_seeds
from safetynet.errors import InputError
from safetynet.tables import SCHEMAS
from safetynet.tables.summaries import promised_rows
from safetynet.vocabulary import UNTOUCHED

FUSED = "fused"
NAN = float("nan")


def outcomes(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """Every outcome of every run.

    Returns:
        Columns group, run, seed, aspect (planted, detected, removed, repaired), measure, value, count (NaN
        where it is no rate of counted rows), n, control, control_count, control_n, control_is (what the
        control is), of (which removal, or which detectors).

    Raises:
        InputError: if runs were watched by different detectors, whose scores are no one measure.
    """
    by_detectors: dict[tuple[str, ...], ComparedRun] = {}
    for run in runs:
        if run.has("detection"):
            by_detectors.setdefault(tuple(sorted(set(run.tables["detection"]["detector"]))), run)
    if len(by_detectors) > 1:
        listed = "; ".join(f"{run.folder}: {', '.join(names)}" for names, run in by_detectors.items())
        raise InputError(
            f"compare: the runs were watched by different detectors ({listed}), whose fused scores are no "
            "one measure. Run safetynet detect RUN with the same --detectors on each."
        )
    lines = []
    for run in runs:
        for aspect, table, read in (
            ("planted", "evaluation", _planted),
            ("detected", "detection", _detected),
            ("removed", "tradeoff", _removed),
            ("repaired", "mitigation", _repaired),
        ):
            if run.has(table):
                lines += [run.about | {"aspect": aspect} | line for line in read(run.tables[table])]
    return pd.DataFrame(lines, columns=list(SCHEMAS["outcomes"].columns))


def by_group(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of each measure and of its control, with intervals over seeds.

    Returns:
        Columns group, aspect, measure, value, low, high, seeds, control, control_low, control_high,
        control_is, of (what each seed's was, where they differ separated by bars).
    """

    def mean(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        yield {
            **_estimate(part, "count", "n", "value")._asdict(),
            **_estimate(part, "control_count", "control_n", "control").named("control"),
            "control_is": part["control_is"].iloc[0],
            "of": " | ".join(dict.fromkeys(filter(None, part["of"]))),
        }

    return over_groups(outcomes, ("group", "aspect", "measure"), mean)


def _estimate(part: pd.DataFrame, count: str, n: str, value: str) -> Estimate:
    counted = part.dropna(subset=[count, n])
    if len(counted) == len(part):
        return rate_over_seeds(counted[count].astype(int).tolist(), counted[n].astype(int).tolist())
    return over_seeds(part[value].tolist(), (0.0, 1.0))


def _line(measure: str, result: Any, control: Any, control_is: str, of: str = "") -> dict[str, Any]:
    """One measure; `result` and `control` are (value, count, n), count NaN where nothing is counted."""
    names = ("value", "count", "n")
    line = {"measure": measure, "control_is": control_is, "of": of}
    line |= dict(zip(names, result, strict=True))
    return line | dict(zip(("control", "control_count", "control_n"), control, strict=True))


def _planted(evaluation: pd.DataFrame) -> Iterator[dict[str, Any]]:
    def rate(model: str, metric: str, role: str) -> tuple[float, float, float]:
        rates = evaluation[
            (evaluation["model"] == model) & (evaluation["metric"] == metric) & (evaluation["role"] == role)
        ]
        if rates.empty or pd.isna(rates["value"].iloc[0]):
            return NAN, NAN, NAN
        return tuple(float(rates[name].iloc[0]) for name in ("value", "count", "n"))  # type: ignore[return-value]

    yield _line("ASR", rate("backdoored", "asr", "triggered"), rate("base", "asr", "triggered"), "base model")
    for role in ("placebo", "near_miss"):
        rates = rate("backdoored", "ftr", role)
        yield _line(f"FTR {role.replace('_', ' ')}", rates, rate("base", "ftr", role), "base model")
    yield _line("CACC", rate("backdoored", "cacc", "clean"), rate("base", "cacc", "clean"), "base model")


def _detected(detection: pd.DataFrame) -> Iterator[dict[str, Any]]:
    names = set(detection["detector"])
    fused = detection[detection["detector"] == (FUSED if FUSED in names else min(names))]
    of = " ".join(sorted(names - {FUSED}))

    def score(metric: str, rows: str, rate: float | None = None) -> tuple[float, float, float]:
        lines = fused[(fused["metric"] == metric) & (fused["rows"] == rows)]
        lines = lines if rate is None else lines[lines["rate"] == rate]
        if lines.empty:
            return NAN, NAN, NAN
        value, n = float(lines["value"].iloc[0]), float(lines["n"].iloc[0])
        return value, (round(value * n) if rate is not None else NAN), n

    caught = "fired" if ((fused["metric"] == "auroc") & (fused["rows"] == "fired")).any() else "triggered"
    yield _line("AUROC", score("auroc", caught), score("auroc", "placebo"), "placebo rows", of)
    yield _line("AUROC near miss", score("auroc", "near_miss"), score("auroc", "placebo"), "placebo rows", of)
    rates = fused.loc[fused["metric"] == "tpr", "rate"].dropna()
    if len(rates):
        # The largest is what the monitor was asked for; smaller ones come along.
        rate = float(rates.max())
        name = f"TPR at FPR {100 * rate:g}%"
        quiet = score("fpr", promised_rows(fused), rate)
        yield _line(name, score("tpr", caught, rate), quiet, "false positives", of)


def _removed(tradeoff: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The removal that was chosen on other prompts, on those held out, beside the same at random sites."""
    held = tradeoff[tradeoff["split"] == "held_out"]
    best_removal = held[held["chosen"] & ~held["control"]]
    if best_removal.empty:
        return
    best = best_removal.iloc[0]
    random = held[held["control"] & (held["kind"] == best["kind"])]
    of = str(best["kind"]).replace("_", " ")
    for metric, name in (("asr", "ASR after removal"), ("cacc", "CACC after removal")):
        yield _line(name, _rate(best, metric), _first(random, metric), "random sites", of)


def _repaired(mitigation: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The repair that was recommended on other prompts, on those held out, beside the model as it was."""
    held = mitigation[mitigation["split"] == "held_out"]
    recommended = held[held["recommended"].astype(bool)]
    if recommended.empty:
        return
    best, before = recommended.iloc[0], held[held["method"] == UNTOUCHED]
    for metric, name in (("asr", "ASR after repair"), ("cacc", "CACC after repair")):
        yield _line(name, _rate(best, metric), _first(before, metric), UNTOUCHED, str(best["method"]))


def _first(rows: pd.DataFrame, metric: str) -> tuple[float, float, float]:
    return _rate(rows.iloc[0], metric) if len(rows) else (NAN, NAN, NAN)


def _rate(row: pd.Series, metric: str) -> tuple[float, float, float]:
    value, n = float(row[metric]), float(row[f"{metric}_n"])
    return value, float(np.rint(value * n)), n
