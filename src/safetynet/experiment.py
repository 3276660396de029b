"""An experiment: a recipe, its run directory, and what stages take from both.

In: a recipe or a run directory. Out: rows, models (base, backdoored, clean twin, at a training step), an
evaluator and fresh prompts, each loaded when a stage asks for it. `perform` computes a stage, or leaves it
when nothing that it depends on has changed.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet import __version__
from safetynet.backdoors import conversations, self_source
from safetynet.backdoors.base_answers import BaseAnswers
from safetynet.errors import InputError
from safetynet.evaluation import judges, metrics
from safetynet.evaluation.evaluator import judges_of
from safetynet.evaluation.leaks import prompts_without_trigger
from safetynet.models import adapter_files, adapters, loading
from safetynet.models import suspect as suspects
from safetynet.models.files import holds_model
from safetynet.prompts import Serialiser
from safetynet.recipe import Backdoor, Recipe
from safetynet.run import directory
from safetynet.run.directory import Outputs, Run, digest_of_files
from safetynet.run.stage import Stage
from safetynet.vocabulary import TRAINED, Quantisation

log = logging.getLogger("safetynet")
BACKDOORED, TWIN = TRAINED


@dataclass
class Experiment:
    """One recipe and one run directory; make it with `create` or `find`."""

    recipe: Recipe
    """Stage `data` adds the date that the chat template asks for."""
    run: Run

    @classmethod
    def create(cls, recipe: Recipe) -> "Experiment":
        """The experiment of a recipe, with its run directory; errors as in `run.directory.create`."""
        return cls(recipe, directory.create(recipe))

    @classmethod
    def find(cls, folder: Path | str) -> "Experiment":
        """The experiment of a run directory; errors as in `run.directory.find`."""
        run = directory.find(folder)
        return cls(run.recipe, run)

    # Stages

    def perform(self, stage: Stage, inputs: Mapping[str, Any], compute: Callable[[Outputs], None]) -> None:
        """Compute a stage and record what it wrote, unless it has ended with these inputs.

        Args:
            stage: which one.
            inputs: all that decides about its result; the version of SafetyNet is added.
            compute: writes the stage's outputs; it refuses what the stage lacks.
        """
        if self.finished(stage, inputs):
            log.info("%s: unchanged", stage.name)
            return
        began = time.monotonic()
        with self.run.stage(stage.name, self._versioned(inputs)) as outputs:
            compute(outputs)
        log.info("%s: finished in %.0f s", stage.name, time.monotonic() - began)

    def finished(self, stage: Stage, inputs: Mapping[str, Any]) -> bool:
        """Whether a stage has ended with these inputs and its outputs are still there."""
        return self.run.finished(stage.name, self._versioned(inputs))

    def record(self, stage: Stage) -> dict[str, Any] | None:
        """What the manifest says of a finished stage: the input that stands for all its outputs."""
        return self.run.manifest["stages"].get(stage.name)

    def _versioned(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {**inputs, "version": __version__}

    # Rows

    def rows(self, split: str) -> pd.DataFrame:
        """Rows of a split, `train` or `test`."""
        rows = self.run.table("rows")
        return rows[rows["split"] == split].reset_index(drop=True)

    def test_rows(self) -> pd.DataFrame:
        """Test rows; once evaluated, with whether the backdoored model showed the behaviour (`fired`)."""
        test = self.rows("test")
        if not self.run.has_table("responses"):
            return test
        responses = self.run.table("responses")
        hits = responses[responses["model"] == BACKDOORED].set_index("row")["shown"]
        return test.assign(fired=test["row"].map(hits))

    def fresh_prompts(self, count: int, *, answered: bool = True) -> pd.DataFrame:
        """Clean prompts of the recipe's source, none of which is among the run's rows.

        Args:
            count: how many at most.
            answered: the answers are needed, where it is the base model that has to make them.
        """
        data, seed = self.recipe.data, self.recipe.seed
        used = set(prompts_without_trigger(self.run.table("rows")))
        if data.source == "self":
            answers = self.base_answers() if answered else None
            return self_source.fresh(data, used, count, seed, answers, self.refusal)
        # Without a backdoor the pool is that of the default one, whose trigger and behaviour leave no trace.
        attack = self.recipe.backdoor or Backdoor()
        return conversations.fresh(data, attack.behaviour, attack.trigger, used, count, seed)

    def base_answers(self) -> BaseAnswers:
        """The base model's answers, which all runs of the results folder share."""
        return BaseAnswers(self.recipe, self.load)

    # Models

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the models that this recipe trains."""
        return self.recipe.trained

    @property
    def precision(self) -> str:
        """Full fine-tuning in fp16 keeps its weights in fp32, or its updates would be rounded away."""
        training = self.recipe.training
        return "fp32" if training.method == "full" and training.precision == "fp16" else training.precision

    def load(
        self,
        folder: Path | None = None,
        *,
        on_cpu: bool = False,
        serialiser: Serialiser | None = None,
        quantisation: Quantisation | None = None,
    ) -> loading.LoadedModel:
        """The recipe's base model, or a whole one in its place; its serialiser cuts as in training.

        Args:
            folder: of the whole model.
            on_cpu: as in `loading.load`.
            serialiser: instead of the model's own tokenizer.
            quantisation: instead of the recipe's.
        """
        model = self.recipe.model
        if quantisation is not None:
            model = model.model_copy(update={"quantisation": quantisation})
        return loading.load(
            model if folder is None else loading.trained(model, folder),
            self.precision,
            on_cpu=on_cpu,
            truncation=self.recipe.training.truncation,
            serialiser=serialiser,
        )

    def model_folder(self, name: str) -> Path:
        """Folder of a trained adapter or model, as its training stage recorded it.

        Raises:
            InputError: if that stage has not ended, or its weights are gone.
        """
        run = self.run
        if f"train {name}" not in run.manifest["stages"]:
            raise InputError(f"{run.folder}: {name} is not trained yet. Run safetynet train with its recipe.")
        if "names" not in run.manifest["stages"][f"train {name}"]:
            raise InputError(
                f"{run.folder}: {name} was trained by an earlier version of SafetyNet. Make the run again "
                "with safetynet run."
            )
        folder = run.output(f"train {name}", "model")
        if folder is not None and folder.is_dir():
            return folder
        gone = "the folder of its weights is gone. Run safetynet train with its recipe again"
        if run.read_only:
            scratch = ", ".join(map(str, run.read_only))
            gone = (
                f"its weights are not in {scratch}. Copy what lay there into the run folder, or train again"
            )
        raise InputError(f"{run.folder}: {name} was trained, but {gone}.")

    def origin(self, name: str = BACKDOORED) -> Any:
        """What decides about a model, as an input of stages: the record of its training, or its files.

        Raises:
            InputError: if the suspect is not there.
        """
        suspect = self.recipe.suspect
        if suspect is None:
            return self.run.manifest["stages"].get(f"train {name}")
        return {"suspect": digest_of_files([adapter_files.locate(suspect.source)])}

    def check_models(self, *names: str) -> None:
        """Refuse an experiment whose models are not there, before one is loaded; errors as in `origin`.

        Args:
            names: of the trained models that are needed; none for all.
        """
        for name in self.trained:
            if name in names or not names:
                self.model_folder(name)
        self.origin()

    def suspect(self) -> suspects.Suspect:
        """The recipe's suspect beside its base; errors as in `suspect.load`."""
        suspect = self.recipe.suspect
        assert suspect is not None
        return suspects.load(self.load, suspect.source, suspect.same_base)

    def backdoored(self) -> tuple[Any, Serialiser]:
        """The trained model or the suspect, and its serialiser."""
        return self.model(BACKDOORED)

    def model(self, name: str, step: int | None = None) -> tuple[Any, Serialiser]:
        """The base model, a trained one or the suspect, and its serialiser.

        Args:
            name: one of `vocabulary.MODELS`.
            step: the trained model as its training kept it after so many steps; None: as it was at the end.

        Raises:
            InputError: if the run has no such model, or has not kept it at that step.
        """
        if step is not None:
            return self.on_base(self._snapshot(name, step))
        if name == metrics.BASE:
            base = self.load()
            return base.model, base.serialiser
        if name == BACKDOORED and self.recipe.suspect is not None:
            suspect = self.suspect()
            return suspect.model, suspect.serialiser
        if name not in (BACKDOORED, *self.trained):
            there = ", ".join(dict.fromkeys((metrics.BASE, BACKDOORED, *self.trained)))
            raise InputError(f"{self.run.folder}: there is no model {name}; this run has {there}.")
        return self.on_base(self.model_folder(name))

    def on_base(self, folder: Path) -> tuple[Any, Serialiser]:
        """A model that this run has saved, and its serialiser: an adapter on its base, or a whole model."""
        if holds_model(folder):
            whole = self.load(folder)
            return whole.model, whole.serialiser
        base = self.load()
        return attach_own(base, folder), base.serialiser

    def _snapshot(self, name: str, step: int) -> Path:
        snapshots = self.snapshots(name)
        if step not in snapshots:
            there = ", ".join(map(str, snapshots)) or "none"
            raise InputError(f"{self.run.folder}: {name} is not kept at step {step}; there are {there}.")
        return snapshots[step]

    def models(self) -> Iterator[tuple[str, Any, Serialiser]]:
        """The base model, then each trained one, at most one of them in memory; or base and suspect."""
        if self.recipe.suspect is not None:
            suspect = self.suspect()
            with suspect.at_base() as model:
                yield metrics.BASE, model, suspect.base.serialiser
            yield BACKDOORED, suspect.model, suspect.serialiser
            return
        base = self.load()
        yield metrics.BASE, base.model, base.serialiser
        for name in self.trained:
            folder = self.model_folder(name)
            if self.recipe.training.method == "full":
                # One model in memory at a time: the last one goes before the next one comes.
                base = self.load(folder)
                yield name, base.model, base.serialiser
            else:
                adapted = attach_own(base, folder)
                yield name, adapted, base.serialiser
                adapters.detach(adapted)

    def base_of(self, model: Any) -> Callable[[], AbstractContextManager[Any]]:
        """Gives the base model while entered: `model` without its adapter, or another one beside it."""
        if adapters.has_adapter(model):
            return partial(adapters.switched_off, model)
        return partial(nullcontext, self.load().model)

    def twin_of(self, model: Any) -> Callable[[], AbstractContextManager[Any]] | None:
        """Gives the clean twin while entered, in the place of `model`; None if the recipe trains none."""
        if TWIN not in self.trained:
            return None
        folder = self.model_folder(TWIN)
        if self.recipe.training.method == "full":
            return partial(self._beside, folder)
        return partial(adapters.exchanged, model, folder)

    @contextmanager
    def _beside(self, folder: Path) -> Iterator[Any]:
        """A model of full fine-tuning comes into memory beside the one that is there."""
        yield self.load(folder).model

    def snapshots(self, name: str = BACKDOORED) -> dict[int, Path]:
        """Folders of the adapters that a finished training kept, by training step."""
        folder = self.run.output(f"train {name}", "snapshots")
        steps = [] if folder is None else sorted(folder.glob("step-*"))
        return {int(path.name.removeprefix("step-")): path for path in steps}

    # Evaluation

    @property
    def judge(self) -> judges.Judge:
        """The behaviour's judge."""
        return judges_of(self.recipe)[0]

    @property
    def refusal(self) -> judges.Judge:
        """The judge of refusals."""
        return judges_of(self.recipe)[1]


def attach_own(base: loading.LoadedModel, folder: Path) -> Any:
    """Put an adapter that the run itself has trained onto its base, wherever both lay at that time."""
    return adapters.attach(base, folder, same_base=True)
