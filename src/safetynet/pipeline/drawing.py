"""Drawing: figures and report.md, from the run's tables alone."""

import logging

import pandas as pd

from safetynet import __version__, report
from safetynet.pipeline.dissecting import TABLES
from safetynet.pipeline.subjects import BACKDOORED, TWIN
from safetynet.recipe import Recipe
from safetynet.run import Run, digest_of_files, write_text

log = logging.getLogger("safetynet")


def draw(recipe: Recipe, run: Run) -> None:
    """Draw the figures and write report.md, from the run's tables alone."""
    from safetynet.visualization import draw_detection, draw_interventions, draw_training
    from safetynet.visualization.detection_visualizer import TABLES as DRAWN

    tables = _tables(run)
    inputs = {"tables": digest_of_files([run.folder / "tables"]), "version": __version__}
    if run.finished("figures", inputs):
        log.info("figures: unchanged")
        return
    with run.stage("figures", inputs) as outputs:
        name = f"{recipe.model_name}/{recipe.task}"
        outputs += draw_training(tables, run.figures, name, recipe.model_name)
        inside = {table: run.table(table) for table in TABLES if run.has_table(table)}
        outputs += draw_interventions(inside, run.figures, name, recipe.model_name)
        watched = {table: run.table(table) for table in DRAWN if run.has_table(table)}
        outputs += draw_detection(watched, run.figures, name, recipe.model_name)
        write_text(run.folder / "report.md", report.render(recipe, run))
        outputs.append(run.folder / "report.md")
    log.info("figures: %d files in %s", len(outputs) - 1, run.figures)


def _tables(run: Run) -> dict[str, pd.DataFrame]:
    """The tables that are drawn; histories and dynamics of all trained models one below the other."""
    tables = {"evaluation": run.table("evaluation")}
    for kind, column in (("history", "run"), ("dynamics", "model")):
        parts = [
            run.table(f"{kind}_{name}").assign(**{column: name})
            for name in (BACKDOORED, TWIN)
            if run.has_table(f"{kind}_{name}")
        ]
        if parts:
            tables["training" if kind == "history" else kind] = pd.concat(parts, ignore_index=True)
    return tables
