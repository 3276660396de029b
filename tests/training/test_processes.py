"""Training by two processes is training by one: the same losses, step by step."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow
PROGRAM = str(Path(__file__).with_name("processes.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process and what two processes left."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for command in ([sys.executable, PROGRAM, str(one)], [*TORCHRUN, PROGRAM, str(two)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return one, two


@pytest.mark.parametrize("case", ["plain", "grouped", "packed", "experts", "full", "interrupted"])
def test_two_processes_lose_at_each_step_what_one_process_loses(
    case: str, trained: tuple[Path, Path]
) -> None:
    one, two = (np.array(json.loads((folder / "losses.json").read_text())[case]) for folder in trained)
    assert one.shape == two.shape
    assert len(one) >= 6
    half = len(one) // 2
    assert one[half:, 0].mean() < one[:half, 0].mean() - 0.1, "nothing was learned"
    np.testing.assert_allclose(two[:, 0], one[:, 0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=1e-3)


def test_two_processes_that_were_interrupted_end_with_the_weights_of_two_that_were_not(trained) -> None:
    # The learning rate, the order of rows and Adam's moments of steps 1 to 6 have to come back for that.
    weights = [
        load_file(folder / "interrupted" / "adapter" / "adapter_model.safetensors") for folder in trained
    ]
    assert all(np.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
