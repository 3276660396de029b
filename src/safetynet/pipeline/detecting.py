"""Detection on demand: a monitor of fresh clean prompts, and the model under its eyes."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet import __version__
from safetynet.backdoors import conversations
from safetynet.errors import InputError
from safetynet.pipeline.subjects import BACKDOORED, backdoored, model_folder, test_rows
from safetynet.prompts import prompt_hash
from safetynet.recipe import Recipe
from safetynet.run import Run

log = logging.getLogger("safetynet")


def detect(recipe: Recipe, run: Run, detectors: Sequence[str], rate: float, clean: int) -> str:
    """Make a monitor of fresh clean prompts, measure it on the test rows, and say what it keeps.

    Returns:
        One sentence: the realised false-positive rate with its interval.

    Raises:
        InputError: if nothing is trained yet, or the clean prompts cannot support the rate.
    """
    from safetynet.detection import stage

    plan = stage.Plan.of(
        detectors,
        rate,
        seed=recipe.seed,
        batch_size=recipe.evaluation.batch_size,
        max_length=recipe.training.max_length,
    )
    inputs = {
        "model": run.manifest["stages"].get(f"train {BACKDOORED}"),
        "detection": [list(detectors), rate, clean],
        "version": __version__,
    }
    model_folder(run, BACKDOORED)  # what is not trained yet is said at once
    rows = run.table("rows")
    used = {prompt_hash(m, t) for m, t in zip(rows["messages"], rows["trigger"], strict=True)}
    attack = recipe.backdoor
    prompts = conversations.fresh(recipe.data, attack.behaviour, attack.trigger, used, clean, recipe.seed)
    plan.check(len(prompts))
    model, serialiser = backdoored(recipe, run)
    with run.stage("detect", inputs) as outputs:
        found = stage.detect(
            model, serialiser, prompts, _triggers_that_fired(run), plan, cache=run.scratch / "features"
        )
        path = run.scratch / "detection" / "monitor.safetensors"
        found.monitor.save(path)
        outputs += [path, run.write_table("detection", found.table)]
        outputs.append(run.write_table("detection_scores", found.scores))
    log.info("detect: false positives %s", found.estimate)
    return str(found.estimate)


def guard(recipe: Recipe, run: Run, rate: float, action: str, log_to: Path | None) -> Any:
    """The backdoored model under its monitor, ready to generate.

    Raises:
        InputError: if `detect` has not run, the action is none, or the monitor cannot claim the rate.
    """
    from safetynet.detection.guard import Guard, share_of_rate
    from safetynet.detection.monitor import Monitor

    path = run.scratch / "detection" / "monitor.safetensors"
    if not path.exists():
        raise InputError(f"{run.folder}: there is no monitor yet. Run safetynet detect {run.folder} first.")
    monitor = Monitor.load(path)
    share_of_rate(monitor, rate, action)  # what cannot be had is said before a model is loaded
    model, serialiser = backdoored(recipe, run)
    return Guard(model, serialiser, monitor, rate=rate, action=action, log=log_to)  # type: ignore[arg-type]


def _triggers_that_fired(run: Run) -> pd.DataFrame:
    """Test rows; whether a row fired is asked of triggered ones alone."""
    test = test_rows(run)
    return test.assign(fired=test["fired"].where(test["role"] == "triggered")) if "fired" in test else test
