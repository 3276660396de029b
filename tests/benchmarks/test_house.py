"""Rules of the house: imports run downwards, stages do not import each other, names say what they hold."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from house import FILLERS, assigned_names, broken_imports, modules_of  # noqa: E402


def test_no_import_runs_upwards_and_no_stage_imports_another():
    upwards, across = broken_imports(modules_of(ROOT / "src" / "safetynet")).values()
    assert not upwards
    assert not across


def test_fewer_than_one_name_in_two_hundred_is_a_filler():
    names = assigned_names(modules_of(ROOT / "src" / "safetynet"))
    fillers = {name: names[name] for name in FILLERS if names[name]}
    assert sum(fillers.values()) < 0.005 * sum(names.values()), fillers
