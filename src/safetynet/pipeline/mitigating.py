"""Mitigation on demand: methods one after the other, each a stage of its own, then the front and the choice.

An interrupted command goes on with the method that it was at. What is recommended is saved as an adapter or
checkpoint, loaded again as anybody would, and asked once more: the card states what the saved files do.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet import __version__
from safetynet.errors import RunError, SafetyNetError
from safetynet.mitigation import (
    METHODS,
    NEEDS,
    Method,
    Subject,
    card,
    examination,
    named,
    recommendation,
    refuse_unmet,
    relearning,
    repair,
    save,
    verification,
)
from safetynet.mitigation.examination import HELD_OUT, SELECTION, Examiner, Found
from safetynet.models import adapter_files
from safetynet.models.adapter_files import AdapterFiles
from safetynet.models.adapters import has_adapter
from safetynet.pipeline import examining, foreign, repairing
from safetynet.pipeline.subjects import BACKDOORED, attach_own, load, model_folder, test_rows
from safetynet.recipe import Recipe
from safetynet.run.directory import Run, digest_of_files, write_atomically, write_text

log = logging.getLogger("safetynet")
TABLES = ("mitigation", "verification", "relearning", "recommendation")
"""What a run may hold after this stage."""
ALL = ("all",)
"""In place of names: every method whose needs are met."""
QUICK = ("fine_tuning", "adapter_scaling", "component_ablation", "cleangen", "trigger_projection")
"""Tried unless methods are named, as far as their needs are met: quick ones, of each kind."""


@dataclass
class _Work:
    """One command: its settings, and the models and rows that are loaded when the first stage needs them."""

    recipe: Recipe
    run: Run
    adapter: Path | None
    """Or a whole model."""
    same_base: bool
    methods: list[Method]
    files: AdapterFiles | None
    """Of an adapter that is not the run's own."""

    @cached_property
    def subject(self) -> Subject:
        """The suspect model with what its owner has."""
        recipe, run, options = self.recipe, self.run, self.recipe.mitigation
        own = options.clean_rows if options.clean is None else 0
        if self.adapter is None:
            found = repairing.suspect(recipe, run, clean=own, known=options.triggered_rows)
        else:
            suspect = foreign.load(recipe, self.adapter, self.same_base, self.files)
            known = repairing.known_groups(run.table("rows"), options.triggered_rows)
            found = Subject(
                model=suspect.model,
                serialiser=suspect.serialiser,
                base=None if has_adapter(suspect.model) else _comparable_base(suspect),
                clean=repairing.clean_conversations(recipe, run, own) if own else None,
                triggered=known if options.triggered_rows else None,
                intervene=repairing.intervene,
                max_length=recipe.training.max_length,
                batch_size=recipe.training.batch_size,
                learning_rate=recipe.training.learning_rate,
            )
        if options.clean is None or options.clean_rows == 0:
            return found
        return replace(found, clean=examining.clean_file(recipe, options.clean))

    @property
    def own(self) -> bool:
        """Whether it is the run's model: only of that do effects and monitor say anything."""
        return self.adapter is None

    @cached_property
    def examiner(self) -> Examiner:
        """What is asked of every model."""
        recipe, test = self.recipe, test_rows(self.run)
        serialiser = self.subject.serialiser
        choosing, judged = examining.divided(test, recipe)
        moved = examining.elsewhere(judged, test, recipe, serialiser)
        options = recipe.mitigation
        rows = examining.for_relearning(self.run.table("rows"), self.subject.triggered)
        examining.tell_cuts(pd.concat([choosing, judged]), self.subject.clean, recipe, serialiser)
        return Examiner(
            respond=examining.responding(recipe, serialiser),
            score=examining.score,
            choosing=choosing,
            judged=pd.concat(
                [judged.assign(elsewhere=False), moved.assign(elsewhere=True)], ignore_index=True
            ),
            relearning=relearning.relearning_rows(rows, options.relearn_rows)
            if options.relearn_rows
            else None,
            learn=examining.learning(recipe, serialiser),
            probe=examining.probing(judged, recipe, serialiser),
            floor=options.floor,
            seed=recipe.seed,
        )

    @cached_property
    def distances(self) -> examination.Reference:
        """With the lines of the untouched model and its base."""
        return examination.distances(self.subject, self.examiner, self.read("compared").lines)

    @property
    def place(self) -> str:
        """Of results, below scratch: those of somebody else's model lie apart from the run's own."""
        return "mitigation" if self.adapter is None else f"suspects/{self.adapter.name}"

    def stage(self, name: str) -> str:
        """Of a method, as the manifest calls it."""
        whose = "" if self.adapter is None else f" of {self.adapter.name}"
        return f"mitigate{name and ' '}{name}{whose}"

    def table(self, name: str) -> str:
        """What a table is called in the run; the report shows the run's own alone."""
        return name if self.adapter is None else f"{name}-{self.adapter.name}"

    def folder(self, name: str) -> Path:
        """Where one method's tables are kept."""
        return self.run.scratch / self.place / name

    def write(self, name: str, found: Found) -> list[Path]:
        """One method's tables."""
        paths = []
        for table in ("lines", "verification", "relearning"):
            path = self.folder(name) / f"{table}.parquet"
            write_atomically(path, getattr(found, table).to_parquet)
            paths.append(path)
        return paths

    def read(self, name: str) -> Found:
        """What `write` wrote."""
        parts = ("lines", "verification", "relearning")
        kept = (self.run.path_of(f"scratch:{self.place}/{name}/{part}.parquet") for part in parts)
        return Found(*map(pd.read_parquet, kept))

    def inputs(self, name: str) -> dict[str, Any]:
        """All that decides about one method's result."""
        manifest, options = self.run.manifest["stages"], self.recipe.mitigation
        method = METHODS.get(name)
        needs = method.needs if method else frozenset()
        return {
            "name": name,
            "model": manifest.get(f"train {BACKDOORED}")
            if self.adapter is None
            else digest_of_files([self.adapter]),
            "rows": manifest["data"]["outputs"],
            # What a file holds counts, not where it lies.
            "options": options.model_dump(mode="json", exclude={"methods", "knobs", "points"})
            | {"clean": None},
            "clean": None if options.clean is None else digest_of_files([options.clean]),
            "points": list(points(method, options.knobs, options.points)) if method else None,
            "effects": manifest.get("intervene") if "sites" in needs else None,
            "monitor": manifest.get("detect") if "alarm" in needs else None,
            "evaluation": self.recipe.evaluation.model_dump(mode="json") | {"labelled": None},
            "version": __version__,
        }


def _comparable_base(suspect: foreign.Foreign) -> Any:
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
    method: Method, knobs: Mapping[str, Mapping[str, Sequence[float]]], most: int
) -> list[dict[str, float]]:
    """Settings of a method to try: all combinations of the values given, or some of its strength's grid.

    One is the default; several lie evenly about the middle of the grid, and as many as it has are all of it.

    Raises:
        InputError: for a knob that it does not have, or a value out of range.
    """
    given = knobs.get(method.name)
    if given:
        return [method.settings(chosen) for chosen in _combinations(given)]
    grid = list(method.sweep())
    if most == 1:
        return [method.settings()]
    if most >= len(grid):
        return grid
    # The ends of a grid are the least likely to be taken.
    places = [round((i + 1) * (len(grid) + 1) / (most + 1)) - 1 for i in range(most)]
    return [grid[place] for place in places]


def mitigate(
    recipe: Recipe, run: Run, adapter: Path | None = None, same_base: bool = False
) -> dict[str, pd.DataFrame]:
    """Try methods on a trained run, verify each, and recommend one.

    Args:
        recipe: of the run; its section `mitigation` says what is tried and how.
        run: trained.
        adapter: repair this adapter of the run's base, or this whole model, instead of the run's own.
        same_base: the adapter names its base otherwise, and it is the run's all the same.

    Returns:
        The tables, by name: mitigation (a line per point and split), verification (a line per measurement),
        relearning (a line per step) and recommendation.

    Raises:
        InputError: before any model is loaded for an unknown method or knob, a value out of range or a file
            that cannot be read; then if a method that was named lacks what it needs.
    """
    asked = recipe.mitigation.methods
    chosen = list(METHODS.values()) if asked == ALL else named(asked or QUICK)
    _check_knobs(recipe)
    files = None
    if adapter is not None:
        files = foreign.check(adapter)
        adapter = adapter_files.locate(adapter).resolve()
    else:
        model_folder(run, BACKDOORED)
    work = _Work(recipe, run, adapter, same_base, chosen, files)
    pending = [m for m in chosen if not run.finished(work.stage(m.name), work.inputs(m.name))]
    if pending and asked not in ((), ALL):
        refuse_unmet(pending, work.subject)
    said = _compare(work)
    if said:
        log.warning("mitigate: %s. Nothing was repaired.", said)
        return _join(work, [], said)
    _try_all(work)
    # What was tried before, under these settings, is still true.
    done = [name for name in METHODS if run.finished(work.stage(name), work.inputs(name))]
    if not done:
        raise RunError("mitigate: no method gave a result; the messages above say why.")
    return _join(work, done, "")


def _try_all(work: _Work) -> None:
    """Each method in a stage of its own; one that fails does not keep the others from being tried."""
    options = work.recipe.mitigation
    for method in work.methods:
        stage, inputs = work.stage(method.name), work.inputs(method.name)
        if work.run.finished(stage, inputs):
            log.info("mitigate %s: unchanged", method.name)
            continue
        if method.missing(work.subject):
            needed = " and ".join(NEEDS[need] for need in sorted(method.missing(work.subject)))
            log.info("mitigate %s: left out, it needs %s", method.name, needed)
            continue
        try:
            with work.run.stage(stage, inputs) as outputs:
                tried = points(method, options.knobs, options.points)
                found = examination.examine(method, tried, work.subject, work.examiner, work.distances)
                outputs += work.write(method.name, found)
        except SafetyNetError as error:
            log.warning("mitigate %s: failed. %s", method.name, error)
            continue
        held = found.lines[found.lines["split"] == HELD_OUT].iloc[0]
        log.info("mitigate %s: ASR %.1f%%, CACC %.1f%%", method.name, 100 * held["asr"], 100 * held["cacc"])


def _compare(work: _Work) -> str:
    """Measure model and base; returns a sentence if there is no backdoor."""
    inputs = work.inputs("compared")
    if not work.run.finished(work.stage("compared"), inputs):
        with work.run.stage(work.stage("compared"), inputs) as outputs:
            found, _ = examination.compared(work.subject, work.examiner)
            outputs += work.write("compared", found)
    return recommendation.no_backdoor(work.read("compared").lines.iloc[0])


def _join(work: _Work, done: Sequence[str], said: str) -> dict[str, pd.DataFrame]:
    """One table of all methods, the recommendation, and the recommended model saved."""
    run = work.run
    parts = [work.read(name) for name in ("compared", *done)]
    stages = {name: run.manifest["stages"].get(work.stage(name)) for name in ("compared", *done)}
    inputs: dict[str, Any] = {"methods": stages, "version": __version__}
    if run.finished(work.stage(""), inputs):
        return {name: run.table(work.table(name)) for name in TABLES if run.has_table(work.table(name))}
    with run.stage(work.stage(""), inputs) as outputs:
        lines = pd.concat([part.lines for part in parts], ignore_index=True)
        marked = recommendation.marked(lines, work.recipe.mitigation.floor)
        verified = pd.concat([part.verification for part in parts], ignore_index=True)
        before = verified[verified["method"] == recommendation.UNTOUCHED].drop(columns=["method", "point"])
        tables = {"verification": verification.beside(verified, before)}
        curves = [part.relearning for part in parts if len(part.relearning)]
        taught = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()
        if curves:
            tables["relearning"] = taught
        folder = None
        if done:
            taken = recommendation.recommended(
                marked[marked["split"] == SELECTION], relearning.hidden(taught)
            )
            taken["relearned"] = [relearning.verdict(taught, str(name)) for name in taken["method"]]
            folder = _save(work, taken, marked)
            taken = taken.assign(
                saved=[run.name_of(folder) if folder and own else "" for own in taken["savable"]]
            )
        else:
            nothing = {"method": "", "point": "", "savable": False, "why": said, "relearned": "", "saved": ""}
            taken = pd.DataFrame([nothing])
        best = set(zip(taken["method"], taken["point"], strict=True))
        named_so = [place in best for place in zip(marked["method"], marked["point"], strict=True)]
        tables |= {"mitigation": marked.assign(recommended=named_so), "recommendation": taken}
        outputs += [run.write_table(work.table(name), table) for name, table in tables.items()]
        outputs += [] if folder is None else [folder]
    return tables


def _save(work: _Work, taken: pd.DataFrame, marked: pd.DataFrame) -> Path | None:
    """Save the best model that can be saved, load it again, ask it, and write the card."""
    savable = taken[taken["savable"]]
    if savable.empty:
        return None
    row, recipe = savable.iloc[-1], work.recipe
    method = METHODS[str(row["method"])]
    tried = points(method, recipe.mitigation.knobs, recipe.mitigation.points)
    knobs = next(k for k in tried if examination.point_name(method, k, tried) == row["point"])
    repaired = repair(method, work.subject, knobs, recipe.seed)
    name = recipe.model_name if work.adapter is None else str(work.adapter)
    about = {"model": name, "run": f"{recipe.model_name}/{recipe.task}", "why": str(row["why"])}
    about["relearned"] = str(row["relearned"])
    lines = {
        "before": _held_out(marked, recommendation.UNTOUCHED),
        "repaired": _held_out(marked, method.name),
    }
    folder = save(
        repaired, work.subject, work.folder("repaired"), card.render(method, repaired, about, lines)
    )
    with _loaded(work, folder, repaired.form) as model:
        lines["saved"], _ = examination.measure(model, work.subject, work.examiner, HELD_OUT, work.distances)
    write_text(folder / "README.md", card.render(method, repaired, about, lines))
    return folder


@contextmanager
def _loaded(work: _Work, folder: Path, form: str) -> Iterator[Any]:
    """The saved files as anybody would load them."""
    recipe = work.recipe
    if form == "checkpoint":
        yield load(recipe, folder).model
    else:
        yield attach_own(load(recipe), folder)


def _held_out(marked: pd.DataFrame, method: str) -> Mapping[str, Any]:
    own = marked[(marked["method"] == method) & (marked["split"] == HELD_OUT)]
    return {str(name): value for name, value in own.iloc[0].items()}


def _check_knobs(recipe: Recipe) -> None:
    """Every knob that is set is a method's own and within its range, whether that method is tried or not."""
    for method in named(list(recipe.mitigation.knobs)):
        points(method, recipe.mitigation.knobs, 1)


def _combinations(given: Mapping[str, Sequence[float]]) -> Iterator[dict[str, float]]:
    for values in itertools.product(*given.values()):
        yield dict(zip(given, values, strict=True))
