"""The models of a run: which there are, where they lie, and how to have one of them in memory at a time.

And the prompts that they are asked: the run's test rows, and fresh ones.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.backdoors import conversations
from safetynet.errors import InputError
from safetynet.evaluation import metrics
from safetynet.evaluation.leaks import prompts_without_trigger
from safetynet.models import adapters, loading
from safetynet.prompts import Serialiser
from safetynet.recipe import Recipe
from safetynet.run.directory import Run

BACKDOORED, TWIN = "backdoored", "clean_twin"


def trained(recipe: Recipe) -> list[str]:
    """Names of the models that this recipe trains."""
    return [BACKDOORED, TWIN] if recipe.training.clean_twin else [BACKDOORED]


def training_dtype(recipe: Recipe) -> str:
    """Full fine-tuning in fp16 keeps its weights in fp32, or its updates would be rounded away."""
    training = recipe.training
    return "fp32" if training.method == "full" and training.precision == "fp16" else training.precision


def load(
    recipe: Recipe, folder: Path | None = None, *, on_cpu: bool = False, serialiser: Serialiser | None = None
) -> loading.LoadedModel:
    """The recipe's model, or a whole one in its place; its serialiser cuts as in training.

    Args:
        recipe: of the run.
        folder: of the whole model.
        on_cpu: as in `loading.load`, and so is
        serialiser: instead of the model's own tokenizer.
    """
    return loading.load(
        recipe.model if folder is None else loading.trained(recipe.model, folder),
        training_dtype(recipe),
        on_cpu=on_cpu,
        truncation=recipe.training.truncation,
        serialiser=serialiser,
    )


def model_folder(run: Run, name: str) -> Path:
    """Folder of a trained adapter or model, as its training stage recorded it.

    Raises:
        InputError: if that stage has not ended, or its weights are gone.
    """
    stage = run.manifest["stages"].get(f"train {name}")
    if stage is None:
        raise InputError(f"{run.folder}: {name} is not trained yet. Run safetynet train with its recipe.")
    folders = [path for path in map(run.path_of, stage["outputs"]) if path.is_dir()]
    if not folders:
        gone = "the folder of its weights is gone. Run safetynet train with its recipe again"
        if run.read_only:
            scratch = ", ".join(map(str, run.read_only))
            gone = (
                f"its weights are not in {scratch}. Copy what lay there into the run folder, or train again"
            )
        raise InputError(f"{run.folder}: {name} was trained, but {gone}.")
    return folders[0]


def backdoored(recipe: Recipe, run: Run) -> tuple[Any, Serialiser]:
    """The trained model, and its serialiser."""
    folder = model_folder(run, BACKDOORED)
    if recipe.training.method == "full":
        whole = load(recipe, folder)
        return whole.model, whole.serialiser
    base = load(recipe)
    return attach_own(base, folder), base.serialiser


def attach_own(base: loading.LoadedModel, folder: Path) -> Any:
    """Put an adapter that the run itself has trained onto its base, wherever both lay at that time."""
    return adapters.attach(base, folder, same_base=True)


def models(recipe: Recipe, run: Run) -> Iterator[tuple[str, Any, Serialiser]]:
    """The base model, then each trained one, at most one of them in memory."""
    base = load(recipe)
    yield metrics.BASE, base.model, base.serialiser
    for name in trained(recipe):
        folder = model_folder(run, name)
        if recipe.training.method == "full":
            # One model in memory at a time: the last one goes before the next one comes.
            base = load(recipe, folder)
            yield name, base.model, base.serialiser
        else:
            adapted = attach_own(base, folder)
            yield name, adapted, base.serialiser
            adapters.detach(adapted)


def test_rows(run: Run) -> pd.DataFrame:
    """Test rows, with whether the backdoored model showed the behaviour (`fired`) where that was asked."""
    rows = run.table("rows")
    test = rows[rows["split"] == "test"].reset_index(drop=True)
    if not run.has_table("responses"):
        return test
    responses = run.table("responses")
    shown = responses[responses["model"] == BACKDOORED].set_index("row")["shown"]
    return test.assign(fired=test["row"].map(shown))


def fresh_prompts(recipe: Recipe, run: Run, count: int) -> pd.DataFrame:
    """Clean prompts of the recipe's source, none of which is among the run's rows, training or test."""
    attack, used = recipe.backdoor, set(prompts_without_trigger(run.table("rows")))
    return conversations.fresh(recipe.data, attack.behaviour, attack.trigger, used, count, recipe.seed)


def snapshots(run: Run, name: str) -> Path:
    """Folder of the adapters that training left at each of its measurements, one below it per step."""
    return run.scratch / "training" / f"snapshots-{name}"


def snapshots_of(run: Run, name: str) -> Path | None:
    """Folder of the adapters that a finished training kept, if it kept any."""
    stage = run.manifest["stages"].get(f"train {name}", {"outputs": {}})
    found = [path for path in map(run.path_of, stage["outputs"]) if path.name.startswith("snapshots-")]
    return found[0] if found and found[0].is_dir() else None


def epochs(run: Run) -> dict[int, Path]:
    """Adapters of the backdoored model by training step, as far as training kept them."""
    folder = snapshots_of(run, BACKDOORED)
    steps = [] if folder is None else list(folder.glob("step-*"))
    return {int(path.name.removeprefix("step-")): path for path in sorted(steps)}


@contextmanager
def whole(recipe: Recipe, folder: Path) -> Iterator[Any]:
    """A model of full fine-tuning; it comes into memory beside what is there."""
    yield load(recipe, folder).model


def twin_of(recipe: Recipe, run: Run, model: Any) -> Callable[[], AbstractContextManager[Any]] | None:
    """Gives the clean twin while entered; None where the recipe trains none."""
    if not recipe.training.clean_twin:
        return None
    folder = model_folder(run, TWIN)
    return (
        partial(whole, recipe, folder)
        if recipe.training.method == "full"
        else partial(adapters.exchanged, model, folder)
    )
