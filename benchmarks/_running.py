"""What benchmarks of whole runs share: a run in a process of its own with one thread, a Markdown table."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]


def run_recipe(command: str, family: str, fields: Mapping[str, object], name: str) -> int:
    """Run a family's miniature recipe; gives the exit code, and says on standard error what went wrong.

    Args:
        command: of safetynet, `run` or `train`.
        family: of the recipe.
        fields: of the recipe, set over it.
        name: of the cell, for the message.
    """
    sets = [word for field, value in fields.items() for word in ("--set", f"{field}={value}")]
    return safetynet(command, str(ROOT / "recipes" / f"{family}-miniature.yaml"), *sets, name=name)


def safetynet(*words: str, name: str) -> int:
    """Run a command of safetynet's; gives the exit code, and says on standard error what went wrong."""
    done = subprocess.run(
        [sys.executable, "-c", "from safetynet.cli.app import main; main()", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(f"{name}: exit {done.returncode}", file=sys.stderr)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode


def program(*words: str, cwd: Path | None = None) -> str:
    """What a Python program with one thread prints; where it fails, this one ends with its last words."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return done.stdout


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.fillna("").itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def percent(row: pd.Series) -> str:
    """A rate with its interval, in percent; a dash where nothing was counted."""
    if not row["n"]:
        return "-"
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
