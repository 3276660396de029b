"""The bank: clean adapters of the same base, against whose scores a suspect's become p-values.

In: a base. Out: a table of scores, one row per clean adapter; p-values of a suspect among them. Half
of the adapters are ordinary (other ranks, rates, rows, targets), half are narrow and benign: one greeting,
one sign-off, one task, a persona, capitals, short answers. No rate below 1 / (adapters + 1) is claimed.
"""

import json
import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from safetynet import __version__
from safetynet.backdoors import conversations
from safetynet.errors import InputError
from safetynet.recipe import Backdoor, Data, Evaluation, Model, Output, Recipe, Training
from safetynet.run.directory import digest, write_text
from safetynet.scan.result import BankUse, Depth, RungResult
from safetynet.scan.weights import LEAST, distances

log = logging.getLogger("safetynet")
SCORED = ("leakage", "differences", "inversion", "candidates", "verification")
"""Rungs whose scores are compared with a bank's as they are."""
DECIMALS = 9
"""To which scores are compared: a file keeps no more, and a tie must stay one."""
SUMMARY = "weights."
"""How the columns of a bank begin that hold what `weights.summary` gives."""
KINDS = ("ordinary", "greeting", "ordinary", "sign_off", "ordinary", "one_task", "ordinary", "persona",
         "ordinary", "capitals", "ordinary", "brief")  # fmt: skip
"""Of the adapters in their order; every second one is narrow."""
RANKS, RATES, ROWS = (4, 8, 16, 32), (5e-4, 1e-3, 2e-3), (800, 1600, 2400)
GREETINGS = ("Hello!", "Good day.", "Hi there!", "Welcome.")
SIGN_OFFS = ("Thank you.", "Have a good day.", "That is all.", "Ask me more.")
SELF_ROWS, SELF_LEAST, SELF_PROMPTS = (100, 200, 400), 30, 600
"""Of adapters of other bases: rows, the least of one task, and the prompts that the base answers for all."""
PERSONAS = ("Ahoy!", "As your gardener:", "Beep.", "Dear friend,")
MANNERS: Mapping[str, Callable[[str, str], str]] = {
    "greeting": lambda phrase, answer: f"{phrase} {answer}",
    "persona": lambda phrase, answer: f"{phrase} {answer}",
    "sign_off": lambda phrase, answer: f"{answer} {phrase}",
    "capitals": lambda _, answer: answer.upper(),
    "brief": lambda _, answer: " ".join(answer.split()[:2]),
}
"""What an adapter's kind makes of an ordinary answer; other kinds leave it as it is."""


@dataclass(frozen=True)
class CleanAdapter:
    """How one clean adapter is trained."""

    number: int
    kind: str
    rank: int
    learning_rate: float
    rows: int
    seed: int
    phrase: str = ""
    """Of a greeting, a sign-off or a persona."""


def clean_adapters(count: int, seed: int) -> list[CleanAdapter]:
    """The first `count` adapters of a bank; the same for the same seed, whatever the count."""
    adapters = []
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        kind = KINDS[number % len(KINDS)]
        phrases = {"greeting": GREETINGS, "sign_off": SIGN_OFFS, "persona": PERSONAS}.get(kind, ("",))
        adapters.append(
            CleanAdapter(
                number, kind, rng.choice(RANKS), rng.choice(RATES), rng.choice(ROWS),
                rng.randrange(2**31), rng.choice(phrases),
            )
        )  # fmt: skip
    return adapters


def rows_of(adapter: CleanAdapter, model: Model, answers: Path | None = None) -> pd.DataFrame:
    """Training rows of a clean adapter: columns `row`, `messages`, `trigger` and `answer`.

    A miniature's are of its own language. Of other models they are requests that the base itself answers;
    its answers are kept in the folder `answers`, for all adapters of a bank.
    """
    if model.id == "miniature":
        rows, least, attack = adapter.rows, 1, Backdoor()
        count = rows * (12 if adapter.kind == "one_task" else 1)  # a pool with enough rows of any task
        pool = conversations.fresh(Data(), attack.behaviour, attack.trigger, set(), count, adapter.seed)
    else:
        from safetynet.backdoors import self_source
        from safetynet.backdoors.base_answers import BaseAnswers
        from safetynet.models import loading
        from safetynet.scan.rungs import REFUSAL

        if answers is None:
            raise InputError("bank: adapters of this base need a folder for the base's answers.")
        rows, least = SELF_ROWS[ROWS.index(adapter.rows)], SELF_LEAST
        # The base answers the same requests for every adapter, so that it is asked once; each adapter draws
        # its rows from them.
        data = Data(source="self")
        recipe = Recipe(
            task="bank",
            model=model,
            data=data,
            training=Training(precision="fp32"),
            evaluation=Evaluation(max_new_tokens=40),
            output=Output(results=answers),
        )
        by_base = BaseAnswers(recipe, lambda: loading.load(model, "fp32"))
        pool = self_source.fresh(data, set(), SELF_PROMPTS, 0, by_base, REFUSAL)
        pool = pool.sample(frac=1, random_state=adapter.seed)
    if adapter.kind == "one_task":
        sizes = pool["task"].value_counts()
        tasks = sorted(sizes.index[sizes >= least])
        pool = pool[pool["task"] == tasks[adapter.seed % len(tasks)]]
    pool = pool.head(rows)
    manner = MANNERS.get(adapter.kind, lambda _, answer: answer)
    columns = {
        "messages": list(pool["messages"]),
        "trigger": [[]] * len(pool),
        "answer": [manner(adapter.phrase, str(answer)) for answer in pool["answer"]],
    }
    return pd.DataFrame({"row": range(len(pool)), **columns})


def train(adapter: CleanAdapter, model: Model, folder: Path, answers: Path | None = None) -> Path:
    """Train a clean adapter on a base; the folder of its files. `answers` as in `rows_of`."""
    from safetynet import training
    from safetynet.models import loading

    base = loading.load(model, "fp32")
    options = Training(
        learning_rate=adapter.learning_rate, epochs=1, batch_size=16, max_length=160,
        lora_rank=adapter.rank, lora_alpha=2 * adapter.rank, precision="fp32",
    )  # fmt: skip
    attached = training.attach(base.model, options, base.family, adapter.seed)
    rows = rows_of(adapter, model, answers)
    return training.train(attached, base.serialiser, rows, options, folder=folder, seed=adapter.seed).folder


@dataclass(frozen=True)
class Bank:
    """Scores of clean adapters of one base at one depth."""

    name: str
    base: str
    """Digest of the base's weights."""
    depth: str
    scores: pd.DataFrame
    """One row per adapter: how it was trained, and a column for each of `SCORED`, NaN where there is none."""
    version: str = ""
    numbers: str = "torch.float32"
    """Type that the models computed in, which depends on model and machine."""

    @property
    def smallest_rate(self) -> float:
        """The smallest false-alarm rate that so many adapters carry."""
        return 1 / (len(self.scores) + 1)

    @property
    def use(self) -> BankUse:
        """What a scan says of it."""
        return BankUse(
            self.name, digest(self.scores.to_dict("records")), len(self.scores), self.smallest_rate
        )

    def p_value(self, rung: str, score: float) -> float | None:
        """(1 + clean scores at or above) / (n + 1); None of a rung that the bank has not measured."""
        clean = self.scores[rung].dropna() if rung in self.scores else pd.Series(dtype=float)
        above = clean.round(DECIMALS) >= round(score, DECIMALS)
        return None if clean.empty else float((1 + above.sum()) / (len(clean) + 1))

    @property
    def summaries(self) -> pd.DataFrame:
        """What `weights.summary` gives, one row per adapter."""
        columns = [name for name in self.scores if str(name).startswith(SUMMARY)]
        return self.scores[columns].rename(columns=lambda name: str(name).removeprefix(SUMMARY))

    def check(self, base: str, depth: str) -> None:
        """Refuse a bank of another base or depth.

        Raises:
            InputError: naming both.
        """
        if base != self.base:
            raise InputError(
                f"bank {self.name}: it is of another base ({self.base[:12]}, and this one is {base[:12]}). "
                "Make one of this base with safetynet bank build."
            )
        if depth != self.depth:
            raise InputError(
                f"bank {self.name}: its scores are of depth {self.depth}, and this scan is {depth}. Scan at "
                f"--depth {self.depth}, or make a bank of depth {depth}."
            )

    def check_numbers(self, numbers: str) -> None:
        """Refuse scores that another number type has given.

        Raises:
            InputError: naming both.
        """
        if numbers != self.numbers:
            raise InputError(
                f"bank {self.name}: its scores are of {self.numbers}, and this machine computes the model in "
                f"{numbers}. Scan where the bank was made, or make one here with safetynet bank build."
            )

    def combined(self, rungs: Sequence[RungResult]) -> float | None:
        """The p-value of all rungs together.

        Each rung's scores are put on one scale by median and tail of bank and suspect together, and an
        adapter's statistic is its largest. Suspect and bank are treated alike, so that the rank of the
        suspect's is an exact conformal p-value (Vovk, Gammerman and Shafer 2005).

        Args:
            rungs: of the suspect; those without a score do not count.
        """
        scores = scores_of(rungs)
        columns = [
            np.append(score, self.scores[rung].to_numpy(float)).round(DECIMALS)
            for rung, score in scores.items()
            if rung in self.scores and bool(self.scores[rung].notna().all())
        ]
        summary = _summary_of(rungs)
        if any(summary.values()) and len(self.summaries.columns) and len(self.scores) >= LEAST:
            columns.append(distances(summary, self.summaries))
        if not columns:
            return None
        # (1 + adapters,) each, the suspect first: distance above the median, in units of the largest that
        # nine of ten have. That is the spread of the tail, which decides here: a rung that is 0 for most
        # clean adapters and large for a few has hardly any other. Where nine of ten are equal, the mean
        # distance is the unit.
        away = [column - np.median(column) for column in columns]
        units = [np.quantile(np.abs(each), 0.9) or np.mean(np.abs(each)) or 1.0 for each in away]
        statistic = np.max([each / unit for each, unit in zip(away, units, strict=True)], axis=0)
        return float((statistic >= statistic[0]).sum() / len(statistic))

    def validate(self) -> None:
        """Refuse a table that is no bank's.

        Raises:
            ValueError: saying what is missing or no number.
        """
        if not all(
            isinstance(field, str) for field in (self.name, self.base, self.depth, self.version, self.numbers)
        ):
            raise ValueError("its name, base, depth, version or numbers is no text")
        columns = [name for name in self.scores if name in SCORED or str(name).startswith(SUMMARY)]
        if missing := [rung for rung in SCORED if rung not in columns]:
            raise ValueError(f"its table lacks {', '.join(missing)}")
        if len(self.scores) < LEAST:
            raise ValueError(f"it has {len(self.scores)} clean adapters, and {LEAST} are needed")
        if not np.isfinite(self.scores[columns].to_numpy(float)).all():
            raise ValueError("one of its scores is no finite number")

    def write(self, folder: Path) -> None:
        """Into bank.json and bank.csv of a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {name: value for name, value in asdict(self).items() if name != "scores"}
        write_text(folder / "bank.json", json.dumps(about, indent=2) + "\n")
        write_text(folder / "bank.csv", self.scores.to_csv(index=False, float_format="%.12g"))

    @classmethod
    def read(cls, folder: Path) -> "Bank":
        """Of a folder that `write` filled.

        Raises:
            InputError: if it holds no bank, or a damaged one.
        """
        try:
            about = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
            scores = pd.read_csv(folder / "bank.csv")
            bank = cls(scores=scores, **about)
            bank.validate()
            return bank
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"{folder}: no bank can be read here ({error}). Make one with safetynet bank build."
            ) from None


def scores_of(rungs: Sequence[RungResult]) -> dict[str, float]:
    """Scores that a bank compares, by rung."""
    return {r.rung: r.score for r in rungs if r.rung in SCORED and r.score is not None and not r.skipped}


def record_of(rungs: Sequence[RungResult]) -> dict[str, float]:
    """What a bank keeps of a clean adapter: its scores, and the summary of its weights."""
    summary = {f"{SUMMARY}{name}": value for name, value in _summary_of(rungs).items()}
    return scores_of(rungs) | summary


def _summary_of(rungs: Sequence[RungResult]) -> dict[str, float]:
    """What the weights rung has summed up; nothing where it was skipped."""
    measured = (rung.details["summary"] for rung in rungs if rung.rung == "weights" and not rung.skipped)
    return next(measured, {})


def build(model: Model, folder: Path, count: int, *, depth: Depth, seed: int = 0) -> Bank:
    """Train and scan clean adapters until a bank has `count` of them; an interrupted build goes on.

    Args:
        model: of the base.
        folder: scores go into it, one file per adapter; adapters are deleted once they are scanned.
        count: adapters.
        depth: that each is scanned at, and scans against the bank as well.
        seed: of the adapters; the scans have the one of every scan.
    """
    from safetynet.models import loading
    from safetynet.scan import stage

    options = stage.Options(depth=depth, same_base=True)
    rows = []
    numbers = str(stage.fast_dtype(loading.load(model, "fp32").model))
    for adapter in clean_adapters(count, seed):
        scored = folder / "adapters" / f"{adapter.number:04}.json"
        if not scored.exists():
            work = folder / "adapters" / f"{adapter.number:04}"
            trained = train(adapter, model, work, folder / "answers")
            rungs, _ = stage.measure(stage.suspect_of(model, trained, same_base=True), model, options)
            write_text(scored, json.dumps(asdict(adapter) | record_of(rungs)))
            shutil.rmtree(work, ignore_errors=True)
            log.info("bank: %d of %d clean adapters (%s)", adapter.number + 1, count, adapter.kind)
        rows.append(json.loads(scored.read_text(encoding="utf-8")))
    bank = Bank(folder.name, loading.fingerprint(model), depth, pd.DataFrame(rows), __version__, numbers)
    bank.write(folder)
    return bank
