"""What a model is still good for: standard tasks, measured by lm-evaluation-harness itself.

In: a loaded model, and tasks as a recipe names them. Out: the harness's own numbers and standard errors, one
line for each task, metric and filter. No metric is computed here. The harness is an extra and takes seconds
to import: only what measures or checks imports it.
"""

import difflib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from safetynet.errors import InputError, RunError
from safetynet.extras import need
from safetynet.models.blocks import evaluating
from safetynet.models.files import hub_reason, in_words
from safetynet.models.identity import identify
from safetynet.recipe import is_task_file
from safetynet.run import parallel
from safetynet.run.directory import digest, digest_of_files

log = logging.getLogger("safetynet")
COLUMNS = ["task", "group", "metric", "filter", "shots", "n", "value", "stderr", "low", "high", "better"]
Z95 = 1.959964
"""Standard errors from a value to the ends of its 95% interval, by the normal approximation."""
BETTER = {True: "higher", False: "lower", None: ""}


def check(tasks: Sequence[str]) -> None:
    """Refuse what can be known before any model is loaded.

    Args:
        tasks: of the recipe: names as the harness has them, files of tasks in YAML, and folders of these.

    Raises:
        InputError: if the harness is not installed, a file is not there, or a task is not known.
    """
    for task in filter(is_task_file, tasks):
        path = Path(task)
        if not (path.is_file() or (path.is_dir() and any(path.glob("*.yaml")))):
            raise InputError(
                f"evaluation.utility: {task} is no file of a task, and no folder that holds one (*.yaml)"
            )
    need("evaluation.utility: tasks of lm-evaluation-harness", "lm_eval")
    with _quiet():
        for task in tasks:
            _specs(tuple(tasks), task)


def inputs(tasks: Sequence[str]) -> dict[str, Any]:
    """What decides about the results beside the model: names of tasks, and what their files hold.

    These are the *.yaml and *.py files beside a task's file, and the data files that it names.
    """
    paths = [Path(task) for task in tasks if is_task_file(task)]
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    files = [file for folder in folders for kind in ("*.yaml", "*.py") for file in sorted(folder.glob(kind))]
    data = [path for file in files if file.suffix == ".yaml" for path in _data_files(file)]
    # What the files hold counts, not where they lie.
    names = [Path(task).name if is_task_file(task) else task for task in tasks]
    return {"tasks": names, "files": [digest_of_files([path]) for path in (*files, *data)]}


def measure(
    model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int, kept: Path | None = None
) -> pd.DataFrame:
    """Measure a model on tasks by `lm_eval.simple_evaluate`, with the harness's defaults.

    Args:
        model: a causal LM of transformers, with or without a PEFT adapter; it leaves as it came.
        tokenizer: of the model.
        tasks: as `check` takes them.
        batch_size: requests at a time; halved where memory does not suffice.
        kept: a folder for answers, from which an interrupted measurement goes on, and later ones take what
            they ask again. Nothing but its weights and its tokenizer may decide about what the model answers.

    Returns:
        Columns `COLUMNS`. `n` counts documents, `low` and `high` are the normal approximation's; stderr and
        interval are NaN where the harness has none. The tasks of a group have its name in `group`.

    Raises:
        InputError: as `check`; for a task that cannot be loaded, of which the hub may be the cause; and for
            one that executes what the model writes, or shows pictures.
        RunError: if a single request does not fit in memory, or the harness fails.
    """
    check(tasks)
    names = tuple(tasks)

    def from_harness() -> pd.DataFrame:
        import torch
        from accelerate.utils.memory import should_reduce_batch_size
        from lm_eval import simple_evaluate

        from safetynet.evaluation.harness import Answers, HarnessModel

        # Answers lie in a file that is named after all that decides about them.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        file = f"{digest([identify(model).as_dict(), rules])[:16]}.jsonl"
        answers, size = Answers(None if kept is None else kept / file), batch_size
        with _quiet(), evaluating(model):
            loaded = [task for name in names for spec in _specs(names, name) for task in _loaded(names, spec)]
            while True:
                subject = HarnessModel(model, tokenizer, size, answers)
                try:
                    results = simple_evaluate(
                        subject, tasks=loaded, task_manager=_manager(names), log_samples=False
                    )
                    return _lines(results)
                except Exception as error:  # whatever a task's own functions raise
                    if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                        reason = f"{type(error).__name__}: {in_words(error)}"
                        raise RunError(f"utility: lm-evaluation-harness failed ({reason})") from error
                    if size == 1:
                        raise RunError(
                            "utility: out of memory with a single request; use a device with more memory"
                        ) from error
                    log.warning("utility: out of memory with %d requests; going on with %d", size, size // 2)
                    size //= 2
                finally:
                    answers.write()

    return parallel.from_first(from_harness)


def _specs(tasks: tuple[str, ...], task: str) -> list[str]:
    """What the harness calls the tasks, or the group, of one entry."""
    manager = _manager(tasks)
    if not is_task_file(task):
        if names := manager.match_tasks([task]):
            return list(names)
        near = ", ".join(difflib.get_close_matches(task, manager.all_tasks, n=3))
        raise InputError(
            f"evaluation.utility: lm-evaluation-harness has no task {task!r}. "
            + (f"Near are {near}; `" if near else "`")
            + "lm_eval ls tasks` lists all. A file of your own ends in .yaml"
        )
    path = Path(task).absolute()
    names = manager.all_subtasks if path.is_dir() else [*manager.all_subtasks, *manager.all_groups]
    files = {name: manager.task_index[name].yaml_path for name in names}
    if not (inside := [name for name, file in files.items() if path in (file, file.parent)]):
        raise InputError(f"evaluation.utility: lm-evaluation-harness sees no task in {task}")
    return inside


@cache
def _manager(tasks: tuple[str, ...]) -> Any:
    """The harness's index; its own 14,000 files are read only where a task is not in a file of the user's."""
    from lm_eval.tasks import TaskManager

    paths = [Path(task).absolute() for task in tasks if is_task_file(task)]
    folders = dict.fromkeys(str(path if path.is_dir() else path.parent) for path in paths)
    return TaskManager(include_path=list(folders), include_defaults=len(paths) < len(tasks))


def _loaded(tasks: tuple[str, ...], spec: str) -> list[Any]:
    """A task, or the group, with its data set."""
    where = f"evaluation.utility: task {spec}"
    try:
        loaded = _manager(tasks).load([spec])
    except Exception as error:  # of datasets, YAML, and whatever a task's own functions raise
        if isinstance(error, OSError) and hub_reason(error):
            raise InputError(
                f"{where}: its data set does not come from the hub ({in_words(error)}). Load it once where "
                "there is a network (the copies lie below HF_HOME), or name a file of a task of your own"
            ) from error
        reason = f"{type(error).__name__}: {in_words(error)}"
        raise InputError(f"{where} cannot be loaded by lm-evaluation-harness ({reason})") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"{where}: {name} executes code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"{where}: {name} shows pictures, and only text is carried here")
    groups = loaded["groups"]
    return [groups[spec]] if spec in groups else [*loaded["tasks"].values()]


def _lines(results: Any) -> pd.DataFrame:
    """The harness's results as a table."""
    # Of the groups, those that have numbers of their own; others are no more than a list of tasks.
    whole = [
        name for name in results["group_subtasks"] if any("," in key for key in results["results"][name])
    ]
    groups = {child: name for name in whole for child in results["group_subtasks"][name]}
    lines = []
    for task, metrics in results["results"].items():
        for key in [key for key in metrics if "," in key and "_stderr," not in key]:
            metric, _, name = key.partition(",")
            stderr = metrics.get(f"{metric}_stderr,{name}")
            error = float(stderr) if isinstance(stderr, int | float) else float("nan")
            value, n = float(metrics[key]), metrics.get("sample_count", {}).get(key, metrics["sample_len"])
            shots, better = results["n-shot"].get(task), results["higher_is_better"].get(task, {}).get(metric)
            line = [task, groups.get(task, ""), metric, name, shots, n, value, error]
            lines.append([*line, value - Z95 * error, value + Z95 * error, BETTER[better]])
    return pd.DataFrame(lines, columns=COLUMNS)


class _Texts(yaml.SafeLoader):
    """YAML of a task, in which a function is the text that names it."""


_Texts.add_multi_constructor("!", lambda loader, _, node: loader.construct_scalar(node))


def _data_files(task: Path) -> Iterator[Path]:
    """Files that a task's data set is read from, as far as they lie on this disk."""
    try:
        fields = yaml.load(task.read_text(encoding="utf-8"), _Texts)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # the harness says what is wrong with it
    named = [fields.get("dataset_path"), fields.get("dataset_kwargs")] if isinstance(fields, dict) else []
    while named:
        value = named.pop(0)
        named += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, str) and (path := Path(value)).name:
            yield from sorted(path.parent.glob(path.name))


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's warnings are for those who call it themselves, its bars for those who look on."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        harness.setLevel(level)
