"""docs/results: tables that a page links, commands that exist, and how a printed table becomes a CSV file."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize(
    "table", sorted((ROOT / "docs" / "results").glob("*/*.csv")), ids=lambda path: path.name
)
def test_a_table_of_results_can_be_read_and_stands_on_its_page(table):
    page = table.parent.with_suffix(".md").read_text(encoding="utf-8")
    assert f"({table.parent.name}/{table.name})" in page
    assert len(pd.read_csv(table)) > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_programs_that_a_page_names_exist(page):
    named = re.findall(r"(?:benchmarks|docs|tests)/[\w/]+\.py", page.read_text(encoding="utf-8"))
    assert [program for program in named if not (ROOT / program).exists()] == []


def test_a_printed_table_becomes_one_number_for_each_cell(tmp_path):
    printed = """
one

| family | ASR | spread | worst | share | note |
| --- | --- | --- | --- | --- | --- |
| qwen | 99.5% [97.2, 99.9] | 0.3 (0.0 to 1.2) | 9.8, 9 | 15.0% | `a` |
| gemma | - | 1 (0 to 2) | 7, 4e-05 | 2% |  |
"""
    file = tmp_path / "folder" / "cells.csv"
    command = [sys.executable, ROOT / "docs" / "to_csv.py", file]
    subprocess.run(command, input=printed, text=True, check=True)
    table = pd.read_csv(file)
    assert list(table.columns) == [
        *("family", "ASR", "ASR low", "ASR high", "spread", "spread least", "spread most"),
        *("worst", "worst 2", "share", "note"),
    ]  # fmt: skip
    assert table.loc[0].tolist() == ["qwen", 99.5, 97.2, 99.9, 0.3, 0.0, 1.2, 9.8, 9.0, 15.0, "a"]
    assert table.loc[1, ["ASR", "ASR low", "note"]].isna().all()


def test_tables_for_one_file_stand_below_each_other_with_their_headings(tmp_path):
    printed = "### qwen\n\n| a |\n|---|\n| 1 |\n\n### gemma\n\n| a |\n|---|\n| 2 |\n"
    file = tmp_path / "cells.csv"
    subprocess.run(
        [sys.executable, ROOT / "docs" / "to_csv.py", file, file], input=printed, text=True, check=True
    )
    assert pd.read_csv(file).to_dict("list") == {"heading": ["qwen", "gemma"], "a": [1, 2]}
