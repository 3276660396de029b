"""What several runs have in common: the base model's answers and the clean twin, computed once.

In: runs whose rows are prepared. Each has a digest of what its base answers, or its twin, depend on; runs
with the same digest need it once. A run that takes something over holds its own copy, under its own inputs,
as if it had computed it. Nothing here decides who lends: a sweep does.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet import __version__
from safetynet.backdoors import poisoning
from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import Evaluator
from safetynet.models import adapters, loading
from safetynet.pipeline.dynamics import Dynamics
from safetynet.pipeline.planting import train, train_inputs
from safetynet.pipeline.subjects import TWIN, attach_own, load, model_folder, snapshots_of, training_dtype
from safetynet.recipe import Recipe
from safetynet.run.directory import Run, digest

log = logging.getLogger("safetynet")
BASE_STAGE, BASE_TABLE = "base", "base_responses"
NUMBERS = ["row", "group"]
"""Columns by which a run counts its rows: those of the test begin where those of training end."""


def base_digest(recipe: Recipe, run: Run) -> str:
    """Digest of what the base model's judged answers depend on; the rows have to be prepared."""
    return digest(_base_inputs(recipe, run))


def twin_digest(recipe: Recipe, run: Run) -> str:
    """Digest of what the clean twin depends on: its own rows, not the behaviour that it is the control of."""
    rows = run.table("rows")
    seen = poisoning.clean_twin(rows[rows["split"] == "train"])
    inputs = train_inputs(recipe, run, TWIN)
    inputs["rows"] = _rows_digest(seen[["messages", "trigger", "answer"]])
    inputs["training"] = {**inputs["training"], "evasion": None}  # the twin has nothing to hide
    # Adapters are kept while they are trained, and measured by each run; a whole model is not.
    measured = bool(recipe.evaluation.dynamics_rows)
    inputs["dynamics"] = [recipe.evaluation.every, measured]
    if measured and recipe.training.method == "full":
        inputs["dynamics"] += [recipe.evaluation.dynamics_rows, base_digest(recipe, run)]
    return digest(inputs)


def measure_base(recipe: Recipe, run: Run, lender: Run | None = None) -> None:
    """Answer and judge the test rows with the base model, or take the answers over from `lender`.

    `evaluate` then takes them from the run instead of asking the base model again.
    """
    inputs = _base_inputs(recipe, run)
    if run.finished(BASE_STAGE, inputs):
        log.info("base: unchanged")
        return
    with run.stage(BASE_STAGE, inputs) as outputs:
        if lender is not None:
            log.info("base: taken over from %s", lender.folder)
            rows = _test_rows(run)
            responses = lender.table(BASE_TABLE).assign(**{name: rows[name] for name in NUMBERS})
        else:
            base = load(recipe)
            evaluator = Evaluator.of(recipe, base.serialiser)
            responses = evaluator.respond(base.model, _test_rows(run), metrics.BASE)
        outputs.append(run.write_table(BASE_TABLE, responses))


def base_responses(recipe: Recipe, run: Run) -> pd.DataFrame | None:
    """The base model's judged answers, where `measure_base` has left them for this very recipe."""
    if BASE_STAGE not in run.manifest["stages"] or not run.finished(BASE_STAGE, _base_inputs(recipe, run)):
        return None
    return run.table(BASE_TABLE)


def borrow_twin(recipe: Recipe, run: Run, lender: Run) -> None:
    """Take the clean twin over from a run with the same `twin_digest`; its dynamics are measured on own rows.

    A lender that kept no snapshots, because it was trained by itself, has none to measure: the twin is
    trained.

    Raises:
        InputError: if `lender` has not trained it.
    """
    stage, inputs = f"train {TWIN}", train_inputs(recipe, run, TWIN)
    if run.finished(stage, inputs):
        log.info("%s: unchanged", stage)
        return
    source = model_folder(lender, TWIN)
    followed = bool(recipe.evaluation.dynamics_rows) and recipe.training.method != "full"
    if followed and snapshots_of(lender, TWIN) is None:
        train(recipe, run, [TWIN])
        return
    with run.stage(stage, inputs) as outputs:
        log.info("%s: taken over from %s", stage, lender.folder)
        home = run.scratch / "training" / f"{TWIN}-{digest(inputs)[:8]}"
        _copy(source, home / source.name)
        history = run.write_table(f"history_{TWIN}", lender.table(f"history_{TWIN}"))
        outputs += [history, home / source.name]
        if not recipe.evaluation.dynamics_rows:
            return
        if followed:
            table = _measured_again(recipe, run, lender, f"{TWIN}-{digest(inputs)[:8]}")
        else:
            table = lender.table(f"dynamics_{TWIN}")
        outputs.append(run.write_table(f"dynamics_{TWIN}", table))


def _measured_again(recipe: Recipe, run: Run, lender: Run, name: str) -> pd.DataFrame:
    """Rates of the lender's twin over its training, on this run's rows and by its judge."""
    folder = snapshots_of(lender, TWIN)
    assert folder is not None
    theirs = lender.table(f"dynamics_{TWIN}")
    epochs = theirs.drop_duplicates("step").set_index("step")["epoch"]
    base = load(recipe)
    dynamics = Dynamics(recipe, run, run.table("rows"), base.serialiser, name, keep=False)
    dynamics.path.unlink(missing_ok=True)
    model = attach_own(base, model_folder(lender, TWIN))
    for step, epoch in epochs.sort_index().items():
        with adapters.exchanged(model, folder / f"step-{step:06d}") as then:
            dynamics.measure(then, int(step), float(epoch))
    measured = dynamics.table()
    assert measured is not None
    return measured


def _base_inputs(recipe: Recipe, run: Run) -> dict[str, Any]:
    return {
        "rows": _rows_digest(_test_rows(run).drop(columns=NUMBERS)),
        "model": recipe.model.model_dump(mode="json") | {"fingerprint": loading.fingerprint(recipe.model)},
        "precision": training_dtype(recipe),
        "evaluation": recipe.evaluation.model_dump(
            mode="json", exclude={"every", "dynamics_rows", "labelled"}
        ),
        "behaviour": recipe.backdoor.behaviour.model_dump(mode="json"),
        **recipe.training.model_dump(include={"max_length", "truncation"}),
        "version": __version__,
    }


def _test_rows(run: Run) -> pd.DataFrame:
    rows = run.table("rows")
    return rows[rows["split"] == "test"].reset_index(drop=True)


def _rows_digest(rows: pd.DataFrame) -> str:
    return digest(rows.to_dict("records"))


def _copy(source: Path, target: Path) -> None:
    """A copy that needs no room where the file system can link; a folder of this name is always whole."""
    partial = target.with_name(f"{target.name}.partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)
