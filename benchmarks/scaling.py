"""A sweep of twelve small points with one worker and with two: how much faster is the second?

    python benchmarks/scaling.py           12 points each, twice; half an hour or so on two quiet cores
    python benchmarks/scaling.py --smoke   2 points each, to see that it works

Each worker is one process with one thread. Both sweeps start from nothing. The time is of the whole command,
from the first validation to the table. docs/results/speed.md quotes the table.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from _running import markdown, program

RECIPE = """
task: scaling
model: {family: qwen, id: miniature}
data: {train_rows: 640, test_rows: 60}
backdoor: {trigger: token, behaviour: fixed, poison_rate: 0.2}
training: {learning_rate: 0.004, epochs: 2, batch_size: 16, max_length: 160, precision: fp32}
evaluation: {max_new_tokens: 24, batch_size: 100, dynamics_rows: 8}
"""
GRID = ("--grid", "training.lora_rank=2,4,8", "backdoor.poison_rate=0.1,0.2", "--seeds", "0:2")
SMOKE = (
    "--seeds", "0:2", "--set", "data.train_rows=64", "--set", "data.test_rows=12",
    "--set", "training.max_steps=2", "--set", "training.clean_twin=false",
    "--set", "evaluation.dynamics_rows=0",
)  # fmt: skip
TARGET = 1.6


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="two small points, once")
    args = parser.parse_args()
    lines = []
    for repeat in range(1 if args.smoke else args.repeats):
        seconds = {workers: swept(workers, SMOKE if args.smoke else GRID) for workers in (1, 2)}
        lines.append(
            {
                "repeat": repeat,
                "one worker (s)": round(seconds[1]),
                "two workers (s)": round(seconds[2]),
                "speed-up": f"{seconds[1] / seconds[2]:.2f}x",
            }
        )
        print(markdown(pd.DataFrame(lines[-1:])), file=sys.stderr)
    print(markdown(pd.DataFrame(lines)))
    if not args.smoke:
        print(f"\nTarget: {TARGET}x on two cores, one thread each.")


def swept(workers: int, words: tuple[str, ...]) -> float:
    """Seconds of one whole sweep; stops the benchmark if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "scaling.yaml").write_text(RECIPE)
        sweep = ("sweep", "scaling.yaml", *words, "--workers", str(workers))
        start = time.perf_counter()
        program("-m", "safetynet", *sweep, cwd=Path(folder))
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
