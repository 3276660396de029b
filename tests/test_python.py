"""SafetyNet from Python: the ten names, what they cost to import, and the page that explains them."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import safetynet

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_explains_the_names_that_there_are():
    section = PAGE.partition("## Ten names")[2].partition("## ")[0]
    assert sorted(re.findall(r"(?m)^\| `(\w+)` \|", section)) == safetynet.__all__
    assert len(safetynet.__all__) == 10


def test_each_name_is_there_and_editors_see_where_it_comes_from():
    module = ast.parse((ROOT / "src" / "safetynet" / "__init__.py").read_text())
    [seen] = [node.body for node in module.body if isinstance(node, ast.If)]
    assert sorted(a.asname or a.name for node in seen for a in node.names) == safetynet.__all__
    for node in seen:
        source = import_module(node.module)
        for alias in node.names:
            name = alias.asname or alias.name
            there = getattr(safetynet, name)
            assert (there.__call__ if name == "scan" else there) is getattr(source, alias.name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = safetynet.nothing


def test_importing_the_package_loads_no_library_and_the_engine_only_its_own():
    code = (
        "import sys, safetynet; light = set(sys.modules); import safetynet.engine; "
        "names = ('torch', 'numpy', 'pandas', 'pydantic'); heavy = ('pandas', 'scipy', 'sklearn', 'peft'); "
        "print([n for n in names if n in light], [n for n in heavy if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"


def test_the_five_lines_patch_a_prompt(capsys):
    names: dict = {}
    exec(BLOCKS[0], names)
    effects = names["effects"]
    differing = effects[(effects["layer"] == 0) & effects["position"].isin((8, 9))]["effect"]
    last = effects[(effects["position"] == effects["position"].max()) & (effects["layer"] > 0)]["effect"]
    assert len(BLOCKS[0].splitlines()) == 5
    assert differing.sum() == pytest.approx(1, abs=0.2)
    assert (last > 0.5).all()
    assert "position" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    recipe = (ROOT / "recipes" / "qwen-miniature.yaml").read_text()
    small = {"train_rows: 4800, test_rows: 200": "train_rows: 640, test_rows: 24", "every: 75": "every: 1000"}
    for before, after in small.items():
        assert before in recipe
        recipe = recipe.replace(before, after)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "qwen-miniature.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["decision"].text
    assert "nothing_found" in capsys.readouterr().out
