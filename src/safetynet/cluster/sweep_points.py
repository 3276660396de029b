"""What a worker does for one point of a sweep: one step at a time, each kept in the point's run directory.

In: a recipe and the run directories that lend to it. Out: which stages were computed, and what later points
may share. A step that is interrupted goes on when it is asked for again; one that has ended is not repeated.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet.errors import SafetyNetError
from safetynet.recipe import Recipe

log = logging.getLogger("safetynet")
STEPS = ("prepare", "base", "twin", "train", "measure")


@dataclass(frozen=True)
class Task:
    """One step of one point."""

    step: str
    recipe: Recipe
    group: str
    """Name of the sweep, under which trackers gather its runs."""
    folder: Path
    """Where the sweep was started; relative paths of the recipe begin there."""
    base: Path | None = None
    """Run directory that lends the base model's answers; None: they are this point's own."""
    twin: Path | None = None
    """Run directory that lends the clean twin."""


@dataclass(frozen=True)
class Done:
    """What a step left behind."""

    computed: tuple[str, ...]
    """Stages that were computed now, in contrast to those that had ended before."""
    base: str | None = None
    twin: str | None = None
    """After `prepare`: digests of what this point can share."""


def perform(task: Task, *_: Any) -> Done:
    """Do one step; further arguments are the steps before it, for the order alone.

    Raises:
        SafetyNetError: as the stages do; another error is put into the point's log with its traceback.
    """
    from safetynet.experiment import Experiment
    from safetynet.models import loading
    from safetynet.run.logs import logging_to

    os.chdir(task.folder)
    # An agent of Weights & Biases starts a sweep of one point at a time: all of them are its sweep's.
    os.environ.setdefault("WANDB_RUN_GROUP", os.environ.get("WANDB_SWEEP_ID", task.group))
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", task.group)
    if task.recipe.model.id == "miniature":
        loading.use_one_thread()
    experiment = Experiment.create(task.recipe)
    run = experiment.run
    # Another process may still be at it: one that the sweep left behind when it was killed.
    with run.lock(wait=True), logging_to(run.log):
        try:
            before = _finished(run)
            base, twin = _step(task, experiment)
            computed = [name for name, when in _finished(run).items() if before.get(name) != when]
        # Errors stand in the point's log, where the sweep's table sends its reader.
        except SafetyNetError as error:
            log.error("%s", error)
            raise
        except Exception:
            log.exception("a fault of SafetyNet")
            raise
    return Done(tuple(computed), base, twin)


def _step(task: Task, experiment: Any) -> tuple[str | None, str | None]:
    from safetynet import stages
    from safetynet.cluster import sharing
    from safetynet.experiment import BACKDOORED, TWIN, Experiment

    if task.step == "prepare":
        stages.prepare(experiment)
        twin = sharing.twin_digest(experiment) if TWIN in experiment.trained else None
        return sharing.base_digest(experiment), twin
    experiment.recipe = experiment.run.recorded_recipe  # with the date of its prompts
    if task.step == "base":
        sharing.measure_base(experiment)
    elif task.step == "twin":
        stages.train(experiment, [TWIN], keep_twin=True)
    elif task.step == "train":
        # A twin that is lent comes later: this point's training does not wait for it.
        stages.train(experiment, None if task.twin is None else [BACKDOORED])
    else:
        if task.base is not None:
            sharing.measure_base(experiment, Experiment.find(task.base))
        if task.twin is not None:
            sharing.borrow_twin(experiment, Experiment.find(task.twin))
        failure = stages.finish(experiment, sharing.base_responses(experiment))
        if failure is not None:
            raise failure
    return None, None


def _finished(run: Any) -> dict[str, str]:
    return {name: record["finished"] + record["inputs"] for name, record in run.manifest["stages"].items()}
