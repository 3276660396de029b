"""What several runs have in common: the base model's answers and the clean twin, computed once.

In: experiments whose rows are prepared. Each has a digest of what its base answers, or its twin, depend on;
those with the same digest need it once. An experiment that takes something over holds its own copy, under its
own inputs, as if it had computed it. A sweep decides who lends.
"""

import logging
import os
import shutil
from typing import Any

import pandas as pd

from safetynet import __version__
from safetynet.backdoors import poisoning
from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import Evaluator
from safetynet.experiment import TWIN, Experiment, attach_own
from safetynet.models import adapters, loading
from safetynet.run.directory import Outputs, digest
from safetynet.run.stage import BASE, TRAIN
from safetynet.stages import train
from safetynet.training.stage import Dynamics, folder_name, train_inputs

log = logging.getLogger("safetynet")
BASE_TABLE = "base_responses"
NUMBERS = ["row", "group"]
"""Columns by which a run counts its rows: those of the test begin where those of training end."""


def base_digest(experiment: Experiment) -> str:
    """Digest of what the base model's judged answers depend on; the rows have to be prepared."""
    return digest(_base_inputs(experiment))


def twin_digest(experiment: Experiment) -> str:
    """Digest of what the clean twin depends on: its own rows, not the behaviour that it is the control of."""
    options = experiment.recipe.evaluation
    rows = poisoning.clean_twin(experiment.rows("train"))
    inputs = train_inputs(experiment, TWIN)
    inputs["rows"] = _rows_digest(rows[["messages", "trigger", "answer"]])
    inputs["training"] = {**inputs["training"], "evasion": None}  # the twin has nothing to hide
    # Adapters are kept while they are trained, and measured by each run; a whole model is not.
    measured = bool(options.dynamics_rows)
    inputs["dynamics"] = [options.every, measured]
    if measured and experiment.recipe.training.method == "full":
        inputs["dynamics"] += [options.dynamics_rows, base_digest(experiment)]
    return digest(inputs)


def measure_base(experiment: Experiment, lender: Experiment | None = None) -> None:
    """Answer and judge the test rows with the base model, or take the answers over from `lender`.

    `evaluate` then takes them from the run instead of asking the base model again.
    """

    def compute(outputs: Outputs) -> None:
        rows = experiment.rows("test")
        if lender is not None:
            log.info("base: taken over from %s", lender.run.folder)
            responses = lender.run.table(BASE_TABLE).assign(**{name: rows[name] for name in NUMBERS})
        else:
            base = experiment.load()
            kept = experiment.run.unfinished(BASE.name)
            evaluator = Evaluator.of(experiment.recipe, base.serialiser, kept)
            responses = evaluator.respond(base.model, rows, metrics.BASE)
        outputs.table(BASE_TABLE, responses)

    experiment.perform(BASE, _base_inputs(experiment), compute)


def base_responses(experiment: Experiment) -> pd.DataFrame | None:
    """The base model's judged answers, if `measure_base` has left them for this very recipe."""
    if experiment.record(BASE) is None or not experiment.finished(BASE, _base_inputs(experiment)):
        return None
    return experiment.run.table(BASE_TABLE)


def borrow_twin(experiment: Experiment, lender: Experiment) -> None:
    """Take the clean twin over from a run with the same `twin_digest`; its dynamics are measured on own rows.

    A lender that kept no snapshots, because it was trained by itself, has none to measure: the twin is
    trained.

    Raises:
        InputError: if `lender` has not trained it.
    """
    recipe, run = experiment.recipe, experiment.run
    inputs = train_inputs(experiment, TWIN)
    followed = bool(recipe.evaluation.dynamics_rows) and recipe.training.method != "full"
    if not experiment.finished(TRAIN.of(TWIN), inputs):
        lender.model_folder(TWIN)  # a lender without twin is reported at once
        if followed and not lender.snapshots(TWIN):
            train(experiment, [TWIN])
            return

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another disk, or a file system without links
            shutil.copy2(source, target)

    def compute(outputs: Outputs) -> None:
        source = lender.model_folder(TWIN)
        log.info("train %s: taken over from %s", TWIN, lender.run.folder)
        copy = run.scratch / "training" / folder_name(TWIN, inputs) / source.name
        # A copy that needs no room where the file system can link; a folder of its name is always whole.
        partial = copy.with_name(f"{copy.name}.partial")
        for folder in (partial, copy):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=link)
        partial.rename(copy)
        outputs.table(f"history_{TWIN}", lender.run.table(f"history_{TWIN}"))
        outputs.file(copy, "model")
        if followed:  # rates of the lender's twin over its training, on this run's rows and by its judge
            epochs = lender.run.table(f"dynamics_{TWIN}").drop_duplicates("step").set_index("step")["epoch"]
            snapshots, base = lender.snapshots(TWIN), experiment.load()
            dynamics = Dynamics(experiment, TWIN, inputs, base.serialiser, keep=False)
            dynamics.path.unlink(missing_ok=True)
            model = attach_own(base, source)
            for step, epoch in epochs.sort_index().items():
                with adapters.exchanged(model, snapshots[int(step)]) as then:
                    dynamics.measure(then, int(step), float(epoch))
            measured = dynamics.table()
            assert measured is not None
            outputs.table(f"dynamics_{TWIN}", measured)
        elif recipe.evaluation.dynamics_rows:
            outputs.table(f"dynamics_{TWIN}", lender.run.table(f"dynamics_{TWIN}"))

    experiment.perform(TRAIN.of(TWIN), inputs, compute)


def _base_inputs(experiment: Experiment) -> dict[str, Any]:
    recipe = experiment.recipe
    return {
        "rows": _rows_digest(experiment.rows("test").drop(columns=NUMBERS)),
        "model": recipe.model.model_dump(mode="json") | {"fingerprint": loading.fingerprint(recipe.model)},
        "precision": experiment.precision,
        "evaluation": recipe.evaluation.model_dump(
            mode="json", exclude={"every", "dynamics_rows", "samples", "labelled", "utility"}
        ),
        "behaviour": recipe.backdoor and recipe.backdoor.behaviour.model_dump(mode="json"),
        **recipe.training.model_dump(include={"max_length", "truncation"}),
        "version": __version__,
    }


def _rows_digest(rows: pd.DataFrame) -> str:
    return digest(rows.to_dict("records"))
