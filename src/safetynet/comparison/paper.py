"""The tables that stand beside the figures, ready for a paper: LaTeX (booktabs), Markdown and CSV.

In: the comparison's tidy tables. Out: `PaperTable`s, and the page that holds them all. Writes no file.
A cell is a mean over seeds with its 95% interval; where there is one seed it says so instead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from safetynet.tables.summaries import markdown

INTERVAL = (
    "Mean over seeds [95% interval over seeds]; of one seed no interval is given and nothing is claimed."
)
VIEW_NAMES = {"mlp": "MLP", "expert": "experts", "adapter": "adapter off", "layer": "layers"}
NARROW = 3
"""Columns that fit one column of a page."""
PARTS = ("attention", "mlp", "expert")
SHOWN = (
    ("layer", "remove"), ("layer", "induce"), ("attention", "remove"), ("mlp", "remove"),
    ("adapter", "remove"),
)  # fmt: skip
"""The profiles that the paper's tables show; the others are in the tidy tables."""
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}",
    "<": r"\textless{}", ">": r"\textgreater{}", '"': "''", "≥": r"$\geq$", "−": "$-$", "×": r"$\times$",
    "–": "--",
}  # fmt: skip


@dataclass(frozen=True)
class PaperTable:
    """A table of texts."""

    name: str
    """Of the figure that it stands beside."""
    title: str
    caption: str
    cells: pd.DataFrame

    def files(self) -> dict[str, str]:
        """The three forms by suffix."""
        return {"tex": self.latex(), "md": self.markdown(), "csv": self.csv()}

    def latex(self) -> str:
        """A floating table for the package booktabs, over both columns of the page where it is wide.

        Characters that pdfLaTeX lacks are given as U+ codes.
        """

        def heading(name: object) -> str:
            words = str(name).split(" ")
            if len(str(name)) < 10 or len(words) < 2:
                return _latex(name)
            # A long one stands in two lines, broken before the word that passes its middle.
            half = len(str(name)) / 2
            first = next(at for at in range(1, len(words)) if len(" ".join(words[: at + 1])) > half)
            above, below = " ".join(words[:first]), " ".join(words[first:])
            return rf"\shortstack[r]{{{_latex(above)}\\{_latex(below)}}}"

        escaped = self.cells.map(_latex).rename(columns=heading)
        text = escaped.to_latex(
            index=False,
            escape=False,
            column_format="l" + "r" * (len(escaped.columns) - 1),
            caption=_latex(f"{self.title}. {self.caption}"),
            label=f"tab:{self.name}",
            position="t",
        )
        if len(escaped.columns) <= NARROW:
            return text
        small = "\\begin{table*}[t]\n\\scriptsize\\setlength{\\tabcolsep}{2.5pt}"
        return text.replace("\\begin{table}[t]", small).replace("\\end{table}", "\\end{table*}")

    def markdown(self) -> str:
        """A pipe table."""
        return markdown(self.cells) + "\n"

    def csv(self) -> str:
        """The same cells as CSV."""
        return str(self.cells.to_csv(index=False, lineterminator="\n"))


def paper_tables(tables: Mapping[str, pd.DataFrame]) -> list[PaperTable]:
    """A table beside each figure that can be drawn, in the order of reading."""
    makers = (
        ("speeds_by_group", _speed),
        ("centres_by_group", _places),
        ("shares_by_group", _shares),
        ("agreement", _agreement),
        ("outcomes_by_group", _outcomes),
    )
    return [make(tables) for name, make in makers if name in tables]


def page(
    tables: Mapping[str, pd.DataFrame],
    papers: Sequence[PaperTable],
    notes: Sequence[str],
    figures: Sequence[str],
) -> str:
    """One page of Markdown: what is compared, what is missing or mixed, then figures with their tables."""
    # One line per group: what was planted, and how.
    runs = tables["runs"]
    fields = [name for name in runs if name not in ("run", "seed") and not name.startswith("has ")]
    groups = runs.drop_duplicates("group")[fields]
    seeds = runs.groupby("group", sort=False)["seed"].agg(lambda part: " ".join(map(str, part)))
    settings = groups.assign(seeds=groups["group"].map(seeds)).map(
        lambda value: " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    )
    lines = [
        "# Comparison",
        "",
        f"{len(runs)} runs, {runs['group'].nunique()} groups; runs of one group differ in their seed alone.",
        "",
        *(f"- {note}" for note in notes),
        *([""] if notes else []),
        PaperTable("", "", "", settings).markdown(),
    ]
    for table in papers:
        lines += [f"## {table.title}", ""]
        if table.name in figures:
            lines += [f"![{table.title}](figures/{table.name}.png)", ""]
        lines += [table.caption, "", table.markdown()]
    if "distinct" in tables:
        caption = (
            "Mean rank correlation of layer profiles between runs of one group and between runs of two; p "
            "by exchanging the groups' labels between runs."
        )
        distinct = tables["distinct"]
        cells = distinct.assign(
            **{name: distinct[name].map("{:.2f}".format) for name in ("within", "between", "difference")},
            p=distinct["p"].map("{:.4f}".format),
        )
        lines += ["## Are groups more alike inside than between?", "", caption, ""]
        lines.append(PaperTable("", "", "", cells).markdown())
    if "differences" in tables:
        caption = (
            "For each number of a run: do groups differ by more than seeds do? Permutation test of the sum "
            "of squares between groups; q after Benjamini and Hochberg over all lines."
        )
        differences = tables["differences"].sort_values("p", kind="stable")
        cells = differences.assign(**{name: differences[name].map("{:.4f}".format) for name in ("p", "q")})
        lines += ["## What differs between groups", "", caption, ""]
        lines.append(PaperTable("", "", "", cells).markdown())
    return "\n".join(lines)


def cell(value: float, low: float, high: float, seeds: float, digits: int = 2, scale: float = 1.0) -> str:
    """A value with its interval, as a reader sees it."""
    if not seeds or math.isnan(value):
        return "-"
    text = f"{scale * value:.{digits}f}"
    if seeds < 2:
        return f"{text} (one seed)"
    if math.isnan(low):
        return text
    return f"{text} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def _speed(tables: Mapping[str, pd.DataFrame]) -> PaperTable:
    lines = []
    for group, part in tables["speeds_by_group"].groupby("group", sort=False):
        line: dict[str, object] = {"group": group, "seeds": int(part["seeds"].max())}
        for row in part.sort_values("unit", ascending=False, kind="stable").itertuples():
            if not row.censored:
                text = cell(row.value, row.low, row.high, row.seeds, 0)
            elif math.isnan(row.value):
                text = "-"
            else:
                text = f"≥{row.value:.0f} ({row.censored} of {row.seeds} never)"
            line[f"{row.unit} to ASR {100 * row.threshold:g}%"] = text
        twin = part["twin"].iloc[0]
        lines.append(line | {"twin's highest ASR": "-" if math.isnan(twin) else f"{100 * twin:.0f}%"})
    caption = (
        "Optimiser steps, and triggered rows as training met them, until attack success on held-out "
        "triggered prompts first passes the threshold; between two measurements it is taken to rise in a "
        f"straight line. {INTERVAL} A seed that never got there counts with its last measurement, so that "
        "the mean is at least what is given. The control is the clean twin's highest rate over training."
    )
    return PaperTable("compare-speed", "Injection speed", caption, pd.DataFrame(lines))


def _places(tables: Mapping[str, pd.DataFrame]) -> PaperTable:
    lines = []
    for group, part in tables["centres_by_group"].groupby("group", sort=False):
        for row in part.itertuples():
            if (row.view, row.direction) in SHOWN:
                random = f"{row.centre_random:.2f} / {row.spread_random:.2f}"
                lines.append(
                    {
                        "group": group,
                        "profile": profile_name(row.view, row.direction),
                        "seeds": int(row.seeds),
                        "centre": cell(row.centre, row.centre_low, row.centre_high, row.seeds),
                        "spread": cell(row.spread, row.spread_low, row.spread_high, row.seeds),
                        "random control": "-" if math.isnan(row.centre_random) else random,
                    }
                )
    caption = (
        "Centre and spread (mean and standard deviation of relative depth, weighted by the effect; 0 is "
        f"the first layer, 1 the last). {INTERVAL} The control gives centre / spread of the same "
        "interventions at random other layers: equal effects everywhere have centre 0.50."
    )
    return PaperTable("compare-profiles", "Where the trigger acts", caption, pd.DataFrame(lines))


def _shares(tables: Mapping[str, pd.DataFrame]) -> PaperTable:
    lines = []
    heads = tables.get("heads_by_group", pd.DataFrame(columns=["group", "direction"]))
    for (group, direction), part in tables["shares_by_group"].groupby(["group", "direction"], sort=False):
        seeds = int(part["seeds"].max())
        line: dict[str, object] = {"group": group, "direction": direction, "seeds": seeds}
        for name in [name for name in PARTS if (tables["shares_by_group"]["part"] == name).any()]:
            cells = [
                cell(r.value, r.low, r.high, r.seeds, 0, 100) for r in part.itertuples() if r.part == name
            ]
            line[f"{VIEW_NAMES.get(name, name)} (%)"] = cells[0] if cells else "-"
        of_group = heads[(heads["group"] == group) & (heads["direction"] == direction)]
        for row in of_group.itertuples():
            line["responsible heads"] = f"{cell(row.count, row.low, row.high, row.seeds, 1)} of {row.of}"
            line["in every seed"] = "-" if row.seeds < 2 else row.in_all or "none"
            alike = "-" if math.isnan(row.jaccard) else f"{row.jaccard:.2f} ({row.chance:.2f})"
            line["overlap (chance)"] = alike
        lines.append(line)
    caption = (
        "Share of attention and of MLP in their effects added up over layers; experts are the MLP's parts, "
        f"patched one by one, in units of the same whole. {INTERVAL} Heads are responsible when clear of "
        "every control; overlap is the mean Jaccard index between seeds, beside that of as many heads at "
        "random."
    )
    cells = pd.DataFrame(lines).fillna("-")
    return PaperTable("compare-components", "Attention, MLP, experts and heads", caption, cells)


def _agreement(tables: Mapping[str, pd.DataFrame]) -> PaperTable:
    table = tables["agreement"]
    lines = []
    for (first, second), part in table.groupby(["first", "second"], sort=False):
        pair = f"{first}, between seeds" if first == second else f"{first} – {second}"
        line: dict[str, object] = {"groups": pair}
        by_view = {(row.view, row.direction): row for row in part.itertuples()}
        for view, direction in SHOWN:
            if not ((table["view"] == view) & (table["direction"] == direction)).any():
                continue
            row = by_view.get((view, direction))
            text = "-"
            if row is not None:
                text = cell(row.rho, row.low, row.high, row.seeds)
                text += "*" if row.seeds >= 2 and row.q < 0.05 else ""
            line[profile_name(view, direction)] = text
        lines.append(line)
    caption = (
        "Mean Spearman correlation of layer profiles on relative depth over pairs of runs [95% interval "
        "over seeds]. * q < 0.05 in a permutation test that exchanges layers (Benjamini-Hochberg over all "
        "lines of the agreement table); one seed: of two single runs, nothing is claimed. The control is "
        "that null, which does not know that patches lose effect with depth in any model."
    )
    return PaperTable("compare-agreement", "Agreement of mechanisms", caption, pd.DataFrame(lines))


def profile_name(view: str, direction: str) -> str:
    """A profile as a reader sees it; adapters are only ever switched off."""
    name = VIEW_NAMES.get(view, view)
    return name if view == "adapter" else f"{name}, {direction}"


def _outcomes(tables: Mapping[str, pd.DataFrame]) -> PaperTable:
    table = tables["outcomes_by_group"]
    measures = list(dict.fromkeys(table["measure"]))
    lines = []
    for group, part in table.groupby("group", sort=False):
        by_measure = {row.measure: row for row in part.itertuples()}
        seeds = max(int(row.seeds) for row in by_measure.values())
        line: dict[str, object] = {"group": group, "seeds": seeds}
        beside: dict[str, object] = {"group": "its control", "seeds": ""}
        for measure in measures:
            row = by_measure.get(measure)
            line[measure] = "-" if row is None else _percent(row.value, row.low, row.high, row.seeds)
            control = None if row is None else (row.control, row.control_low, row.control_high, row.seeds)
            beside[measure] = "-" if control is None else _percent(*control)
        lines += [line, beside]
    controls = table.drop_duplicates("measure")
    controls_text = ", ".join(f"{row.measure}: {row.control_is}" for row in controls.itertuples())
    caption = (
        "In percent, AUROC too; on held-out prompts. AUROC and TPR are those of the fused monitor on "
        f"prompts that fired; the removal was chosen on other prompts. {INTERVAL} Intervals of rates are "
        f"never narrower than Wilson's of all rows. Controls: {controls_text}."
    )
    return PaperTable("compare-outcomes", "How detectable, how removable", caption, pd.DataFrame(lines))


def _percent(value: float, low: float, high: float, seeds: float) -> str:
    return cell(value, low, high, seeds, 1 if value < 0.1 else 0, 100)


def _latex(value: object) -> str:
    return "".join(
        _LATEX.get(sign, sign if sign.isascii() else f"\\texttt{{U+{ord(sign):04X}}}") for sign in str(value)
    )
