"""Comparing: finished runs side by side, from their tables alone, into a folder of its own."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from safetynet import __version__
from safetynet.comparison.runs import COMPARED, ComparedRun
from safetynet.errors import InputError
from safetynet.run.directory import Run, digest_of_files, find, write_text

log = logging.getLogger("safetynet")


class Comparison(NamedTuple):
    """What a comparison found and where it lies."""

    tables: Mapping[str, pd.DataFrame]
    notes: Sequence[str]
    page: Path


def compare(folders: Sequence[Path], out: Path) -> Comparison:
    """Compare runs and write tables, figures and comparison.md below `out`.

    Args:
        folders: of the runs.
        out: where it is written; what another comparison left there moves to `earlier/`.

    Raises:
        InputError: if a folder is no run, a table is damaged, the runs cannot be compared, or `out` cannot be
            written or is a run itself.
    """
    from safetynet import comparison
    from safetynet.comparison import paper, places, runs
    from safetynet.figures import figures_of, save_all

    opened = [find(folder) for folder in folders]
    short = ["/".join(run.folder.parts[-2:]) for run in opened]
    names = [n if short.count(n) == 1 else str(run.folder) for run, n in zip(opened, short, strict=True)]
    compared = [_read(run, name) for run, name in zip(opened, names, strict=True)]
    runs.check(compared)
    in_groups = runs.grouped(compared)
    tables = comparison.compare(in_groups)
    notes = [*runs.notes(in_groups), *places.incomplete(in_groups)]

    # The folder of a comparison is kept like a run's: atomic writes, digests, what was there set aside.
    target = Run(out.absolute(), out.absolute(), out.absolute() / "compare.log")
    if target.manifest.get("recipe"):
        raise InputError(f"--out: {out} is a run itself. Name another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written ({error.strerror}). Name another folder.") from None
    inputs = {
        "runs": {str(run.folder): {name: digest_of_files([_path(run, name)]) for name in run_of.tables}
                 for run, run_of in zip(opened, compared, strict=True)},
        "recipes": [run_of.recipe.model_dump(mode="json") for run_of in compared],
        "versions": [dict(run_of.versions) for run_of in compared],
        "version": __version__,
    }  # fmt: skip
    result = Comparison(tables, notes, target.folder / "comparison.md")
    with target.lock():
        if target.finished("compare", inputs):
            log.info("compare: unchanged")
            return result
        with target.stage("compare", inputs) as outputs:
            for name, table in tables.items():
                outputs.table(name, table)
            figures, faults = figures_of(tables, target.figures, f"comparison of {len(in_groups)} runs")
            if faults:
                raise InputError(faults[0])
            files = save_all(figures)
            papers = paper.paper_tables(tables)
            pages = {
                target.figures / f"{table.name}-table.{suffix}": text
                for table in papers
                for suffix, text in table.files().items()
            }
            pages[result.page] = paper.page(tables, papers, notes, [figure.name for figure in figures])
            for path, text in pages.items():
                write_text(path, text)
            for path in (*files, *pages):
                outputs.file(path)
    return result


def _read(run: Run, name: str) -> ComparedRun:
    """A run with the tables that its finished stages wrote.

    Raises:
        InputError: if a table is gone, cannot be read, or is no longer what its stage wrote.
    """
    manifest = run.manifest
    if "compare" in manifest["stages"]:
        raise InputError(f"{run.folder}: this is a comparison, not a run. Name run directories.")
    recipe = run.recorded_recipe  # runs of two machines are one group, whatever their folders are called
    recorded: dict[str, str] = {}
    for stage in manifest["stages"].values():
        recorded |= stage.get("outputs", {})
    tables = {}
    for table in COMPARED:
        path = _path(run, table)
        digest = recorded.get(f"tables/{table}.parquet")
        # A table that no finished stage recorded is one that an interrupted stage left.
        if digest is None:
            continue
        tables[table] = run.table(table)
        if digest_of_files([path]) != digest:
            raise InputError(
                f"{path}: the table is not what its stage wrote. Delete it and run the stage again: "
                f"safetynet run goes on from what is there."
            )
    return ComparedRun(name, str(run.folder), recipe, manifest.get("versions", {}), tables)


def _path(run: Run, table: str) -> Path:
    return run.folder / "tables" / f"{table}.parquet"
