"""The arrows of the house: no module imports one of a higher floor, and no stage imports another."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from house import broken_imports, modules_of  # noqa: E402


def test_no_import_runs_upwards_and_no_stage_imports_another():
    upwards, across = broken_imports(modules_of(ROOT / "src" / "safetynet")).values()
    assert not upwards
    assert not across
