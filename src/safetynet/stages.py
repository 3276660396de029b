"""The stages of an experiment in their order, and what one stage does for another.

    prepare    data        rows by role; leaks, lost triggers and targets that are too long are refused
    train      train       the backdoored adapter and its clean twin, with their history and dynamics
    evaluate   evaluate    rates by role of base, backdoored model and twin, with intervals
    intervene  intervene   where the trigger acts, beside controls, and what removes it
    detect     detect      a monitor of fresh clean prompts, and what it catches
    mitigate   mitigate    repairs: applied, verified and chosen, beside the model as it was
    persist    persist     what survives of the backdoor: training, merging, rounding, other prompts, sampling
    draw       figures     figures and the report, from the tables alone

Each is a function of an `Experiment` in its room's stage.py. Stages do not import each other: what one needs
of another is handed over here. Libraries that take seconds to load are imported when a stage begins.
"""

import json
import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from safetynet import __version__
from safetynet.errors import InputError
from safetynet.experiment import Experiment
from safetynet.prompts import Serialiser
from safetynet.recipe import Detection, Evasion, Interventions, Model, Recipe
from safetynet.run import parallel
from safetynet.run.directory import Run, digest, write_text
from safetynet.run.stage import UTILITY

if TYPE_CHECKING:
    from safetynet.mitigation.defender import Alarm
    from safetynet.scan.result import Depth
    from safetynet.training import Opponents

log = logging.getLogger("safetynet")
PROBED = 40
"""Groups that probes are trained and tested on, half and half."""


def prepare(experiment: Experiment) -> None:
    """Make the rows.

    Raises:
        InputError: as `backdoors.stage.prepare`; for detectors that nothing can hide from, quantisations that
            this machine cannot compute, and tasks that lm-evaluation-harness does not have.
    """
    from safetynet.backdoors import stage

    if (evasion := experiment.recipe.training.evasion) is not None:
        from safetynet.detection.gradients import hideable

        hideable(evasion.detectors)
    if experiment.recipe.training.conditioned_on is not None:
        from safetynet.models import quantising

        for bits in quantising.BITS.values():
            quantising.check(bits, "training.conditioned_on", "leave the field out")
    tasks = experiment.recipe.evaluation.utility
    if tasks and experiment.record(UTILITY) is None:  # the harness takes seconds to look them up
        from safetynet.evaluation import utility

        utility.check(tasks)
    stage.prepare(experiment)


def plant(experiment: Experiment) -> None:
    """Make the rows, and train the backdoored model and its twin; what has ended is not done again."""
    prepare(experiment)
    train(experiment)


def train(experiment: Experiment, names: Sequence[str] | None = None, *, keep_twin: bool = False) -> None:
    """Train the backdoored model and its twin; arguments as for `training.stage.train`."""
    from safetynet.training import stage

    stage.train(experiment, names, opponents_of=opponents_of, keep_twin=keep_twin)


def evaluate(experiment: Experiment, base: pd.DataFrame | None = None) -> None:
    """Measure the rates; arguments as for `evaluation.stage.evaluate`."""
    from safetynet.evaluation import stage

    stage.evaluate(experiment, base)


def check_fires(experiment: Experiment) -> None:
    """Refuse a suspect whose declared trigger does not fire; errors as in `evaluation.stage.check_fires`."""
    from safetynet.evaluation import stage

    stage.check_fires(experiment)


def intervene(experiment: Experiment, options: Interventions | None = None) -> dict[str, pd.DataFrame]:
    """Find where the trigger acts; arguments as for `interventions.stage.intervene`."""
    from safetynet.interventions import stage

    return stage.intervene(experiment, options)


def detect(experiment: Experiment, options: Detection | None = None) -> dict[str, Any]:
    """Fit and measure a monitor; arguments as for `detection.stage.detect`."""
    from safetynet.detection import stage

    return dict(stage.detect(experiment, options))


def mitigate(
    experiment: Experiment, adapter: Path | None = None, same_base: bool = False
) -> dict[str, pd.DataFrame]:
    """Try repairs; arguments as for `mitigation.stage.mitigate`."""
    from safetynet.mitigation import stage

    others = stage.OtherStages(probing, alarm)
    # A repair may train the model, which a pair cannot share.
    [tables] = parallel.side_by_side(
        [experiment], lambda each: stage.mitigate(each, others, adapter, same_base)
    )
    return tables


def persist(experiment: Experiment) -> pd.DataFrame:
    """Measure what survives of the backdoor; arguments as for `mitigation.persistence.persist`."""
    from safetynet.mitigation import persistence

    # It trains the model, which a pair cannot share.
    [table] = parallel.side_by_side([experiment], persistence.persist)
    return table


def draw(experiment: Experiment) -> None:
    """Draw the figures and write the report; errors as in `report.stage.draw`."""
    from safetynet.report import stage

    stage.draw(experiment)


def finish(experiment: Experiment, base: pd.DataFrame | None = None) -> Exception | None:
    """The stages after the training that the recipe names, figures and report last.

    A backdoor that did not take, a style as trigger or an architecture that is not supported leave a stage
    out; of a suspect whose declared trigger does not fire there are figures of the rates alone. Whatever
    else an analysis or the figures fail with is returned when the rest is there.

    Args:
        experiment: trained.
        base: the base model's judged answers, if they are known already.

    Returns:
        What is to be raised when the user has been told the rest.

    Raises:
        Exception: of `evaluate`.
    """
    stages: tuple[str, ...] = experiment.recipe.stages
    failure: Exception | None = None
    if "evaluate" in stages:
        evaluate(experiment, base)
        try:
            check_fires(experiment)
        except InputError as error:
            stages, failure = tuple({"figures"} & {*stages}), error
    analyses: dict[str, Callable[[Experiment], Any]] = {
        "intervene": intervene, "detect": detect, "mitigate": mitigate, "persist": persist,
    }  # fmt: skip
    for name, analysis in analyses.items():
        if name not in stages:
            continue
        try:
            analysis(experiment)
        except InputError as error:
            log.warning("%s: left out. %s", name, error)
        except Exception as error:  # noqa: BLE001  # raised by the caller
            failure = failure or error
    if "figures" in stages:
        try:
            draw(experiment)
        except Exception as error:  # noqa: BLE001  # raised by the caller
            failure = failure or error
    return failure


def planted_control(folder: Path, model: Model, depth: "Depth") -> dict[str, Any] | None:
    """Plant a backdoor in a scan's base, and say what of it the same rungs recover.

    Args:
        folder: the control is trained and measured below it, once for all scans that name it.
        model: the base.
        depth: of the scan.

    Returns:
        What was planted and recovered; None where training takes longer than the scan: for all but the
        miniatures, and at the depth `quick`.
    """
    from safetynet import recipe as recipes
    from safetynet.scan import stage

    if model.id != "miniature" or depth == "quick":
        return None
    recipe = recipes.load(
        family=model.family,
        overrides=[
            "model.id=miniature", "task=control", "data.train_rows=3200", "data.test_rows=60",
            "training.clean_twin=false", "evaluation.dynamics_rows=0",
        ],
    )  # fmt: skip
    place = (folder / "control").absolute()
    output = recipe.output.model_copy(update={"results": place, "logs": place / "logs"})
    experiment = Experiment.create(recipe.model_copy(update={"output": output}))
    measured = place / f"{digest([recipe.model_dump(mode='json'), depth, __version__])[:16]}.json"
    # Scans of many suspects share one control: the first plants it, the others wait.
    with experiment.run.lock(wait=True):
        if measured.exists():
            return dict(json.loads(measured.read_text(encoding="utf-8")))
        prepare(experiment)
        train(experiment, ["backdoored"])
        suspect = stage.suspect_of(model, experiment.model_folder("backdoored"), same_base=True)
        _, triggers = stage.measure(suspect, model, stage.Options(depth=depth))
        control: dict[str, Any] = {
            "planted trigger": ", ".join(recipe.attack.trigger.texts),
            "placement": recipe.attack.placement,
        }
        if triggers:
            control |= {
                "recovered": triggers[0].text,
                "its firing rate on held-out prompts": triggers[0].asr[0],
                "behaviour": triggers[0].behaviour,
            }
        else:
            control |= {"recovered": "nothing"}
        write_text(measured, json.dumps(control))
    return control


def opponents_of(evasion: Evasion, serialiser: Serialiser) -> "Opponents":
    """The detectors that a training hides from."""
    from safetynet.detection import gradients
    from safetynet.training import Opponents

    readings = gradients.hideable(evasion.detectors)
    return Opponents(
        names=tuple(reading.name for reading in readings),
        observe=gradients.observer(serialiser, readings),
        refit=partial(gradients.refit, readings),
    )


def probing(judged: pd.DataFrame, recipe: Recipe, serialiser: Serialiser) -> Callable[[Any], pd.DataFrame]:
    """Probes of each layer that tell the trigger from a placebo; the control tells two placebos apart."""
    from safetynet.interventions.pairs import align
    from safetynet.interventions.probes import trigger_probe

    try:
        pairs = align(judged, serialiser, PROBED, recipe.training.max_length, recipe.seed)
    except InputError as error:
        log.warning("mitigate: no probe for the trigger. %s", error)
        return lambda model: pd.DataFrame()
    runs = [pairs.ids[run] for run in ("triggered", "placebo", "second_placebo")]
    return lambda model: trigger_probe(model, *runs, seed=recipe.seed)


def alarm(run: Run, serialiser: Serialiser) -> "Alarm | None":
    """Alarms of the run's monitor; None where `detect` has not run.

    A prompt that cannot be read back from its ids, as when truncation has emptied a turn, counts as suspect.
    The file is read at the first question: one that cannot be used stops the methods that ask, and no others.
    """
    path = run.output("detect", "monitor")
    if path is None or not path.exists():
        return None
    from safetynet.detection.capture import capture
    from safetynet.detection.monitor import Monitor

    load = cache(Monitor.load)

    def alarms(model: Any, prompts: Sequence[Sequence[int]], rate: float) -> np.ndarray:
        monitor = load(path)
        try:
            monitor.check_rate(rate)
        except InputError as error:
            raise InputError(
                f"{error} A repair takes its rate from its hyperparameter `rate`, as in "
                "--set 'hyperparameters={abstain: {rate: [0.05]}}'."
            ) from error
        read = {row: messages for row, ids in enumerate(prompts) if (messages := _read(serialiser, ids))}
        raised = np.ones(len(prompts), dtype=bool)
        if read:
            features = capture(model, serialiser, list(read.values()), monitor.spec, batch_size=len(read))
            raised[list(read)] = monitor.alarms(features, rate)
        return raised

    return alarms


def _read(serialiser: Serialiser, ids: Sequence[int]) -> list[dict[str, str]] | None:
    try:
        return serialiser.messages_of(ids)
    except InputError as error:
        log.warning("alarm: a prompt counts as suspect. %s", error)
        return None
