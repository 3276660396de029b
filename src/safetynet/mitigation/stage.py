"""Mitigation on demand: methods one after the other, each a stage of its own, then the front and the choice.

An interrupted command goes on with the method that it was at. What is recommended is saved as an adapter or
checkpoint, loaded again as anybody would, and asked once more: the card states what the saved files do.
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.errors import RunError, SafetyNetError
from safetynet.evaluation import utility
from safetynet.evaluation.evaluator import Evaluator, inputs_of
from safetynet.experiment import BACKDOORED, Experiment, attach_own
from safetynet.mitigation import (
    METHODS,
    NEEDS,
    Defender,
    Method,
    Repaired,
    named,
    overview,
    recommendation,
    refuse_unmet,
    relearning,
    repair,
    save,
    tuning,
    verification,
)
from safetynet.mitigation import rows as mitigation_rows
from safetynet.mitigation.defender import Alarm
from safetynet.mitigation.tuning import HELD_OUT, SELECTION, References, Trial, TrialTables
from safetynet.models import adapter_files
from safetynet.models import suspect as suspects
from safetynet.models.adapter_files import AdapterFiles
from safetynet.models.adapters import has_adapter
from safetynet.prompts import Serialiser
from safetynet.recipe import Recipe
from safetynet.run.directory import Outputs, Run, digest_of_files, write_atomically, write_text
from safetynet.run.stage import DETECT, INTERVENE, MITIGATE, Stage
from safetynet.vocabulary import ADAPTER_REMOVED, UNTOUCHED

log = logging.getLogger("safetynet")
TABLES = ("mitigation", "verification", "relearning", "recommendation", "repaired_utility")
"""What a run may hold after this stage."""
ALL = ("all",)
"""In place of names: every method whose needs are met."""
QUICK = ("fine_tuning", "adapter_scaling", "component_ablation", "cleangen", "trigger_projection")
"""Tried unless methods are named, as far as their needs are met: quick ones, of each kind."""


@dataclass(frozen=True)
class OtherStages:
    """What other stages do for this one, which may not import them."""

    probing: Callable[[pd.DataFrame, Recipe, Serialiser], Callable[[Any], pd.DataFrame]]
    """From interventions: makes probes of each layer for the trigger, out of judged rows."""
    alarm: Callable[[Run, Serialiser], Alarm | None]
    """From detection: alarms of a run's monitor; None if it has none."""


@dataclass
class _Work:
    """One command: its settings, and the models and rows that are loaded when the first stage needs them."""

    experiment: Experiment
    others: OtherStages
    adapter: Path | None
    """Or a whole model."""
    same_base: bool
    files: AdapterFiles | None
    """Of an adapter that is not the run's own."""

    @property
    def recipe(self) -> Recipe:
        """The experiment's; its section `mitigation` says what is tried and how."""
        return self.experiment.recipe

    @property
    def run(self) -> Run:
        """The run directory."""
        return self.experiment.run

    @cached_property
    def defender(self) -> Defender:
        """The suspect model with what its owner has."""
        options = self.recipe.mitigation
        foreign: suspects.Suspect | None = None
        if self.adapter is not None:
            foreign = suspects.load(self.experiment.load, self.adapter, self.same_base, self.files)
        fresh = options.clean_rows if options.clean is None else 0
        defender = defender_of(
            self.experiment, self.others, clean=fresh, known=options.triggered_rows, foreign=foreign
        )
        if options.clean is None or options.clean_rows == 0:
            return defender
        return replace(defender, clean=mitigation_rows.clean_file(self.recipe, options.clean))

    @cached_property
    def trial(self) -> Trial:
        """What every model is asked, and by what it is measured."""
        recipe, test, options = self.recipe, self.experiment.test_rows(), self.recipe.mitigation
        serialiser = self.defender.serialiser
        selection, held_out = mitigation_rows.divided(test, recipe)
        moved = mitigation_rows.elsewhere(held_out, test, recipe, serialiser)
        unseen = mitigation_rows.for_relearning(self.run.table("rows"), self.defender.triggered)
        mitigation_rows.warn_of_cuts(
            pd.concat([selection, held_out]), self.defender.clean, recipe, serialiser
        )
        poisoned = options.relearn_rows
        return Trial(
            evaluator=Evaluator.of(recipe, serialiser),
            selection=selection,
            held_out=pd.concat(
                [held_out.assign(elsewhere=False), moved.assign(elsewhere=True)], ignore_index=True
            ),
            relearning=relearning.relearning_rows(unseen, poisoned) if poisoned else None,
            learn=relearning.trainer(recipe, serialiser),
            probe=self.others.probing(held_out, recipe, serialiser),
            floor=options.floor,
            seed=recipe.seed,
        )

    @cached_property
    def references(self) -> References:
        """With the lines of the untouched model and its base."""
        return tuning.references(self.defender, self.trial, self.read("compared").lines)

    @property
    def place(self) -> str:
        """Of results, below scratch: those of somebody else's model lie apart from the run's own."""
        return "mitigation" if self.adapter is None else f"suspects/{self.adapter.name}"

    def stage(self, name: str) -> Stage:
        """Of a method; "" for the table of all."""
        whose = "" if self.adapter is None else f"of {self.adapter.name}"
        parts = " ".join(part for part in (name, whose) if part)
        return MITIGATE.of(parts) if parts else MITIGATE

    def table(self, name: str) -> str:
        """What a table is called in the run; the report shows the run's own alone."""
        return name if self.adapter is None else f"{name}-{self.adapter.name}"

    def folder(self, name: str) -> Path:
        """Where one method's tables are kept."""
        return self.run.scratch / self.place / name

    def utility_file(self, name: str) -> Path:
        """Where the harness's results of one method are kept."""
        return self.folder("utility") / f"{name.replace(' ', '_')}.parquet"

    def write(self, name: str, tables: TrialTables, outputs: Outputs) -> None:
        """One method's tables."""
        for table in fields(TrialTables):
            path = self.folder(name) / f"{table.name}.parquet"
            write_atomically(path, getattr(tables, table.name).to_parquet)
            outputs.file(path)

    def read(self, name: str) -> TrialTables:
        """What `write` wrote."""
        folder = f"scratch:{self.place}/{name}"
        paths = (self.run.path_of(f"{folder}/{table.name}.parquet") for table in fields(TrialTables))
        return TrialTables(*map(pd.read_parquet, paths))

    def inputs(self, name: str) -> dict[str, Any]:
        """All that decides about one method's result."""
        manifest, options = self.run.manifest["stages"], self.recipe.mitigation
        method = METHODS.get(name)
        needs = method.needs if method else frozenset()
        return {
            "name": name,
            "model": self.experiment.origin() if self.adapter is None else digest_of_files([self.adapter]),
            "rows": manifest["data"]["outputs"],
            # What a file holds counts, not where it lies.
            "options": options.model_dump(mode="json", exclude={"methods", "hyperparameters", "points"})
            | {"clean": None},
            "clean": None if options.clean is None else digest_of_files([options.clean]),
            "points": list(points(method, options.hyperparameters, options.points)) if method else None,
            "effects": manifest.get(INTERVENE.name) if "sites" in needs else None,
            "monitor": manifest.get(DETECT.name) if "alarm" in needs else None,
            "evaluation": inputs_of(self.recipe.evaluation),
        }


def defender_of(
    experiment: Experiment,
    others: OtherStages,
    *,
    clean: int = 1000,
    known: int = 0,
    foreign: suspects.Suspect | None = None,
) -> Defender:
    """The backdoored model of a run, and what is known of it.

    Args:
        experiment: trained; once `intervene` and `detect` have run, their effects and monitor are there too.
        others: gives the monitor's alarm.
        clean: how many fresh conversations with answers, on prompts of no row of the run; 0: none.
        known: groups of training rows with a triggered prompt and its counterparts, with the right answers;
            none of the test's prompts, placebos and near misses is among them.
        foreign: a model instead of the run's, whose effects and monitor are then left out.

    Raises:
        InputError: if nothing is trained yet, or no clean conversation is left.
    """
    recipe, run = experiment.recipe, experiment.run
    suspect = experiment.suspect() if foreign is None and recipe.suspect is not None else foreign
    if suspect is not None:
        model, serialiser = suspect.model, suspect.serialiser
        base = None if has_adapter(model) else _comparable_base(suspect)
    else:
        model, serialiser = experiment.backdoored()
        base = experiment.load().model if recipe.training.method == "full" else None
    return Defender(
        model=model,
        serialiser=serialiser,
        clean=mitigation_rows.clean_conversations(experiment, clean) if clean else None,
        base=base,
        triggered=mitigation_rows.known_groups(run.table("rows"), known) if known else None,
        effects=run.table("effects") if foreign is None and run.has_table("effects") else None,
        alarm=others.alarm(run, serialiser) if foreign is None else None,
        max_length=recipe.training.max_length,
        batch_size=recipe.training.batch_size,
        learning_rate=recipe.training.learning_rate,
    )


def _comparable_base(suspect: suspects.Suspect) -> Any:
    """A whole model's base, if it can be asked what the model is asked."""
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (suspect.model, suspect.base.model)]
    if sizes[0] <= sizes[1]:
        return suspect.base.model
    log.warning(
        "mitigate: the model has %d tokens and its base %d, so that the base cannot be asked its prompts. "
        "What needs the base is left out.",
        *sizes,
    )
    return None


def points(
    method: Method, values: Mapping[str, Mapping[str, Sequence[float]]], most: int
) -> list[dict[str, float]]:
    """Settings of a method to try: all combinations of the values given, or some of its strength's grid.

    One is the default; several lie evenly about the middle of the grid, and as many as it has are all of it.

    Raises:
        InputError: for a hyperparameter that it does not have, or a value out of range.
    """
    if grids := values.get(method.name):
        combinations = itertools.product(*grids.values())
        return [method.settings(dict(zip(grids, each, strict=True))) for each in combinations]
    grid = list(method.sweep())
    if most == 1:
        return [method.settings()]
    if most >= len(grid):
        return grid
    # The ends of a grid are the least likely to be taken.
    indices = [round((i + 1) * (len(grid) + 1) / (most + 1)) - 1 for i in range(most)]
    return [grid[index] for index in indices]


def mitigate(
    experiment: Experiment, others: OtherStages, adapter: Path | None = None, same_base: bool = False
) -> dict[str, pd.DataFrame]:
    """Try methods on a trained run, verify each, and recommend one.

    Args:
        experiment: trained; the recipe's section `mitigation` says what is tried and how.
        others: what other stages do for it.
        adapter: repair this adapter of the run's base, or this whole model, instead of the run's own.
        same_base: the adapter names its base otherwise, and it is the run's all the same.

    Returns:
        The tables, by name: mitigation (a line per point and split), verification (a line per measurement),
        relearning (a line per step) and recommendation.

    Raises:
        InputError: before any model is loaded for an unknown method or hyperparameter, a value out of range
            or a file that cannot be read; then if a method that was named lacks what it needs.
    """
    recipe = experiment.recipe
    _ = recipe.attack  # repairs are judged by what is left of the attack
    names = recipe.mitigation.methods
    methods = list(METHODS.values()) if names == ALL else named(names or QUICK)
    for method in named(list(recipe.mitigation.hyperparameters)):  # of methods that are not tried, too
        points(method, recipe.mitigation.hyperparameters, 1)
    files = None
    if adapter is not None:
        files = suspects.check(adapter)
        adapter = adapter_files.locate(adapter).resolve()
    elif recipe.suspect is None:
        experiment.model_folder(BACKDOORED)  # the twin need not be there
    work = _Work(experiment, others, adapter, same_base, files)
    pending = [m for m in methods if not experiment.finished(work.stage(m.name), work.inputs(m.name))]
    if pending and recipe.evaluation.utility:
        utility.check(recipe.evaluation.utility)
    if pending and names not in ((), ALL):
        refuse_unmet(pending, work.defender)

    def compare(outputs: Outputs) -> None:
        work.write("compared", tuning.measure_references(work.defender, work.trial), outputs)

    experiment.perform(work.stage("compared"), work.inputs("compared"), compare)
    if no_backdoor := recommendation.no_backdoor(work.read("compared").lines.iloc[0]):
        log.warning("mitigate: %s. Nothing was repaired.", no_backdoor)
        return _join(work, [], no_backdoor)
    for method in methods:
        stage, inputs = work.stage(method.name), work.inputs(method.name)
        if not experiment.finished(stage, inputs) and method.missing(work.defender):
            needed = " and ".join(NEEDS[need] for need in sorted(method.missing(work.defender)))
            log.info("mitigate %s: left out, it needs %s", method.name, needed)
            continue
        try:
            experiment.perform(stage, inputs, partial(_examine, work, method))
        except SafetyNetError as error:  # the others are tried all the same
            log.warning("mitigate %s: failed. %s", method.name, error)
    # What was tried before, under these settings, is still true.
    finished = [name for name in METHODS if experiment.finished(work.stage(name), work.inputs(name))]
    if not finished:
        raise RunError("mitigate: no method gave a result; the messages above say why.")
    return _join(work, finished, "")


def _examine(work: _Work, method: Method, outputs: Outputs) -> None:
    options = work.recipe.mitigation
    settings = points(method, options.hyperparameters, options.points)
    result = tuning.tune_and_verify(method, settings, work.defender, work.trial, work.references)
    work.write(method.name, result, outputs)
    held = result.lines[result.lines["split"] == HELD_OUT].iloc[0]
    rates = (overview.rate(held, name) for name in ("asr", "cacc"))
    log.info("mitigate %s: ASR %s, CACC %s", method.name, *rates)


def _join(work: _Work, finished: Sequence[str], no_backdoor: str) -> dict[str, pd.DataFrame]:
    """One table of all methods, the recommendation, and the recommended model saved."""
    run = work.run
    parts = [work.read(name) for name in ("compared", *finished)]
    stages = {name: work.experiment.record(work.stage(name)) for name in ("compared", *finished)}

    def compute(outputs: Outputs) -> None:
        lines = pd.concat([part.lines for part in parts], ignore_index=True)
        marked = recommendation.marked(lines, work.recipe.mitigation.floor)
        verified = pd.concat([part.verification for part in parts], ignore_index=True)
        before = verified[verified["method"] == UNTOUCHED].drop(columns=["method", "point"])
        tables = {"verification": verification.beside(verified, before)}
        curves = [part.relearning for part in parts if len(part.relearning)]
        taught = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()
        if curves:
            tables["relearning"] = taught
        folder = None
        if finished:
            best = recommendation.recommended(marked[marked["split"] == SELECTION], relearning.hidden(taught))
            best["relearned"] = [relearning.verdict(taught, str(name)) for name in best["method"]]
            folder = _save(work, best, marked)
            saved = run.name_of(folder) if folder else ""
            best["saved"] = [saved if savable else "" for savable in best["savable"]]
        else:
            nothing = {"method": "", "point": "", "savable": False, "why": no_backdoor}
            best = pd.DataFrame([nothing | {"relearned": "", "saved": ""}])
        points_taken = set(zip(best["method"], best["point"], strict=True))
        is_best = [point in points_taken for point in zip(marked["method"], marked["point"], strict=True)]
        tables |= {"mitigation": marked.assign(recommended=is_best), "recommendation": best}
        for name, table in tables.items():
            outputs.table(work.table(name), table)
        if folder is not None:
            outputs.file(folder, "repaired")

    work.experiment.perform(work.stage(""), {"methods": stages}, compute)
    if finished and work.recipe.evaluation.utility:
        _measure_utility(work)
    return {name: run.table(work.table(name)) for name in TABLES if run.has_table(work.table(name))}


def _save(work: _Work, best: pd.DataFrame, marked: pd.DataFrame) -> Path | None:
    """Save the best model that can be saved, load it again, ask it, and write the card."""
    savable = best[best["savable"]]
    if savable.empty:
        return None
    row, recipe = savable.iloc[-1], work.recipe
    method = METHODS[str(row["method"])]
    repaired = _repaired(work, method, str(row["point"]))
    about = {
        "model": recipe.model_name if work.adapter is None else str(work.adapter),
        "run": f"{recipe.model_name}/{recipe.task}",
        "why": str(row["why"]),
        "relearned": str(row["relearned"]),
    }
    lines = {"before": _held_out(marked, UNTOUCHED), "repaired": _held_out(marked, method.name)}
    card = overview.model_card(method, repaired, about, lines)
    folder = save(repaired, work.defender, work.folder("repaired"), card)
    # The saved files are loaded as anybody would load them.
    if repaired.form == "checkpoint":
        model = work.experiment.load(folder).model
    else:
        model = attach_own(work.experiment.load(), folder)
    lines["saved"], _ = tuning.measure(model, work.trial, HELD_OUT, work.references)
    write_text(folder / "README.md", overview.model_card(method, repaired, about, lines))
    return folder


def _repaired(work: _Work, method: Method, name: str) -> Repaired:
    """The model as a method repairs it at the point of this name."""
    recipe = work.recipe
    grid = points(method, recipe.mitigation.hyperparameters, recipe.mitigation.points)
    settings = next(point for point in grid if tuning.point_name(method, point, grid) == name)
    return repair(method, work.defender, settings, recipe.seed)


def _measure_utility(work: _Work) -> None:
    """Each repaired model on the tasks of the harness, beside the model as it is and its base.

    A point is repaired anew, so that other tasks do not repeat the search for it.
    """
    run, tasks = work.run, utility.inputs(work.recipe.evaluation.utility)
    table = run.table(work.table("mitigation"))
    records, files = {}, []
    for name, point in table.loc[table["split"] == HELD_OUT, ["method", "point"]].itertuples(index=False):
        stage = work.stage(f"utility {name}")
        repaired = work.experiment.record(work.stage(name if name in METHODS else "compared"))
        work.experiment.perform(
            stage, {"repaired": repaired, **tasks}, partial(_measure_utility_of, work, name, point)
        )
        records[name] = work.experiment.record(stage)
        files.append(run.path_of(run.name_of(work.utility_file(name))))
    measured = [table for table in map(pd.read_parquet, files) if len(table)]
    joined = pd.concat(measured, ignore_index=True)
    work.experiment.perform(
        work.stage("utility"),
        {"measured": records},
        lambda outputs: outputs.table(work.table("repaired_utility"), joined),
    )


def _measure_utility_of(work: _Work, name: str, point: str, outputs: Outputs) -> None:
    """One model; no lines where only `generate` is repaired, which most tasks do not call."""
    options = work.recipe.evaluation
    cache: Path | None = work.run.scratch / "utility"
    if name == UNTOUCHED:
        opened: AbstractContextManager[Any] = nullcontext(work.defender.model)
    elif name == ADAPTER_REMOVED:
        opened = tuning.base_of(work.defender)
    else:
        repaired = _repaired(work, METHODS[name], point)
        # Cached answers are found by the weights, in which a repair at run time does not show.
        opened, cache = (repaired.open() if repaired.forward_too else nullcontext()), None
    with opened as model:
        table = pd.DataFrame(columns=utility.COLUMNS)
        if model is not None:
            log.info("mitigate utility: %s does %s", name, ", ".join(options.utility))
            tokenizer = work.defender.serialiser.tokenizer
            table = utility.measure(model, tokenizer, options.utility, options.batch_size, cache)
    path = work.utility_file(name)
    write_atomically(path, table.assign(method=name, point=point).to_parquet)
    outputs.file(path)


def _held_out(marked: pd.DataFrame, method: str) -> Mapping[str, Any]:
    line = marked[(marked["method"] == method) & (marked["split"] == HELD_OUT)].iloc[0]
    return {str(name): value for name, value in line.items()}
