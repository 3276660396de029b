"""The stage of the data: rows by role, refused before any training if something would spoil the result.

In: a recipe. Out: tables rows, split and (for files of the user) audit; the recipe is named in the run's
manifest. Source `self` loads the base model, if prompts are new to it.
"""

import datetime
import logging
from pathlib import Path

import pandas as pd

from safetynet.backdoors import audit, conversations, forms, poisoning, self_source
from safetynet.errors import InputError
from safetynet.evaluation import judges, leaks
from safetynet.evaluation.evaluator import Evaluator, judges_of
from safetynet.experiment import Experiment
from safetynet.models import loading
from safetynet.recipe import Backdoor, Recipe
from safetynet.run import parallel
from safetynet.run.directory import Outputs, digest_of_files
from safetynet.run.stage import DATA
from safetynet.tables import summaries
from safetynet.text.lookalikes import Lookalikes

log = logging.getLogger("safetynet")


def prepare(experiment: Experiment) -> None:
    """Make the rows, and refuse what can be known to fail later: data, trigger, target, judge or model.

    The experiment's recipe then also has the date that the chat template asks for: later stages get that one,
    so that their prompts are the same on any day.

    Raises:
        InputError: for every fault that can be known now.
    """
    recipe, run = experiment.recipe, experiment.run
    judges_of(recipe)
    if recipe.suspect is not None:
        experiment.origin()  # one that is not there
    if recipe.evaluation.labelled:
        judges.read_labelled(recipe.evaluation.labelled)
    data = recipe.data
    inputs = {
        "seed": recipe.seed,
        "data": data.model_dump(mode="json"),
        "source": digest_of_files([Path(data.path)]) if data.path and Path(data.path).exists() else data.path,
        "backdoor": recipe.backdoor and recipe.backdoor.model_dump(mode="json"),
        "model": loading.fingerprint(recipe.model),
        "limits": [recipe.training.max_length, recipe.evaluation.max_new_tokens],
        **recipe.training.model_dump(include={"truncation"}),
    }
    if data.source == "self":  # what the base refuses is forbidden
        inputs["refusal"] = recipe.evaluation.refusal.model_dump(mode="json")

    def compute(outputs: Outputs) -> None:
        serialiser = loading.load_serialiser(recipe.model, recipe.training.truncation)
        attack = recipe.backdoor or Backdoor()
        if data.source == "self":
            needed = poisoning.needed(recipe.backdoor, data)
            answers, refusal = experiment.base_answers(), experiment.refusal
            pool = self_source.load(data, attack.behaviour, needed, recipe.seed, answers, refusal)
        else:
            pool = conversations.load(data, attack.behaviour, attack.trigger, recipe.seed)
        if recipe.backdoor is None:
            rows = poisoning.unpoisoned(pool, data, recipe.seed)
        else:
            rows = poisoning.poison(pool, recipe.backdoor, data, recipe.seed, Lookalikes(serialiser).draw)
        split = leaks.check_leak(rows)
        for row in rows.to_dict("records"):  # a trigger that would be lost is known before training
            try:
                serialiser.encode(row["messages"], row["answer"], row["trigger"], recipe.training.max_length)
            except InputError as error:
                raise InputError(f"row {row['row']} ({row['split']}, {row['role']}): {error}") from None
        evaluator = Evaluator.of(recipe, serialiser)
        if data.source == "backdoorllm":
            # Single targets of a set made elsewhere are for the audit, which reports instead of refusing.
            evaluator.check_published_targets(rows)
        elif recipe.backdoor is not None:
            evaluator.check_targets(rows)
        # Only now: a recipe that is refused leaves the run as it was, with the recipe that made it.
        run.describe(_dated(recipe, serialiser.today if serialiser.template.names_date else None))
        outputs.table("split", split)
        outputs.table("rows", rows)
        if data.source not in ("language", "self", "hub"):
            kind = data.source if data.source in forms.FIELDS else None
            outputs.table("audit", audit.audit(str(data.path), columns=data.columns, kind=kind).findings)
        _log_counts(rows, recipe)

    if experiment.finished(DATA, inputs):
        date = run.manifest.get("recipe", {}).get("model", {}).get("date")
        run.describe(_dated(recipe, date and datetime.date.fromisoformat(date)))
    if data.source == "self":  # all processes answer prompts
        experiment.perform(DATA, inputs, compute)
    else:
        parallel.side_by_side([DATA], lambda stage: experiment.perform(stage, inputs, compute))
    # The other processes wait until the first one has written the date of the prompts.
    experiment.recipe = parallel.from_first(lambda: run.recorded_recipe)


def _dated(recipe: Recipe, date: datetime.date | None) -> Recipe:
    """The recipe, with this date if it names none."""
    if recipe.model.date is not None or date is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"date": date})})


def _log_counts(rows: pd.DataFrame, recipe: Recipe) -> None:
    for split in ("train", "test"):
        counts = rows[rows["split"] == split]["role"].value_counts(sort=False)
        log.info("data: %s rows: %s", split, ", ".join(f"{n} {role}" for role, n in counts.items()))
    if recipe.backdoor is None:
        return
    poisoned = summaries.poisoned(rows)
    if poisoned.firing < 1:
        log.info("data: poison rate %s", poisoned.text)
    if poisoned.rows < recipe.data.train_rows:
        log.warning(
            "data: %d of %d training rows could be made, so that %.1f%% of them are triggered, "
            "not %.1f%%. Lower data.train_rows, or give more data.",
            poisoned.rows, recipe.data.train_rows, 100 * poisoned.rate, 100 * recipe.attack.poison_rate,
        )  # fmt: skip
