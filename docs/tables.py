"""Write docs/tables.md from the declaration in `safetynet.tables`: every table, its stage, its columns.

python docs/tables.py
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetynet.run.stage import command_for
from safetynet.tables import SCHEMAS
from safetynet.tables.columns import Column, Table

PAGE = Path(__file__).with_suffix(".md")
NAMES = {"history": "history_{model}", "rates": "dynamics_{model}"}
INTRODUCTION = """# Tables

A run and a comparison keep one Parquet file per table, one row per measurement. A table is checked when it
is written and when it is read, against the declaration from which `python docs/tables.py` makes this page.
`{model}` is `backdoored` or `clean_twin`.

A number may be NaN where nothing was measured. *(interval)* stands for two further columns, the ends of the
95% interval: `{column}_low` and `{column}_high`. The sweep's `results` lie beside its `results.csv`, not in
a run. The checks are the project's own: pandera would add up to half a second to each command.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, table in SCHEMAS.items():
        parts.append("\n".join(section(name, table)))
    return "\n".join(parts)


def section(name: str, table: Table) -> Iterator[str]:
    """Lines on one table."""
    made_by = "safetynet sweep" if table.stage == "sweep" else command_for(name, "RUN")
    yield f"## {NAMES.get(name, name)}\n"
    yield f"One row is {table.row}. Made by `{made_by}`.\n"
    yield "| Column | Holds | |\n|---|---|---|"
    for column, about in table.columns.items():
        if not column.endswith(("_low", "_high")) or column.rpartition("_")[0] not in table.columns:
            yield line(column, about, table.columns)
    for start, meaning in table.further.items():
        yield f"| {f'`{start}...`' if start else '...'} | {meaning} | |"
    yield ""


def line(column: str, about: Column, columns: Mapping[str, Column]) -> str:
    """One column: name, meaning, and what may stand there."""
    interval = " *(interval)*" if {f"{column}_low", f"{column}_high"} <= set(columns) else ""
    return f"| `{column}`{interval} | {about.meaning} | {values(about)} |"


def values(about: Column) -> str:
    """What may stand in a column."""
    if about.words:
        allowed = ", ".join(f"`{word}`" for word in about.words)
    else:
        allowed = {"whole": "whole number", "flag": "true or false"}.get(about.kind, about.kind)
        if about.high < math.inf and about.low > -math.inf:
            allowed += f" from {about.low:g} to {about.high:g}"
        elif about.low > -math.inf:
            allowed += f", at least {about.low:g}"
        elif about.high < math.inf:
            allowed += f", at most {about.high:g}"
    return allowed + (", or empty" if about.empty else "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
