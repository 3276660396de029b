"""The figures of a report: the drawing of the paper, how to read it, its control, its data and its files.

In: Contents. Out: Pictures. A figure of a stage that is not in the registry is taken from the run's folder of
figures as it was saved there.
"""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from safetynet.extras import need
from safetynet.figures import FIGURES, Figure, figures_of, paper
from safetynet.figures.chart import table
from safetynet.figures.registry import Section
from safetynet.figures.theme import SCREEN
from safetynet.report.contents import Contents

SECTIONS: dict[Section, str] = {
    "behaviour": "What it does",
    "inside": "Where it acts",
    "seen": "Whether it can be seen",
    "removed": "What removes it",
    "training": "How it was trained",
    "other": "Other figures",
}
PREFIXES: dict[str, Section] = {
    "detection": "seen",
    "evasion": "seen",
    "guard": "seen",
    "mitigation": "removed",
    "verification": "removed",
    "intervention": "inside",
}
"""The section of a figure that is not in the registry, by the first word of its name."""
SUFFIXES = ("pdf", "svg", "png", "csv")
TOKENS = "intervention-tokens"
"""The figure that the report shows as an interactive map instead."""
MAX_ROWS = 400
"""Rows of data that are written into the page; longer tables lie beside the figure as CSV."""


@dataclass(frozen=True)
class Picture:
    """One figure as the report shows it."""

    name: str
    title: str
    section: Section
    reads: str
    control: str
    source: str
    caption: str = ""
    svg: str = ""
    """The drawing, ready to stand in the page."""
    width: str = "one"
    image: str = ""
    """A saved figure as a data address, in place of a drawing."""
    page: str = ""
    """Path of the interactive page, as seen from the report; "" where it was not saved."""
    files: list[str] = field(default_factory=list)
    """Paths of the other saved files."""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    """The data behind it, where they are few enough."""
    count: int = 0
    """Values drawn."""


def pictures(run: Contents) -> tuple[list[Picture], dict[str, str], list[str]]:
    """Every figure of a run, the style sheet that their drawings share, and what could not be drawn.

    Returns:
        The figures in the order of reading; class names of styles (`fill: #fff; ...`) that stand in the
        drawings; a sentence for each damaged table.
    """
    folder = run.folder / "figures"
    figures, faults = figures_of(run.tables, folder, run.name, run.model)
    styles: dict[str, str] = {}
    drawings = [_picture(figure, run.model, styles) for figure in figures if figure.name != TOKENS]
    return drawings + _saved(folder, {figure.name for figure in figures}), styles, faults


def _picture(figure: Figure, model: str, styles: dict[str, str]) -> Picture:
    chart, kind = figure.chart, FIGURES[figure.name]
    # The SVG that lies in the run is taken where it shows this very chart; else it is drawn now.
    try:
        drawing = (figure.folder / f"{figure.name}.svg").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        drawing = ""
    if chart.digest not in drawing:
        drawing = paper.render(chart, ("svg",))["svg"].decode()

    def cell(value: object) -> str:
        return "" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)

    data = table(chart)
    columns: list[str] = []
    rows: list[list[str]] = []
    if len(data) <= MAX_ROWS:
        # What every row shares, and columns without a value, say nothing to a reader.
        short = data.drop(columns=["run", "table", "kind", "role", "part", "panel"], errors="ignore")
        short = short.dropna(axis=1, how="all")
        short = short[[name for name in short if (short[name].astype(str) != "").any()]]
        columns = [str(name) for name in short]
        rows = [[*map(cell, row)] for row in short.itertuples(index=False)]
    return Picture(
        figure.name,
        chart.title.removesuffix(f", {model}"),
        kind.section,
        kind.reads,
        kind.control,
        str(chart.source),
        chart.caption,
        inlined(drawing, figure.name, chart.title, styles),
        chart.width,
        page=next(_beside(figure.folder, figure.name, ("html",)), ""),
        files=list(_beside(figure.folder, figure.name, SUFFIXES)),
        columns=columns,
        rows=rows,
        count=len(data),
    )


def inlined(svg: str, name: str, title: str, styles: dict[str, str]) -> str:
    """A drawing of the paper renderer as an element of a page.

    Style attributes, which the page's content policy refuses, become classes; identities are made unique.

    Args:
        svg: a whole SVG file.
        name: that no other drawing of the page has.
        title: what a screen reader says.
        styles: class names by style, to which this drawing's are added.
    """
    body = svg[svg.index("<svg") :]  # without the XML declaration and the document type
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r">\s+<", "><", body)
    # Identities: only those that something refers to stay, under a number that no other drawing has.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    numbers = {identity: f"{name}-{number}" for number, identity in enumerate(sorted(used))}
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{numbers[m[1]]}"' if m[1] in used else "", body)
    body = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{numbers[m[1]]})", body)
    body = re.sub(r'xlink:href="#([^"]+)"', lambda m: f'href="#{numbers[m[1]]}"', body)
    body = re.sub(
        r' style="([^"]*)"', lambda m: f' class="{styles.setdefault(m[1], f"s{len(styles)}")}"', body
    )
    while (shorter := re.sub(r"<g>((?:(?!<g\b|</g>).)*)</g>", r"\1", body, flags=re.S)) != body:
        body = shorter  # groups that only carried an identity
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert size is not None
    width, height = (round(SCREEN * float(points)) for points in size.groups())
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg role="img" aria-label="{label}" viewBox="0 0 {size[1]} {size[2]}" '
    return head + f'width="{width}" height="{height}"' + body[body.index(">") :]


def _beside(folder: Path, name: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Saved files of a figure, as seen from the report."""
    return (f"figures/{name}.{suffix}" for suffix in suffixes if (folder / f"{name}.{suffix}").exists())


def _saved(folder: Path, names: set[str]) -> list[Picture]:
    """Figures that were saved by stages whose charts are not among `names`, as their PNG."""
    need("figures of a report", "PIL")
    from PIL import Image, UnidentifiedImageError

    saved = []
    for path in sorted(folder.glob("*.png")):
        if path.stem in names:
            continue
        try:
            with Image.open(path) as image:
                about = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        except (OSError, UnidentifiedImageError):  # a damaged one says nothing of itself
            about = {}
        saved.append(
            Picture(
                path.stem,
                about.get("Title", path.stem),
                PREFIXES.get(path.stem.split("-")[0], "other"),
                about.get("Description", ""),
                "",
                about.get("Source", ""),
                about.get("Description", ""),
                image="data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
                page=next(_beside(folder, path.stem, ("html",)), ""),
                files=list(_beside(folder, path.stem, SUFFIXES)),
            )
        )
    return saved


def as_json(data: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins another."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
