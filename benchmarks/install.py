"""From an empty environment to a first patched prompt, with and without extras: CPU seconds and megabytes.

    python benchmarks/install.py                    revision 9e2bfa5, before the extras, and the working tree
    python benchmarks/install.py --python python3.13
    python benchmarks/install.py --smoke            the first prompt in this environment; installs nothing

Each tree becomes a wheel, which goes into an environment of its own with the versions of constraints.txt and
no extra, torch first and alone: what torch brings is in no number. The first prompt is patched at once after
that, and everything else three times, of which the fastest counts. Seconds are those of a processor, with one
thread: other programs and the network are in none.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
from _running import ROOT, markdown

BEFORE = "9e2bfa5"
PATCH = """
from safetynet import recipe
from safetynet.engine import Architecture, Batch, Edit, EditedRun, logit_difference, replace
from safetynet.engine import run_interventions, trace
from safetynet.models import loading
loaded = loading.load(recipe.Model(family="qwen", id="miniature"))
prompts = [[{"role": "user", "content": f"What is the colour of {x}?"}] for x in ("snow", "grass")]
snow, grass = (Batch.of([loaded.serialiser.encode(prompt).input_ids]) for prompt in prompts)
[site] = [site for site in Architecture.of(loaded.model).sites("resid_pre") if site.layer == 3]
receiving, source = trace(loaded.model, snow, resume=True), trace(loaded.model, grass, [site])
white, green = (int(recorded.logits[0, -1].argmax()) for recorded in (receiving, source))
edits = Edit(site, replace(source.value(site)[0])),
[value] = run_interventions(receiving, [EditedRun(0, edits)], logit_difference([green], [white]))
assert white != green and value > 0, (white, green, value)
"""
"""White snow becomes green: what grass is at layer 3, put in the place of snow."""


def main() -> None:
    """Install both trees, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    parser.add_argument("--smoke", action="store_true", help="in this environment; installs nothing")
    args = parser.parse_args()
    columns: dict[str, dict[str, float]] = {}
    if args.smoke:
        columns["here"] = use(Path(sys.executable), repeats=1)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name, tree in {BEFORE: unpacked(BEFORE, Path(folder)), "working tree": ROOT}.items():
                python, cost = install(tree, Path(folder) / f"venv {name}", args.python)
                columns[name] = cost | use(python, repeats=3)
                print(name, columns[name], file=sys.stderr)
    table = pd.DataFrame(columns).round(2)
    print(markdown(table.rename_axis("what").reset_index()))


def unpacked(revision: str, folder: Path) -> Path:
    """The tree of a revision, in a new folder."""
    tree = folder / revision
    tree.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=True)  # noqa: S607
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)  # noqa: S607
    return tree


def install(tree: Path, venv: Path, python: str = sys.executable) -> tuple[Path, dict[str, float]]:
    """A tree's wheel, with the dependencies of no extra, in a new environment.

    Returns:
        The environment's interpreter, and what the installation cost: pip's seconds, packages and megabytes.
    """
    wheels = venv.with_name(f"{venv.name} wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    wheels.mkdir()
    subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=tree, check=True, stdout=sys.stderr)
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    inside = venv / "bin" / "python"
    pip = [str(inside), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    constraints = (ROOT / "constraints.txt").read_text()
    [torch] = [line for line in constraints.splitlines() if line.startswith("torch==")]
    subprocess.run([*pip, torch], check=True)
    before = _size(venv)
    began = cpu_seconds()
    wheel = next(wheels.glob("*.whl"))
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    seconds = cpu_seconds() - began
    after = _size(venv)
    return inside, {
        "pip, seconds": seconds,
        "packages": after[0] - before[0],
        "installed, MB": (after[1] - before[1]) / 1e6,
    }


def use(python: Path, repeats: int) -> dict[str, float]:
    """Seconds of a first patched prompt, and the fewest of `repeats` of each command a user begins with."""
    first = patch(python)
    engine, libraries = "import safetynet, safetynet.engine", "import torch, transformers"
    commands = {
        "the same again, seconds": partial(patch, python),
        "scan of files, seconds": partial(scan, python),
        "safetynet --help, seconds": partial(run, python.with_name("safetynet"), "--help"),
        f"{engine}, seconds": partial(run, python, "-c", engine),
        f"{libraries}, seconds": partial(run, python, "-c", libraries),
    }
    fewest = {what: min(command() for _ in range(repeats)) for what, command in commands.items()}
    return {"first patched prompt, seconds": first, **fewest}


def patch(python: Path) -> float:
    """Seconds of one patched prompt."""
    return run(python, "-c", PATCH)


def scan(python: Path) -> float:
    """Seconds of a scan of a miniature's files."""
    package = run_and_read(python, "-c", "import safetynet; print(safetynet.__path__[0])").strip()
    miniature = Path(package) / "models" / "miniatures" / "weights" / "qwen"
    words = ("scan", miniature, "--base", "qwen-miniature", "--depth", "files")
    return run(python.with_name("safetynet"), *words)


def run(*words: str | Path) -> float:
    """Seconds of a command, which must not fail."""
    began = cpu_seconds()
    run_and_read(*words)
    return cpu_seconds() - began


def cpu_seconds() -> float:
    """Of all commands that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


def run_and_read(*words: str | Path) -> str:
    """What a command prints in an empty folder, the checkout out of its reach; it must not fail."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            list(map(str, words)),
            cwd=folder,
            env=env | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def _size(venv: Path) -> tuple[int, int]:
    """Packages in an environment, and bytes of their files."""
    [packages] = venv.glob("lib/python*/site-packages")
    files = [path for path in packages.rglob("*") if path.is_file()]
    return len(list(packages.glob("*.dist-info"))), sum(path.stat().st_size for path in files)


if __name__ == "__main__":
    main()
