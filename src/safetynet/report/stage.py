"""The stage of the figures: figures and report of a run, and an index of many, from the tables alone."""

import logging
from pathlib import Path
from typing import Any

from safetynet.errors import InputError, RunError
from safetynet.experiment import Experiment
from safetynet.recipe import Report
from safetynet.run import directory as runs
from safetynet.run import parallel
from safetynet.run.directory import Outputs, Run, digest_of_files, write_text
from safetynet.run.stage import FIGURES

log = logging.getLogger("safetynet")
DEPTH = 3
"""Folders between the one that is indexed and a run, at most; results/ itself has two."""


def draw(experiment: Experiment, options: Report | None = None) -> None:
    """Draw the figures and write the report, from the run's tables alone.

    Args:
        experiment: evaluated.
        options: instead of the recipe's.

    Raises:
        InputError: if there is no such venue, a table cannot be drawn or the folder cannot be written. The
            figures of other tables are there then, and the report is written, whatever is raised.
    """
    from safetynet.figures import figures_of, save_all

    recipe, run = experiment.recipe, experiment.run
    options = options or recipe.report

    def compute(outputs: Outputs) -> None:
        run.table("evaluation")  # a missing evaluation is reported before anything is drawn
        tables, damaged = {}, []
        for path in sorted((run.folder / "tables").glob("*.parquet")):
            try:
                tables[path.stem] = run.table(path.stem)
            except InputError as error:  # the other tables are drawn all the same
                damaged.append(str(error))
        if not parallel.is_first():
            return
        name = f"{recipe.model_name}/{recipe.task}"
        figures, faults = figures_of(tables, run.figures, name, recipe.model_name)
        for path in save_all(figures, options.venue, options.self_contained):
            outputs.file(path)
        if faults := [*damaged, *faults]:
            raise InputError(faults[0])
        log.info("figures: %d files in %s", len(outputs.paths), run.figures)

    try:
        inputs: dict[str, Any] = {"tables": digest_of_files([run.folder / "tables"])}
        if options != Report():
            inputs["options"] = options.model_dump(mode="json")
        experiment.perform(FIGURES, inputs, compute)
    finally:
        if parallel.is_first():
            report(run)


def report(run: Run, out: Path | None = None) -> Path:
    """Write a run's report.html, and report.md beside it, from whatever the run holds.

    Args:
        run: with or without its stages and tables.
        out: another file for the page; the run is then not written to.

    Returns:
        The page.

    Raises:
        InputError: if the manifest is damaged, or the page cannot be written.
    """
    from safetynet import report as reports

    contents = reports.read(run)
    page = out or run.folder / reports.REPORT
    _write(page, reports.report(contents))
    if out is None:
        _write(run.folder / "report.md", reports.markdown(contents))
    return page


def index(folder: Path, out: Path | None = None) -> Path:
    """Write a page that lists every run below a folder, and the report of those that have none.

    Raises:
        InputError: if there is no such folder, or the page cannot be written.
    """
    from safetynet import report as reports

    if not folder.is_dir():
        raise InputError(
            f"--index: {folder} is no folder. Name the one that holds the runs, such as results."
        )
    page = out or folder / "index.html"
    folders = sorted(
        path.parent.absolute()
        for depth in range(DEPTH + 1)
        for path in folder.glob("*/" * depth + "manifest.json")
    )
    for run in folders:
        if not (run / reports.REPORT).exists():
            try:
                report(runs.find(run))
            except InputError as error:
                log.warning("index: no report. %s", error)
    _write(page, reports.index(folders, page.parent.absolute()))
    return page


def _write(page: Path, text: str) -> None:
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, text)
    except (OSError, RunError) as error:
        raise InputError(f"{page}: cannot be written ({error}). Name another file with --out.") from None
