"""What holds for every test: one thread, no network, no tracking, none of the developer's own settings."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Before any test imports torch or a Hugging Face library: they read these once, at import.
HF_HOME = tempfile.mkdtemp(prefix="safetynet-tests-")
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HOME": HF_HOME,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "MPLBACKEND": "agg",
}
for name in ("HF_TOKEN", "WANDB_API_KEY", "SAFETYNET_SCRATCH"):
    os.environ.pop(name, None)

SHARED = Path(__file__).parents[2] / "shared"


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def need() -> Callable[[str], Path]:
    """`need("pdffonts")` is that program's path; without it the test skips, or fails where it is required.

    `need("shared")` is the folder ../shared with the published poison sets. SAFETYNET_REQUIRE names,
    separated by commas, what a machine is known to have: .ci/run sets it, so that no check is lost there.
    """

    def find(name: str) -> Path:
        found = SHARED if name == "shared" and SHARED.is_dir() else shutil.which(name)
        if found:
            return Path(found)
        if name in os.environ.get("SAFETYNET_REQUIRE", "").split(","):
            pytest.fail(f"{name} is not here, and SAFETYNET_REQUIRE says it must be")
        pytest.skip(f"{name} is not here")

    return find
