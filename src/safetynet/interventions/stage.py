"""The stage of the interventions: where the trigger acts, how sure that is, and what removes it.

In: the backdoored model, the test rows, and ways to run its clean twin and its earlier epochs. Out: tidy
tables by name, as docs/interventions.md lists them. Some groups of rows find, others judge what was found.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from safetynet.engine.sites import Architecture
from safetynet.errors import InputError
from safetynet.evaluation.evaluator import Evaluator
from safetynet.experiment import BACKDOORED, Experiment
from safetynet.interventions import attribution, removal
from safetynet.interventions.effects import MIN_DISTANCE, effects, fewest_together
from safetynet.interventions.observations import observe
from safetynet.interventions.pairs import MIN_GROUPS, Pairs, align, filter_firing_pairs
from safetynet.interventions.racing import likely_effects
from safetynet.interventions.sweep import (
    SWEEP_SITES,
    Measured,
    Spot,
    cost,
    default_components,
    evenly_spaced,
    runs_of,
    spots_by,
    sweep,
)
from safetynet.models.adapters import exchanged
from safetynet.prompts import Serialiser
from safetynet.recipe import Interventions
from safetynet.run import parallel
from safetynet.run.directory import Outputs, digest
from safetynet.run.logs import ProgressLog
from safetynet.run.stage import EVALUATE, INTERVENE
from safetynet.vocabulary import UNTOUCHED, Direction, Mode

log = logging.getLogger(__name__)

TABLES = (
    "effects", "tokens", "dynamics", "tradeoff", "lens", "lens_map", "probes", "attention", "divergence",
    "drift",
)  # fmt: skip
"""What a run may hold after this stage."""
EXAMPLES = 6
"""Groups whose tokens are measured one by one, for the report's map of single prompts."""
JUDGED = 80
"""Held-out rows of each role that answer under a removing intervention."""
CHOOSING = 48
"""Rows of each role that candidates answer before one is chosen; the pairs' own prompts among them."""
MOST, MOST_ON_GPU = 1e13, 1e15
"""Multiplications that all sites may take by default: about ten minutes of one core, or of a GPU."""
ARMS = 3
"""Sweeps that make one: itself, between two placebos, in the twin."""
LIKELY_LAYERS = 10
"""Layers, evenly spaced, at which a sweep by position is made where only likely sites are measured."""
LIKELY_TOKENS = 0.1
"""Share of an example's layers and tokens that are measured where only likely sites are."""
TRIED = 2
"""Candidates of each kind that answer prompts before the best one is judged."""
AS_IT_IS = removal.Candidate(UNTOUCHED, "none", ())
TwinOf = Callable[[], AbstractContextManager[Any]]
"""Gives a model with another adapter while it is entered: the clean twin's, or an earlier epoch's."""


def intervene(experiment: Experiment, options: Interventions | None = None) -> dict[str, pd.DataFrame]:
    """Sweep a trained run and write its tables of interventions.

    Args:
        experiment: trained and evaluated.
        options: instead of the recipe's; their defaults answer "where is it?".

    Returns:
        The tables, as far as they could be made.

    Raises:
        InputError: if nothing is trained or evaluated yet, a sweep or site does not exist, the prompts cannot
            be aligned, or the backdoor does not fire.
    """
    recipe, run = experiment.recipe, experiment.run
    options = options or recipe.interventions
    _ = recipe.attack  # pairs of prompts differ in the trigger
    evaluated = experiment.record(EVALUATE)
    inputs = {
        "models": {name: experiment.origin(name) for name in (BACKDOORED, *experiment.trained)},
        "interventions": options.model_dump(mode="json"),
        "seed": recipe.seed,
        "max_length": recipe.training.max_length,
        "evaluation": evaluated,
    }

    def compute(outputs: Outputs) -> None:
        experiment.check_models()
        if evaluated is None:
            raise InputError(
                f"{run.folder}: it is not evaluated yet. Run safetynet evaluate {run.folder} first: "
                "which prompts make the backdoor fire decides what can be asked."
            )
        rows = experiment.test_rows()
        model, serialiser = experiment.backdoored()
        snapshots = experiment.snapshots()
        subject = Subject(
            model=model,
            serialiser=serialiser,
            twin=experiment.twin_of(model),
            epochs={step: partial(exchanged, model, path) for step, path in snapshots.items()},
            adapters=snapshots,
            respond=Evaluator.of(recipe, serialiser).answer,
            store=run.scratch / "interventions",
            kept=run.unfinished(INTERVENE.name) / digest(inputs)[:16],
        )
        for name, table in dissect(subject, rows, options, recipe.seed, recipe.training.max_length).items():
            outputs.table(name, table)

    experiment.perform(INTERVENE, inputs, compute)
    return {name: run.table(name) for name in TABLES if run.has_table(name)}


@dataclass(frozen=True)
class Subject:
    """The model under study, and what it is compared with."""

    model: Any
    serialiser: Serialiser
    twin: TwinOf | None = None
    epochs: Mapping[int, TwinOf] = field(default_factory=dict)
    """By training step."""
    adapters: Mapping[int, Path] = field(default_factory=dict)
    """Folders of the same epochs' adapters."""
    respond: removal.Respond | None = None
    store: Path | None = None
    """Where sweeps keep what is done."""
    kept: Path | None = None
    """A folder of this very analysis for what its removals have done so far."""


def dissect(
    subject: Subject, rows: pd.DataFrame, options: Interventions, seed: int = 0, max_length: int | None = None
) -> dict[str, pd.DataFrame]:
    """Sweep, compare with the controls, follow over training, and try what was found.

    Args:
        subject: the model.
        rows: test rows, as in the run's table `rows`.
        options: which sweeps.
        seed: of every random draw.
        max_length: prompts are truncated as in training.

    Returns:
        Tables by name, as far as they could be made; docs/interventions.md lists them.

    Raises:
        InputError: if too few groups can be aligned, a site does not exist, or the backdoor does not fire.
    """
    sweeps = list(_sweeps(Architecture.of(subject.model), options))
    aligned = align(rows, subject.serialiser, 2 * options.groups, max_length, seed)
    pairs = filter_firing_pairs(subject.model, aligned, options.groups)
    log.info("intervene: %d groups, left out: %s", len(pairs), dict(pairs.left_out) or "none")
    # Only sites that are likely to matter are measured where all would take long.
    work = ARMS * sum(cost(Architecture.of(subject.model), pairs, each.spots) for each in sweeps)
    most = MOST_ON_GPU if subject.model.device.type == "cuda" else MOST
    likely = options.measure == "likely" or (options.measure == "auto" and work > most)
    log.info(
        "intervene: %s (all of them would be about %.0e multiplications)",
        "sites that are likely to matter (--measure all for all)" if likely else "all sites", work,
    )  # fmt: skip
    if likely:
        # At the trigger's own positions most layers matter, which no race gives up.
        sweeps = [
            replace(each, spots=evenly_spaced(each.spots, LIKELY_LAYERS)) if each.by == "position" else each
            for each in sweeps
        ]
    tables = {"effects": _effects(subject, pairs, sweeps, seed, likely=likely)}
    log.info("intervene: single prompts, token by token")
    tables["tokens"] = _tokens(subject, pairs, options, likely=likely)
    if subject.epochs:
        log.info("intervene: layers over the training")
        tables["dynamics"] = _dynamics(subject, pairs, options, likely=likely)
    if options.observe:
        log.info("intervene: lens, probes, attention, drift")
        tables |= observe(
            subject.model,
            subject.serialiser,
            pairs,
            tables["effects"],
            rows,
            subject.adapters,
            seed,
        )
    if options.removals and subject.respond is not None:
        log.info("intervene: what removes it")
        tables["tradeoff"] = _tradeoff(subject, pairs, tables["effects"], rows, seed)
    return {name: table for name, table in tables.items() if len(table)}


@dataclass(frozen=True)
class _Sweep:
    """One sweep in one direction."""

    by: str
    direction: Direction
    mode: Mode
    spots: list[Spot]


def _effects(
    subject: Subject, pairs: Pairs, sweeps: Sequence[_Sweep], seed: int, *, likely: bool
) -> pd.DataFrame:
    total = sum(len(each.spots) for each in sweeps) // parallel.side_count()
    report = ProgressLog("intervene, sites", total)
    decided = 0

    def advance(by: str, done: int) -> None:
        # Sites that stay in a race are decided at its end: the first that are say nothing of the time left.
        if decided + done >= total / 10:
            report.update(decided + done, f"by {by}")

    def measured(planned: _Sweep) -> pd.DataFrame:
        nonlocal decided
        log.info("intervene: %s by %s, %d spots", planned.direction, planned.by, len(planned.spots))
        if (fewest := fewest_together(len(planned.spots), len(pairs))) > 1:
            log.warning(
                "intervene: %d groups tell few places of %d from chance: at least %d have to stand out "
                "together for any to count as responsible. Raise interventions.groups.",
                len(pairs), len(planned.spots), fewest,
            )  # fmt: skip
        if likely:
            [table] = likely_effects(
                subject.model,
                subject.twin,
                pairs,
                planned.spots,
                [planned.direction],
                mode=planned.mode,
                seed=seed,
                store=subject.store,
                advance=partial(advance, planned.by),
            ).values()
        else:
            table = _one(subject, pairs, seed, planned)
        decided += len(planned.spots)
        report.update(decided)
        return table.assign(
            sweep=planned.by, direction=planned.direction, mode=planned.mode, metric="logit_difference"
        )

    # The longest first, or one process of a pair would wait for the other's last sweep.
    order = sorted(range(len(sweeps)), key=lambda number: -len(sweeps[number].spots))
    tables = parallel.side_by_side([sweeps[number] for number in order], measured)
    by_number = dict(zip(order, tables, strict=True))
    return pd.concat([by_number[number] for number in range(len(sweeps))], ignore_index=True)


def _sweeps(architecture: Architecture, options: Interventions) -> Iterator[_Sweep]:
    """The sweeps of a plan that mean something in this model; those that do not are told."""
    for component in options.sites:
        architecture.sites(component)  # what does not exist is refused
    count, reasons = 0, []
    for by in options.by:
        mode = _mode(by, options.mode)
        places, why = _places(architecture, options, by, mode)
        directions = [d for d in options.directions if d == "remove" or mode not in ("off", "knock_out")]
        if mode is None:
            why = f"mode {options.mode} does not apply"
        elif not why and not directions:
            why = "switching off and cutting can only remove"
        if mode is None or why:
            reasons.append(f"by {by}: {why}")
            log.info("intervene: no sweep %s", reasons[-1])
            continue
        spots = list(spots_by(architecture, by, places, mode))
        for direction in directions:
            count += 1
            yield _Sweep(by, direction, mode, spots)
    if not count:
        raise InputError(f"interventions: there is nothing to sweep ({'; '.join(reasons)}). Ask for another.")


def _places(
    architecture: Architecture, options: Interventions, by: str, mode: Mode | None
) -> tuple[list[str], str]:
    """A sweep's components that this model has; or why it has none."""
    requested = [name for name in options.sites or default_components(by, mode) if name in SWEEP_SITES[by]]
    absent = {name: architecture.why_absent(name) for name in requested if not architecture.layers_with(name)}
    if not requested:
        return [], f"it takes the sites {', '.join(SWEEP_SITES[by])}"
    if len(absent) == len(requested):
        if by in ("expert", "adapter"):
            return [], f"this model has no {by}"
        return [], "this model has " + "; ".join(f"no {name}: {reason}" for name, reason in absent.items())
    for name, reason in absent.items():
        log.info("intervene: by %s without %s: %s", by, name, reason)
    return [name for name in requested if name not in absent], ""


def _mode(by: str, mode: Mode) -> Mode | None:
    """A sweep's mode; None where the one that is asked for means nothing there."""
    if by == "adapter":
        return "off" if mode in ("patch", "zero", "off") else None
    if mode == "off":
        return mode if by in ("head", "expert") else None
    return None if mode == "knock_out" and by not in ("layer", "head") else mode


def _one(subject: Subject, pairs: Pairs, seed: int, planned: _Sweep) -> pd.DataFrame:
    """One sweep in one direction beside its controls."""
    receiving, source = runs_of(planned.direction)
    spots = planned.spots
    depth = Architecture.of(subject.model).shape.layers

    def run(
        model: Any, measured_spots: Sequence[Spot], receiving: str = receiving, source: str = source
    ) -> Measured:
        return sweep(
            model,
            pairs,
            measured_spots,
            receiving=receiving,
            source=source,
            mode=planned.mode,
            seed=seed,
            store=subject.store,
        )

    main = run(subject.model, spots)
    controls = {"placebo": run(subject.model, spots, "placebo", "second_placebo")}
    if any(spot.position for spot in spots):
        others = [replace(spot, elsewhere=True) for spot in spots]
        controls["random"] = run(subject.model, others)
    if subject.twin is not None:
        with subject.twin() as twin:
            controls["twin"] = run(twin, spots)
    return effects(main, controls, layers=depth, seed=seed)


def _tokens(subject: Subject, pairs: Pairs, options: Interventions, *, likely: bool) -> pd.DataFrame:
    """Layer by token, one example group at a time; no interval, since each is one prompt.

    Args:
        subject: the model.
        pairs: of which some are examples.
        options: the directions.
        likely: measure those that attribution puts first.
    """
    sites = Architecture.of(subject.model).sites("resid_pre")

    def lines_of(example: Pairs) -> list[dict[str, Any]]:
        lines = []
        for direction in options.directions:
            receiving, source = runs_of(direction)
            spots = [Spot(site, f"token {p}") for site in sites for p in range(len(example.roles[0]))]
            cells = None
            if likely:
                scores = attribution.scores(subject.model, example, spots, receiving=receiving, source=source)
                most = round(LIKELY_TOKENS * len(spots))
                # Where the runs do not differ yet the effect is 0, and costs nothing.
                cells = ((scores == 0) | (scores >= np.sort(scores)[-most]))[:, None]
            measured = sweep(subject.model, example, spots, receiving=receiving, source=source, cells=cells)
            share = measured.change[:, 0] / measured.distance[0]
            for spot, value in zip(spots, share, strict=True):
                column = int(spot.position.split()[1])
                lines.append(
                    {
                        "group": example.groups[0],
                        "direction": direction,
                        "component": spot.site.component,
                        "layer": spot.site.layer,
                        "column": column,
                        "token": subject.serialiser.piece(example.ids["triggered"][0][column]),
                        "role": example.roles[0][column],
                        "effect": float(value),
                    }
                )
        return lines

    # The first groups in which the trigger does something; there is no share of nothing.
    receiving, source = runs_of("remove")
    distance = sweep(subject.model, pairs, (), receiving=receiving, source=source).distance
    numbers = np.flatnonzero(np.abs(distance) >= MIN_DISTANCE)[:EXAMPLES].tolist()
    tables = parallel.side_by_side([pairs.take([number]) for number in numbers], lines_of)
    return pd.DataFrame([line for lines in tables for line in lines])


def _dynamics(subject: Subject, pairs: Pairs, options: Interventions, *, likely: bool) -> pd.DataFrame:
    """The sweep by layer at each saved epoch, measured against the distance of the finished model.

    Args:
        subject: the model and its epochs.
        pairs: aligned prompts.
        options: the directions.
        likely: measure on as few pairs as an interval needs.
    """
    pairs = pairs.take(range(MIN_GROUPS)) if likely else pairs
    architecture = Architecture.of(subject.model)
    spots = list(spots_by(architecture, "layer"))

    def followed(direction: Direction) -> pd.DataFrame:
        receiving, source = runs_of(direction)
        tables = []

        run = partial(sweep, pairs=pairs, receiving=receiving, source=source, store=subject.store)
        distance = run(subject.model, spots=()).distance
        for step, epoch in subject.epochs.items():
            with epoch() as model:
                measured = run(model, spots=spots)
            table = effects(measured, {}, layers=architecture.shape.layers, distance=distance)
            about = {"sweep": "layer", "direction": direction, "mode": "patch", "metric": "logit_difference"}
            tables.append(table.assign(step=step, **about))
        return pd.concat(tables, ignore_index=True)

    return pd.concat(parallel.side_by_side(options.directions, followed), ignore_index=True)


def _tradeoff(
    subject: Subject, pairs: Pairs, effect_table: pd.DataFrame, rows: pd.DataFrame, seed: int
) -> pd.DataFrame:
    """The best candidate of each kind and its control, chosen on the pairs' prompts and judged on others."""
    assert subject.respond is not None
    prompts = rows[rows["role"].isin(("triggered", "clean"))]
    inside = prompts["group"].isin(pairs.groups)
    others = prompts[~inside].groupby("role").head(JUDGED)
    # Groups that are neither held out nor pairs choose too: few prompts tell no two points of accuracy.
    rest = prompts[~inside & ~prompts["group"].isin(others["group"])]
    ours = pd.concat([prompts[inside], rest]).groupby("role").head(CHOOSING)
    if ours["role"].nunique() < 2 or others["role"].nunique() < 2:
        log.warning("intervene: no rows are left to judge removals on; raise data.test_rows")
        return pd.DataFrame()
    candidates, controls = removal.candidates(subject.model, pairs, effect_table, seed)
    ranked = removal.prefilter(subject.model, pairs, candidates)
    by_name = {candidate.name: candidate for candidate in candidates}
    # Of those that answer alike, the one that removes most has most to spare on other prompts.
    first = ranked.groupby("kind", sort=False).head(TRIED).sort_values("removed", ascending=False)
    leading_candidates = [by_name[str(name)] for name in first["name"]]
    selection = removal.judge(
        subject.model, subject.respond, ours, leading_candidates, kept=subject.kept, split="selection"
    )
    best = [removal.best(part) for _, part in selection.groupby("kind", sort=False)]
    leading = selection.set_index("intervention").loc[best].reset_index()
    beside = [controls[name] for name in best]
    random = removal.judge(subject.model, subject.respond, ours, beside, kept=subject.kept, split="selection")
    selected = removal.best(removal.clear(leading, random))
    judged = [AS_IT_IS, *(candidate for name in best for candidate in (by_name[name], controls[name]))]
    held_out = removal.judge(
        subject.model, subject.respond, others, judged, kept=subject.kept, split="held_out"
    )
    return pd.concat(
        [table.assign(chosen=table["intervention"] == selected) for table in (held_out, selection, random)],
        ignore_index=True,
    )
