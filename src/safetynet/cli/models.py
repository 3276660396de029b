"""The commands `safetynet models` and `safetynet miniatures ...`: what is at hand, and what is built in."""

from pathlib import Path
from typing import Annotated

import typer

miniature_app = typer.Typer(help="The built-in miniature models.", no_args_is_help=True)


def models(
    path: Annotated[
        Path | None, typer.Argument(metavar="[GGUF]", help="A .gguf file, to see what it holds.")
    ] = None,
) -> None:
    """List the models that can stand in `model.id`, whether they are here, and what each needs.

    Example: `safetynet models`
    """
    from safetynet.models import gguf, overview

    if path is not None:
        contents = gguf.read(gguf.file_of(str(path)))
        typer.echo(f"{path}: {contents.architecture}, {contents.parameters / 1e6:.0f} million weights")
        typer.echo(contents.in_words)
        typer.echo(f"It needs {contents.parameters * 4 / 2**30:.1f} GB of memory in fp32.")
        return
    for line in overview.lines():
        typer.echo(f"{line.family:8} {line.id:38} {line.size:>9}  {line.state}")
    typer.echo(
        "\nmodel.id also takes any other hub id, a folder of safetensors, or a .gguf file; "
        "family generic fits any causal language model."
    )


@miniature_app.command("list")
def list_miniatures() -> None:
    """List the shipped miniatures and where they lie.

    Example: `safetynet miniatures list`
    """
    from safetynet.models import miniatures

    for family in miniatures.FAMILIES:
        typer.echo(f"{family:9} {miniatures.path(family)}")


@miniature_app.command("measure")
def measure_miniature(family: Annotated[str, typer.Argument(help="Family of the miniature.")]) -> None:
    """Ask a shipped miniature held-out questions and print its accuracy by task.

    Example: `safetynet miniatures measure qwen`
    """
    from safetynet.models import loading, miniatures
    from safetynet.models.miniatures.measure import measure

    loading.use_one_thread()
    typer.echo(measure(miniatures.path(family), family).to_string(index=False))


@miniature_app.command("build")
def build_miniature(
    family: Annotated[str, typer.Argument(help="Family to build.")],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
) -> None:
    """Pretrain a miniature from nothing, about a quarter of an hour on one core, and write its card.

    Example: `safetynet miniatures build qwen --out my-qwen`
    """
    from safetynet.models import loading
    from safetynet.models.miniatures.build import Schedule, build

    loading.use_one_thread()
    build(family, out, Schedule(seed=seed))
    typer.echo(f"Written: {out}")
