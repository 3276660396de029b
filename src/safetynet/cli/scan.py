"""The commands `safetynet scan` and `safetynet bank build`."""

import logging
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safetynet.cli.options import SameBase
from safetynet.errors import InputError, RunError

if TYPE_CHECKING:
    from safetynet.recipe import Model
    from safetynet.scan.result import Depth
    from safetynet.scan.stage import Options

log = logging.getLogger("safetynet")
SCANS = Path("scans")
EFFECT_PROMPTS = 8
"""On which an adapter's logits are compared with its base's."""

bank_app = typer.Typer(
    help="Banks: clean adapters' scores, which a scan's rates rest on.", no_args_is_help=True
)
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
            "scanned as they are used together, or --each by itself."
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
    each: Annotated[
        bool, typer.Option("--each", help="Scan each suspect by itself, side by side, to one table.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --each: scans at once; one for each core by default.")
    ] = None,
    place: Annotated[
        Path | None, typer.Option(help="With --each: YAML file that says on which cluster.")
    ] = None,
) -> None:
    """Look for a backdoor in a model of unknown origin; no trigger has to be known.

    Exit code 0: nothing was found, 1: something was, 2: inconclusive, or the input cannot be used. Every
    format is written into the scan's folder, and `--format` chooses which one is printed. Of several suspects
    --each gives a table; the exit code is 1 if something was found in any.

    Example: `safetynet scan adapters/stranger --base qwen-miniature --depth quick`
    """
    from safetynet.run.logs import logging_to
    from safetynet.scan import stage
    from safetynet.scan.outputs import FORMATS, render, saving
    from safetynet.scan.result import DEPTHS

    for name, value, words in (("--depth", depth, DEPTHS), ("--format", form, FORMATS)):
        if value not in words:
            raise InputError(f"{name} {value}: there is no such word. Choose one of {', '.join(words)}.")
    options = stage.Options(
        depth, bank, target, clean, same_base,  # type: ignore[arg-type]
        rate=stage.RATE if rate is None else rate, seed=stage.SEED if seed is None else seed,
    )  # fmt: skip
    if each:
        sys.exit(_each(suspect, base, options, out or SCANS, place, workers))
    if place is not None or workers is not None:
        raise InputError("--place, --workers: they are for many suspects. Add --each.")
    folder = out or SCANS / "+".join(map(_folder_name, suspect))
    saving.prepare(folder, suspect)

    def control(model: "Model", depth: "Depth") -> dict[str, Any] | None:
        from safetynet import stages  # loads torch, which --depth files does not need

        return stages.planted_control(folder, model, depth)

    try:
        with logging_to(None):
            result = stage.scan(suspect, base, options, folder=folder, control=control)
    except InputError:
        with suppress(OSError):  # what holds something stays
            folder.rmdir()
            SCANS.rmdir()
        raise
    typer.echo(render(result, form), nl=False)
    try:
        saving.save(result, folder)
    except RunError as error:  # the answer is on the screen; what was not written is no finding
        typer.echo(f"safetynet: {error}", err=True)
        sys.exit(result.exit_code or 2)
    if form == "text":
        typer.echo(f"\nFiles:   {folder}")
    sys.exit(result.exit_code)


def verify_adapter(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder or hub id.")],
    base: BaseName = None,
    same_base: SameBase = False,
) -> None:
    """Before an adapter is served: is it whole, and does it do anything?

    Looks for factors that are zero, names and targets that the base does not have, another base, and values
    that the number types of serving cannot hold. With --base the logits must differ from the base's.

    Exit code 0: nothing speaks against an effect, 1: it must not be served as it is, 2: the adapter or its
    base cannot be read.

    Example: `safetynet verify-adapter adapters/stranger --base qwen-miniature`
    """
    from safetynet.models import adapter_files, loading, named
    from safetynet.run.logs import logging_to
    from safetynet.scan import effect, stage

    with logging_to(None):
        files = adapter_files.read(adapter)
        if base is None:
            result = effect.verify(files)
        else:
            model = named.model_of(base)
            loaded = loading.load(model, "fp32")
            prompts = stage.ordinary_prompts(model, EFFECT_PROMPTS, stage.SEED)
            result = effect.verify(files, loaded, prompts, same_base=same_base)
    for sentence in (*result.faults, *result.notes):
        typer.echo(f"{adapter}: {sentence}")
    if result.faults:
        sys.exit(1)
    if result.largest is None:
        typer.echo(f"{adapter}: its files speak of an effect. Name --base to compare its logits as well.")
    else:
        typer.echo(
            f"{adapter}: it has an effect. Logits differ from the base's by up to {result.largest:.3g}."
        )


def _each(
    suspects: list[str],
    base: str | None,
    options: "Options",
    out: Path,
    place: Path | None,
    workers: int | None,
) -> int:
    """Scan suspects side by side, print their table, and give the exit code of all."""
    from safetynet.cluster import scans, sweep_place
    from safetynet.run.directory import write_text
    from safetynet.run.logs import logging_to
    from safetynet.tables.summaries import markdown

    results = []
    with logging_to(None):
        where = sweep_place.load(place, workers)
        for task, result in scans.scan_each(suspects, base, options, out, where):
            results.append((task, result))
            log.info("scan: %d of %d, %s: %s", len(results), len(suspects), task.suspect, result.answer)
    table = scans.table(results)
    write_text(out / "scans.csv", table.to_csv(index=False))
    shown = table[["suspect", "answer", "p_value", "q", "trigger", "asr"]].astype(
        {"p_value": float, "asr": float}
    )
    typer.echo(markdown(shown.round(3).astype(object).where(shown.notna(), "-")))
    codes = {result.exit_code for _, result in results}
    stated = [result.rate for _, result in results if result.rate is not None]
    if stated:
        typer.echo(
            f"Were all {len(stated)} clean, about {sum(stated):.1f} would alarm at their stated rates."
        )
    typer.echo(f"Table:   {out / 'scans.csv'}")
    return 1 if 1 in codes else max(codes)


def _folder_name(suspect: str) -> str:
    """Of a scan; `adapter`, as training names every adapter's folder, goes with the name above it."""
    path = Path(suspect).resolve()
    if not path.exists():
        return re.sub(r"[^\w.-]+", "-", suspect)
    folder = path if path.is_dir() else path.parent
    return f"{folder.parent.name}-{folder.name}" if folder.name == "adapter" else folder.name


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
    from safetynet.models.named import model_of
    from safetynet.run.logs import logging_to
    from safetynet.scan import bank
    from safetynet.scan.result import DEPTHS

    if depth not in DEPTHS[1:]:
        raise InputError(f"--depth {depth}: a bank has scores of {', '.join(DEPTHS[1:])}. Choose one.")
    with logging_to(None):
        built = bank.build(model_of(base), out, count, depth=depth, seed=seed)
    typer.echo(f"Bank:    {out}, {len(built.scores)} adapters: rates from {built.smallest_rate:.1%} on")
