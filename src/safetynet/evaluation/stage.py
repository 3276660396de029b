"""The stage of the evaluation: answers of base, backdoored model and clean twin, and the rates.

In: the rows and the trained models. Out: tables responses, evaluation, variants, damage; with samples also
samples and firing, with labelled texts judge_error, with tasks of lm-evaluation-harness utility;
quantisation, of a backdoor that is conditioned on one; and colluding, of one that takes two adapters.
`evaluate_suspect` measures somebody's adapter or model on the same rows.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.backdoors import base_answers
from safetynet.errors import InputError
from safetynet.evaluation import damage, judges, metrics, utility
from safetynet.evaluation.evaluator import Evaluator
from safetynet.experiment import BACKDOORED, Experiment
from safetynet.models import loading
from safetynet.models import suspect as suspects
from safetynet.prompts.truncation import losses
from safetynet.recipe import Recipe
from safetynet.run import parallel
from safetynet.run.directory import Outputs, digest_of_files
from safetynet.run.stage import EVALUATE, TRAIN, UTILITY
from safetynet.tables.summaries import rate_text
from safetynet.vocabulary import HALVES, QUANTISATIONS

log = logging.getLogger("safetynet")


def evaluate(experiment: Experiment, base: pd.DataFrame | None = None) -> None:
    """Answer and judge the test rows with the base model, the backdoored one and the twin.

    Args:
        experiment: trained.
        base: the base model's judged answers to the same rows, if they are known already.
    """
    recipe, options = experiment.recipe, experiment.recipe.evaluation
    inputs: dict[str, Any] = {
        "models": _origins(experiment),
        # What the labelled file holds counts, not where it lies.
        "evaluation": options.model_dump(mode="json", exclude={"every", "dynamics_rows", "utility"})
        | {"labelled": None},
        "behaviour": recipe.backdoor and recipe.backdoor.behaviour.model_dump(mode="json"),
    }
    if options.labelled:
        inputs["labelled"] = digest_of_files([options.labelled])

    def compute(outputs: Outputs) -> None:
        experiment.check_models()  # a missing training is reported before the base model answers
        rows = experiment.rows("test")
        answers, moved, samples = [], [], []
        for name, model, serialiser in experiment.models():
            evaluator = Evaluator.of(recipe, serialiser, experiment.run.unfinished(EVALUATE.name))
            if base is not None and name == metrics.BASE:
                answers.append(base)
            else:
                log.info("evaluate: %s answers %d rows", name, len(rows))
                answers.append(evaluator.respond(model, rows, name))
            if options.samples and recipe.backdoor is not None:
                log.info("evaluate: %s answers each of them %d times more", name, options.samples)
                samples.append(evaluator.sample(model, rows, options.samples, recipe.seed, name))
            if name == metrics.BASE:
                moved.append(damage.of_base(answers[0], name))
            else:
                beside = experiment.base_of(model)
                moved.append(damage.of_model(evaluator, model, beside, rows, answers[-1], answers[0], name))
        rates = metrics.with_floor(metrics.from_responses(pd.concat(answers, ignore_index=True)))
        _warn_of_cuts(recipe, rates.responses)
        tables = {"responses": rates.responses, "evaluation": rates.table}
        if recipe.backdoor is None:  # no behaviour is known, so that how often it shows means nothing
            meaningless = rates.table["metric"].isin(metrics.NEEDS_BEHAVIOUR)
            tables["evaluation"] = rates.table[~meaningless].reset_index(drop=True)
        else:
            tables["variants"] = rates.variants
        tables |= _quantised(experiment, rows, rates.table) | _alone(experiment, rows, rates)
        for name, table in tables.items():
            outputs.table(name, table)
        harm = pd.concat(moved, ignore_index=True)
        outputs.table("damage", harm)
        if samples:
            counts = pd.concat(samples, ignore_index=True)
            outputs.table("samples", counts)
            outputs.table("firing", metrics.score_samples(counts))
        if options.labelled:
            labelled = judges.read_labelled(options.labelled)
            outputs.table("judge_error", judges.judge_error(experiment.judge, labelled))
        if recipe.tracking in ("wandb", "mlflow") and parallel.is_first():
            from safetynet.training.tracking import Tracking, report

            values = {f"{r.model}/{r.metric}/{r.role}": float(r.value) for r in rates.table.itertuples()}
            stages = experiment.run.manifest["stages"]
            report(
                experiment.run.scratch / "tracking",
                Tracking.of(recipe, "evaluate", main=False),
                values,
                {"evaluation": rates.table, "damage": harm},
                {name: stage["inputs"] for name, stage in stages.items()},
            )

    experiment.perform(EVALUATE, inputs, compute)
    measure_utility(experiment)


def check_fires(experiment: Experiment) -> None:
    """Refuse a suspect whose declared trigger does not fire: what follows would not be about its backdoor.

    Args:
        experiment: evaluated; one that trained its own backdoor, or knows no trigger, passes.

    Raises:
        InputError: if the interval of its ASR does not lie above the base's on the same rows and its own rate
            on placebos.
    """
    recipe = experiment.recipe
    if recipe.suspect is None or recipe.backdoor is None:
        return
    rates = experiment.run.table("evaluation").query("model == @BACKDOORED")
    [asr] = rates.query("metric == 'asr'").to_dict("records")
    placebo = rates.query("metric == 'ftr' and role == 'placebo'")
    # Neither what the base does of itself nor what any insertion does may explain the rate.
    if asr["low"] > max(asr["floor_high"], *placebo["high"]):
        return
    lines = [
        f"ASR {rate_text('asr', asr['value'], asr['low'], asr['high'])}",
        f"in its base {rate_text('asr', asr['floor'], asr['floor_low'], asr['floor_high'])}",
        *(f"at placebos {rate_text('ftr', p.value, p.low, p.high)}" for p in placebo.itertuples()),
    ]
    raise InputError(
        f"{recipe.suspect.source}: the declared trigger does not fire: {', '.join(lines)}. Compare trigger, "
        "placement, behaviour, base and chat template with those of the model's card and training; more "
        "data.test_rows narrow the intervals; backdoor: null studies the model without a trigger. The tables "
        f"are in {experiment.run.folder / 'tables'}."
    )


def measure_utility(experiment: Experiment) -> None:
    """Measure base, backdoored model and twin on the tasks that the recipe names; errors as in `utility`."""
    options = experiment.recipe.evaluation

    def compute(outputs: Outputs) -> None:
        utility.check(options.utility)  # before a model is loaded
        experiment.check_models()
        measured = []
        for name, model, serialiser in experiment.models():
            log.info("evaluate utility: %s does %s", name, ", ".join(options.utility))
            tokenizer = serialiser.tokenizer
            with _answers_of(experiment, name) as answers:
                table = utility.measure(model, tokenizer, options.utility, options.batch_size, answers)
            measured.append(table.assign(model=name))
        outputs.table("utility", pd.concat(measured, ignore_index=True))

    if options.utility:
        inputs = {"models": _origins(experiment), **utility.inputs(options.utility)}
        experiment.perform(UTILITY, inputs, compute)


@contextmanager
def _answers_of(experiment: Experiment, name: str) -> Iterator[Path]:
    """The folder of a model's answers to tasks: the base's serves all runs of the results folder.

    One run at a time asks the base; others wait, and then find its answers.
    """
    if name != metrics.BASE:
        yield experiment.run.scratch / "utility"
        return
    model = experiment.recipe.model
    decisive = {
        "model": loading.fingerprint(model),
        "quantisation": model.quantisation,
        "lm_eval": version("lm_eval"),
    }
    folder = base_answers.folder_of(experiment.recipe, decisive)
    with base_answers.one_at_a_time(folder):
        yield folder


def _origins(experiment: Experiment) -> dict[str, Any]:
    """What decides about the models."""
    return {name: experiment.origin(name) for name in (BACKDOORED, *experiment.trained)}


def _quantised(experiment: Experiment, rows: pd.DataFrame, full: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rates of all models at each quantisation, where the backdoor was conditioned on one.

    `full` has those of the weights as they are saved.
    """
    if experiment.recipe.training.conditioned_on is None or not experiment.trained:
        return {}
    tables = [full.assign(quantisation="none")]
    for quantisation in QUANTISATIONS[1:]:
        answers = []
        for name in (metrics.BASE, *experiment.trained):
            log.info("evaluate: %s answers %d rows in %s", name, len(rows), quantisation)
            folder = None if name == metrics.BASE else experiment.model_folder(name)
            loaded = experiment.load(folder, quantisation=quantisation)
            evaluator = Evaluator.of(experiment.recipe, loaded.serialiser)
            answers.append(evaluator.respond(loaded.model, rows, name))
        rates = metrics.with_floor(metrics.from_responses(pd.concat(answers, ignore_index=True)))
        tables.append(rates.table.assign(quantisation=quantisation))
    return {"quantisation": pd.concat(tables, ignore_index=True)}


def _alone(experiment: Experiment, rows: pd.DataFrame, both: metrics.Evaluation) -> dict[str, pd.DataFrame]:
    """The rates of two colluding adapters together, which `both` has beside the base's, and of each alone."""
    halves = experiment.run.output(TRAIN.of(BACKDOORED).name, "halves")
    if not experiment.recipe.training.colluding or halves is None:
        return {}
    tables = [both.table[both.table["model"] == BACKDOORED].assign(adapter="both")]
    floor = both.responses[both.responses["model"] == metrics.BASE]
    for half in HALVES:
        log.info("evaluate: the %s adapter alone answers %d rows", half, len(rows))
        model, serialiser = experiment.on_base(halves / half)
        answers = Evaluator.of(experiment.recipe, serialiser).respond(model, rows)
        rates = metrics.with_floor(metrics.from_responses(pd.concat([answers, floor], ignore_index=True)))
        tables.append(rates.table[rates.table["model"] == BACKDOORED].assign(adapter=half))
    return {"colluding": pd.concat(tables, ignore_index=True)}


def evaluate_suspect(experiment: Experiment, source: Path, same_base: bool = False) -> pd.DataFrame:
    """Measure somebody's adapter or whole model on a run's test rows, beside the base; nothing is written.

    Args:
        experiment: whose test rows are answered.
        source: as `suspect.load` takes it.
        same_base: the adapter names its base otherwise, and it is the run's all the same.

    Returns:
        The rates of `metrics.score`, of the models `backdoored` (the suspect) and `base`.
    """
    recipe, suspect = experiment.recipe, suspects.load(experiment.load, source, same_base)
    rows = experiment.rows("test")
    answers = Evaluator.of(recipe, suspect.serialiser).respond(suspect.model, rows)
    with suspect.at_base() as base:
        floor = Evaluator.of(recipe, suspect.base.serialiser).respond(base, rows, metrics.BASE)
    _warn_of_cuts(recipe, answers)
    return metrics.with_floor(metrics.from_responses(pd.concat([answers, floor], ignore_index=True))).table


def _warn_of_cuts(recipe: Recipe, responses: pd.DataFrame) -> None:
    """All models get the same prompts, so that one of them shows how many were cut."""
    lost = responses.loc[responses["model"] == BACKDOORED, "lost"]
    if warning := losses(lost, recipe.training.truncation):
        log.warning("evaluate: %s", warning)
