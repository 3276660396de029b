"""The command `safetynet models`: which models are at hand, and what each needs."""

from pathlib import Path
from typing import Annotated

import typer


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
