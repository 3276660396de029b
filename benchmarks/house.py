"""How large and how orderly the code is: before and after, beside the goals.

    python benchmarks/house.py                  revision 02bb309 beside the working tree
    python benchmarks/house.py BEFORE AFTER     two revisions of git, or folders that hold src/ and tests/
    python benchmarks/house.py --smoke          the working tree alone

Prints a Markdown table, then the imports of AFTER that break the order of `FLOORS`, then its filler names.
`ast` and `tokenize` count; nothing of SafetyNet is imported, so any revision can be counted.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from _running import ROOT, markdown

BEFORE = "02bb309"
PACKAGE = "safetynet"

FLOORS = {
    "ground": (
        "", "errors", "extras", "families", "tables", "vocabulary", "statistics",
        "models.families", "words", "characters", "token_texts", "holding", "parallel", "provenance",
        "presets", "findings",
    ),
    "models, prompts, run, recipe": (
        "models", "prompts", "run", "recipe", "text",
        "recipe_sections", "whereabouts", "locking", "templates", "truncation", "lookalikes",
    ),
    "engine": ("engine",),
    "evaluation, backdoors, training": ("evaluation", "backdoors", "training"),
    "experiment, figures": ("experiment", "figures", "report.page"),
    "stages": (
        "interventions", "detection", "mitigation", "scan", "comparison", "report",
        "backdoors.stage", "training.stage", "evaluation.stage",
    ),
    "list of the stages": ("stages", "cluster", "visualization", "pipeline"),
    "cli": ("cli", "__main__", "inspect_ai", "commands", "terminal"),
}  # fmt: skip
"""Floors from the lowest to the highest, each with its rooms: packages and modules below `safetynet`.

A module's room is the longest name here that its own name begins with. It may import its own room, lower
floors and its neighbours; but a stage may import no other stage. `engine` has a floor to itself, because it
knows no backdoor. The last lines of a floor hold rooms that only earlier revisions have.
"""

FILLERS = (
    "found", "own", "one", "made", "told", "said", "chosen", "wanted", "kept", "given", "taken", "asked",
    "known", "drawn", "done", "seen", "shown", "due", "tried",
)  # fmt: skip
"""Names that say nothing about what they hold."""

GOALS = {
    "source files": "at most 180",
    "source lines": "at most 29,000",
    "private helpers called once in their file": "below 35 %",
    "filler names among assigned names": "below 0.5 %",
    "imports that run up": "0",
    "imports from one stage into another": "0",
    "test lines per source line": "at least 0.75",
    "comments per 100 lines": "at least 4",
}


@dataclass(frozen=True)
class Module:
    """A source file, read and parsed."""

    name: str
    """Dotted, below the package: `models.loading`; a package's `__init__` has the package's name."""
    path: Path
    source: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        """The file's lines, without their ends."""
        return self.source.splitlines()


def main() -> None:
    """Count both trees and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", nargs="?", default=BEFORE, help="revision or folder")
    parser.add_argument("after", nargs="?", default=str(ROOT), help="revision or folder")
    parser.add_argument("--smoke", action="store_true", help="the working tree alone")
    args = parser.parse_args()
    trees = [str(ROOT)] if args.smoke else [args.before, args.after]
    columns = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, tree in enumerate(trees):
            folder = folder_of(tree, Path(temporary) / str(number))
            modules = modules_of(folder / "src" / PACKAGE)
            columns["working tree" if folder == ROOT else tree] = figures(modules, folder / "tests")
    table = pd.DataFrame(columns)
    table.insert(0, "figure", table.index)
    print(markdown(table.assign(goal=[GOALS.get(figure, "") for figure in table.index])))
    for kind, arrows in broken_imports(modules).items():
        print(f"\n{kind}:", *(arrows or ["none"]), sep="\n- ")
    fillers = [f"{name} {count}" for name, count in assigned_names(modules).most_common() if name in FILLERS]
    print("\nFiller names: " + (", ".join(fillers) or "none"))


def folder_of(tree: str, temporary: Path) -> Path:
    """The folder with src/ and tests/ of a tree; those of a revision are unpacked below `temporary`."""
    if (Path(tree) / "src" / PACKAGE).is_dir():
        return Path(tree).resolve()
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--format=tar", tree, "src", "tests"],  # noqa: S607
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        sys.exit(
            f"{tree}: neither a folder that holds src/{PACKAGE} nor a revision (git: {archive.stderr!r})"
        )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(temporary, filter="data")
    return temporary


def modules_of(package: Path) -> list[Module]:
    """Every Python file of the package, in the order of their names."""
    modules = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        source = path.read_text(encoding="utf-8")
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name, path, source, ast.parse(source)))
    return modules


def figures(modules: list[Module], tests: Path) -> dict[str, str]:
    """The figures of one tree, ready to print, by what they count."""
    kinds = sum((line_kinds(module) for module in modules), Counter())
    lines = sum(len(module.lines) for module in modules)
    test_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests.rglob("*.py"))
    helpers, once, handed_on = map(sum, zip(*map(private_helpers, modules), strict=True))
    assigned = assigned_names(modules)
    fillers = sum(assigned[name] for name in FILLERS)
    up, across = broken_imports(modules).values()
    return {
        "source files": f"{len(modules):,}",
        "source lines": f"{lines:,}",
        **{f"of these {kind}": f"{kinds[kind]:,}" for kind in ("code", "docstring", "blank", "comment")},
        "functions": f"{sum(isinstance(n, FUNCTION) for m in modules for n in ast.walk(m.tree)):,}",
        "private helpers": f"{helpers:,}",
        "private helpers called once in their file": f"{100 * once / helpers:.1f} %",
        "of these registered or handed on, not called": f"{100 * handed_on / helpers:.1f} %",
        "assigned names": f"{assigned.total():,}",
        "filler names among assigned names": f"{100 * fillers / assigned.total():.2f} %",
        "imports that run up": f"{len(up):,}",
        "imports from one stage into another": f"{len(across):,}",
        "test lines": f"{test_lines:,}",
        "test lines per source line": f"{test_lines / lines:.2f}",
        "comments per 100 lines": f"{100 * sum(map(comments, modules)) / lines:.1f}",
    }


FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def line_kinds(module: Module) -> Counter[str]:
    """How many lines are code, docstring (of attributes too), blank, or nothing but a comment."""
    # A string that stands alone is documentation: of the module, class, function or attribute above it.
    strings = [
        node.value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    docstring = {number for node in strings for number in range(node.lineno, (node.end_lineno or 0) + 1)}
    comment = {
        t.start[0] for t in tokens(module) if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")
    }
    kinds: Counter[str] = Counter()
    for number, line in enumerate(module.lines, 1):
        if number in docstring:
            kinds["docstring"] += 1
        elif not line.strip():
            kinds["blank"] += 1
        else:
            kinds["comment" if number in comment else "code"] += 1
    return kinds


def tokens(module: Module) -> Iterator[tokenize.TokenInfo]:
    """The file's tokens."""
    return tokenize.generate_tokens(io.StringIO(module.source).readline)


def comments(module: Module) -> int:
    """Comments that speak to a reader, not to a tool."""
    directive = re.compile(r"#\s*(noqa|type:|fmt:)")
    return sum(t.type == tokenize.COMMENT and not directive.match(t.string) for t in tokens(module))


def private_helpers(module: Module) -> tuple[int, int, int]:
    """Private functions of the file and methods of its classes: how many, named once, and not as a call."""
    bodies = [module.tree.body]
    bodies += [node.body for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    helpers = [
        node.name
        for body in bodies
        for node in body
        if isinstance(node, FUNCTION) and re.match("_[^_]", node.name)
    ]
    uses = Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
    )
    calls = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }
    once = [name for name in helpers if uses[name] == 1]
    return len(helpers), len(once), sum(name not in calls for name in once)


def assigned_names(modules: list[Module]) -> Counter[str]:
    """How often each name is assigned: by statements, loops, with, comprehensions, and as a class's field."""
    return Counter(
        node.id
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )


def broken_imports(modules: list[Module]) -> dict[str, list[str]]:
    """Imports that run up, and those from one stage into another, each as `importer -> imported`.

    A module that imports another one twice counts once. Imports inside functions and for types count too.

    Raises:
        SystemExit: if a module is in no room of `FLOORS`.
    """
    order = list(FLOORS)
    names = {module.name for module in modules}
    up, across = set(), set()
    for module in modules:
        if not module.name:
            continue  # the package itself hands on names of every floor, each when it is asked for
        floor, room = room_of(module.name)
        for target in imports(module, names):
            target_floor, target_room = room_of(target)
            arrow = f"{module.name or PACKAGE} -> {target}"
            if order.index(target_floor) > order.index(floor):
                up.add(f"{arrow} ({floor} -> {target_floor})")
            elif floor == target_floor == "stages" and room != target_room:
                across.add(arrow)
    return {"Imports that run up": sorted(up), "Imports from one stage into another": sorted(across)}


def room_of(name: str) -> tuple[str, str]:
    """Floor and room of a module: the longest name in `FLOORS` that it begins with.

    Raises:
        SystemExit: if it is in no room.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        room = ".".join(parts[:length])
        for floor, rooms in FLOORS.items():
            if room in rooms:
                return floor, room
    sys.exit(f"{PACKAGE}.{name} is on no floor: add it, or its package, to FLOORS in {Path(__file__).name}.")


def imports(module: Module, names: set[str]) -> set[str]:
    """Modules of the package that this one imports, wherever the statement stands."""
    targets = set()
    package = module.name.split(".") if module.path.name == "__init__.py" else module.name.split(".")[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = [PACKAGE, *package][: len(package) + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets |= {f"{base}.{alias.name}" for alias in node.names}
    below = {target.removeprefix(f"{PACKAGE}.") for target in targets if target.startswith(f"{PACKAGE}.")}
    # What is no module is a name out of one.
    return {target if target in names else target.rpartition(".")[0] for target in below} - {module.name}


if __name__ == "__main__":
    main()
