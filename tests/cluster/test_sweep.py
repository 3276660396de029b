"""Sweeps as a user starts, stops and kills them: every point once, in one table."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

RECIPE = """
task: tiny
model: {family: qwen, id: miniature}
data: {train_rows: 64, test_rows: 12}
backdoor: {trigger: token, behaviour: fixed, poison_rate: 0.2}
training: {learning_rate: 0.004, max_steps: 4, max_length: 160, precision: fp32, clean_twin: false}
evaluation: {max_new_tokens: 16, batch_size: 100, dynamics_rows: 0}
stages: [evaluate, figures]
"""
THREE = ("--grid", "training.lora_rank=2,4,8", "--seeds", "0", "--workers", "2")
PATIENCE_S = 900
# A shell starts background processes deaf to Ctrl-C, and they hand that on.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from safetynet.cli.app import main
main()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def started(home: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "sweep", "tiny.yaml", *words],
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def swept(home: Path, *words: str) -> tuple[int, str, str]:
    process = started(home, *words)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def stages(home: Path) -> dict[tuple[str, str], str]:
    """When each stage of each point ended."""
    found = {}
    for path in home.glob("results/*/*/manifest.json"):
        for name, stage in json.loads(path.read_text())["stages"].items():
            found[path.parent.name, name] = f"{stage['finished']} {stage['inputs']} {stage['seconds']}"
    return found


def results(home: Path) -> pd.DataFrame:
    [path] = home.glob("results/sweeps/*/results.parquet")
    return pd.read_parquet(path)


def until(
    home: Path, stage: str, count: int, process: subprocess.Popen[str]
) -> Mapping[tuple[str, str], str]:
    """Wait until `count` points have ended a stage; what has ended by then."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        found = stages(home)
        if sum(name == stage for _, name in found) >= count:
            return found
        time.sleep(0.2)
    raise AssertionError(f"{stage} did not come: {stages(home)}")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sweep alone", "Ctrl-C"])
def test_a_sweep_that_was_killed_ends_with_every_point_and_none_computed_twice(how: str, home: Path) -> None:
    points = 3
    process = started(home, *THREE)
    before = until(home, "figures", 1, process)
    process.send_signal(signal.SIGKILL if how == "sweep alone" else signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if how == "Ctrl-C":
        assert process.returncode == 130
        assert "interrupted" in err
    assert 0 < sum(name == "figures" for _, name in stages(home)) < points, "killed in the middle"

    code, out, err = swept(home, *THREE)
    assert code == 0, err
    assert f"Sweep of {points} points: {points} done, 0 failed" in out
    table = results(home)
    assert table["point"].nunique() == points
    assert set(table["status"]) == {"done"}
    after = stages(home)
    assert {key: after[key] for key in before} == before, "a stage that had ended was computed again"
    logs = [path.read_text() for path in (home / "logs").rglob("*.log")]
    assert len(logs) == points
    assert all(len(re.findall(r"figures: \d+ files", text)) == 1 for text in logs)
    assert not list(home.glob("results/*/*/earlier"))

    code, _, err = swept(home, *THREE)
    assert code == 0
    assert stages(home) == after
    assert err.count("had ended before") == points


@pytest.mark.slow
def test_a_point_that_fails_is_listed_with_its_reason_and_the_others_end(home: Path) -> None:
    # Ten rows with a poison rate of 0.02 give no triggered row: known only when rows are made.
    code, out, err = swept(
        home, "--grid", "backdoor.poison_rate=0.2,0.005", "--seeds", "0", "--set", "data.train_rows=60"
    )
    assert code == 1
    assert "Traceback" not in err
    assert "1 of 2 points failed" in err
    table = results(home)
    failed = table[table["status"] == "failed"]
    assert len(failed) == 1
    assert failed["failed"].item() == "prepare"
    assert "gives no triggered row" in failed["reason"].item()
    assert "gives no triggered row" in Path(failed["log"].item()).read_text()
    assert "gives no triggered row" in out
    done = table[table["status"] == "done"]
    assert set(done["backdoor.poison_rate"]) == {0.2}
    assert done["n"].max() == 12
    [folder] = home.glob("results/sweeps/*")
    assert len(pd.read_csv(folder / "results.csv")) == len(table)
    assert "## Failed" in (folder / "results.md").read_text()
