"""Charts of causal effects: by layer, by place in the network, by token, and over training.

In: the tables effects, dynamics and tokens. Out: Charts. Draws nothing.
Every effect stands beside its controls: random sites, a placebo against another, the clean twin.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import pandas as pd

from safetynet.figures.chart import Axis, Chart, Panel, Reference, Shade
from safetynet.figures.glyphs import visible
from safetynet.figures.panels import (
    Frame,
    Look,
    Row,
    curve,
    frame_for,
    grid_of,
    grid_panel,
    interval,
    layer_axis,
    layers_of,
    once,
    read,
    series_of,
    with_interval,
)
from safetynet.figures.registry import NotMeasuredError, figure
from safetynet.tables import Data
from safetynet.vocabulary import COMPONENTS, CONTROLS, DIRECTIONS, POSITIONS

EFFECT = Shade("Effect")
RESPONSIBLE = "responsible: clear of every control"
EXAMPLES = 2
"""Groups of rows that a figure of single examples shows."""
LEAD = 4
"""Tokens before the trigger that a map of single tokens shows."""
CONTROL_LOOKS: dict[str, Look] = {
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
        series = []
        marked = cells[cells["responsible"]].sort_values("layer", kind="stable")
        if len(marked):
            dots: Look = (RESPONSIBLE, "triggered", "subject")
            series.append(series_of("points", marked, "layer", "effect", dots))
        effect: Look = ("effect", "backdoored", "subject")
        series.append(curve(cells, "layer", "effect low high", effect, _note, "line"))
        series += [
            curve(cells, "layer", interval(name), CONTROL_LOOKS[name], kind="line")
            for name in CONTROLS
            if cells[name].notna().any()
        ]
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
    table, across = _sweep_of("effects", effects, sweep), ACROSS[sweep]
    if sweep == "adapter":
        table["module"] = module_names(table["module"])
    title = f"Effect by layer and {across.label.lower()}"
    return _map("effects", table, across, title, READING + SIGN + CONTROL)


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
    caption = (
        "Each column is one checkpoint: from left to right one sees when, and in which layers, the backdoor "
        f"forms. {READING}{SIGN}{CONTROL}"
    )
    table = _sweep_of("dynamics", data, "layer")
    return _map("dynamics", table, Across("step", "Step"), "Effect by layer over training", caption)


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
        example = table[table["group"] == group]
        # What comes before the trigger is the same in both runs; of a long prompt it would fill the map.
        start = example["column"][example["role"].str.startswith("trigger")].min() - LEAD
        for title, cells in _facets(example[~(example["column"] < start)], ["layer", "column"]):
            once(cells, "tokens", ["layer", "column"])
            columns, trigger = token_columns(cells)
            places = ("column", columns), layers_of(cells["layer"])
            grid = grid_of(cells, *places, "effect", EFFECT, notes=itemgetter("role"))
            name = f"group {group}: {title}"
            panels.append(grid_panel(grid, ("Token", "Layer"), frame, name, trigger, enclosing(trigger)))
    caption = (
        READING
        + "Dashed lines enclose the trigger; the control is the rest of the prompt, above all before it, "
        + f"of which the last {LEAD} tokens are shown. "
        + "These are single examples: intervals over all groups are in the figure by position. "
        + SIGN
        + (f"Shown are {len(examples)} of {len(groups)} groups. " if len(groups) > len(examples) else "")
    )
    return Chart("Effect by layer and token", tuple(panels), 1, "two", caption.strip())


def token_columns(cells: pd.DataFrame) -> tuple[dict[int, str], list[int]]:
    """Columns of a prompt with the visible token in each, and the places of the trigger's tokens."""
    first = cells.drop_duplicates("column").sort_values("column")
    roles = [role.split(" ")[0] for role in first["role"]]
    trigger = [place for place, role in enumerate(roles) if role == "trigger"]
    return dict(zip(first["column"], map(visible, first["token"]), strict=True)), trigger


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
        "sweep direction mode metric component layer position index module effect low high n responsible"
    )
    more = " step" if name == "dynamics" else ""
    table = read(name, data, f"{columns} {interval(*CONTROLS)}{more}")
    rows = table[table["sweep"] == sweep].reset_index(drop=True)
    if rows.empty:
        there = ", ".join(sorted(set(table["sweep"])))
        raise NotMeasuredError(f"{name}: column sweep has no row with {sweep!r}; there are {there}")
    return rows


def _facets(frame: pd.DataFrame, axes: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each panel, with a title that says what distinguishes them.

    Args:
        frame: effects.
        axes: columns that the panel itself shows.
    """
    keys = [name for name in IDENTITY if name in frame and name not in axes]
    differing = [name for name in keys if name == "direction" or frame[name].nunique() > 1]
    order = {word: place for place, word in enumerate(DIRECTIONS)}
    groups = [cells for _, cells in frame.groupby(keys, sort=False)]
    groups.sort(key=lambda cells: order[cells["direction"].iloc[0]])

    def words(name: str, value: object) -> str:
        if value == "" and name == "position":
            return "all positions"
        text = str(value).replace("_", " ")
        return f"{name} {text}" if name == "index" else text

    return [(", ".join(words(name, cells[name].iloc[0]) for name in differing), cells) for cells in groups]


def _map(name: str, table: pd.DataFrame, across: Across, title: str, caption: str) -> Chart:
    """Effects over layers and another axis, a panel for each direction; `name` is the table's."""
    axes = ["layer", across.column]
    parts = _facets(table, axes)
    frame = frame_for(len(parts))
    panels = []
    for panel_title, cells in parts:
        once(cells, name, axes)
        columns: list[Any] = list(dict.fromkeys(cells[across.column]))
        if across.order:
            # By the first word of the order that a name begins with, then as they appear.
            at = {word: place for place, word in enumerate(across.order)}
            columns.sort(key=lambda column: at.get(column.split(" ")[0], len(at)))
        elif across.column != "module":  # modules stay in the order of the network
            columns.sort()
        names = {column: str(column) or "all" for column in columns}
        if across.order:
            names = {column: name.replace("_", " ") for column, name in names.items()}
        places = (across.column, names), layers_of(cells["layer"])
        marked = itemgetter("responsible")
        grid = grid_of(cells, *places, "effect", EFFECT, RESPONSIBLE, marked=marked, notes=_note)
        panels.append(grid_panel(grid, (across.label, "Layer"), frame, panel_title))
    return Chart(title, tuple(panels), frame.columns, frame.width, caption)


def _note(row: Row) -> str:
    """Interval, groups and controls of one effect."""
    if math.isnan(row["effect"]):
        return "not measured"
    facts = []
    if not math.isnan(row["low"]):
        facts.append(with_interval(row, "effect low high"))
    if not math.isnan(row["n"]):
        facts.append(f"{row['n']:.0f} groups")
    controls = [name for name in CONTROLS if not math.isnan(row[name])]
    facts += [f"{name} {with_interval(row, interval(name))}" for name in controls]
    return "\n".join(facts)
