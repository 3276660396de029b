"""The benchmark runs as its help says, and both of its methods give the same answers."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "evaluation.py"


@pytest.mark.slow
def test_the_benchmark_in_smoke_mode_finds_the_same_answers_both_ways():
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--smoke"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "12/12" in done.stdout
    assert "8/8" in done.stdout
