"""Every figure by its name: the function that draws it, its tables, and what the report says of it.

A chart function is declared with `figure` where it is defined. `draw`, the run, `safetynet plot` and the
report follow from that; the order of declaration is the order of the page.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures.chart import Chart, Source
from safetynet.figures.saving import Figure
from safetynet.tables import Data
from safetynet.vocabulary import TRAINED

Section = Literal["behaviour", "inside", "seen", "removed", "training", "other", "comparison"]
ChartFunction = TypeVar("ChartFunction", bound=Callable[..., Chart])


@dataclass(frozen=True)
class FigureKind:
    """A figure that can be drawn from tables."""

    name: str
    tables: tuple[str, ...]
    """Tables that the chart function takes; `history_*` and `dynamics_*` are those of all trained models."""
    section: Section
    """Of the report."""
    reads: str
    """How to read it, in a sentence."""
    control: str
    """What it is compared with, in a sentence."""
    chart: Callable[..., Chart]


FIGURES: dict[str, FigureKind] = {}


class NotMeasuredError(InputError):
    """A table is sound and holds nothing of what a figure shows: a run leaves that figure out."""


def figure(
    name: str, *tables: str, section: Section, reads: str, control: str = "", **options: object
) -> Callable[[ChartFunction], ChartFunction]:
    """Declare that a chart function draws a figure; one function may draw several with different options.

    Args:
        name: of the figure and its files.
        tables: names of the tables that the function takes, in their order.
        section: of the report.
        reads: how to read it, in a sentence.
        control: what it is compared with, in a sentence.
        options: passed to the function.
    """

    def declare(chart: ChartFunction) -> ChartFunction:
        FIGURES[name] = FigureKind(name, tables, section, reads, control, partial(chart, **options))
        return chart

    return declare


def draw(
    name: str,
    *tables: Data | Path | str,
    model: str = "",
    run: str = "",
    folder: Path | str = "figures",
) -> Figure:
    """One figure of tables.

    Args:
        name: of the figure, such as `intervention-heads`.
        tables: DataFrames, lists of records or dicts of lists, as `FIGURES[name].tables` names them.
        model: name in the title.
        run: name of the run, which every file carries.
        folder: where `.save()` puts the files.

    Raises:
        InputError: if there is no such figure, a column is missing, a word is unknown, a value is no number,
            or there are no rows.
    """
    if name not in FIGURES:
        raise InputError(f"there is no figure {name!r}; there are {', '.join(FIGURES)}")
    kind = FIGURES[name]
    if len(tables) != len(kind.tables):
        raise InputError(f"figure {name}: give its tables {' and '.join(kind.tables)}, in this order")
    return place(kind.chart(*tables), name, kind.tables[0], model, run, folder)


def place(chart: Chart, name: str, table: str, model: str, run: str, folder: Path | str) -> Figure:
    """A chart with the model in its title, the run and table in its files, and the folder that they go to."""
    title = f"{chart.title}, {model}" if model else chart.title
    return Figure(replace(chart, title=title, source=Source(run, table)), name, Path(folder))


def figures_of(
    tables: Mapping[str, pd.DataFrame], folder: Path | str, run: str, model: str = ""
) -> tuple[list[Figure], list[str]]:
    """Every figure that the tables of a run or a comparison hold, and a sentence for each that is damaged.

    Args:
        tables: by the names they have in the run.
        folder: of the figures.
        run: name of the run, which every figure carries.
        model: name in titles.
    """
    # Histories and rates over training of all trained models, one below the other.
    joined = dict(tables)
    for stem, column in (("history", "run"), ("dynamics", "model")):
        parts = [
            tables[f"{stem}_{model}"].assign(**{column: model})
            for model in TRAINED
            if f"{stem}_{model}" in tables
        ]
        if parts:
            joined[f"{stem}_*"] = pd.concat(parts, ignore_index=True)
    # The floor is measured once, in the final evaluation, where training did not measure the base model.
    evaluation, rates = tables.get("evaluation"), joined.get("dynamics_*")
    if rates is not None and evaluation is not None and "model" in evaluation:
        base = evaluation[evaluation["model"] == "base"]
        joined["dynamics_*"] = pd.concat([rates, base.assign(step=0, epoch=0.0)], ignore_index=True)

    figures: list[Figure] = []
    faults: dict[str, None] = {}
    for name, kind in FIGURES.items():
        if all(table in joined for table in kind.tables):
            try:
                figures.append(draw(name, *map(joined.get, kind.tables), model=model, run=run, folder=folder))
            except NotMeasuredError:
                continue
            except InputError as error:
                faults[str(error)] = None
    return figures, list(faults)
