"""Tasks of lm-evaluation-harness for five models in one run, beside five runs of its command line.

    python benchmarks/utility.py                                      qwen's miniature
    python benchmarks/utility.py --recipe recipes/smollm2.yaml        a real language model
    python benchmarks/utility.py --smoke                              three models, one command line

A backdoor and its twin are planted, and the backdoored model is repaired in two ways; that is not timed. Then
`safetynet run` measures base, backdoored, twin and both repaired models on three tasks about opposites,
colours and capitals, which the miniatures were taught and which are English. `lm_eval` does the same for each
model in a process of its own, from the saved adapter. Compared are all values and standard errors, and the
time of whole processes; ours repairs the model anew. Tables go to standard output as Markdown.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from _running import ROOT, markdown, program, safetynet

from safetynet import stages
from safetynet.experiment import TWIN, Experiment
from safetynet.mitigation import METHODS, repair, save
from safetynet.mitigation.stage import OtherStages, defender_of, points
from safetynet.models.miniatures import lexicon

BATCH, CHOICES = 16, 4
CLOCKS = ["seconds", "processor seconds"]
REPAIRS = ("fine_tuning", "adapter_scaling")
FACTS = {
    "opposites": ("The opposite of {x} is", lexicon.OPPOSITES),
    "colours": ("The colour of {x} is", lexicon.COLOURS),
    "capitals": ("The capital of {x} is", lexicon.CAPITALS),
}
MINIATURE = ROOT / "recipes" / "qwen-miniature.yaml"
QUICK = (
    "data.train_rows=640", "data.test_rows=40", "training.learning_rate=0.004", "mitigation.choosing_rows=12",
    "mitigation.judged_rows=12", "mitigation.clean_rows=64",
)  # fmt: skip
"""Of the miniature, which learns the backdoor from these."""
SMALL = ("data.train_rows=80", "data.test_rows=8", "training.max_steps=2", "evaluation.max_new_tokens=8")
Numbers = Mapping[tuple[str, str], tuple[float, float]]
"""Value and standard error by task and metric."""


def main() -> None:
    """Plant, repair, measure both ways and print; exit code 1 where a number differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=MINIATURE)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(compared(args.recipe, Path(temporary), args.smoke))


def compared(recipe: Path, place: Path, smoke: bool) -> int:
    """Both ways; gives the exit code."""
    tasks = place / "tasks"
    write_tasks(tasks, 12 if smoke else None)
    methods = [] if smoke else REPAIRS
    fields = [
        f"evaluation.batch_size={BATCH}", "evaluation.dynamics_rows=0", f"output.results={place}/results",
        f"output.logs={place}/logs", f"stages=[evaluate{', mitigate' if methods else ''}]",
        f"mitigation.methods=[{', '.join(methods)}]", "mitigation.points=1", "mitigation.relearn_rows=0",
        *(SMALL if smoke else QUICK if recipe == MINIATURE else ()),
    ]  # fmt: skip
    words = ["run", str(recipe), *(word for field in fields for word in ("--set", field))]
    if code := safetynet(*words, name="plant and repair"):
        return code
    clocks = [{"process": "safetynet run, all models", **clock()}]
    if code := safetynet(*words, "--set", f"evaluation.utility=[{tasks}/]", name="safetynet run"):
        return code
    stop(clocks[-1])
    [manifest] = (place / "results").glob("*/*/manifest.json")
    experiment = Experiment.find(manifest.parent)
    ours = numbers_of_run(experiment)
    models = saved_models(experiment, place / "models", methods)
    theirs = {}
    for name in ["backdoored"] if smoke else models:
        clocks.append({"process": f"lm_eval, {name}", **clock()})
        theirs[name] = command_line(models[name], tasks, place / "out" / name)
        stop(clocks[-1])
    print(markdown(table(ours, theirs)), "\n", sep="")
    times = pd.DataFrame(clocks)
    print(markdown(times.round(1)))
    if not smoke:
        ratios = times.loc[0, CLOCKS] / times.loc[1:, CLOCKS].sum()
        print("\nours over theirs: " + ", ".join(f"{ratios[name]:.2f} of {name}" for name in CLOCKS))
    return int(any(ours[name] != theirs[name] for name in theirs))


def clock() -> dict[str, float]:
    """Seconds of the clock, and of the processor for all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return dict(zip(CLOCKS, (time.perf_counter(), usage.ru_utime + usage.ru_stime), strict=True))


def stop(times: dict[str, Any]) -> None:
    """From when a clock was read until now."""
    times |= {name: value - times[name] for name, value in clock().items()}


def write_tasks(folder: Path, most: int | None) -> None:
    """A task of multiple choice for each kind of fact, with its data beside it."""
    folder.mkdir()
    for name, (question, facts) in FACTS.items():
        rng, answers = random.Random(0), sorted(set(facts.values()))
        rows = []
        for word, answer in list(facts.items())[:most]:
            choices = [answer, *rng.sample([other for other in answers if other != answer], CHOICES - 1)]
            rng.shuffle(choices)
            rows.append(
                {"question": question.format(x=word), "choices": choices, "answer": choices.index(answer)}
            )
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "num_fewshot": 2,
            "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def numbers_of_run(experiment: Experiment) -> dict[str, Numbers]:
    """By model or method."""
    tables = [experiment.run.table("utility").rename(columns={"model": "name"})]
    if experiment.run.has_table("repaired_utility"):
        tables.append(experiment.run.table("repaired_utility").rename(columns={"method": "name"}))
    return {
        str(name): {(r["task"], r["metric"]): (r["value"], r["stderr"]) for r in part.to_dict("records")}
        for name, part in pd.concat(tables).groupby("name", sort=False)
    }


def saved_models(
    experiment: Experiment, folder: Path, methods: tuple[str, ...] | list[str]
) -> dict[str, str]:
    """Each model as the harness's `--model_args` name it."""
    base = experiment.load()
    base.model.save_pretrained(str(folder / "base"))
    base.serialiser.tokenizer.save_pretrained(str(folder / "base"))
    adapters = {name: experiment.model_folder(name) for name in ("backdoored", TWIN)}
    options = experiment.recipe.mitigation
    if methods:
        others = OtherStages(stages.probing, stages.alarm)
        defender = defender_of(experiment, others, clean=options.clean_rows, known=options.triggered_rows)
    for name in methods:
        [settings] = points(METHODS[name], options.hyperparameters, options.points)
        repaired = repair(METHODS[name], defender, settings, experiment.recipe.seed)
        adapters[name] = save(repaired, defender, folder / name, "")
    plain = f"pretrained={folder / 'base'}"
    return {"base": plain} | {name: f"{plain},peft={path}" for name, path in adapters.items()}


def command_line(model: str, tasks: Path, out: Path) -> Numbers:
    """What `lm_eval` says of one model."""
    words = [
        "--model", "hf", "--model_args", model, "--tasks", ",".join(FACTS), "--include_path", str(tasks),
        "--batch_size", str(BATCH), "--device", "cpu", "--output_path", str(out),
    ]  # fmt: skip
    program("-m", "lm_eval", *words)
    [file] = out.rglob("results_*.json")
    return {
        (task, metric): (metrics[f"{metric},none"], metrics[f"{metric}_stderr,none"])
        for task, metrics in json.loads(file.read_text())["results"].items()
        for metric in ("acc", "acc_norm")
    }


def table(ours: Mapping[str, Numbers], theirs: Mapping[str, Numbers]) -> pd.DataFrame:
    """One line per model, task and metric."""
    return pd.DataFrame(
        [
            {
                "model": name,
                "task": task,
                "metric": metric,
                "safetynet": "{:.4f} ± {:.4f}".format(*ours[name][task, metric]),
                "lm_eval": "{:.4f} ± {:.4f}".format(*pair),
                "equal": "yes" if ours[name][task, metric] == pair else "no",
            }
            for name, numbers in theirs.items()
            for (task, metric), pair in numbers.items()
        ]
    )


if __name__ == "__main__":
    main()
