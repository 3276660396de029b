"""An index of many runs: one line each, sortable, with a link to its report.

In: run directories. Out: one HTML page. A run that cannot be read has its line too, and says why.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetynet.errors import InputError
from safetynet.report.answers import Measure, answers, headline
from safetynet.report.build import setup
from safetynet.report.contents import read
from safetynet.report.page import render
from safetynet.run.directory import find

REPORT = "report.html"
COLUMNS = (
    "Run", "Trigger", "Behaviour", "Seed", "Attack success", "False triggers", "Acts at", "Seen",
    "Removed to", "Accuracy then", "Version", "Finished",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What a reader sees, what is sorted by, and a smaller second line."""

    text: str
    key: float | str = ""
    small: str = ""


@dataclass(frozen=True)
class Line:
    """One run."""

    name: str
    link: str
    """Its report as seen from the index; "" where there is none."""
    cells: list[Cell] = field(default_factory=list)
    fault: str = ""
    note: str = ""


def index(folders: Sequence[Path], place: Path) -> str:
    """A page that lists runs.

    Args:
        folders: run directories.
        place: the folder in which the page will lie, for its links.
    """
    lines = [_line(folder, place) for folder in folders]
    versions = sorted({line.cells[-2].text for line in lines if line.cells} - {"unknown"})
    values = {"lines": lines, "columns": COLUMNS, "versions": versions, "place": place.name}
    return render("index.html", "index.js", values)


def _line(folder: Path, place: Path) -> Line:
    name = "/".join(folder.parts[-2:])
    path = folder / REPORT
    link = Path(os.path.relpath(path, place)).as_posix() if path.exists() else ""
    try:
        run = read(find(folder))
    except InputError as error:
        return Line(name, "", fault=" ".join(str(error).replace(f"{folder}/", "").split()))
    by_key = {answer.key: answer for answer in answers(run)}
    where, facts = by_key["where"], setup(run)
    records = run.manifest["stages"].values()
    finished = max(
        (str(stage.get("finished", "")) for stage in records if isinstance(stage, dict)), default=""
    )
    version = str((run.manifest.get("versions") or {}).get("safetynet") or "unknown")
    verdict, _ = headline(by_key.values())
    cells = [
        Cell(", ".join(facts.triggers) or "none", ", ".join(facts.triggers)),
        Cell(facts.behaviour, facts.behaviour),
        Cell(str(run.field("seed", "")), float(run.field("seed", -1))),
        _measured(by_key["planted"].measures),
        _measured(by_key["reliable"].measures, worst=True),
        Cell(where.short, where.short) if where.measures else Cell("–", ""),
        _measured(by_key["seen"].measures),
        _measured(by_key["removed"].measures),
        _measured(by_key["price"].measures),
        Cell(version, version),
        Cell(finished[:10], finished),
    ]
    gaps = ", ".join(missing.stage for missing in run.missing())
    notes = [
        verdict,
        f"{len(run.faults)} tables damaged." if run.faults else "",
        f"Not run: {gaps}." if gaps else "",
    ]
    return Line(name, link, cells, note=" ".join(filter(None, notes)))


def _measured(measures: Sequence[Measure], *, worst: bool = False) -> Cell:
    """The claimed number, which is the first, or the worst of several; its interval below."""
    if not measures:
        return Cell("–", -1.0)
    measure = max(measures, key=lambda measure: measure.value) if worst else measures[0]
    value, _, interval = measure.text.partition(" ")
    small = f"{interval} {measure.label}" if worst and measure.value > 0 else interval
    return Cell(value, float(measure.value), small)
