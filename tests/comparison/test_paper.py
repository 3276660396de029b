"""Tables for a paper: what a cell says, three forms of it, and LaTeX that compiles."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from safetynet import comparison
from safetynet.comparison.paper import PaperTable, cell, page, paper_tables
from safetynet.comparison.runs import grouped, notes

DOCUMENT = r"""\documentclass[twocolumn]{article}
\usepackage[paperwidth=8.5in,textwidth=7in]{geometry}
\usepackage{booktabs}
\begin{document}
%s
\end{document}
"""


@pytest.fixture
def compared(subject: Callable) -> dict[str, pd.DataFrame]:
    runs = [subject(family, seed) for family in ("qwen", "mixtral") for seed in range(2)]
    odd = "backdoor.trigger={texts: ['50% of_{A} & 🦜 <|x|> ~^\\\\#$']}"
    return comparison.compare(grouped([*runs, subject("qwen", 0, odd)]))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((0.314, 0.25, 0.375, 3), "0.31 [0.25, 0.38]"),
        ((0.314, float("nan"), float("nan"), 1), "0.31 (one seed)"),
        ((float("nan"), float("nan"), float("nan"), 0), "-"),
        ((142.4, 120.0, 164.6, 3, 0), "142 [120, 165]"),
        ((0.5, 0.25, 0.75, 3, 0, 100), "50 [25, 75]"),
    ],
)
def test_a_cell_has_its_interval_or_says_that_there_is_one_seed(given: tuple, text: str) -> None:
    assert cell(*given) == text


def test_a_table_stands_beside_each_figure(compared: dict[str, pd.DataFrame]) -> None:
    tables = {table.name: table for table in paper_tables(compared)}
    assert list(tables) == [
        "compare-speed", "compare-profiles", "compare-components", "compare-agreement", "compare-outcomes",
    ]  # fmt: skip
    for table in tables.values():
        assert "control" in table.caption.lower()
        assert "seed" in table.caption
        assert set(table.files()) == {"tex", "md", "csv"}
    speed = tables["compare-speed"].cells.set_index("group")
    assert speed.loc["mixtral, token", "steps to ASR 50%"] == "25 [25, 25]"
    assert [line for line in speed["steps to ASR 50%"] if "one seed" in line] == ["25 (one seed)"]


def test_latex_has_booktabs_rules_and_escapes_what_latex_would_read(
    compared: dict[str, pd.DataFrame],
) -> None:
    text = paper_tables(compared)[0].latex()
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    assert r"50\% of\_\{A\} \& \texttt{U+1F99C} \textless{}\textbar{}x" in text
    assert r"\label{tab:compare-speed}" in text


def test_markdown_keeps_a_bar_within_its_cell() -> None:
    table = PaperTable("a", "b", "c", pd.DataFrame({"x|y": ["1|2"]}))
    assert table.markdown() == "| x\\|y |\n| --- |\n| 1\\|2 |\n"


@pytest.fixture
def typeset(need: Callable[[str], Path], tmp_path: Path) -> Callable[[dict[str, pd.DataFrame]], str]:
    """`typeset(tables)` is what pdfLaTeX says of a paper of two columns with all tables in it."""
    latex = need("pdflatex")
    if not subprocess.run([need("kpsewhich"), "booktabs.sty"], capture_output=True, check=False).stdout:
        pytest.skip("LaTeX's package booktabs is not here")

    def make(tables: dict[str, pd.DataFrame]) -> str:
        text = "\n".join(table.latex() for table in paper_tables(tables))
        (tmp_path / "paper.tex").write_text(DOCUMENT % text, encoding="utf-8")
        command = [latex, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False
        )
        assert done.returncode == 0, done.stdout[-2000:]
        return done.stdout

    return make


def test_every_table_compiles_whatever_the_trigger_is(
    compared: dict[str, pd.DataFrame], typeset: Callable
) -> None:
    typeset(compared)


def test_tables_of_five_families_fit_the_page(subject: Callable, typeset: Callable) -> None:
    families = ("llama2", "llama3", "qwen", "gemma", "mixtral")
    runs = [subject(family, seed) for family in families for seed in range(3)]
    assert "Overfull" not in typeset(comparison.compare(grouped(runs)))


def test_the_page_says_what_is_missing_before_it_shows_what_is_there(subject: Callable) -> None:
    runs = grouped([subject(seed=0, detection=None), subject(seed=1, detection=None)])
    tables = comparison.compare(runs)
    text = page(tables, paper_tables(tables), notes(runs), ["compare-speed"])
    assert (
        "- No run has the table detection. Make it: safetynet detect results/qwen-miniature/seed-0;" in text
    )
    assert text.index("No run has") < text.index("## Injection speed")
    assert "![Injection speed](figures/compare-speed.png)" in text
    assert "compare-profiles.png" not in text


def test_what_differs_between_groups_is_tested_and_corrected(subject: Callable, tables: Callable) -> None:
    late = tables()["effects"]
    late["effect"] = late.groupby(["sweep", "component", "direction", "index"])["effect"].transform(
        lambda own: own.to_numpy()[::-1]
    )
    runs = [subject("qwen", seed) for seed in range(4)]
    runs += [subject("mixtral", seed, effects=late) for seed in range(4)]
    found = comparison.compare(grouped(runs))["differences"].set_index("quantity")
    assert found.loc["centre, layer, remove", "p"] == pytest.approx(2 / 16, abs=0.01)  # of four seeds' swaps
    assert found.loc["steps until ASR 50%", "p"] == 1.0
    assert (found["q"] >= found["p"]).all()
