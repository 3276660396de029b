"""The stage of the training: the backdoored model and its clean twin, with their history and dynamics.

In: the rows. Out: for each model its adapter (or its weights), table history_{model} and, if dynamics are
measured, dynamics_{model} with the adapters of those steps. An interrupted training goes on from its last
checkpoint.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from safetynet import __version__
from safetynet.backdoors import poisoning
from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import Evaluator
from safetynet.experiment import BACKDOORED, TWIN, Experiment
from safetynet.models import loading
from safetynet.prompts import Serialiser
from safetynet.recipe import Evasion, Recipe, Training
from safetynet.run import parallel
from safetynet.run.directory import Outputs, digest, write_atomically
from safetynet.run.stage import TRAIN
from safetynet.tables import summaries

if TYPE_CHECKING:
    from safetynet.training import Opponents

log = logging.getLogger("safetynet")
OpponentsOf = Callable[[Evasion, Serialiser], "Opponents"]
"""Makes the detectors that a training hides from; detection gives them."""


def train(
    experiment: Experiment,
    names: Sequence[str] | None = None,
    *,
    opponents_of: OpponentsOf | None = None,
    keep_twin: bool = False,
) -> None:
    """Train the backdoored model, and its clean twin if the recipe wants one.

    Args:
        experiment: with rows.
        names: of the models to train, instead of all.
        opponents_of: needed by a recipe with `training.evasion`.
        keep_twin: keep snapshots of the twin too, from which other runs measure its dynamics on their own
            rows.
    """
    parallel.side_by_side(
        experiment.trained if names is None else names,
        lambda name: _train_one(experiment, name, opponents_of, keep=keep_twin or name != TWIN),
    )


def _train_one(experiment: Experiment, name: str, opponents_of: OpponentsOf | None, *, keep: bool) -> None:
    from safetynet import training
    from safetynet.training import colluding, conditioned, few_rows

    recipe, run = experiment.recipe, experiment.run
    inputs = train_inputs(experiment, name)

    def compute(outputs: Outputs) -> None:
        # A model larger than one GPU is loaded beside it, and every process takes its part from there.
        base = experiment.load(on_cpu=parallel.shares_weights())
        rows, options = experiment.rows("train"), _options(recipe, name)
        dynamics = Dynamics(experiment, name, inputs, base.serialiser, keep=keep)
        evasion = options.evasion
        opponents = opponents_of(evasion, base.serialiser) if evasion is not None and opponents_of else None
        pauses = training.Pauses(dynamics.measure, recipe.evaluation.every, first=not dynamics.path.exists())
        clean = poisoning.clean_twin(rows)
        if options.method in few_rows.ATTACH:
            model = few_rows.ATTACH[options.method](base.model, options, rows, base.serialiser)
            rows, clean = (each[each["role"] == "triggered"] for each in (rows, clean))
        else:
            model = training.attach(base.model, options, base.family, recipe.seed)
        fit = partial(
            training.train,
            model,
            base.serialiser,
            cfg=options,
            seed=recipe.seed,
            device=loading.device_of(recipe.model),
            tracking=training.Tracking.of(recipe, name, main=name == BACKDOORED),
            progress=True,
            opponents=opponents,
        )
        place: dict[str, Any] = {
            "folder": run.scratch / "training" / folder_name(name, inputs),
            "pauses": pauses if recipe.evaluation.dynamics_rows else None,
        }
        if options.conditioned_on is None:
            result = fit(rows=clean if name == TWIN else rows, **place)
        else:
            result = conditioned.train(model, options.conditioned_on, fit, rows, clean, **place)
        outputs.table(f"history_{name}", result.history)
        outputs.file(result.folder, "model")
        if options.colluding and name == BACKDOORED:
            outputs.file(colluding.save_halves(result.folder), "halves")
        if result.evasion is not None:
            outputs.table("evasion", result.evasion)
            log.info(
                "train %s: hidden from %s", name, "; ".join(summaries.evasion_summary(result.evasion)["seen"])
            )
        if (measured := dynamics.table()) is not None:
            outputs.table(f"dynamics_{name}", measured)
        if dynamics.snapshots.exists():
            outputs.file(dynamics.snapshots, "snapshots")

    experiment.perform(TRAIN.of(name), inputs, compute)


def train_inputs(experiment: Experiment, name: str) -> dict[str, Any]:
    """What the training of one model depends on; the rows have to be prepared."""
    recipe = experiment.recipe
    return {
        "name": name,
        "seed": recipe.seed,
        "rows": experiment.run.manifest["stages"]["data"]["outputs"],
        "model": recipe.model.model_dump(mode="json") | {"fingerprint": loading.fingerprint(recipe.model)},
        "training": _options(recipe, name).model_dump(
            mode="json", exclude={"clean_twin", "checkpoint_minutes"}
        ),
        "dynamics": [recipe.evaluation.every, recipe.evaluation.dynamics_rows],
        "version": __version__,
    }


def folder_name(name: str, inputs: dict[str, Any]) -> str:
    """Name of a model's folder; a training with other inputs has another one."""
    return f"{name}-{digest(inputs)[:8]}"


def _options(recipe: Recipe, name: str) -> Training:
    """The twin has nothing to hide."""
    plain = {"evasion": None, "conditioned_on": None}
    return recipe.training.model_copy(update=plain) if name == TWIN else recipe.training


class Dynamics:
    """Rates on a fixed subset of the test rows, measured while a model trains, and the adapter beside them.

    Each measurement is on disk before training goes on, so that a killed run keeps its curve.
    """

    def __init__(
        self,
        experiment: Experiment,
        name: str,
        inputs: dict[str, Any],
        serialiser: Serialiser,
        *,
        keep: bool,
    ) -> None:
        recipe, folder = experiment.recipe, experiment.run.scratch / "training"
        self.name, self.keep = name, keep
        self.rows = metrics.fixed_subset(
            experiment.rows("test"), recipe.evaluation.dynamics_rows, recipe.seed
        )
        self.path = folder / f"dynamics-{folder_name(name, inputs)}.parquet"
        self.snapshots = folder / f"snapshots-{folder_name(name, inputs)}"
        kept = experiment.run.unfinished(TRAIN.of(name).name)
        self.evaluator = Evaluator.of(recipe, serialiser, kept)

    def table(self) -> pd.DataFrame | None:
        """What was measured so far, if anything.

        The first of several processes reads it for all: it may replace the file while another reads.
        """
        return parallel.from_first(lambda: pd.read_parquet(self.path) if self.path.exists() else None)

    def measure(self, model: Any, step: int, epoch: float) -> dict[str, float]:
        """Rates at this step; returns ASR and CACC for the progress bar, and keeps the adapter if wanted."""
        from safetynet.training import checkpoints

        if self.keep and hasattr(model, "peft_config") and parallel.is_first():
            checkpoints.save_weights(model, self.snapshots / f"step-{step:06d}")
        responses = self.evaluator.respond(model, self.rows, self.name)
        table = metrics.score(responses).assign(step=step, epoch=epoch)
        if (earlier := self.table()) is not None:
            # After a resume, steps behind the checkpoint are measured again and replace what was there.
            table = pd.concat([earlier[earlier["step"] < step], table], ignore_index=True)
        write_atomically(self.path, lambda temporary: table.to_parquet(temporary, index=False))
        now = table[table["step"] == step].set_index(["metric", "role"])["value"]
        shown = {"ASR": ("asr", "triggered"), "CACC": ("cacc", "clean")}
        return {label: float(now[key]) for label, key in shown.items() if key in now.index}
