"""The figures of a report: which section each belongs to, how to read it, what its control is.

In: Contents. Out: Pictures, drawn from the run's tables. A figure of a stage that this module has never heard
of is taken from the run's folder of figures as it was saved there.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from safetynet.figures.chart import Chart, legend, legend_needed, table
from safetynet.figures.of_run import figures_of
from safetynet.figures.saving import Figure
from safetynet.report import grid_panel, series_panel
from safetynet.report.contents import Contents
from safetynet.report.readings import PREFIXES, READINGS, Reading, Section

SUFFIXES = ("pdf", "svg", "png", "html", "csv")
TOKENS = "intervention-tokens"
"""The figure that the report shows as an interactive map instead."""
MOST_ROWS = 400
"""Rows of data that are written into the page; longer tables lie beside the figure as CSV."""

WIDE = 420
"""Pixels from which on a drawing keeps its size and is moved sideways on a narrow screen."""


@dataclass(frozen=True)
class Picture:
    """One figure as the report shows it."""

    name: str
    title: str
    section: Section
    read: str
    control: str
    source: str
    more: str = ""
    """The caption as a whole."""
    keys: list[tuple[str, str]] = field(default_factory=list)
    """Legend: a drawing and a label."""
    bars: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Colour bars: ramp, label, lower and upper end."""
    panels: list[dict[str, str]] = field(default_factory=list)
    """Title, SVG, JSON of the interactive layer, and whether it is `wide`."""
    files: list[str] = field(default_factory=list)
    """Paths of the saved figure, as seen from the report."""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    """The data behind it, where they are few enough."""
    count: int = 0
    """Values drawn."""
    image: str = ""
    """A saved figure as a data address, in place of panels."""


def pictures(run: Contents) -> tuple[list[Picture], list[str]]:
    """Every figure of a run in the order of reading, and a sentence for what could not be drawn."""
    drawn, faults = figures_of(run.tables, run.folder / "figures", run.name, run.model)
    found = [_drawn(figure, run.model) for figure in drawn if figure.name != TOKENS]
    found += _saved(run.folder / "figures", {figure.name for figure in drawn})
    order = {name: place for place, name in enumerate(READINGS)}
    found.sort(key=lambda one: order.get(one.name, len(order)))
    return found, faults


def _drawn(figure: Figure, model: str) -> Picture:
    chart = figure.chart
    section, read, control = READINGS.get(figure.name) or Reading(_section(figure.name), chart.caption, "")
    data = table(chart)
    columns, rows = _data(data)
    keys = legend(chart)
    return Picture(
        figure.name,
        chart.title.removesuffix(f", {model}"),
        section,
        read,
        control,
        str(chart.source),
        chart.caption,
        [(series_panel.legend_mark(key.role, key.part, key.kind), key.label) for key in keys]
        if legend_needed(keys)
        else [],
        _bars(chart),
        [_panel(chart, number) for number in range(len(chart.panels))],
        [f"figures/{path.name}" for path in _beside(figure.folder, figure.name)],
        columns,
        rows,
        len(data),
    )


def _panel(chart: Chart, number: int) -> dict[str, str]:
    panel = chart.panels[number]
    label = ", ".join(filter(None, [chart.title, panel.title]))
    told = f"{label}. {panel.y.text or 'values'} by {panel.x.text}. The values are in the table below."
    draw = grid_panel.draw if panel.grid is not None else series_panel.draw
    drawing = draw(panel, told, series_panel.width(len(chart.panels)))
    wide = "wide" if drawing.width > WIDE else ""
    return {"title": panel.title, "svg": drawing.picture, "data": as_json(drawing.data), "size": wide}


def _bars(chart: Chart) -> list[tuple[str, str, str, str]]:
    shades = dict.fromkeys(panel.grid.shade for panel in chart.panels if panel.grid is not None)
    return [
        (shade.ramp, shade.text, *(f"{end:g}".replace("-", "−") for end in shade.limits))  # type: ignore[misc]
        for shade in shades
    ]


def _data(data: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The data without what every row shares; nothing where there are too many rows to read."""
    if len(data) > MOST_ROWS:
        return [], []
    kept = data.drop(columns=["run", "table", "kind", "role", "part", "panel"], errors="ignore").dropna(
        axis=1, how="all"
    )
    kept = kept[[name for name in kept if (kept[name].astype(str) != "").any()]]
    rows = [["" if pd.isna(cell) else _cell(cell) for cell in row] for row in kept.itertuples(index=False)]
    return [str(name) for name in kept], rows


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _beside(folder: Path, name: str) -> Iterator[Path]:
    for suffix in SUFFIXES:
        if (path := folder / f"{name}.{suffix}").exists():
            yield path


def _saved(folder: Path, known: set[str]) -> list[Picture]:
    """Figures that were saved by stages whose charts are not among `known`, as their PNG."""
    found = []
    for path in sorted(folder.glob("*.png")):
        if path.stem in known:
            continue
        told = _metadata(path)
        found.append(
            Picture(
                path.stem,
                told.get("Title", path.stem),
                *(READINGS.get(path.stem) or Reading(_section(path.stem), told.get("Description", ""), "")),
                told.get("Source", ""),
                told.get("Description", ""),
                files=[f"figures/{file.name}" for file in _beside(folder, path.stem)],
                image="data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
            )
        )
    return found


def _metadata(path: Path) -> dict[str, str]:
    """What a saved PNG says of itself; nothing where it is damaged."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, UnidentifiedImageError):
        return {}


def _section(name: str) -> Section:
    return PREFIXES.get(name.split("-")[0], "other")


def as_json(data: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins another."""
    told = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        told = told.replace(sign, f"\\u{ord(sign):04x}")
    return told
