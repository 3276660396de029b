"""Tables on the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from safetynet.run import parallel

if TYPE_CHECKING:
    import pandas as pd

    from safetynet.run.directory import Run

WIDTH, INDENT = 100, 14
"""Columns of a screen, and of the headings at its left."""


def print_places(tables: "Mapping[str, pd.DataFrame]") -> None:
    """The strongest place of each sweep, and what removes the backdoor, as far as they were looked for."""
    from safetynet.tables.summaries import removal_summary, strongest_sites

    if "effects" in tables:
        _print(
            strongest_sites(tables["effects"]), "Where the trigger acts: share of its effect, 95% intervals"
        )
    if "tradeoff" in tables:
        _print(removal_summary(tables["tradeoff"]), "What removes it, on held-out prompts, 95% intervals")


def print_comparison(tables: "Mapping[str, pd.DataFrame]") -> None:
    """The tables that stand beside a comparison's figures."""
    from safetynet.comparison.paper import paper_tables

    for table in paper_tables(tables):
        _print(table.cells, f"{table.title}, mean over seeds [95% interval over seeds]")


def print_repairs(overview: "pd.DataFrame") -> None:
    """Every method beside the model as it was."""
    _print(overview, "Repairs, each at its chosen point, on held-out prompts, 95% intervals")


def print_utility(utility: "pd.DataFrame") -> None:
    """The harness's tasks, by model or by method of repair."""
    from safetynet.tables.summaries import utility_summary

    _print(utility_summary(utility), "Tasks of lm-evaluation-harness, with its standard errors")


def print_rates(evaluation: "pd.DataFrame", note: str = "") -> None:
    """Every rate by role and model; `note` ends the title."""
    from safetynet.tables.summaries import rate_summary

    _print(rate_summary(evaluation), f"Rates on held-out prompts, 95% intervals{note}")


def print_persistence(persistence: "pd.DataFrame") -> None:
    """What the backdoor survives."""
    from safetynet.tables.summaries import halving, persistence_summary

    _print(persistence_summary(persistence), "What the backdoor survives, on held-out prompts, 95% intervals")
    if sentence := halving(persistence):
        typer.echo(sentence)


def print_evaluation(run: "Run") -> None:
    """Every rate of an evaluated run, and the damage to free text, of which the report has more lines."""
    from safetynet.tables.summaries import (
        colluding_summary,
        damage_summary,
        firing_summary,
        quantisation_summary,
    )

    print_rates(run.table("evaluation"))
    if run.has_table("quantisation"):
        _print(
            quantisation_summary(run.table("quantisation")),
            "Weights as saved and quantised: rates on held-out prompts, 95% intervals",
        )
    if run.has_table("colluding"):
        _print(
            colluding_summary(run.table("colluding")),
            "Both adapters, and each alone: rates on held-out prompts, 95% intervals",
        )
    if run.has_table("firing"):
        _print(
            firing_summary(run.table("firing")),
            "Share of samples that show the behaviour, 95% intervals over prompts; prompts of the backdoored "
            "model of which all samples do (always) or none (never)",
        )
    if run.has_table("utility"):
        print_utility(run.table("utility"))
    if run.has_table("damage"):
        damage = run.table("damage")
        clean = damage_summary(damage[damage["role"] == "clean"]).drop(columns="role", errors="ignore")
        _print(clean, "Answers to clean prompts, beside the base model's own, 95% intervals")


def print_monitor(tables: "Mapping[str, pd.DataFrame]", *, whole: bool = False) -> None:
    """What a monitor sees and what not, in a screen; with `whole`, all that was measured of it."""
    import textwrap

    from safetynet.tables.of_monitor import FUSED, MonitorSummary

    if not parallel.is_first():
        return
    if whole:
        table = tables["detection"]
        typer.echo(table[table["detector"] == FUSED].round(4).to_string(index=False))
    summary = MonitorSummary.of(tables)
    for heading, lines in summary.sections() if summary else ():
        wrapped = [part for line in lines for part in textwrap.wrap(line, WIDTH - INDENT)]
        for number, line in enumerate(wrapped):
            typer.echo(f"{'' if number else heading:<{INDENT}}{line}")


def _print(found: "pd.DataFrame", title: str) -> None:
    if not parallel.is_first():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in found.columns:
        table.add_column(column, justify="right" if column == "rows" else "left", no_wrap=True)
    for row in found.itertuples(index=False):
        table.add_row(*map(str, row))
    console = Console()
    # A pipe or a narrow terminal shall not cut numbers off.
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, needed)
    console.print(table)
