"""Write the Markdown tables that a benchmark prints as the CSV files of docs/results.

    python benchmarks/planting.py --out OUT | python docs/to_csv.py docs/results/planting/cells.csv

In: Markdown on standard input. Out: the first table in the first file named, the second in the second, and
so on; `-` leaves a table out. Tables that go to one file stand below each other, each with the line of text
before it in the column `heading`.

A column x of cells "99.5 [97.2, 99.9]" becomes three: `x`, `x low` and `x high`. One of cells "0.3 (0.0 to
1.2)" becomes `x`, `x least` and `x most`, one of cells "100.0, 98.4" becomes `x` and `x 2`. Percent signs go,
and a dash becomes an empty cell.
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

NUMBER = r"(-?[\d.]+(?:e-?\d+)?)%?"
FORMS = {
    ("", " low", " high"): rf"{NUMBER} \[{NUMBER}, {NUMBER}\]",
    ("", " least", " most"): rf"{NUMBER} \({NUMBER} to {NUMBER}\)",
    ("", " 2"): f"{NUMBER}, {NUMBER}",
    ("",): NUMBER,
}


def main() -> None:
    """Read standard input and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="CSV files in the order of the tables; - leaves one out")
    files = parser.parse_args().files
    tables = read(sys.stdin.read())
    if len(tables) != len(files):
        sys.exit(f"There are {len(tables)} tables and {len(files)} files. Name one file for each table.")
    for file in dict.fromkeys(files):
        if file == "-":
            continue
        parts = [
            (heading, numbers(table))
            for (heading, table), to in zip(tables, files, strict=True)
            if to == file
        ]
        if len(parts) > 1:
            for heading, table in parts:
                table.insert(0, "heading", heading)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        pd.concat([table for _, table in parts]).to_csv(file, index=False)


def read(text: str) -> list[tuple[str, pd.DataFrame]]:
    """The tables of a text, each with the line of text before it."""
    tables: list[tuple[str, pd.DataFrame]] = []
    heading, rows = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]])
            continue
        if rows:
            tables.append((heading, pd.DataFrame(rows[2:], columns=rows[0])))
            rows = []
        if line.strip():
            heading = line.strip("# ").strip()
    return tables


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The table with one number, or one text, in each cell."""
    columns: dict[str, pd.Series] = {}
    for name in table.columns:
        cells = table[name].str.replace("`", "").replace("-", "")
        filled = cells[cells != ""]
        columns[name] = cells
        for ends, form in FORMS.items():
            if len(filled) and filled.str.fullmatch(form).all():
                parts = cells.str.extract(f"{form}$")
                columns |= {f"{name}{end}": parts[at] for at, end in enumerate(ends)}
    return pd.DataFrame(columns)


if __name__ == "__main__":
    main()
