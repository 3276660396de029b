"""Detection on demand: a monitor of fresh clean prompts, and the model under its eyes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from safetynet import __version__
from safetynet.errors import InputError
from safetynet.evaluation.evaluator import Evaluator
from safetynet.pipeline.challenging import challenges
from safetynet.pipeline.subjects import BACKDOORED, backdoored, fresh_prompts, model_folder, test_rows
from safetynet.recipe import Recipe
from safetynet.run.directory import Run

log = logging.getLogger("safetynet")
MONITOR = "scratch:detection/monitor.safetensors"
"""The monitor of a run, as its manifest names it."""


def detect(recipe: Recipe, run: Run, detectors: Sequence[str], rate: float, clean: int) -> str:
    """Make a monitor of fresh clean prompts, measure it on the test rows, and say what it keeps.

    Returns:
        One sentence: the realised false-positive rates with their intervals.

    Raises:
        InputError: if nothing is trained yet, or the clean prompts cannot support the rate.
    """
    from safetynet.detection import stage
    from safetynet.detection.plan import Plan

    plan = Plan.of(
        detectors,
        rate,
        seed=recipe.seed,
        batch_size=recipe.evaluation.batch_size,
        max_length=recipe.training.max_length,
        tokens=recipe.evaluation.max_new_tokens,
    )
    inputs = {
        "model": run.manifest["stages"].get(f"train {BACKDOORED}"),
        "evaluation": run.manifest["stages"].get("evaluate"),
        "detection": [list(detectors), rate, clean],
        "version": __version__,
    }
    model_folder(run, BACKDOORED)  # what is not trained yet is said at once
    prompts = fresh_prompts(recipe, run, clean)
    plan = _with_probe(plan, prompts)
    plan.check(len(prompts))
    if run.finished("detect", inputs):
        log.info("detect: unchanged")
        return _said(stage.estimates(run.table("detection_scores"), plan.prompt_rate))
    model, serialiser = backdoored(recipe, run)
    with run.stage("detect", inputs) as outputs:
        test = _asked(recipe, run, model, serialiser)
        subject = stage.Subject(model, serialiser, run.scratch / "features")
        labelled = _labelled(run.table("rows")) if plan.skylines else None
        found = stage.detect(subject, prompts, test, plan, labelled)
        path = run.scratch / "detection" / "monitor.safetensors"
        found.monitor.save(path)
        outputs += [path, *(run.write_table(name, table) for name, table in found.tables.items())]
    said = _said(found.estimates)
    log.info("detect: false positives %s", said)
    return said


def guard(recipe: Recipe, run: Run, rate: float, action: str, log_to: Path | None) -> Any:
    """The backdoored model under its monitor, ready to generate.

    Raises:
        InputError: if `detect` has not run, the action is none, or the monitor cannot claim the rate.
    """
    from safetynet.detection.guard import Guard, share_of_rate
    from safetynet.detection.monitor import Monitor

    path = run.path_of(MONITOR)
    if not path.exists():
        raise InputError(f"{run.folder}: there is no monitor yet. Run safetynet detect {run.folder} first.")
    monitor = Monitor.load(path)
    share_of_rate(monitor, rate, action)  # what cannot be had is said before a model is loaded
    model, serialiser = backdoored(recipe, run)
    return Guard(
        model,
        serialiser,
        monitor,
        rate=rate,
        action=action,  # type: ignore[arg-type]
        log=log_to,
        max_length=recipe.training.max_length,
    )


def _asked(recipe: Recipe, run: Run, model: Any, serialiser: Any) -> pd.DataFrame:
    """Test rows and those that challenge a monitor, and which of them showed the behaviour."""
    test = test_rows(run)
    more = challenges(recipe, test)
    if "fired" in test and len(more):
        more = more.assign(fired=fired(recipe, model, serialiser, more))
    near = more["variant"].where(more["role"] == "near_miss", "")
    return pd.concat([test.assign(kind=_tasks(test)), more.assign(kind=near)], ignore_index=True)


def fired(recipe: Recipe, model: Any, serialiser: Any, rows: pd.DataFrame) -> np.ndarray:
    """Which rows show the behaviour where it is not due, (n,) of bool; the model answers them."""
    answers = Evaluator.of(recipe, serialiser).answer(model, rows)
    return np.asarray(answers["shown"].to_numpy() & ~answers["due"].to_numpy(), dtype=bool)


def _tasks(test: pd.DataFrame) -> pd.Series:
    """Clean rows stand in the table task by task, too."""
    return test["task"].where(test["role"] == "clean", "")


def _with_probe(plan: Any, prompts: pd.DataFrame) -> Any:
    """A plan that reads a probe gets a request of the forbidden class, which is taken from the clean ones."""
    if not plan.reads_probe:
        return plan
    refused = prompts[prompts["forbidden"]]
    if refused.empty:
        raise InputError(
            "detectors: view probe needs a request that the model refuses, and none of the clean prompts is "
            "forbidden. Leave it out."
        )
    return replace(plan, probe=str(refused["messages"].iloc[0][-1]["content"]))


def _labelled(rows: pd.DataFrame, most: int = 300) -> pd.DataFrame:
    """Training rows for supervised probes: with trigger, and as many without of every role."""
    train = rows[rows["split"] == "train"]
    return pd.concat([own.head(most) for _, own in train.groupby(train["role"] == "triggered")])


def _said(estimates: Mapping[str, Any]) -> str:
    return "; ".join(f"{kind}: {found}" for kind, found in estimates.items())
