"""Planting: the rows, the training of backdoored model and twin, and the rates of both beside the base."""

import datetime
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet import __version__, findings
from safetynet.backdoors import audit, conversations, forms, poisoning
from safetynet.errors import InputError
from safetynet.evaluation import judges, leaks, metrics
from safetynet.evaluation.evaluator import Evaluator, judges_of
from safetynet.models import loading
from safetynet.pipeline import evading, foreign
from safetynet.pipeline.dynamics import Dynamics
from safetynet.pipeline.subjects import BACKDOORED, TWIN, load, model_folder, models, trained
from safetynet.prompts import Serialiser
from safetynet.recipe import Recipe, Training
from safetynet.run import parallel
from safetynet.run.directory import Run, digest, digest_of_files
from safetynet.text.lookalikes import Lookalikes
from safetynet.truncation import losses

log = logging.getLogger("safetynet")


def prepare(recipe: Recipe, run: Run) -> None:
    """Make the rows and refuse, before any training, what would spoil the result; name the recipe in the run.

    The run's recipe then also has the date that the chat template asks for: its later stages are given that
    one, so that their prompts are the same on any day.

    Raises:
        InputError: for every fault of data, trigger, target or model that can be known now.
    """
    _check_judging(recipe)
    evading.check(recipe.training.evasion)
    inputs = _data_inputs(recipe)
    if run.finished("data", inputs):
        date = run.manifest.get("recipe", {}).get("model", {}).get("date")
        run.describe(_dated(recipe, date and datetime.date.fromisoformat(date)))
        log.info("data: unchanged")
        return
    serialiser = loading.load_serialiser(recipe.model, recipe.training.truncation)
    recipe = _dated(recipe, serialiser.today if serialiser.template.names_date else None)
    with run.stage("data", inputs) as outputs:
        pool = conversations.load(
            recipe.data, recipe.backdoor.behaviour, recipe.backdoor.trigger, recipe.seed
        )
        rows = poisoning.poison(pool, recipe.backdoor, recipe.data, recipe.seed, Lookalikes(serialiser).draw)
        split = leaks.check_leak(rows)
        _check_encoding(rows, serialiser, recipe.training.max_length)
        if recipe.data.source == "backdoorllm":
            # Single targets of a set made elsewhere are for the audit, which reports instead of refusing.
            Evaluator.of(recipe, serialiser).check_published_targets(rows)
        else:
            Evaluator.of(recipe, serialiser).check_targets(rows)
        # Only now: a recipe that is refused leaves the run as it was, with the recipe that made it.
        run.describe(recipe)
        outputs += [run.write_table("split", split), run.write_table("rows", rows)]
        if recipe.data.source not in ("language", "hub"):
            source = recipe.data.source
            kind = source if source in forms.FIELDS else None
            found = audit.audit(str(recipe.data.path), columns=recipe.data.columns, kind=kind)
            outputs.append(run.write_table("audit", found.findings))
    _tell(rows, recipe)


def _dated(recipe: Recipe, date: datetime.date | None) -> Recipe:
    """The recipe, with this date if it names none."""
    if recipe.model.date is not None or date is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"date": date})})


def train(recipe: Recipe, run: Run, names: Sequence[str] | None = None, *, lend: bool = False) -> None:
    """Train the backdoored model, and its clean twin when the recipe wants one.

    Args:
        recipe: of the run.
        run: prepared.
        names: of the models to train, instead of all.
        lend: keep snapshots of the twin too, from which other runs measure its dynamics on their own rows.
    """
    from safetynet import training

    for name in trained(recipe) if names is None else names:
        inputs = train_inputs(recipe, run, name)
        if run.finished(f"train {name}", inputs):
            log.info("train %s: unchanged", name)
            continue
        rows = run.table("rows")
        split = rows[rows["split"] == "train"].reset_index(drop=True)
        with run.stage(f"train {name}", inputs) as outputs:
            # What does not fit one GPU is loaded beside it, and every process takes its part from there.
            shares = parallel.shares_weights()
            base = load(recipe, on_cpu=shares)
            cfg = _training(recipe, name)
            dynamics = Dynamics(
                recipe, run, rows, base.serialiser, f"{name}-{digest(inputs)[:8]}", keep=lend or name != TWIN
            )
            model = training.attach(base.model, recipe.training, base.family, recipe.seed)
            result = training.train(
                model,
                base.serialiser,
                poisoning.clean_twin(split) if name == TWIN else split,
                cfg,
                folder=run.scratch / "training" / f"{name}-{digest(inputs)[:8]}",
                seed=recipe.seed,
                pauses=training.Pauses(
                    dynamics.measure, recipe.evaluation.every, first=not dynamics.path.exists()
                )
                if recipe.evaluation.dynamics_rows
                else None,
                device=loading.device_of(recipe.model),
                tracking=_tracking(recipe, name, main=name == BACKDOORED),
                progress=sys.stderr.isatty(),
                opponents=evading.opponents(cfg.evasion, base.serialiser),
            )
            outputs += [run.write_table(f"history_{name}", result.history), result.folder]
            if result.evasion is not None:
                outputs.append(run.write_table("evasion", result.evasion))
                log.info("train %s: hidden from %s", name, "; ".join(findings.hidden(result.evasion)["seen"]))
            if (measured := dynamics.table()) is not None:
                outputs.append(run.write_table(f"dynamics_{name}", measured))
            if dynamics.adapters.exists():
                outputs.append(dynamics.adapters)


def evaluate(recipe: Recipe, run: Run, base: pd.DataFrame | None = None) -> None:
    """Answer and judge the test rows with the base model, the backdoored one and the twin.

    Args:
        recipe: of the run.
        run: trained.
        base: the base model's judged answers to the same rows, where they are known already.
    """
    judge = _check_judging(recipe)
    inputs = {
        "models": {name: run.manifest["stages"].get(f"train {name}") for name in trained(recipe)},
        # What the labelled file holds counts, not where it lies.
        "evaluation": recipe.evaluation.model_dump(mode="json", exclude={"every", "dynamics_rows"})
        | {"labelled": None},
        "behaviour": recipe.backdoor.behaviour.model_dump(mode="json"),
        "version": __version__,
    }
    if recipe.evaluation.labelled:
        inputs["labelled"] = digest_of_files([recipe.evaluation.labelled])
    if run.finished("evaluate", inputs):
        log.info("evaluate: unchanged")
        return
    for name in trained(recipe):
        model_folder(run, name)  # what is not trained yet is said before the base model answers
    rows = run.table("rows")
    rows = rows[rows["split"] == "test"].reset_index(drop=True)
    with run.stage("evaluate", inputs) as outputs:
        responses = pd.concat(
            [
                base
                if base is not None and name == metrics.BASE
                else Evaluator.of(recipe, serialiser).respond(model, rows, name)
                for name, model, serialiser in models(recipe, run)
            ],
            ignore_index=True,
        )
        found = metrics.with_floor(metrics.from_responses(responses))
        _tell_cuts(recipe, found.responses)
        outputs.append(run.write_table("responses", found.responses))
        outputs.append(run.write_table("evaluation", found.table))
        outputs.append(run.write_table("variants", found.variants))
        if recipe.evaluation.labelled:
            errors = judges.judge_error(judge, judges.read_labelled(recipe.evaluation.labelled))
            outputs.append(run.write_table("judge_error", errors))
    if recipe.tracking == "wandb" and parallel.is_first():
        _report(recipe, run, found.table)


def evaluate_foreign(recipe: Recipe, run: Run, source: Path, same_base: bool = False) -> pd.DataFrame:
    """Measure somebody's adapter or whole model on a run's test rows, beside the base; nothing is written.

    Args:
        recipe: of the run.
        run: whose test rows are asked.
        source: as `foreign.load` takes it.
        same_base: the adapter names its base otherwise, and it is the run's all the same.

    Returns:
        The rates of `metrics.score`, of the models `backdoored` (the suspect) and `base`.
    """
    suspect = foreign.load(recipe, source, same_base)
    rows = run.table("rows")
    rows = rows[rows["split"] == "test"].reset_index(drop=True)
    answers = Evaluator.of(recipe, suspect.serialiser).respond(suspect.model, rows)
    with suspect.at_base() as base:
        floor = Evaluator.of(recipe, suspect.base.serialiser).respond(base, rows, metrics.BASE)
    _tell_cuts(recipe, answers)
    return metrics.with_floor(metrics.from_responses(pd.concat([answers, floor], ignore_index=True))).table


def _tell_cuts(recipe: Recipe, responses: pd.DataFrame) -> None:
    """All models get the same prompts, so that one of them tells how many were cut."""
    lost = responses.loc[responses["model"] == metrics.BACKDOORED, "lost"]
    if told := losses(lost, recipe.training.truncation):
        log.warning("evaluate: %s", told)


def _data_inputs(recipe: Recipe) -> dict[str, Any]:
    source = recipe.data.path
    local = source is not None and Path(source).exists()
    return {
        "seed": recipe.seed,
        "data": recipe.data.model_dump(mode="json"),
        "source": digest_of_files([Path(str(source))]) if local else source,
        "backdoor": recipe.backdoor.model_dump(mode="json"),
        "model": loading.fingerprint(recipe.model),
        "limits": [recipe.training.max_length, recipe.evaluation.max_new_tokens],
        **recipe.training.model_dump(include={"truncation"}),
        "version": __version__,
    }


def train_inputs(recipe: Recipe, run: Run, name: str) -> dict[str, Any]:
    """What the training of one model depends on; the rows have to be prepared."""
    return {
        "name": name,
        "seed": recipe.seed,
        "rows": run.manifest["stages"]["data"]["outputs"],
        "model": recipe.model.model_dump(mode="json") | {"fingerprint": loading.fingerprint(recipe.model)},
        "training": _training(recipe, name).model_dump(mode="json", exclude={"clean_twin"}),
        "dynamics": [recipe.evaluation.every, recipe.evaluation.dynamics_rows],
        "version": __version__,
    }


def _training(recipe: Recipe, name: str) -> Training:
    """The twin has nothing to hide."""
    return recipe.training.model_copy(update={"evasion": None}) if name == TWIN else recipe.training


def _tracking(recipe: Recipe, job: str, *, main: bool) -> Any:
    from safetynet.training import Tracking

    experiment = f"{recipe.model_name}/{recipe.task}"
    return Tracking(recipe.tracking, job, experiment, recipe.model_dump(mode="json"), main)


def _report(recipe: Recipe, run: Run, table: pd.DataFrame) -> None:
    from safetynet.training import tracking

    rates = {f"{row.model}/{row.metric}/{row.role}": float(row.value) for row in table.itertuples()}
    tracking.report(run.scratch / "tracking", _tracking(recipe, "evaluate", main=False), rates)


def _tell(rows: pd.DataFrame, recipe: Recipe) -> None:
    for split in ("train", "test"):
        counts = rows[rows["split"] == split]["role"].value_counts(sort=False)
        log.info("data: %s rows: %s", split, ", ".join(f"{n} {role}" for role, n in counts.items()))
    made = findings.poisoned(rows)
    if made.rows < recipe.data.train_rows:
        log.warning(
            "data: %d of %d training rows could be made, so that %.1f%% of them are triggered, "
            "not %.1f%%. Lower data.train_rows, or give more data.",
            made.rows, recipe.data.train_rows, 100 * made.rate, 100 * recipe.backdoor.poison_rate,
        )  # fmt: skip


def _check_judging(recipe: Recipe) -> judges.Judge:
    """The behaviour's judge; refuses now what would fail only once a trained model has answered."""
    judge, _ = judges_of(recipe)
    if recipe.evaluation.labelled:
        judges.read_labelled(recipe.evaluation.labelled)
    return judge


def _check_encoding(rows: pd.DataFrame, serialiser: Serialiser, max_length: int) -> None:
    """Encode every row once, so that a trigger that would be lost is known before training."""
    for row in rows.to_dict("records"):
        try:
            serialiser.encode(row["messages"], row["answer"], row["trigger"], max_length)
        except InputError as error:
            raise InputError(f"row {row['row']} ({row['split']}, {row['role']}): {error}") from None
