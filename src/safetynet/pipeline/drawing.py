"""Drawing: figures, report.html and report.md of a run and an index of many, from the tables alone."""

import logging
from pathlib import Path

from safetynet import __version__
from safetynet.errors import InputError, RunError
from safetynet.recipe import Recipe
from safetynet.run import directory as runs
from safetynet.run import parallel
from safetynet.run.directory import Run, digest_of_files, write_text

log = logging.getLogger("safetynet")
DEPTH = 3
"""Folders between the one that is indexed and a run, at most; results/ itself has two."""


def draw(recipe: Recipe, run: Run, venue: str = "general") -> None:
    """Draw the figures and write the report, from the run's tables alone.

    Args:
        recipe: of the run.
        run: evaluated.
        venue: whose columns the figures on paper fit.

    Raises:
        InputError: if there is no such venue, a table cannot be drawn or the folder cannot be written. The
            figures of other tables are there then, and the report is written, whatever is raised.
    """
    try:
        _figures(recipe, run, venue)
    finally:
        if parallel.is_first():
            report(run)


def _figures(recipe: Recipe, run: Run, venue: str) -> None:
    from safetynet.figures.of_run import figures_of

    inputs = {"tables": digest_of_files([run.folder / "tables"]), "version": __version__}
    if venue != "general":
        inputs["venue"] = venue
    if run.finished("figures", inputs):
        log.info("figures: unchanged")
        return
    run.table("evaluation")  # what is not evaluated yet is said before anything is drawn
    tables = {path.stem: run.table(path.stem) for path in sorted((run.folder / "tables").glob("*.parquet"))}
    with run.stage("figures", inputs) as outputs:
        if not parallel.is_first():
            return
        name = f"{recipe.model_name}/{recipe.task}"
        figures, faults = figures_of(tables, run.figures, name, recipe.model_name)
        outputs += [path for figure in figures for path in figure.save(venue=venue)]
        if faults:
            raise InputError(faults[0])
    log.info("figures: %d files in %s", len(outputs), run.figures)


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
    found = sorted(
        path.parent.absolute()
        for depth in range(DEPTH + 1)
        for path in folder.glob("*/" * depth + "manifest.json")
    )
    for run in found:
        if not (run / reports.REPORT).exists():
            try:
                report(runs.find(run))
            except InputError as error:
                log.warning("index: no report. %s", error)
    _write(page, reports.index(found, page.parent.absolute()))
    return page


def _write(page: Path, text: str) -> None:
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, text)
    except (OSError, RunError) as error:
        raise InputError(f"{page}: cannot be written ({error}). Name another file with --out.") from None
