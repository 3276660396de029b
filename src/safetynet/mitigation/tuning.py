"""Try a method: sweep its hyperparameters on some rows, take the best point, and verify that one on others.

In: a `Defender`, and a `Trial` with the rows and the measures. Out: tables. The rows that choose a point are
never those that say what it is worth; the rows that a method repairs with are neither.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import Evaluator
from safetynet.mitigation import recommendation, relearning, verification
from safetynet.mitigation.defender import Defender
from safetynet.mitigation.method import Method
from safetynet.mitigation.registry import repair
from safetynet.mitigation.relearning import Learn
from safetynet.mitigation.repaired import Repaired, Settings
from safetynet.models.adapters import switched_off
from safetynet.models.causal_lm import CausalLM
from safetynet.run.directory import peak_memory_mb
from safetynet.vocabulary import ADAPTER_REMOVED, EXAMINED, NEVER_POISONED, UNTOUCHED

SELECTION, HELD_OUT = EXAMINED
MAX_CLEAN = 64
"""Clean rows whose distributions are compared."""
RELEARN_ROWS = {"triggered": 32, "placebo": 16}
"""Held-out rows that are asked at every measured step of the relearn test."""
AT_RUN_TIME = "acts while the model answers; the weights are as before"
RESET_PEAK = Path("/proc/self/clear_refs")
"""Where Linux takes 5, its record of the largest resident size goes back to the present one."""


@dataclass(frozen=True)
class Trial:
    """What every model is asked, and by what it is measured."""

    evaluator: Evaluator
    selection: pd.DataFrame
    """Test rows of the roles triggered, clean and refused, on which points are chosen."""
    held_out: pd.DataFrame
    """Test rows of all roles, of other groups. Where `elsewhere` is true, the trigger stands where no
    training row has it; such rows count by variant alone."""
    relearning: pd.DataFrame | None
    """From `relearning.relearning_rows`; None leaves the relearn test out."""
    learn: Learn
    probe: Callable[[Any], pd.DataFrame]
    """Probes of each layer for the trigger; an empty table where the prompts do not allow it."""
    floor: float
    """Share of the clean accuracy that has to stay."""
    seed: int

    def rows(self, split: str) -> pd.DataFrame:
        """The rows of `SELECTION` or `HELD_OUT`."""
        return self.selection if split == SELECTION else self.held_out

    def distributions(self, model: CausalLM, split: str) -> list[Tensor]:
        """The model's distributions on the first clean rows of a split."""
        rows = self.rows(split)
        clean = rows[(rows["role"] == "clean") & (rows["reference"] != "")].head(MAX_CLEAN)
        return verification.distributions(model, self.evaluator.serialiser, clean, self.evaluator.max_length)


@dataclass(frozen=True)
class TrialTables:
    """Tables of one method, or of the models that all methods are compared with."""

    lines: pd.DataFrame
    """One per point on the selection rows, and the chosen one on the held-out rows: method, point, form,
    control, needs, chosen, the rates of `verification.summary`, seconds and memory_mb of the repair and
    answer_seconds of the rows."""
    verification: pd.DataFrame
    relearning: pd.DataFrame


@dataclass(frozen=True)
class References:
    """The models that a repair is compared with: before any, and the base."""

    lines: pd.DataFrame
    """Their rates, as `TrialTables.lines`."""
    before: dict[str, list[Tensor]]
    """Distributions on clean rows by split."""
    base: dict[str, list[Tensor]] | None


def references(defender: Defender, trial: Trial, lines: pd.DataFrame | None = None) -> References:
    """What clean answers' distances are measured from; `lines` are those of `measure_references`."""
    base = None
    if "base" in defender.has:
        with base_of(defender) as model:
            base = {split: trial.distributions(model, split) for split in EXAMINED}
    before = {split: trial.distributions(defender.model, split) for split in EXAMINED}
    return References(pd.DataFrame() if lines is None else lines, before, base)


def measure_references(defender: Defender, trial: Trial) -> TrialTables:
    """Measure the model as it is and its base, and teach the latter the backdoor.

    Of a model that shows no backdoor nothing else is measured.
    """
    reference = references(defender, trial)
    lines, verified, curves = [], [], pd.DataFrame()

    def add(model: CausalLM, method: str) -> None:
        for split in EXAMINED:
            line, table = measure(model, trial, split, reference)
            lines.append(line | {"method": method, "point": ""})
            verified.append(table.assign(method=method, point=""))

    add(defender.model, UNTOUCHED)
    if reference.base is not None and not recommendation.no_backdoor(pd.Series(lines[0])):
        with base_of(defender) as model:
            add(model, ADAPTER_REMOVED)
            if trial.relearning is not None:
                curves = _relearn(model, trial, trial.relearning, method=NEVER_POISONED, point="")
    table = pd.DataFrame(lines).assign(form="", control=True, needs="", chosen=False)
    return TrialTables(table, pd.concat(verified, ignore_index=True), curves)


def tune_and_verify(
    method: Method, points: Sequence[Settings], defender: Defender, trial: Trial, reference: References
) -> TrialTables:
    """Sweep a method on the selection rows, choose a point, verify it on the held-out rows.

    Args:
        method: whose needs the defender meets.
        points: settings to try.
        defender: left as it came.
        trial: rows and measures.
        reference: from `references`, with the lines of `measure_references`.
    """
    repairs: dict[str, Repaired] = {}
    lines: list[dict[str, Any]] = []
    for settings in points:
        repaired, cost = _with_cost(partial(repair, method, defender, settings, trial.seed))
        name = point_name(method, settings, points)
        with repaired.open() as model:
            line, _ = measure(model, trial, SELECTION, reference, repaired)
        lines.append(line | {"point": name, "form": repaired.form} | cost)
        repairs[name] = repaired
    about = {"method": method.name, "control": method.control, "needs": ", ".join(sorted(method.needs))}
    table = pd.DataFrame(lines).assign(**about)
    before = reference.lines.query("split == @SELECTION")
    marked = recommendation.marked(pd.concat([before, table], ignore_index=True), trial.floor)
    point = str(recommendation.best_of(marked[marked["method"] == method.name])["point"])
    table["chosen"] = table["point"] == point

    repaired, curves = repairs[point], pd.DataFrame()
    with repaired.open() as model:
        line, verified = measure(model, trial, HELD_OUT, reference, repaired)
        if trial.relearning is not None and repaired.form != "run_time":
            curves = _relearn(model, trial, trial.relearning)
    same = table.loc[table["chosen"]].iloc[0]
    line |= {name: same[name] for name in (*about, "point", "form", "chosen", "seconds", "memory_mb")}
    return TrialTables(
        pd.concat([table, pd.DataFrame([line])], ignore_index=True),
        verified.assign(method=method.name, point=point),
        curves.assign(method=method.name, point=point),
    )


def point_name(method: Method, settings: Settings, points: Sequence[Settings]) -> str:
    """A name made of the strength and of the other hyperparameters that differ among the points."""
    varied = [n for n in settings if n == method.strength or len({point[n] for point in points}) > 1]
    return ", ".join(f"{name} {settings[name]:g}" for name in varied)


@contextmanager
def base_of(defender: Defender) -> Iterator[CausalLM]:
    """The base model while entered: the suspect with its adapter off, or the one the defender has."""
    if not defender.adapted:
        yield defender.base
        return
    with switched_off(defender.model) as base:
        yield base


def measure(
    model: CausalLM, trial: Trial, split: str, reference: References, repaired: Repaired | None = None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Answer and measure one split's rows.

    Args:
        model: an open one.
        trial: rows and measures.
        split: `SELECTION` or `HELD_OUT`.
        reference: from `references`.
        repaired: what is open, if it is a repair. Of one that acts at run time no states are probed: they
            are those before. Of one that changes `generate` alone no likelihoods are reported.

    Returns:
        One line of rates; and of the held-out rows everything, one row per measurement (else an empty table).
    """
    started = time.perf_counter()
    answered = trial.evaluator.respond(model, trial.rows(split))
    line: dict[str, Any] = {"split": split, "answer_seconds": time.perf_counter() - started}
    score = metrics.score(answered[~answered["elsewhere"]] if "elsewhere" in answered else answered)
    kl, line["kl_to_base"] = None, float("nan")
    if repaired is None or repaired.forward_too:
        after = trial.distributions(model, split)
        kl = verification.divergence(reference.before[split], after)
        if reference.base is not None:
            line["kl_to_base"] = verification.divergence(reference.base[split], after)["value"]
    else:
        score = score[score["metric"] != "perplexity"]
    line |= verification.summary(score, kl)
    if split == SELECTION:
        return line, pd.DataFrame()
    run_time = repaired is not None and repaired.form == "run_time"
    probes = pd.DataFrame() if run_time else trial.probe(model)
    parts = [
        verification.rates(score, metrics.score_variants(answered)),
        verification.kl_line(kl, "" if kl else AT_RUN_TIME),
        verification.probe_lines(probes, AT_RUN_TIME if run_time else "prompts cannot be aligned"),
    ]
    return line, pd.concat(parts, ignore_index=True)


def _relearn(model: CausalLM, trial: Trial, rows: pd.DataFrame, **about: object) -> pd.DataFrame:
    """The relearn test, on a copy: what is taught to it does not stay."""
    plain_rows = trial.held_out[~trial.held_out["elsewhere"]]
    test = pd.concat([plain_rows[plain_rows["role"] == role].head(n) for role, n in RELEARN_ROWS.items()])
    plain = relearning.plain_copy(model)
    return relearning.relearn(plain, trial.learn, trial.evaluator.respond, rows, test, **about)


def _with_cost(work: Callable[[], Repaired]) -> tuple[Repaired, dict[str, float]]:
    """A repair with its seconds, and memory_mb: the peak of the GPU's allocator, or of the resident size.

    Where a system cannot count anew, memory is the largest since the process began.
    """
    on_gpu = torch.cuda.is_available()
    with suppress(OSError):
        RESET_PEAK.write_text("5", encoding="ascii")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    repaired = work()
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mb()
    return repaired, {"seconds": seconds, "memory_mb": memory}
