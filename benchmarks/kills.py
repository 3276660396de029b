"""SIGKILL `safetynet run` at random moments, go on after each, and compare every table with a run without.

    python benchmarks/kills.py --out results-kills --kills 50      as docs/results/kills.md quotes it
    python benchmarks/kills.py --smoke                             two kills of a small run

One run is made without a kill; how long it takes on the processor gives the scale. Then runs of the same
recipe are made, one after the other, until there were so many kills: a start is killed when it has used a
time on the processor that is drawn evenly from nothing to a third of that scale, and the next start goes on
in the same folders, until the run ends. The program loads the libraries once and forks each start, so that
moments fall into the run and not into imports. Where a process was, its own traceback says, which it writes
on SIGUSR2 just before. Clean twin and backdoored model train one after the other (`SAFETYNET_PAIR=off`).

Prints kills by place, runs, and what was repeated; exits 1 if a table differs. Writes OUT/kills.csv.
"""

import argparse
import contextlib
import faulthandler
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from _running import ROOT, markdown
from same_numbers import differing, tables_below

SETTINGS = (
    "data.train_rows=640", "data.test_rows=40", "training.learning_rate=0.004", "training.log_every=7",
    "training.checkpoint_minutes=0.01", "evaluation.every=15", "evaluation.dynamics_rows=8",
    "evaluation.batch_size=20", "interventions.by=layer", "interventions.groups=12",
    "interventions.observe=false", "stages=[evaluate, intervene]",
)  # fmt: skip
SMOKE = (
    "data.train_rows=96", "data.test_rows=8", "evaluation.dynamics_rows=4", "training.clean_twin=false",
    "training.checkpoint_minutes=0.001", "stages=[evaluate]",
)  # fmt: skip
PLACES = {
    "writing a checkpoint": r"in _save_checkpoint",
    "measuring in training": r"training/stage.py.* in measure\b",
    "training": r"in _run_epoch",
    "evaluating": r"evaluation/stage.py",
    "intervening": r"interventions/stage.py",
    "making rows": r"backdoors/stage.py",
}
"""What a traceback holds, by the place of a process; the first that fits."""
ELSEWHERE = "starting, loading, recording"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Start:
    """One start of a run and its end."""

    run: int
    seed: int
    """Of the moments of this run."""
    seconds: float
    """On the processor."""
    killed: bool
    place: str
    repeated: int
    """Training steps that the next start repeats."""


def main() -> None:
    """Make the runs, print what happened, and exit 1 if a table is not that of the run without a kill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="results root; a temporary one by default")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; run N has this + N")
    parser.add_argument("--smoke", action="store_true", help="two kills of a small run")
    args = parser.parse_args()
    os.environ |= {"SAFETYNET_PAIR": "off", "OMP_NUM_THREADS": "1"}
    load_libraries()
    settings, kills = (SMOKE, 2) if args.smoke else (SETTINGS, args.kills)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        whole = start(out / "whole", settings)
        print(f"without a kill: {whole:.0f} s on the processor", flush=True)
        starts: list[Start] = []
        while sum(each.killed for each in starts) < kills:
            run = 1 + max((each.run for each in starts), default=0)
            left = kills - sum(each.killed for each in starts)
            starts += killed_run(out, settings, run, args.seed + run, whole, left)
        table = pd.DataFrame(starts)
        if args.out:
            table.to_csv(args.out / "kills.csv", index=False, float_format="%.2f")
        unequal = [compared(out / "whole", out / f"run{run}") for run in table["run"].unique()]
        report(table, whole, unequal)
    sys.exit(1 if any(unequal) else 0)


def load_libraries() -> None:
    """All that a run imports; what is forked has it."""
    import safetynet.cli.app
    import safetynet.evaluation.stage
    import safetynet.interventions.stage
    import safetynet.training
    import safetynet.training.stage  # noqa: F401
    from safetynet.models.loading import use_one_thread

    use_one_thread()


def start(folder: Path, settings: Sequence[str], most: float = np.inf) -> float:
    """Start a run, and kill it when it has used so many seconds; gives those that it used.

    Args:
        folder: of results, scratch, logs and of `out`, what the process said; `where` is its last traceback.
        settings: of the recipe.
        most: seconds on the processor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "where").unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        run_here(folder, settings)
    used, ended, status = 0.0, 0, 0
    while not ended:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / TICKS
        if used >= most:
            kill(process, folder / "where")
            return used
        time.sleep(0.02)
        ended, status = os.waitpid(process, os.WNOHANG)
    if status:
        sys.exit(f"a run failed:\n{(folder / 'out').read_text(encoding='utf-8')[-2000:]}")
    return used


def kill(process: int, where: Path) -> None:
    """SIGKILL, as soon as the process has written down where it is."""
    os.kill(process, signal.SIGUSR2)
    until = time.monotonic() + 5
    while not (where.exists() and "most recent call first" in where.read_text()) and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def run_here(folder: Path, settings: Sequence[str]) -> None:
    """`safetynet run`, in this process, which ends with it."""
    from safetynet.cli.app import main as safetynet

    places = {name: folder / name for name in ("results", "scratch", "logs")}
    sets = [*settings, *(f"output.{name}={path}" for name, path in places.items())]
    code = 0
    with (folder / "where").open("w") as where, (folder / "out").open("a") as said:
        faulthandler.register(signal.SIGUSR2, where, all_threads=False)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.argv = ["safetynet", "run", str(ROOT / "recipes" / "qwen-miniature.yaml")]
        sys.argv += [word for text in sets for word in ("--set", text)]
        try:
            safetynet()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(ValueError):
                    stream.flush()
            os._exit(code)


def killed_run(
    out: Path, settings: Sequence[str], run: int, seed: int, whole: float, most: int
) -> list[Start]:
    """One run, with at most so many kills, to its end."""
    rng, folder, starts = np.random.default_rng(seed), out / f"run{run}", list[Start]()
    while True:
        limit = rng.uniform(0, whole / 3) if len(starts) < most else np.inf
        before = repeated_steps(folder)
        used = start(folder, settings, limit)
        killed, repeated = used >= limit, repeated_steps(folder) - before
        text = (folder / "where").read_text(encoding="utf-8")
        place = next((name for name, sign in PLACES.items() if re.search(sign, text)), ELSEWHERE)
        if starts and repeated:  # what a start repeats, the kill before it cost
            starts[-1] = Start(**{**vars(starts[-1]), "repeated": repeated})
        starts.append(Start(run, seed, used, killed, place if killed else "end", 0))
        print(f"run {run}: {used:.1f} s, {starts[-1].place}", file=sys.stderr, flush=True)
        if not killed:
            return starts


def repeated_steps(folder: Path) -> int:
    """Training steps that the starts of a run have repeated so far, as they said."""
    said = folder / "out"
    text = said.read_text(encoding="utf-8") if said.exists() else ""
    return sum(map(int, re.findall(r"which are repeated: (\d+)", text)))


def compared(whole: Path, run: Path) -> list[str]:
    """Columns of tables that are not those of the run without a kill; the clock's are left out."""
    before, after = tables_below(whole / "results"), tables_below(run / "results")
    return [
        f"{run.name}: {table}.{column} ({kind})"
        for path, table in sorted({*before, *after})
        for column, kind, *_ in differing(before.get((path, table), {}), after.get((path, table), {}))
        if column != "seconds"
    ]


def report(table: pd.DataFrame, whole: float, unequal: Sequence[Sequence[str]]) -> None:
    """Print kills by place, the runs, and every column that differs."""
    kills = table[table["killed"]]
    places = kills.groupby("place").agg(kills=("seconds", "size"), steps=("repeated", "sum"))
    places["most at once"] = kills.groupby("place")["repeated"].max()
    order = [name for name in (*PLACES, ELSEWHERE) if name in places.index]
    places = places.loc[order].rename(columns={"steps": "steps repeated"}).rename_axis("killed while")
    print("\n" + markdown(places.reset_index()))
    runs = table.groupby(["run", "seed"], as_index=False).agg(
        kills=("killed", "sum"), seconds=("seconds", "sum")
    )
    runs["seconds repeated"] = (runs["seconds"] - whole).round(1)
    runs["seconds"] = runs["seconds"].round(1)
    runs["columns that differ"] = [len(columns) for columns in unequal]
    print("\n" + markdown(runs))
    per_kill = (runs["seconds"].sum() - whole * len(runs)) / len(kills)
    print(f"\n{len(kills)} kills in {len(runs)} runs; {per_kill:.1f} s repeated for a kill, start included")
    for columns in unequal:
        print("\n".join(columns), end="\n" if columns else "")


if __name__ == "__main__":
    main()
