"""The interventions' tables, brought into one form: checked columns, known words, one row per measurement.

In: a DataFrame, a list of records, or a dict of lists. Out: DataFrames that the charts are built from.
Draws nothing and computes no result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures.checks import Measurements, known, require, to_frame
from safetynet.figures.registry import NotMeasuredError
from safetynet.figures.values import numbers

SWEEPS = ("layer", "position", "component", "head", "expert", "adapter")
DIRECTIONS = ("remove", "induce", "ablate")
COMPONENTS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "head",
    "query",
    "key",
    "value",
    "attention",
    "router",
    "expert",
    "adapter",
)
"""In the order in which a layer computes them, the parts of one kind together."""
RUNS = ("triggered", "placebo")
PROBED = ("trigger", "fires")
SPLITS = ("selection", "held_out")
CONTROLS = ("random", "placebo", "twin")
POSITIONS = ("system", "before", "trigger", "after", "template", "last")
IDENTITY = ("direction", "mode", "metric", "component", "position", "index", "module")
"""What, beside layer and step, tells one measured effect from another."""


@dataclass(frozen=True)
class Form:
    """The columns of a table, by what they hold."""

    name: str
    numbers: tuple[str, ...]
    whole: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def interval(*names: str) -> tuple[str, ...]:
    """Columns of values with their intervals."""
    return tuple(f"{name}{end}" for name in names for end in ("", "_low", "_high"))


_EFFECT = Form(
    "effects",
    numbers=("effect", "low", "high", "n", *interval(*CONTROLS)),
    whole=("layer", "index"),
    texts=("mode", "metric", "position", "module"),
    flags=("responsible",),
    words={"sweep": SWEEPS, "direction": DIRECTIONS, "component": COMPONENTS},
)
EFFECTS = _EFFECT
DYNAMICS = Form(
    "dynamics", _EFFECT.numbers, ("step", *_EFFECT.whole), _EFFECT.texts, _EFFECT.flags, _EFFECT.words
)
TOKENS = Form(
    "tokens",
    ("effect",),
    ("layer", "column"),
    ("group", "token", "role"),
    words={"direction": DIRECTIONS, "component": COMPONENTS},
)
LENS = Form("lens", ("value", "low", "high", "n"), ("layer",), words={"run": RUNS})
LENS_MAP = Form(
    "lens_map", ("probability",), ("layer", "column"), ("group", "token", "role", "top"), words={"run": RUNS}
)
PROBES = Form(
    "probes", ("auroc", "low", "high", "n", *interval("control")), ("layer",), words={"label": PROBED}
)
ATTENTION = Form(
    "attention",
    ("weight",),
    ("layer", "head", "query", "key"),
    ("group", "query_token", "key_token"),
    words={"run": RUNS},
)
DIVERGENCE = Form("divergence", ("value", "low", "high", "n", *interval("control")), ("layer", "head"))
DRIFT = Form("drift", ("energy", "top_share", "overlap"), ("layer", "step"), ("module",))
TRADEOFF = Form(
    "tradeoff",
    (*interval("asr", "cacc"), "asr_n", "cacc_n"),
    ("sites",),
    ("intervention", "kind"),
    ("control", "chosen"),
    {"split": SPLITS},
)
MITIGATION = Form(
    "mitigation",
    (*interval("asr", "cacc"), "asr_n", "cacc_n"),
    texts=("method", "point", "form", "needs", "flags"),
    flags=("control", "chosen", "front", "recommended"),
    words={"split": SPLITS},
)
RELEARNING = Form(
    "relearning", (*interval("asr", "ftr"), "asr_n", "ftr_n"), ("step", "poisoned_rows"), ("method", "point")
)


def checked(data: Measurements, form: Form) -> pd.DataFrame:
    """The columns of a form: floats, whole numbers, texts, flags and known words; rows numbered anew.

    Raises:
        InputError: naming the table, the column and the row, if there are no rows, a column is missing,
            a word is unknown, or a value is of another kind.
    """
    frame = to_frame(data, form.name)
    require(frame, form.name, [*form.words, *form.texts, *form.whole, *form.numbers, *form.flags])
    columns: dict[str, Sequence[object]] = {}
    for name in (*form.words, *form.texts):
        columns[name] = ["" if pd.isna(value) else str(value) for value in frame[name]]
    for name in form.numbers:
        columns[name] = numbers(frame[name], f"{form.name}, field {name}")
    for name in form.whole:
        columns[name] = _whole(frame[name], form.name, name)
    for name in form.flags:
        columns[name] = _flags(frame[name], form.name, name)
    out = pd.DataFrame(columns)
    for name, allowed in form.words.items():
        known(out, form.name, name, allowed)
    return out


def one_sweep(data: Measurements, form: Form, sweep: str) -> pd.DataFrame:
    """The rows of one sweep.

    Raises:
        InputError: as `checked`, and if the table holds no row of the sweep.
    """
    frame = checked(data, form)
    own = frame[frame["sweep"] == sweep].reset_index(drop=True)
    if own.empty:
        there = ", ".join(sorted(set(frame["sweep"])))
        raise NotMeasuredError(f"{form.name}: column sweep has no row with {sweep!r}; there are {there}")
    return own


def facets(frame: pd.DataFrame, axes: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Rows that belong into one panel, with a title of what tells them from the other panels' rows.

    Args:
        frame: effects.
        axes: columns that the panel itself shows.
    """
    keys = [name for name in IDENTITY if name in frame and name not in axes]
    telling = [name for name in keys if name == "direction" or frame[name].nunique() > 1]
    order = {word: place for place, word in enumerate(DIRECTIONS)}
    groups = [own for _, own in frame.groupby(keys, sort=False)]
    groups.sort(key=lambda own: order[own["direction"].iloc[0]])
    return [(", ".join(_told(name, own[name].iloc[0]) for name in telling), own) for own in groups]


def once(frame: pd.DataFrame, table: str, keys: Sequence[str]) -> None:
    """Check that each place is measured once.

    Raises:
        InputError: naming the place that the table holds twice.
    """
    twice = frame[frame.duplicated(list(keys))]
    if len(twice):
        place = ", ".join(f"{name} {twice[name].iloc[0]!s}" for name in keys)
        raise InputError(f"{table}: {place} is there more than once; give one row for each")


def in_order(names: Sequence[str], order: Sequence[str]) -> list[str]:
    """Names, each once: by the first word of the order that they begin with, then as they appear."""

    def place(name: str) -> int:
        return next((at for at, word in enumerate(order) if name.split(" ")[0] == word), len(order))

    return sorted(dict.fromkeys(names), key=place)


def _told(name: str, value: object) -> str:
    if value == "" and name == "position":
        return "all positions"
    text = str(value).replace("_", " ")
    return f"{name} {text}" if name == "index" else text


def _whole(values: pd.Series, table: str, name: str) -> list[int]:
    found = numbers(values, f"{table}, field {name}")
    for row, value in enumerate(found):
        if not value.is_integer():
            raise InputError(f"{table}, field {name}, row {row}: {values.iloc[row]!r} is no whole number")
    return [int(value) for value in found]


def _flags(values: pd.Series, table: str, name: str) -> list[bool]:
    for row, value in enumerate(values):
        if not pd.isna(value) and value not in (True, False):
            raise InputError(f"{table}, field {name}, row {row}: {value!r} is neither true nor false")
    return [not pd.isna(value) and bool(value) for value in values]
