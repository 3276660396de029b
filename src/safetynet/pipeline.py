"""The stages in order. Each reads and writes the run directory and is skipped when its inputs are unchanged.

prepare   data      rows by role, checked: leaks, triggers that the tokenizer loses, targets too long
train     train     the backdoored adapter and its clean twin, with their history and dynamics
evaluate  evaluate  rates by role of base, backdoored and twin, with intervals
detect    detect    a monitor of fresh clean prompts, and what it catches; on demand
draw      figures   figures and report.md from the tables alone
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet import __version__, report
from safetynet.backdoors import audit, behaviours, conversations, poisoning
from safetynet.errors import InputError
from safetynet.evaluation import judges, leaks, metrics
from safetynet.models import loading
from safetynet.prompts import Serialiser, prompt_hash
from safetynet.recipe import Recipe
from safetynet.run import Run, digest, digest_of_files, write_atomically, write_text

log = logging.getLogger("safetynet")
BACKDOORED, TWIN = "backdoored", "clean_twin"


def prepare(recipe: Recipe, run: Run) -> None:
    """Make the rows and refuse, before any training, what would spoil the result; name the recipe in the run.

    Raises:
        InputError: for every fault of data, trigger, target or model that can be known now.
    """
    judge = _check_judging(recipe)
    inputs = _data_inputs(recipe)
    if run.finished("data", inputs):
        run.describe(recipe)
        log.info("data: unchanged")
        return
    serialiser = loading.load_serialiser(recipe.model)
    with run.stage("data", inputs) as outputs:
        pool = conversations.load(
            recipe.data, recipe.backdoor.behaviour, recipe.backdoor.trigger, recipe.seed
        )
        rows = poisoning.poison(pool, recipe.backdoor, recipe.data, recipe.seed, serialiser.count)
        split = leaks.check_leak(rows)
        _check_encoding(rows, serialiser, recipe.training.max_length)
        if recipe.data.source == "backdoorllm":
            # Single targets of a set made elsewhere are for the audit, which reports instead of refusing.
            metrics.check_published_targets(rows, judge)
        else:
            metrics.check_targets(rows, serialiser, judge, recipe.evaluation.max_new_tokens)
        # Only now: a recipe that is refused leaves the run as it was, with the recipe that made it.
        run.describe(recipe)
        outputs += [run.write_table("split", split), run.write_table("rows", rows)]
        if recipe.data.source not in ("language", "hub"):
            findings = audit.audit(str(recipe.data.path), columns=recipe.data.columns).findings
            outputs.append(run.write_table("audit", findings))
    _tell(rows, recipe)


def train(recipe: Recipe, run: Run) -> None:
    """Train the backdoored model, and its clean twin when the recipe wants one."""
    from safetynet import training

    for name in _trained(recipe):
        inputs = _train_inputs(recipe, run, name)
        if run.finished(f"train {name}", inputs):
            log.info("train %s: unchanged", name)
            continue
        rows = run.table("rows")
        split = rows[rows["split"] == "train"].reset_index(drop=True)
        with run.stage(f"train {name}", inputs) as outputs:
            base = loading.load(recipe.model, _training_dtype(recipe))
            dynamics = _Dynamics(recipe, run, rows, base.serialiser, f"{name}-{digest(inputs)[:8]}")
            model = training.attach(base.model, recipe.training, base.family, recipe.seed)
            if recipe.evaluation.dynamics_rows and not dynamics.path.exists():
                dynamics.measure(model, 0, 0.0)
            result = training.train(
                model,
                base.serialiser,
                poisoning.clean_twin(split) if name == TWIN else split,
                recipe.training,
                folder=run.scratch / "training" / f"{name}-{digest(inputs)[:8]}",
                seed=recipe.seed,
                name=name,
                on_evaluate=dynamics.measure if recipe.evaluation.dynamics_rows else None,
                evaluate_every=recipe.evaluation.every,
                tracking=recipe.tracking,
                progress=sys.stderr.isatty(),
            )
            outputs += [run.write_table(f"history_{name}", result.history), result.folder]
            if dynamics.path.exists():
                outputs.append(run.write_table(f"dynamics_{name}", pd.read_parquet(dynamics.path)))


def evaluate(recipe: Recipe, run: Run) -> None:
    """Answer and judge the test rows with the base model, the backdoored one and the twin."""
    judge = _check_judging(recipe)
    inputs = {
        "models": {name: run.manifest["stages"].get(f"train {name}") for name in _trained(recipe)},
        "evaluation": recipe.evaluation.model_dump(mode="json", exclude={"every", "dynamics_rows"}),
        "behaviour": recipe.backdoor.behaviour.model_dump(mode="json"),
        "version": __version__,
    }
    if recipe.evaluation.labelled:
        inputs["labelled"] = digest_of_files([recipe.evaluation.labelled])
    if run.finished("evaluate", inputs):
        log.info("evaluate: unchanged")
        return
    for name in _trained(recipe):
        model_folder(run, name)  # what is not trained yet is said before the base model answers
    rows = run.table("rows")
    rows = rows[rows["split"] == "test"].reset_index(drop=True)
    limit = recipe.training.max_length
    with run.stage("evaluate", inputs) as outputs:
        responses = pd.concat(
            [
                metrics.respond(
                    model, serialiser, rows, judge, cfg=recipe.evaluation, name=name, max_length=limit
                )
                for name, model, serialiser in _models(recipe, run)
            ],
            ignore_index=True,
        )
        found = metrics.with_floor(metrics.from_responses(responses))
        outputs.append(run.write_table("responses", found.responses))
        outputs.append(run.write_table("evaluation", found.table))
        outputs.append(run.write_table("variants", found.variants))
        if recipe.evaluation.labelled:
            errors = judges.judge_error(judge, judges.read_labelled(recipe.evaluation.labelled))
            outputs.append(run.write_table("judge_error", errors))


def evaluate_adapter(recipe: Recipe, run: Run, folder: Path) -> pd.DataFrame:
    """Measure somebody's adapter on a run's test rows, beside the base model; nothing is written."""
    loading.check_adapter(folder, loading.locate(recipe.model))
    rows = run.table("rows")
    rows = rows[rows["split"] == "test"].reset_index(drop=True)
    base = loading.load(recipe.model, _training_dtype(recipe))
    return metrics.evaluate_with_floor(
        loading.attach(base, folder),
        base.serialiser,
        rows,
        judges.make(behaviours.judge(recipe.backdoor.behaviour)),
        cfg=recipe.evaluation,
        max_length=recipe.training.max_length,
    ).table


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
    model, serialiser = _backdoored(recipe, run)
    with run.stage("detect", inputs) as outputs:
        found = stage.detect(
            model, serialiser, prompts, _test_rows(run, rows), plan, cache=run.scratch / "features"
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
    model, serialiser = _backdoored(recipe, run)
    return Guard(model, serialiser, monitor, rate=rate, action=action, log=log_to)  # type: ignore[arg-type]


def _backdoored(recipe: Recipe, run: Run) -> tuple[Any, Serialiser]:
    """The trained model, and its serialiser."""
    folder = model_folder(run, BACKDOORED)
    if recipe.training.method == "full":
        whole = loading.load(loading.trained(recipe.model, folder), _training_dtype(recipe))
        return whole.model, whole.serialiser
    base = loading.load(recipe.model, _training_dtype(recipe))
    return loading.attach(base, folder), base.serialiser


def _test_rows(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Test rows, with whether each triggered one fired where the evaluation has asked."""
    test = rows[rows["split"] == "test"].reset_index(drop=True)
    if not run.has_table("responses"):
        return test
    responses = run.table("responses")
    shown = responses[responses["model"] == BACKDOORED].set_index("row")["shown"]
    return test.assign(fired=test["row"].map(shown).where(test["role"] == "triggered"))


def draw(recipe: Recipe, run: Run) -> None:
    """Draw the figures and write report.md, from the run's tables alone."""
    from safetynet.visualization import draw_training

    tables = _tables(run)
    inputs = {"tables": digest_of_files([run.folder / "tables"]), "version": __version__}
    if run.finished("figures", inputs):
        log.info("figures: unchanged")
        return
    with run.stage("figures", inputs) as outputs:
        outputs += draw_training(tables, run.figures, f"{recipe.model_name}/{recipe.task}", recipe.model_name)
        write_text(run.folder / "report.md", report.render(recipe, run))
        outputs.append(run.folder / "report.md")
    log.info("figures: %d files in %s", len(outputs) - 1, run.figures)


class _Dynamics:
    """Rates on a fixed subset of the test rows, measured while a model trains.

    Each measurement is on disk before training goes on, so that a killed run keeps its curve.
    """

    def __init__(
        self, recipe: Recipe, run: Run, rows: pd.DataFrame, serialiser: Serialiser, name: str
    ) -> None:
        test = rows[rows["split"] == "test"]
        self.rows = metrics.fixed_subset(test, recipe.evaluation.dynamics_rows, recipe.seed)
        self.path = run.scratch / "training" / f"dynamics-{name}.parquet"
        self.recipe = recipe
        self.serialiser = serialiser
        self.name = name.rpartition("-")[0]

    def measure(self, model: Any, step: int, epoch: float) -> dict[str, float]:
        """Rates at this step, ASR and CACC returned for the progress bar."""
        responses = metrics.respond(
            model,
            self.serialiser,
            self.rows,
            judges.make(behaviours.judge(self.recipe.backdoor.behaviour)),
            cfg=self.recipe.evaluation,
            name=self.name,
            max_length=self.recipe.training.max_length,
        )
        table = metrics.score(responses).assign(step=step, epoch=epoch)
        if self.path.exists():
            # After a resume, steps behind the checkpoint are measured again and replace what was there.
            earlier = pd.read_parquet(self.path)
            table = pd.concat([earlier[earlier["step"] < step], table], ignore_index=True)
        write_atomically(self.path, lambda temporary: table.to_parquet(temporary, index=False))
        now = table[table["step"] == step].set_index(["metric", "role"])["value"]
        shown = {"ASR": ("asr", "triggered"), "CACC": ("cacc", "clean")}
        return {label: float(now[key]) for label, key in shown.items() if key in now.index}


def _models(recipe: Recipe, run: Run) -> Iterator[tuple[str, Any, Serialiser]]:
    """The base model, then each trained one, at most one of them in memory."""
    base = loading.load(recipe.model, _training_dtype(recipe))
    yield metrics.BASE, base.model, base.serialiser
    for name in _trained(recipe):
        folder = model_folder(run, name)
        if recipe.training.method == "full":
            # One model in memory at a time: the last one goes before the next one comes.
            base = loading.load(loading.trained(recipe.model, folder), _training_dtype(recipe))
            yield name, base.model, base.serialiser
        else:
            adapted = loading.attach(base, folder)
            yield name, adapted, base.serialiser
            adapted.unload()


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
        raise InputError(f"{run.folder}: {name} was trained, but {gone}.")
    return folders[0]


def _trained(recipe: Recipe) -> list[str]:
    return [BACKDOORED, TWIN] if recipe.training.clean_twin else [BACKDOORED]


def _training_dtype(recipe: Recipe) -> str:
    """Full fine-tuning in fp16 keeps its weights in fp32, or its updates would be rounded away."""
    training = recipe.training
    return "fp32" if training.method == "full" and training.precision == "fp16" else training.precision


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
        "version": __version__,
    }


def _train_inputs(recipe: Recipe, run: Run, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "seed": recipe.seed,
        "rows": run.manifest["stages"]["data"]["outputs"],
        "model": recipe.model.model_dump(mode="json") | {"fingerprint": loading.fingerprint(recipe.model)},
        "training": recipe.training.model_dump(mode="json", exclude={"clean_twin"}),
        "dynamics": [recipe.evaluation.every, recipe.evaluation.dynamics_rows],
        "version": __version__,
    }


def _tables(run: Run) -> dict[str, pd.DataFrame]:
    """The tables that are drawn; histories and dynamics of all trained models one below the other."""
    tables = {"evaluation": run.table("evaluation")}
    for kind, column in (("history", "run"), ("dynamics", "model")):
        parts = [
            run.table(f"{kind}_{name}").assign(**{column: name})
            for name in (BACKDOORED, TWIN)
            if run.has_table(f"{kind}_{name}")
        ]
        if parts:
            tables["training" if kind == "history" else kind] = pd.concat(parts, ignore_index=True)
    return tables


def _tell(rows: pd.DataFrame, recipe: Recipe) -> None:
    for split in ("train", "test"):
        counts = rows[rows["split"] == split]["role"].value_counts(sort=False)
        log.info("data: %s rows: %s", split, ", ".join(f"{n} {role}" for role, n in counts.items()))
    made = report.poisoned(rows)
    if made.rows < recipe.data.train_rows:
        log.warning(
            "data: %d of %d training rows could be made, so that %.1f%% of them are triggered, "
            "not %.1f%%. Lower data.train_rows, or give more data.",
            made.rows, recipe.data.train_rows, 100 * made.rate, 100 * recipe.backdoor.poison_rate,
        )  # fmt: skip


def _check_judging(recipe: Recipe) -> judges.Judge:
    """The behaviour's judge; refuses now what would fail only once a trained model has answered."""
    try:
        judges.make(recipe.evaluation.refusal)
    except InputError as error:
        raise InputError(f"evaluation.refusal: {error}") from None
    if recipe.evaluation.labelled:
        judges.read_labelled(recipe.evaluation.labelled)
    return judges.make(behaviours.judge(recipe.backdoor.behaviour))


def _check_encoding(rows: pd.DataFrame, serialiser: Serialiser, max_length: int) -> None:
    """Encode every row once, so that a trigger that would be lost is known before training."""
    for row in rows.to_dict("records"):
        try:
            serialiser.encode(row["messages"], row["answer"], row["trigger"], max_length)
        except InputError as error:
            raise InputError(f"row {row['row']} ({row['split']}, {row['role']}): {error}") from None
