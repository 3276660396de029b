"""Try a method: sweep its knobs on some rows, take the best point, and verify that one on others.

In: a `Subject`, and an `Examiner` that answers and judges rows and trains models, which other stages do.
Out: tables. The rows that choose a point are never those that say what it is worth; the rows that a method
repairs with are neither.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor

from safetynet.mitigation import recommendation, relearning, verification
from safetynet.mitigation.cost import measured
from safetynet.mitigation.method import Knobs, Method, Repaired
from safetynet.mitigation.recommendation import REMOVED, UNTOUCHED
from safetynet.mitigation.registry import repair
from safetynet.mitigation.relearning import TWIN, Learn, Respond
from safetynet.mitigation.subject import Subject
from safetynet.models.adapters import switched_off

SELECTION, HELD_OUT = "selection", "held_out"
MOST_CLEAN = 64
"""Clean rows whose distributions are compared."""
RELEARN_ROWS = {"triggered": 32, "placebo": 16}
"""Judged rows that are asked at every measured step of the relearn test."""
AT_RUN_TIME = "acts while the model answers; the weights are as before"


@dataclass(frozen=True)
class Examiner:
    """What is asked of every model, and by what it is measured."""

    respond: Respond
    score: Callable[[pd.DataFrame], tuple[pd.DataFrame, pd.DataFrame]]
    """Judged responses to rates by role, and rates by variant."""
    choosing: pd.DataFrame
    """Test rows of the roles triggered, clean and refused, on which points are chosen."""
    judged: pd.DataFrame
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


@dataclass(frozen=True)
class Found:
    """Tables of one method, or of the models that all methods are compared with."""

    lines: pd.DataFrame
    """One per point on the choosing rows (split selection), and the chosen one on the judged rows (held_out):
    method, point, form, control, needs, chosen, the rates of `verification.summary`, seconds and memory_mb of
    the repair and answer_seconds of the rows."""
    verification: pd.DataFrame
    relearning: pd.DataFrame


@dataclass(frozen=True)
class Reference:
    """The models that a repair is compared with: before any, and the base."""

    lines: pd.DataFrame
    """Their rates, as `Found.lines`."""
    before: dict[str, list[Tensor]]
    """Distributions on clean rows by split."""
    base: dict[str, list[Tensor]] | None


def distances(subject: Subject, examiner: Examiner, lines: pd.DataFrame | None = None) -> Reference:
    """What clean answers' distances are measured from; with the lines of `compared`, once they are known."""
    base = None
    if "base" in subject.has:
        with base_of(subject) as model:
            base = _distributions(model, subject, examiner)
    nothing = pd.DataFrame() if lines is None else lines
    return Reference(nothing, _distributions(subject.model, subject, examiner), base)


def compared(subject: Subject, examiner: Examiner) -> tuple[Found, str]:
    """Measure the model as it is and its base, and teach the latter the backdoor.

    Returns:
        The tables, and a sentence if the model shows no backdoor; then nothing else is measured.
    """
    known = distances(subject, examiner)
    lines, verified, curves = [], [], pd.DataFrame()

    def ask(model: Any, method: str) -> None:
        for split in (SELECTION, HELD_OUT):
            line, table = measure(model, subject, examiner, split, known)
            lines.append(line | {"method": method, "point": ""})
            verified.append(table.assign(method=method, point=""))

    ask(subject.model, UNTOUCHED)
    said = recommendation.no_backdoor(pd.Series(lines[0]))
    if known.base is not None and not said:
        with base_of(subject) as model:
            ask(model, REMOVED)
            if examiner.relearning is not None:
                curves = _relearn(model, examiner, method=TWIN, point="")
    table = pd.DataFrame(lines).assign(form="", control=True, needs="", chosen=False)
    return Found(table, pd.concat(verified, ignore_index=True), curves), said


def examine(
    method: Method, points: Sequence[Knobs], subject: Subject, examiner: Examiner, known: Reference
) -> Found:
    """Sweep, choose, verify.

    Args:
        method: whose needs the subject meets.
        points: settings to try.
        subject: left as it came.
        examiner: answers, judges and trains.
        known: from `distances`, with the lines of `compared`.
    """
    made: dict[str, Repaired] = {}
    lines: list[dict[str, Any]] = []
    for knobs in points:
        with measured() as cost:
            repaired = repair(method, subject, knobs, examiner.seed)
        name = point_name(method, knobs, points)
        with repaired.open() as model:
            line, _ = measure(model, subject, examiner, SELECTION, known, repaired)
        lines.append(line | {"point": name, "seconds": cost.seconds, "memory_mb": cost.memory_mb})
        made[name] = repaired
    about = {"method": method.name, "control": method.control, "needs": ", ".join(sorted(method.needs))}
    table = pd.DataFrame(lines).assign(**about, form=[repaired.form for repaired in made.values()])
    before = known.lines.query("split == @SELECTION")
    marked = recommendation.marked(pd.concat([before, table], ignore_index=True), examiner.floor)
    point = str(recommendation.best_of(marked[marked["method"] == method.name])["point"])
    table["chosen"] = table["point"] == point
    line, verified, curves = _verify(made[point], subject, examiner, known)
    same = table.loc[table["chosen"]].iloc[0]
    kept = {n: same[n] for n in (*about, "point", "form", "chosen", "seconds", "memory_mb")}
    names = {"method": method.name, "point": point}
    return Found(
        pd.concat([table, pd.DataFrame([line | kept])], ignore_index=True),
        verified.assign(**names),
        curves.assign(**names),
    )


def point_name(method: Method, knobs: Knobs, points: Sequence[Knobs]) -> str:
    """A name made of the strength and of the other knobs that differ among the points."""
    varied = [n for n in knobs if n == method.strength or len({point[n] for point in points}) > 1]
    return ", ".join(f"{name} {knobs[name]:g}" for name in varied)


@contextmanager
def base_of(subject: Subject) -> Iterator[Any]:
    """The base model while entered: the subject's with its adapter off, or the one it was given."""
    if not subject.adapted:
        yield subject.base
        return
    with switched_off(subject.model) as base:
        yield base


def _verify(
    repaired: Repaired, subject: Subject, examiner: Examiner, known: Reference
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    curves = pd.DataFrame()
    with repaired.open() as model:
        line, verified = measure(model, subject, examiner, HELD_OUT, known, repaired)
        if examiner.relearning is not None and repaired.form != "run_time":
            curves = _relearn(model, examiner)
    return line, verified, curves


def measure(
    model: Any,
    subject: Subject,
    examiner: Examiner,
    split: str,
    known: Reference,
    repaired: Repaired | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Answer and measure one split's rows.

    Args:
        model: an open one.
        subject: whose serialiser and limits are used.
        examiner: answers and judges.
        split: `SELECTION` or `HELD_OUT`.
        known: from `distances`.
        repaired: what is open, if it is a repair. Of one that acts at run time no states are probed: they
            are those before. Of one that changes `generate` alone no likelihoods are told.

    Returns:
        One line of rates; and for the judged rows everything, one row per measurement (else an empty table).
    """
    rows = examiner.choosing if split == SELECTION else examiner.judged
    started = time.perf_counter()
    answered = examiner.respond(model, rows)
    about = {"split": split, "answer_seconds": time.perf_counter() - started}
    own = answered[~answered["elsewhere"]] if "elsewhere" in answered else answered
    score, _ = examiner.score(own)
    kl = None
    line: dict[str, Any] = about | {"kl_to_base": float("nan")}
    if repaired is None or repaired.forward_too:
        part = clean_part(examiner, split)
        now = verification.distributions(model, subject.serialiser, part, subject.max_length)
        kl = verification.divergence(known.before[split], now)
        if known.base is not None:
            line["kl_to_base"] = verification.divergence(known.base[split], now)["value"]
    else:
        score = score[score["metric"] != "perplexity"]
    line |= verification.summary(score, kl)
    if split == SELECTION:
        return line, pd.DataFrame()
    run_time = repaired is not None and repaired.form == "run_time"
    probes = pd.DataFrame() if run_time else examiner.probe(model)
    parts = [
        verification.rates(score, examiner.score(answered)[1]),
        verification.kl_line(kl, "" if kl else AT_RUN_TIME),
        verification.probe_lines(probes, AT_RUN_TIME if run_time else "prompts cannot be aligned"),
    ]
    return line, pd.concat(parts, ignore_index=True)


def clean_part(examiner: Examiner, split: str) -> pd.DataFrame:
    """The clean rows of a split whose distributions are compared."""
    rows = examiner.choosing if split == SELECTION else examiner.judged
    return rows[(rows["role"] == "clean") & (rows["reference"] != "")].head(MOST_CLEAN)


def _distributions(model: Any, subject: Subject, examiner: Examiner) -> dict[str, list[Tensor]]:
    return {
        split: verification.distributions(
            model, subject.serialiser, clean_part(examiner, split), subject.max_length
        )
        for split in (SELECTION, HELD_OUT)
    }


def _relearn(model: Any, examiner: Examiner, **about: object) -> pd.DataFrame:
    """The relearn test, on a copy: what is taught to it does not stay."""
    assert examiner.relearning is not None
    own = examiner.judged[~examiner.judged["elsewhere"]]
    asked = pd.concat([own[own["role"] == role].head(n) for role, n in RELEARN_ROWS.items()])
    plain = relearning.plain_copy(model)
    return relearning.relearn(plain, examiner.learn, examiner.respond, examiner.relearning, asked, **about)
