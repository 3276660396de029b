"""Charts of causal effects: by layer, by place in the network, by token, and over training.

In: the tables effects, dynamics and tokens. Out: Charts. Draws nothing.
Every effect stands beside its controls: random sites, a placebo against another, the clean twin.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from safetynet.figures.chart import Axis, Chart, Grid, Kind, Panel, Reference, Series, Shade
from safetynet.figures.checks import interval, once, read
from safetynet.figures.panels import (
    Frame,
    frame_for,
    grid_panel,
    layer_axis,
    layer_name,
    matrix,
    values,
    with_interval,
)
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.figures.theme import Part, Role
from safetynet.figures.values import visible
from safetynet.tables import Data
from safetynet.vocabulary import COMPONENTS, CONTROLS, DIRECTIONS, POSITIONS

EFFECT = Shade("Effect")
RESPONSIBLE = "responsible: clear of every control"
EXAMPLES = 2
"""Groups of rows that a figure of single examples shows."""
CONTROL_LOOKS: dict[str, tuple[str, Role, Part]] = {
    "random": ("random sites (control)", "base", "floor"),
    "placebo": ("placebo (control)", "placebo", "control"),
    "twin": ("clean twin (control)", "clean_twin", "control"),
}
READING = (
    "Effect 0: the run without intervention; 1: the run that the values come from. Where the backdoor is "
    "to be removed, 1 means that its effect on the metric is gone. "
)
CONTROL = (
    "A dot marks a responsible site: its 95% bootstrap interval over groups lies clear of those of every "
    "control (random sites of the same size, a placebo against another placebo, the clean twin)."
)
SIGN = "A dash marks a negative effect, grey hatching what was not measured. "


IDENTITY = ("direction", "mode", "metric", "component", "position", "index", "module")
"""Columns that, beside layer and step, distinguish measured effects."""


@dataclass(frozen=True)
class Across:
    """What a map of effects has along x, beside the layers along y."""

    column: str
    label: str
    order: Sequence[str] = ()


ACROSS = {
    "position": Across("position", "Position", POSITIONS),
    "component": Across("component", "Component", sorted(COMPONENTS, key=lambda c: c[:5] != "resid")),
    "head": Across("index", "Head"),
    "expert": Across("index", "Expert"),
    "adapter": Across("module", "Adapter"),
}


@figure(
    "intervention-layers",
    "effects",
    section="inside",
    reads="A layer counts where the solid curve's band is clear of all others; layer 0 carries the token's "
    "identity in every model.",
    control="The other curves repeat it at a random layer, between two placebos, and in the clean twin.",
)
def layer_profile(effects: Data) -> Chart:
    """Effect by layer with its controls, one panel for each direction."""
    table = _sweep_of("effects", effects, "layer")
    parts = _facets(table, ["layer"])
    columns = ["effect", "low", "high", *CONTROLS]
    # 0 to 1 and, in quarters, as far beyond as values lie.
    finite = [0.0, 1.0, *filter(math.isfinite, table[columns].to_numpy().ravel().tolist())]
    axis = Axis("Effect", limits=(math.floor(4 * min(finite)) / 4, math.ceil(4 * max(finite)) / 4))
    layers = layer_axis(table["layer"])
    panels = []
    for title, cells in parts:
        once(cells, "effects", ["layer"])
        cells = cells.sort_values("layer", kind="stable")
        kind: Kind = "line" if len(cells) > 1 else "points"
        at = list(cells["layer"])
        series = []
        marked = cells[cells["responsible"]]
        if len(marked):
            dots = list(marked["layer"]), list(marked["effect"])
            series.append(Series("points", *dots, label=RESPONSIBLE, role="triggered"))
        y, low, high = (list(cells[name]) for name in ("effect", "low", "high"))
        notes = [_note(row) for row in cells.to_dict("records")]
        series.append(Series(kind, at, y, low, high, label="effect", role="backdoored", notes=notes))
        for name in CONTROLS:
            if cells[name].notna().any():
                label, role, part = CONTROL_LOOKS[name]
                y, low, high = (list(cells[column]) for column in (name, f"{name}_low", f"{name}_high"))
                series.append(Series(kind, at, y, low, high, label=label, role=role, part=part))
        panels.append(Panel(layers, axis, tuple(series), title))
    frame = frame_for(len(panels))
    caption = (
        READING + CONTROL + " Bands are 95% intervals; where they overlap the controls', nothing is claimed."
    )
    return Chart("Effect by layer", tuple(panels), frame.columns, frame.width, caption)


def effect_map(effects: Data, sweep: str) -> Chart:
    """Effects over layers and positions, components, heads, experts or adapters, a panel for each direction.

    Args:
        effects: the table.
        sweep: which of its sweeps.
    """
    table = _sweep_of("effects", effects, sweep)
    across = ACROSS[sweep]
    if sweep == "adapter":
        table["module"] = module_names(table["module"])
    parts = _facets(table, ["layer", across.column])
    frame = frame_for(len(parts))
    panels = []
    for title, cells in parts:
        once(cells, "effects", ["layer", across.column])
        panels.append(_map(cells, across, frame, title))
    name = f"Effect by layer and {across.label.lower()}"
    return Chart(name, tuple(panels), frame.columns, frame.width, READING + SIGN + CONTROL)


for _sweep, _reads in {
    "position": "The effect starts at the trigger's own tokens in low layers and moves to the last position: "
    "where it changes place, information is moved.",
    "component": "Orange cells show whether attention or the MLP of a layer writes the effect.",
    "head": "Few dark cells are a circuit, many pale ones a diffuse backdoor.",
    "expert": "Few dark cells are experts that the backdoor needs, many pale ones none in particular.",
    "adapter": "Each cell switches one trained module off; small effects everywhere mean that modules stand "
    "in for each other.",
}.items():
    figure(
        f"intervention-{_sweep}s",
        "effects",
        section="inside",
        reads=_reads,
        control="A dot marks a site whose interval is clear of every control's: random sites, another "
        "placebo, the twin.",
        sweep=_sweep,
    )(effect_map)


@figure(
    "intervention-dynamics",
    "dynamics",
    section="inside",
    reads="From left to right, when each layer's effect appears during training.",
    control="A dot means clear of a random other layer, which is the only control measured here.",
)
def dynamics(data: Data) -> Chart:
    """Effect by layer over the steps of training."""
    table = _sweep_of("dynamics", data, "layer")
    parts = _facets(table, ["layer"])
    frame = frame_for(len(parts))
    panels = []
    for title, cells in parts:
        once(cells, "dynamics", ["layer", "step"])
        panels.append(_map(cells, Across("step", "Step"), frame, title))
    caption = (
        "Each column is one checkpoint: from left to right one sees when, and in which layers, the backdoor "
        "forms. "
    )
    return Chart(
        "Effect by layer over training",
        tuple(panels),
        frame.columns,
        frame.width,
        caption + READING + SIGN + CONTROL,
    )


@figure(
    "intervention-tokens",
    "tokens",
    section="inside",
    reads="Dark cells carry the trigger's effect on one prompt.",
    control="The tokens before the trigger, which cannot carry it.",
)
def token_map(tokens: Data) -> Chart:
    """Effect of single tokens by layer, one panel for each example."""
    table = read("tokens", tokens, "group direction component layer column token role effect")
    groups = list(dict.fromkeys(table["group"]))
    examples = groups[:EXAMPLES]
    frame = Frame("two", 1)
    panels = []
    for group in examples:
        for title, cells in _facets(table[table["group"] == group], ["layer", "column"]):
            once(cells, "tokens", ["layer", "column"])
            columns, names, trigger = token_columns(cells)
            layers = sorted(set(cells["layer"]))
            places = ("column", columns, "layer", layers)
            grid = Grid(
                names,
                [layer_name(layer) for layer in layers],
                values(cells, places, "effect"),
                EFFECT,
                notes=matrix(cells, places, lambda row: row["role"], ""),
            )
            name = f"group {group}: {title}"
            panels.append(grid_panel(grid, ("Token", "Layer"), frame, name, trigger, enclosing(trigger)))
    caption = (
        READING
        + "Dashed lines enclose the trigger; the control is the rest of the prompt, above all before it. "
        + "These are single examples: intervals over all groups are in the figure by position. "
        + SIGN
        + (f"Shown are {len(examples)} of {len(groups)} groups. " if len(groups) > len(examples) else "")
    )
    return Chart("Effect by layer and token", tuple(panels), 1, "two", caption.strip())


def token_columns(cells: pd.DataFrame) -> tuple[list[int], list[str], list[int]]:
    """Columns of a prompt, the token in each as one can see it, and the places of the trigger's tokens."""
    first = cells.drop_duplicates("column").sort_values("column")
    roles = [role.split(" ")[0] for role in first["role"]]
    trigger = [place for place, role in enumerate(roles) if role == "trigger"]
    return list(first["column"]), [visible(token) for token in first["token"]], trigger


def enclosing(places: Sequence[int]) -> tuple[Reference, ...]:
    """Lines before and after the trigger."""
    if not places:
        return ()
    ends = (min(places) - 0.5, max(places) + 0.5)
    return tuple(Reference(end, "x", role="ink", part="control") for end in ends)


def module_names(modules: Iterable[str]) -> list[str]:
    """Modules' names, the same in every layer: the last word where that tells them apart."""
    short = []
    for module in modules:
        words = module.split(".")
        numbered = next((place for place, word in enumerate(words) if word.isdigit()), -1)
        short.append(".".join(words[numbered + 1 :]) or module)
    last = [name.rsplit(".", 1)[-1] for name in short]
    return last if len(set(last)) == len(set(short)) else short


def _sweep_of(name: str, data: Data, sweep: str) -> pd.DataFrame:
    """The rows of one sweep of the table `effects` or `dynamics`.

    Raises:
        NotMeasuredError: if the table holds no row of the sweep.
    """
    columns = (
        "sweep direction mode metric component layer position index module effect low high n responsible "
    )
    columns += interval(*CONTROLS) + (" step" if name == "dynamics" else "")
    table = read(name, data, columns)
    rows = table[table["sweep"] == sweep].reset_index(drop=True)
    if rows.empty:
        there = ", ".join(sorted(set(table["sweep"])))
        raise NotMeasuredError(f"{name}: column sweep has no row with {sweep!r}; there are {there}")
    return rows


def _facets(frame: pd.DataFrame, axes: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Rows that belong into one panel, with a title of what tells them from the other panels' rows.

    Args:
        frame: effects.
        axes: columns that the panel itself shows.
    """
    keys = [name for name in IDENTITY if name in frame and name not in axes]
    telling = [name for name in keys if name == "direction" or frame[name].nunique() > 1]
    order = {word: place for place, word in enumerate(DIRECTIONS)}
    groups = [cells for _, cells in frame.groupby(keys, sort=False)]
    groups.sort(key=lambda cells: order[cells["direction"].iloc[0]])

    def words(name: str, value: object) -> str:
        if value == "" and name == "position":
            return "all positions"
        text = str(value).replace("_", " ")
        return f"{name} {text}" if name == "index" else text

    return [(", ".join(words(name, cells[name].iloc[0]) for name in telling), cells) for cells in groups]


def _map(cells: pd.DataFrame, across: Across, frame: Frame, title: str) -> Panel:
    if across.order:
        # By the first word of the order that a name begins with, then as they appear.
        at = {word: place for place, word in enumerate(across.order)}
        names = dict.fromkeys(cells[across.column])
        columns: list[Any] = sorted(names, key=lambda name: at.get(name.split(" ")[0], len(at)))
    elif across.column == "module":
        columns = list(dict.fromkeys(cells[across.column]))
    else:
        columns = sorted(set(cells[across.column]))
    layers = sorted(set(cells["layer"]))
    places = (across.column, columns, "layer", layers)
    texts = [str(column).replace("_", " ") if across.order else str(column) for column in columns]
    grid = Grid(
        [text or "all" for text in texts],
        [layer_name(layer) for layer in layers],
        values(cells, places, "effect"),
        EFFECT,
        marked=matrix(cells, places, lambda row: bool(row["responsible"]), False),
        mark=RESPONSIBLE,
        notes=matrix(cells, places, _note, ""),
    )
    return grid_panel(grid, (across.label, "Layer"), frame, title)


def _note(row: Mapping[str, Any]) -> str:
    """Interval, groups and controls of one effect."""
    if math.isnan(row["effect"]):
        return "not measured"
    facts = []
    if not math.isnan(row["low"]):
        facts.append(with_interval(row["effect"], row["low"], row["high"]))
    if not math.isnan(row["n"]):
        facts.append(f"{row['n']:.0f} groups")
    facts += [
        f"{name} {with_interval(row[name], row[f'{name}_low'], row[f'{name}_high'])}"
        for name in CONTROLS
        if not math.isnan(row[name])
    ]
    return "\n".join(facts)
