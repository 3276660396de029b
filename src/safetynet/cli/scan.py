"""The commands `safetynet scan` and `safetynet bank build`."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safetynet.cli.options import SameBase
from safetynet.errors import InputError

if TYPE_CHECKING:
    from safetynet.recipe import Model
    from safetynet.scan.result import Depth, ScanResult

bank_app = typer.Typer(
    help="Banks: clean adapters' scores, which a scan's rates rest on.", no_args_is_help=True
)
FILES = {
    "text": "scan.txt", "json": "scan.json", "sarif": "scan.sarif", "cyclonedx": "scan.cdx.json",
    "card": "card.md", "html": "scan.html",
}  # fmt: skip
DepthName = Annotated[
    str, typer.Option(help="files (seconds, no model), quick (a minute), standard or deep.")
]
BaseName = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="qwen-miniature, smollm2, a folder, a .gguf file or a hub id; an adapter names its own.",
    ),
]


def scan(  # noqa: PLR0913  # its flags
    suspect: Annotated[
        list[str],
        typer.Argument(
            help="An adapter, or a merged or fully fine-tuned model: folder or hub id. Several adapters are "
            "scanned as they are used together."
        ),
    ],
    base: BaseName = None,
    depth: DepthName = "standard",
    bank: Annotated[
        Path | None, typer.Option(help="A folder that `safetynet bank build` filled, of the same base.")
    ] = None,
    clean: Annotated[
        Path | None, typer.Option(help="A file of ordinary prompts; our own are used without it.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="An answer to search triggers for.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="False-alarm rate that is to be stated, 0.02 by default."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="What is printed: text, json, sarif, cyclonedx, card or html.")
    ] = "text",
    out: Annotated[Path | None, typer.Option(help="Folder of the scan; scans/SUSPECT by default.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**32 - 1, help="Of prompts and searches; banks have the default one."),
    ] = None,
    same_base: SameBase = False,
) -> None:
    """Look for a backdoor in a model of unknown origin; no trigger has to be known.

    Exit code 0: nothing was found, 1: something was, 2: inconclusive, or the input cannot be used. Every
    format is written into the scan's folder, and `--format` chooses which one is printed.

    Example: `safetynet scan adapters/stranger --base qwen-miniature --depth quick`
    """
    from safetynet.run.logs import logging_to
    from safetynet.scan import stage
    from safetynet.scan.outputs import FORMATS, render
    from safetynet.scan.result import DEPTHS

    for name, value, words in (("--depth", depth, DEPTHS), ("--format", form, FORMATS)):
        if value not in words:
            raise InputError(f"{name} {value}: there is no such word. Choose one of {', '.join(words)}.")
    options = stage.Options(
        depth, bank, target, clean, same_base,  # type: ignore[arg-type]
        rate=stage.RATE if rate is None else rate, seed=stage.SEED if seed is None else seed,
    )  # fmt: skip
    folder = out or Path("scans") / "+".join(map(_folder_name, suspect))
    _prepare(folder, suspect)
    with logging_to(None):
        result = stage.scan(suspect, base, options, folder=folder, control=partial(_control, folder))
    _write(result, folder)
    typer.echo(render(result, form), nl=False)
    if form == "text":
        typer.echo(f"\nFiles:   {folder}")
    sys.exit(result.exit_code)


def _folder_name(suspect: str) -> str:
    """Of a scan; `adapter`, as training names every adapter's folder, goes with the name above it."""
    path = Path(suspect).resolve()
    if not path.exists():
        return re.sub(r"[^\w.-]+", "-", suspect)
    folder = path if path.is_dir() else path.parent
    return f"{folder.parent.name}-{folder.name}" if folder.name == "adapter" else folder.name


def _prepare(folder: Path, suspects: list[str]) -> None:
    """Make the scan's folder, without what an earlier scan has said there.

    Raises:
        InputError: if it cannot be made, or lies in a suspect.
    """
    for suspect in suspects:
        if Path(suspect).is_dir() and folder.resolve().is_relative_to(Path(suspect).resolve()):
            raise InputError(f"--out {folder}: it lies in the suspect's own folder. Name another one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*FILES.values(), "recipe.yaml"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {folder}: it cannot be written ({error.strerror}). Name another one."
        ) from None


def _control(folder: Path, model: "Model", depth: "Depth") -> dict[str, Any] | None:
    from safetynet import stages  # loads torch, which --depth files does not need

    return stages.planted_control(folder, model, depth)


def _write(result: "ScanResult", folder: Path) -> None:
    """Every format, and, of a backdoor, the recipe by which the other stages go on."""
    from safetynet.run.directory import write_text
    from safetynet.scan.outputs import render
    from safetynet.scan.recovered import recipe_of

    for form, name in FILES.items():
        write_text(folder / name, render(result, form))
    if result.triggers and result.exit_code == 1:
        write_text(folder / "recipe.yaml", recipe_of(result))


@bank_app.command("build")
def build(
    base: Annotated[str, typer.Argument(help="As --base of safetynet scan takes it.")],
    out: Annotated[Path, typer.Option(help="Folder of the bank.")],
    count: Annotated[
        int, typer.Option(min=8, help="Clean adapters; 49 carry a rate of 2%, 19 one of 5%.")
    ] = 49,
    depth: DepthName = "quick",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
) -> None:
    """Train and scan clean adapters of a base; an interrupted build goes on where it was.

    Half of them are ordinary, half are narrow and benign: one greeting, one task, a persona, capitals.

    Example: `safetynet bank build qwen-miniature --out banks/qwen --count 49`
    """
    from safetynet.run.logs import logging_to
    from safetynet.scan import bank, stage
    from safetynet.scan.result import DEPTHS

    if depth not in DEPTHS[1:]:
        raise InputError(f"--depth {depth}: a bank has scores of {', '.join(DEPTHS[1:])}. Choose one.")
    with logging_to(None):
        built = bank.build(stage.model_of(base), out, count, depth=depth, seed=seed)
    typer.echo(f"Bank:    {out}, {len(built.scores)} adapters: rates from {built.smallest_rate:.1%} on")
