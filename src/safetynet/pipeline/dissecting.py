"""Dissecting: where in the backdoored model the trigger acts, beside its clean twin, and what removes it."""

import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd

from safetynet import __version__
from safetynet.errors import InputError
from safetynet.evaluation.evaluator import Evaluator
from safetynet.models.adapters import exchanged
from safetynet.pipeline.drawing import draw
from safetynet.pipeline.subjects import backdoored, epochs, model_folder, test_rows, trained, twin_of
from safetynet.recipe import Recipe
from safetynet.run.directory import Run

log = logging.getLogger("safetynet")
TABLES = (
    "effects", "tokens", "dynamics", "tradeoff", "lens", "lens_map", "probes", "attention", "divergence",
    "drift",
)  # fmt: skip
"""What a run may hold after this stage."""


def intervene(recipe: Recipe, run: Run, **wanted: Any) -> dict[str, pd.DataFrame]:
    """Sweep a trained run and write its tables of interventions.

    Args:
        recipe: of the run.
        run: trained.
        wanted: fields of `interventions.stage.Plan`; its defaults answer "where is it?".

    Returns:
        The tables.

    Raises:
        InputError: if nothing is trained or evaluated yet, a sweep or site does not exist, the prompts cannot
            be aligned, or the backdoor does not fire.
    """
    from safetynet.interventions import stage

    plan = stage.Plan(seed=recipe.seed, max_length=recipe.training.max_length, **wanted)
    inputs = {
        "models": {name: run.manifest["stages"].get(f"train {name}") for name in trained(recipe)},
        "interventions": asdict(plan),
        "evaluation": run.manifest["stages"].get("evaluate"),
        "version": __version__,
    }
    if run.finished("intervene", inputs):
        log.info("intervene: unchanged")
        return {name: run.table(name) for name in TABLES if run.has_table(name)}
    for name in trained(recipe):
        model_folder(run, name)
    if inputs["evaluation"] is None:
        raise InputError(
            f"{run.folder}: it is not evaluated yet. Run safetynet evaluate {run.folder} first: "
            "which prompts make the backdoor fire decides what can be asked."
        )
    rows = test_rows(run)
    model, serialiser = backdoored(recipe, run)
    subject = stage.Subject(
        model=model,
        serialiser=serialiser,
        twin=twin_of(recipe, run, model),
        epochs={step: partial(exchanged, model, path) for step, path in epochs(run).items()},
        adapters=epochs(run),
        respond=Evaluator.of(recipe, serialiser).answer,
        store=run.scratch / "interventions",
    )
    with run.stage("intervene", inputs) as outputs:
        tables = stage.dissect(subject, rows, plan)
        outputs += [run.write_table(name, table) for name, table in tables.items()]
    return tables


def intervene_and_draw(recipe: Recipe, run: Run) -> None:
    """Interventions as far as they can be made, then figures and report of all that there is.

    A backdoor that did not take, a style as trigger or an architecture that is not supported leave the
    interventions out. Whatever else they fail with is raised when the rest is drawn.

    Args:
        recipe: of the run.
        run: evaluated.

    Raises:
        Exception: what interventions failed with, if it is no InputError; errors of `draw`.
    """
    failure = None
    try:
        intervene(recipe, run)
    except InputError as error:
        log.warning("intervene: left out. %s", error)
    except Exception as error:  # noqa: BLE001  # raised again below
        failure = error
    draw(recipe, run)
    if failure is not None:
        raise failure
