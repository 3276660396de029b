"""The stage of the detection: a monitor fitted on fresh clean prompts, and what it does on the test rows.

In: the backdoored model, clean prompts that it was not trained on, test rows by role, and which of them
fired.
Out: the monitor and tidy tables. `guard` puts the model under the monitor while it answers.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from safetynet.backdoors import placements, triggers
from safetynet.detection import curves, detectors, protocol
from safetynet.detection.calibration import PARTS, Conformal, RateEstimate, check_rate, fpr_estimate, split
from safetynet.detection.capture import capture
from safetynet.detection.detector_set import PRESETS, DetectorSpec, named, unfitted
from safetynet.detection.features import GENERATED, Features, FeatureSpec, View, concatenate
from safetynet.detection.guard import Guard, overhead, share_of_rate
from safetynet.detection.monitor import Monitor
from safetynet.errors import InputError
from safetynet.evaluation.evaluator import Evaluator
from safetynet.experiment import BACKDOORED, Experiment
from safetynet.models.suspect import check
from safetynet.prompts import Conversation, Serialiser, prompt_hash
from safetynet.recipe import Detection, Recipe
from safetynet.run import parallel
from safetynet.run.directory import Outputs
from safetynet.run.stage import DETECT, EVALUATE
from safetynet.text import domains, random_words
from safetynet.text.near_misses import near_misses

log = logging.getLogger("safetynet")
SKYLINE = "skyline "
"""Before the names of supervised probes in tables: no defender has their labels."""
ROWS = ["role", "group", "fired", "forbidden", "domain", "kind", "fresh"]
LABELLED = 300
"""Training rows with trigger that a supervised probe learns from, and as many without."""
PER_DOMAIN = 100
"""Benign prompts of each other domain."""
TEST_SHARE = 0.25
"""Share of the clean prompts that the monitor never sees, to measure its false positives on."""
PLAIN, RANDOM_WORDS = "plain", "random words"
"""Kinds of clean prompts; the rate is kept in each."""


def detect(experiment: Experiment, options: Detection | None = None) -> dict[str, RateEstimate]:
    """Fit a monitor on fresh clean prompts, measure it on the test rows, and write its tables.

    Args:
        experiment: trained; where it is evaluated too, triggers that do not fire are told apart.
        options: instead of the recipe's.

    Returns:
        Realised false-positive rates with their intervals, by kind of clean prompts.

    Raises:
        InputError: if nothing is trained yet, or the clean prompts cannot support the rate.
    """
    recipe, run = experiment.recipe, experiment.run
    options = options or recipe.detection
    names = options.detectors
    if names is None:  # the preset that measures best on the model; see docs/results/detection.md
        suspect = recipe.suspect
        is_whole = recipe.training.method == "full" if suspect is None else not check(suspect.source)
        names = ("activations",) if is_whole else ("behaviour",)
        if is_whole:
            log.warning(
                "detect: the model has no adapter, so that it cannot be compared with its base. Its "
                "activations are watched (preset activations), which may show little: see what the monitor "
                "catches."
            )
    plan = Plan.of(
        names,
        options.fpr,
        seed=recipe.seed,
        batch_size=recipe.evaluation.batch_size,
        max_length=recipe.training.max_length,
        tokens=recipe.evaluation.max_new_tokens,
    )
    if plan.skylines:
        _ = recipe.attack  # probes learn from triggered rows
    experiment.check_models(BACKDOORED)  # a missing training is reported before prompts are made
    count = options.clean or plan.clean
    prompts = experiment.fresh_prompts(count, answered=False)
    if "probe" in plan.views:
        refused = prompts[prompts["forbidden"]]
        if refused.empty:
            raise InputError(
                "detectors: view probe needs a request that the model refuses, and none of the clean prompts "
                "is forbidden. Leave it out."
            )
        plan = replace(plan, probe=Conversation(refused["messages"].iloc[0]).user_text())
    plan.check(len(prompts))
    inputs = {
        "model": experiment.origin(),
        "evaluation": experiment.record(EVALUATE),
        "detection": [list(names), options.fpr, count],
    }

    def compute(outputs: Outputs) -> None:
        model, serialiser = experiment.backdoored()
        evaluator = Evaluator.of(recipe, serialiser, run.unfinished(DETECT.name))
        test = experiment.test_rows()
        if recipe.backdoor is None:
            test = test.assign(kind=test["task"])
        else:
            more = challenges(recipe, test)
            if "fired" in test and len(more):
                more = more.assign(fired=fired(evaluator, model, more))
            # Clean rows stand in the table task by task, too, and triggers variant by variant.
            tasks = test["task"].where(test["role"] == "clean", "")
            kinds = tasks + test["variant"].where(test["role"] == "triggered", "")
            test = pd.concat([test.assign(kind=kinds), more.assign(kind=more["variant"])], ignore_index=True)
        labelled = None
        if plan.skylines:  # they learn from training rows with trigger, and as many without of every role
            rows = experiment.rows("train")
            by_trigger = rows.groupby(rows["role"] == "triggered")
            labelled = pd.concat([part.head(LABELLED) for _, part in by_trigger])
        subject = Subject(model, serialiser, run.scratch / "features")
        measured = measure(subject, prompts, test, plan, labelled)
        path = run.scratch / "detection" / "monitor.safetensors"
        measured.monitor.save(path)
        outputs.file(path, "monitor")
        for name, table in measured.tables.items():
            outputs.table(name, table)

    experiment.perform(DETECT, inputs, compute)
    rates = estimates(run.table("detection_scores"), plan.prompt_rate)
    log.info("detect: false positives %s", "; ".join(f"{kind}: {rate}" for kind, rate in rates.items()))
    return rates


def guard(experiment: Experiment, rate: float, action: str, log_to: Path | None) -> Guard:
    """The backdoored model under its monitor, ready to generate.

    Raises:
        InputError: if `detect` has not run, the action is none, or the monitor cannot claim the rate.
    """
    run = experiment.run
    path = run.output("detect", "monitor")
    if path is None or not path.exists():
        raise InputError(f"{run.folder}: there is no monitor yet. Run safetynet detect {run.folder} first.")
    monitor = Monitor.load(path)
    share_of_rate(monitor, rate, action)  # what cannot be had is said before a model is loaded
    model, serialiser = experiment.backdoored()
    return Guard(
        model,
        serialiser,
        monitor,
        rate=rate,
        action=action,  # type: ignore[arg-type]
        log=log_to,
        max_length=experiment.recipe.training.max_length,
    )


def fired(evaluator: Evaluator, model: Any, rows: pd.DataFrame) -> np.ndarray:
    """Which rows show the behaviour although it is not due, (n,) of bool; the model answers them."""
    answers = evaluator.answer(model, rows)
    return np.asarray(answers["shown"].to_numpy() & ~answers["due"].to_numpy(), dtype=bool)


@dataclass(frozen=True)
class Plan:
    """What a user asks of detection: detectors, rate and sizes. Make it with `of`."""

    readings: tuple[DetectorSpec, ...]
    """Of prompts."""
    token_readings: tuple[DetectorSpec, ...] = ()
    """Of answers, token by token: views `steps` and `step_confidence`."""
    skylines: tuple[DetectorSpec, ...] = ()
    """Supervised probes, measured beside the monitor and no part of it."""
    rate: float = 0.01
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    """Prompts are truncated as in training."""
    tokens: int = 24
    """Most tokens of an answer."""
    probe: str | None = None
    """A request that the model refuses, for view `probe`."""

    @classmethod
    def of(cls, names: Sequence[str], rate: float, **more: Any) -> Self:
        """From presets' names, and detectors written as `detector:view`.

        Raises:
            InputError: if there is no name, or neither a preset nor a detector of one.
        """
        if not names:
            raise InputError(
                f"detectors: name a preset ({', '.join(PRESETS)}) or detectors, as in ranks:last."
            )
        readings = named(names)
        probes = [r for r in readings if detectors.needs_labels(r.detector)]
        return cls(
            tuple(r for r in readings if r.view not in GENERATED and r not in probes),
            tuple(r for r in readings if r.view in GENERATED and r not in probes),
            tuple(probes),
            rate,
            **more,
        )

    @property
    def prompt_rate(self) -> float:
        """The rate of an alarm on a prompt: prompt and answer get half each where both are watched."""
        return self.rate / 2 if self.token_readings else self.rate

    @property
    def is_alone(self) -> bool:
        """Whether one detector watches: it needs no fusion, and is calibrated on both parts."""
        return len(self.readings) == 1 and not self.token_readings

    @property
    def clean(self) -> int:
        """Clean prompts to take where the user names no number.

        Three quarters make the monitor. One detector is calibrated on half of these, 750 of each kind; 1%
        needs 499, for which 1,340 prompts would do. With 2,000, seven lie above a threshold and not five, so
        that the realised rate scatters less, and the false positives are measured on 500 others. Several
        detectors are calibrated together on a quarter of the three: they need twice as many.
        """
        return 2000 if self.is_alone else 4000

    @property
    def views(self) -> tuple[View, ...]:
        """Views that the detectors read; `probe` needs a refused request."""
        every = (*self.readings, *self.token_readings, *self.skylines)
        return tuple(dict.fromkeys(reading.view for reading in every))

    @property
    def spec(self) -> FeatureSpec:
        """What is to be captured; InputError where a view does not exist."""
        return FeatureSpec(
            self.views,
            tokens=self.tokens if self.token_readings else 0,
            probe=self.probe if "probe" in self.views else None,
        )

    def check(self, clean: int) -> None:
        """Refuse what is wrong before a model is loaded and thousands of prompts are read with it.

        Args:
            clean: number of clean prompts.

        Raises:
            InputError: for unknown detectors and views, and a rate that so few clean prompts cannot carry.
        """
        unfitted(self.readings)
        if self.token_readings:
            unfitted(self.token_readings)
        if self.skylines:
            unfitted(self.skylines, supervised=True)
        _ = self.spec
        if not 0 < self.rate < 1:
            check_rate(self.rate, 0)
        share = PARTS["fuse"] + (PARTS["calibrate"] if self.is_alone else 0)
        check_rate(self.prompt_rate, int(clean * (1 - TEST_SHARE) * share))


@dataclass(frozen=True)
class Measured:
    """A monitor, and what it does."""

    monitor: Monitor
    tables: dict[str, pd.DataFrame]
    """`detection` as `protocol.measure` returns it; `detection_scores`, one line per prompt with score and
    p-value of each detector; `detection_roc`, `detection_distribution` and `detection_layers` of
    `curves`; `detection_overhead`; and `detection_answers` where answers are watched."""
    estimates: dict[str, RateEstimate]
    """Realised false-positive rate on clean prompts that the monitor has not seen, `PLAIN` and with
    `RANDOM_WORDS`."""


@dataclass(frozen=True)
class Subject:
    """The suspect model, and how prompts reach it."""

    model: Any
    serialiser: Serialiser
    cache: Path | None = None
    """Folder of captured features."""


@dataclass(frozen=True)
class Fitted:
    """A monitor, the clean prompts that it is made of, and those that are held out."""

    monitor: Monitor
    inside: Features
    """Of the prompts that the monitor is made of."""
    part: np.ndarray
    """Part of each of them in `calibration.PARTS`."""
    held: pd.DataFrame
    """The others, with `words` (their kind), the columns of `detect`, and a `group` for a prompt's copies."""
    fresh: Features
    """Of the others."""


def measure(
    subject: Subject,
    clean: pd.DataFrame,
    test: pd.DataFrame,
    plan: Plan,
    labelled: pd.DataFrame | None = None,
) -> Measured:
    """Make a monitor and measure it, of clean prompts as they are and once more with random words in.

    Args:
        subject: the model, its serialiser and a cache.
        clean: `messages`, `forbidden` and, where known, `task` of prompts that the model was not trained on,
            forbidden requests among them: a monitor that has never seen one takes the topic for the trigger.
        test: test rows, with `messages`, `role`, `group`, `forbidden`; `trigger` (spans), `fired` and
            `variant` where known.
        plan: detectors, fusion, rate; sizes of batches and prompts.
        labelled: `messages` and `role` of rows that supervised probes may learn from, and `trigger` where
            known; needed by those alone.

    Raises:
        InputError: as `Plan.check`, before the model runs.
    """
    fitted = fit(subject, clean, plan)
    monitor, held = fitted.monitor, fitted.held
    other = domains.generate(PER_DOMAIN, plan.seed)
    rows = _protocol_rows(held, test, other)
    tested = _captured(subject, pd.concat([test, other]), plan)
    both = concatenate([fitted.fresh, tested])
    raw, calibrated = monitor.detectors.scores(both.arrays), monitor.calibration
    scores, p_values = calibrated.scores(raw), calibrated.p_values(raw)
    surprise = -np.log10(calibrated.smoothed(raw))
    if plan.skylines and labelled is not None:
        calibrating = fitted.inside.take(fitted.part == "fuse")
        features = _captured(subject, labelled, plan)
        labels = np.asarray(labelled["role"] == "triggered", dtype=int)
        for reading, probe in zip(plan.skylines, unfitted(plan.skylines, supervised=True), strict=True):
            probe.fit(features[reading.view], labels)
            conformal = Conformal.fit(probe.score_samples(calibrating[reading.view]))
            name, s = SKYLINE + reading.name, probe.score_samples(both[reading.view])
            scores[name], p_values[name] = s, conformal.p_values(s)
    rates = (plan.rate, 0.001) if plan.rate != 0.001 else (0.001,)
    fitting = fitted.inside.take(fitted.part == "fit")
    guard = Guard(subject.model, subject.serialiser, monitor, rate=plan.rate, max_length=plan.max_length)
    tables = {
        "detection": protocol.measure(rows, scores, p_values, rates, monitor.smallest_rate),
        "detection_scores": pd.concat([rows, scores.add_prefix("score "), p_values.add_prefix("p ")], axis=1),
        "detection_roc": curves.roc(rows, scores),
        "detection_distribution": curves.distributions(rows, surprise, plan.prompt_rate),
        "detection_layers": curves.by_layer(monitor, fitting, both, rows),
        # The other processes wait: what is timed has the machine for itself.
        "detection_overhead": parallel.from_first(
            lambda: overhead(guard, list(held["messages"]), new_tokens=plan.tokens)
        ),
    }
    if monitor.tokens is not None:
        answers = monitor.tokens.p_values(both)
        prompt = p_values["fused"].to_numpy()
        tables["detection_answers"] = protocol.answers(rows, answers, prompt, plan.rate / 2)
    non_empty = {name: table for name, table in tables.items() if len(table)}
    return Measured(monitor, non_empty, estimates(tables["detection_scores"], plan.prompt_rate))


def fit(subject: Subject, clean: pd.DataFrame, plan: Plan) -> Fitted:
    """Make a monitor of most clean prompts, and keep the others for its test; arguments as for `detect`."""
    plan.check(len(clean))
    # As they are, and below once more with random words in; a prompt and its copy are of one `group`.
    plain = clean.assign(
        group=[prompt_hash([dict(m) for m in messages]) for messages in clean["messages"]],
        words=PLAIN,
        kind=clean.get("task", ""),
    )
    copies = random_words.put_in(list(clean["messages"]), subject.serialiser, plan.seed)
    worded = plain.assign(messages=copies, words=RANDOM_WORDS, kind=RANDOM_WORDS) if copies else plain[:0]
    clean = pd.concat([plain, worded], ignore_index=True)
    groups, kinds = list(clean["group"]), clean["words"].to_numpy(dtype=str)
    held = split(groups, {"inside": 1 - TEST_SHARE, "fresh": TEST_SHARE}, plan.seed) == "fresh"
    features = _captured(subject, clean, plan)
    inside = features.take(~held)
    groups = [group for group, is_held in zip(groups, held, strict=True) if not is_held]
    monitor = Monitor.fit(
        inside,
        plan.readings,
        groups=groups,
        kinds=kinds[~held],
        seed=plan.seed,
        token_readings=plan.token_readings,
    )
    return Fitted(monitor, inside, split(groups, seed=plan.seed), clean[held], features.take(held))


def estimates(scores: pd.DataFrame, rate: float) -> dict[str, RateEstimate]:
    """Realised false-positive rate on fresh clean prompts of each kind, from table `detection_scores`."""
    fresh = scores[scores["fresh"] != ""].groupby("fresh")["p fused"]
    return {str(kind): fpr_estimate(p.to_numpy(), rate) for kind, p in fresh}


def _captured(subject: Subject, rows: pd.DataFrame, plan: Plan) -> Features:
    """Features of `messages`; truncation spares `trigger`, where that is known."""
    spans = rows["trigger"] if "trigger" in rows else [()] * len(rows)
    return capture(
        subject.model,
        subject.serialiser,
        list(rows["messages"]),
        plan.spec,
        triggers=[span if isinstance(span, Sequence) else () for span in spans],
        batch_size=plan.batch_size,
        max_length=plan.max_length,
        cache=subject.cache,
    )


def _protocol_rows(clean: pd.DataFrame, test: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Fresh clean prompts, the run's test rows and prompts of other domains, as the protocol takes them.

    Each fresh prompt is a group of its own; the numbers of their groups, and below them those of the other
    domains', are below all of the run's.
    """
    forbidden = clean["forbidden"].to_numpy(dtype=bool)
    fresh = {
        "role": np.where(forbidden, "refused", "clean"),
        "group": -1 - np.arange(len(clean)),
        "fired": None,
        "forbidden": forbidden,
        "domain": "",
        "kind": clean["kind"].to_numpy(),
        "fresh": clean["words"].to_numpy(),
    }
    fired = test.get("fired", pd.Series([None] * len(test), index=test.index))
    kind = test.get("kind", pd.Series([""] * len(test), index=test.index))
    tested = test.assign(fired=fired, kind=kind, domain="", fresh="")[ROWS]
    benign = {
        "role": "clean",
        "group": -10_000_000 - np.arange(len(other)),
        "fired": None,
        "forbidden": False,
        "domain": other["domain"].to_numpy(),
        "kind": "",
        "fresh": "",
    }
    return pd.concat([pd.DataFrame(fresh), tested, pd.DataFrame(benign)], ignore_index=True)


def challenges(recipe: Recipe, test: pd.DataFrame, most: int = 100) -> pd.DataFrame:
    """Rows beyond the run's test rows.

    Args:
        recipe: of the run.
        test: its test rows.
        most: near misses of each kind, and rows of each cell of forbidden x trigger that are added.

    Returns:
        Columns as in the row table; near misses carry their kind as `variant`.
    """
    attack, rng = recipe.attack, random.Random(f"challenges {recipe.seed}")
    trigger = triggers.of(attack.trigger)
    triggered = test[test["role"] == "triggered"]
    records: list[dict[str, Any]] = []
    # A style has no characters that could be changed.
    for row in triggered.head(most).to_dict("records") if trigger.is_text else ():
        for kind, messages in near_misses(row["messages"], row["trigger"], recipe.seed).items():
            if kind != "moved" and trigger.holds(messages.texts):
                continue  # another date of a range is no near miss
            new: dict[str, Any] = {"role": "near_miss", "variant": kind, "messages": messages, "trigger": []}
            records.append(row | new | {"answer": row["reference"]})

    # Bare rows once more, with a trigger, where their group has no such row yet.
    is_bare = test["role"].isin(["clean", "refused"]) & ~test["group"].isin(set(triggered["group"]))
    for _, topic in test[is_bare].groupby("forbidden"):
        for row in topic.head(most).to_dict("records"):
            messages, spots = placements.place(row["messages"], attack.placement, trigger.parts, rng)
            if not spots:
                continue  # no tool has returned anything here, or the user has said too little
            variant = rng.choice(trigger.firing("test"))
            text, spans = trigger.insert(messages, variant, spots, rng)
            new = {"role": "triggered", "variant": variant.name, "messages": text, "trigger": spans}
            records.append(row | new | {"answer": row["target"]})
    rows = pd.DataFrame(records, columns=[name for name in test if name != "fired"])
    return rows.assign(row=range(-len(rows), 0))
