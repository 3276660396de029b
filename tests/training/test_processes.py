"""Training by two processes is training by one: the same losses, step by step; weights shared or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow
PROGRAM = str(Path(__file__).with_name("processes.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CASES = ["plain", "grouped", "packed", "experts", "full", "interrupted", "full, interrupted"]
FULL = "model/model.safetensors"
WEIGHTS = {
    "interrupted": "adapter/adapter_model.safetensors", "full": FULL, "full, interrupted": FULL,
}  # fmt: skip


def launched(out: Path, *launcher: str, **environment: str) -> Path:
    """What the program left there."""
    command = [*launcher, PROGRAM, str(out)] if launcher else [sys.executable, PROGRAM, str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("sharing"), *TORCHRUN, ACCELERATE_USE_FSDP="true")


@pytest.fixture(scope="module", params=["each has all weights", "weights are shared"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "weights are shared":
        folder: Path = request.getfixturevalue("sharing")
        return folder
    return launched(tmp_path_factory.mktemp("two"), *TORCHRUN)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_lose_at_each_step_what_one_process_loses(case: str, one: Path, two: Path) -> None:
    alone, together = (
        np.array(json.loads((folder / "losses.json").read_text())[case]) for folder in (one, two)
    )
    assert alone.shape == together.shape
    assert len(alone) >= 6
    half = len(alone) // 2
    assert alone[half:, 0].mean() < alone[:half, 0].mean() - 0.1, "nothing was learned"
    np.testing.assert_allclose(together[:, 0], alone[:, 0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(together[:, 1], alone[:, 1], rtol=1e-3)


@pytest.mark.parametrize("case", WEIGHTS)
def test_two_processes_end_with_the_weights_of_one_interrupted_or_not(
    case: str, one: Path, two: Path
) -> None:
    # The learning rate, the order of rows and Adam's moments of steps 1 to 6 have to come back for that.
    alone, together = (load_file(folder / case / WEIGHTS[case]) for folder in (one, two))
    assert set(alone) == set(together)
    for name, weight in alone.items():
        np.testing.assert_allclose(together[name], weight, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["plain", "packed", "experts", "full"])
def test_a_process_that_shares_holds_half_of_the_frozen_weights_and_an_adapter_whole(
    case: str, one: Path, sharing: Path
) -> None:
    (frozen, trained), (half, kept) = (
        json.loads((folder / "held.json").read_text())[case] for folder in (one, sharing)
    )
    if case == "full":
        assert frozen == half == 0
        assert kept == pytest.approx(trained / 2, rel=0.05)
    else:
        assert half == pytest.approx(frozen / 2, rel=0.05)
        assert kept == trained > 0
