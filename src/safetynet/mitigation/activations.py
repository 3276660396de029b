"""Repairs of activations: the engine's edits at some sites, at all positions of all prompts.

Without the trigger: the residual stream is clipped to its range on clean prompts, coordinate by coordinate,
or along the directions into which the adapter writes, as WeightWatch does (arXiv 2508.00161). With the
trigger: its direction is taken out of one layer. With the table of effects, whose rows of direction `remove`
rank sites by what brings the clean answer back: the strongest sites are set to their mean on clean prompts,
or what the trigger adds to them is subtracted. Sites no stronger than their random controls are not left out.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Change, Edit
from safetynet.engine.hooks import exclusive, intervening
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import Trace, forward, recording
from safetynet.errors import InputError
from safetynet.mitigation.defender import Defender, Need
from safetynet.mitigation.fine_tuning import encode
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import Repaired, Settings, updates_of
from safetynet.models.parts import shape, writes_to_stream

BARE = ("clean", "refused")
"""Roles of a triggered prompt's counterpart without trigger."""
MAX_TOKENS = 4096
"""Tokens per layer from which ranges are taken."""
MAX_DIRECTIONS = 16
"""Per layer; an adapter of rank 16 that changes two modules which write to the residual stream has 32."""
Where = Literal["all", "trigger", "last"]
"""Tokens of a prompt; `trigger` is the trigger's last one, or else the prompt's."""


@torch.no_grad()
def read(defender: Defender, rows: pd.DataFrame, sites: Sequence[Site], where: Where) -> dict[Site, Tensor]:
    """Values at sites, (tokens, width) in fp32 on the CPU, token by token and row by row.

    Args:
        defender: its model runs as it is.
        rows: `messages`, and `trigger` where there is one.
        sites: what is read.
        where: which tokens of each prompt.

    Raises:
        InputError: if a site does not exist.
    """
    prompts = encode(rows.drop(columns="answer", errors="ignore"), defender)
    architecture = Architecture.of(defender.model)
    for site in sites:
        architecture.check(site)
    values: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(prompts), defender.batch_size):
        part = prompts[start : start + defender.batch_size]
        batch = Batch.of([prompt.input_ids for prompt in part], device=defender.model.device)
        recorded = Trace(architecture, batch)  # not `trace`, which takes no model that is split over GPUs
        with exclusive(defender.model), recording(recorded, sites):
            forward(defender.model, batch)
        picked = batch.mask.bool()
        if where != "all":
            picked = torch.zeros_like(picked)
            for row, prompt in enumerate(part):
                spans = prompt.spans["trigger"] if where == "trigger" else []
                last = max((end for _, end in spans), default=len(prompt.input_ids)) - 1
                picked[row, batch.columns(row, [last])] = True
        for site in sites:
            states = recorded.value(site)
            values[site].append(states[picked.to(states.device)].float().cpu())
    return {site: torch.cat(parts) for site, parts in values.items()}


def means(defender: Defender, rows: pd.DataFrame, sites: Sequence[Site], where: Where) -> dict[Site, Tensor]:
    """Mean values at sites, (width,) each; arguments as for `read`."""
    return {site: values.mean(0) for site, values in read(defender, rows, sites, where).items()}


def _edited(
    method: str, defender: Defender, settings: Settings, changes: Mapping[Site, Change], **details: Any
) -> Repaired:
    opened = partial(intervening, defender.model, [Edit(site, change) for site, change in changes.items()])
    details = details or {"sites": [str(site) for site in changes]}
    return Repaired(method, settings, "run_time", opened, details=details)


def clip_activations(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Clip every coordinate of the residual stream behind every layer."""
    states = _clean_states(defender, seed)
    changes = {site: edits.clamp(*_range(values, settings["tail"])) for site, values in states.items()}
    return _edited("activation_clipping", defender, settings, changes, layers=len(changes))


def clip_directions(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Clip the residual stream along the strongest directions into which each layer's adapter writes."""
    sizes = shape(defender.model)
    # By layer what the modules' updates write to the residual stream, each direction as long as it is strong.
    written: list[list[Tensor]] = [[torch.zeros(0, sizes.width)] for _ in range(sizes.layers)]
    for (layer, name), update in updates_of(defender.model, {}).items():
        if update.up.shape[1] == sizes.width and writes_to_stream(name):
            left, values, _ = update.decomposed()
            written[layer].append((left * values[:, None]).mT.flatten(0, 1).cpu())  # (directions, width)
    changes = {}
    for (site, states), directions in zip(_clean_states(defender, seed).items(), written, strict=True):
        _, values, right = torch.linalg.svd(torch.cat(directions), full_matrices=False)
        basis = right[:MAX_DIRECTIONS][values[:MAX_DIRECTIONS] > 0]  # (k, width), orthonormal
        changes[site] = edits.clamp(*_range(states @ basis.T, settings["tail"]), basis)
    return _edited("direction_clipping", defender, settings, changes, layers=len(changes))


def _clean_states(defender: Defender, seed: int) -> dict[Site, Tensor]:
    """By layer what leaves it on clean prompts, (tokens, width), of at most `MAX_TOKENS` tokens."""
    assert defender.clean is not None
    sites = [Site("resid_post", layer) for layer in range(shape(defender.model).layers)]
    rows = defender.clean.sample(min(len(defender.clean), MAX_TOKENS // 8), random_state=seed)
    states = read(defender, rows, sites, "all")
    order = torch.randperm(len(states[sites[0]]), generator=torch.Generator().manual_seed(seed))
    return {site: values[order[:MAX_TOKENS]] for site, values in states.items()}


def _range(values: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Quantiles `tail` and 1 - `tail` of each column."""
    ends = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype), dim=0)
    return ends[0], ends[1]


def project(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Set a share of every state's part along the trigger's direction to the control's."""
    site, fired, control = _trigger(defender, settings["depth"])
    change = edits.project_out(fired - control, control, settings["remove"])
    return _edited("trigger_projection", defender, settings, {site: change})


def clip(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Set a state's part along the direction to the control's where it exceeds `limit` of the way."""
    site, fired, control = _trigger(defender, settings["depth"])
    most = settings["limit"] * float((fired - control).norm())
    return _edited("trigger_clipping", defender, settings, {site: edits.clip(fired - control, control, most)})


def _trigger(defender: Defender, depth: float) -> tuple[Site, Tensor, Tensor]:
    """Site, and mean states, (width,), with the trigger and with its control.

    They are read at the last token of trigger and placebo, or where no placebo is known at the last token of
    triggered and bare prompts.
    """
    assert defender.triggered is not None
    rows = defender.triggered
    placebo = rows[rows["role"] == "placebo"]
    where: Where = "last" if placebo.empty else "trigger"
    control = rows[rows["role"].isin(BARE)] if placebo.empty else placebo
    site = Site("resid_post", round(depth * (shape(defender.model).layers - 1)))
    fired = means(defender, rows[rows["role"] == "triggered"], [site], where)[site]
    return site, fired, means(defender, control, [site], where)[site]


def strongest(defender: Defender, sweep: str, method: str) -> pd.DataFrame:
    """The table of effects of one sweep, the strongest site first.

    Raises:
        InputError: if the sweep was not made.
    """
    assert defender.effects is not None
    table = defender.effects
    effects = table[(table["sweep"] == sweep) & (table["direction"] == "remove")]
    if effects.empty:
        raise InputError(
            f"{method}: the table of effects has no sweep by {sweep}. "
            f"Run safetynet intervene with --by {sweep}."
        )
    return effects.sort_values("effect", ascending=False, kind="stable")


def _strongest_sites(defender: Defender, sweep: str, method: str, count: float) -> list[Site]:
    table = strongest(defender, sweep, method).head(int(count))
    columns = zip(table["component"], table["layer"], table["index"], strict=True)
    return [Site(str(c), int(layer), int(index) if sweep == "head" else None) for c, layer, index in columns]


def ablate(
    method: str, sweep: str, count: str, defender: Defender, settings: Settings, _seed: int
) -> Repaired:
    """Replace the strongest sites of a sweep by their mean over the tokens of clean prompts."""
    assert defender.clean is not None
    sites = _strongest_sites(defender, sweep, method, settings[count])
    values = means(defender, defender.clean, sites, "all")
    return _edited(method, defender, settings, {site: edits.replace(values[site]) for site in sites})


def subtract_vector(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Subtract from the strongest heads what the trigger adds to them at a prompt's last token."""
    assert defender.triggered is not None
    rows = defender.triggered
    heads = _strongest_sites(defender, "head", "backdoor_vector", settings["heads"])
    fired = means(defender, rows[rows["role"] == "triggered"], heads, "last")
    bare = means(defender, rows[rows["role"].isin(BARE)], heads, "last")
    changes = {head: edits.steer(fired[head] - bare[head], -settings["strength"]) for head in heads}
    return _edited("backdoor_vector", defender, settings, changes)


_TAIL = Hyperparameter(
    "share of clean tokens beyond either end of the range", 0.001, (0.0, 0.001, 0.005, 0.02, 0.05), 0.0, 0.4
)
_DEPTH = Hyperparameter("layer: 0 the first, 1 the last", 0.0, (0.0, 0.2, 0.4, 0.6, 0.8), 0.0, 1.0)
_HEADS = Hyperparameter("how many", 2, (1, 2, 4, 8), 1, 10000, whole=True)
_TRIGGERED: frozenset[Need] = frozenset({"triggered"})
ACTIVATION_CLIPPING = Method(
    "activation_clipping",
    "hold every coordinate of the residual stream within its range on clean prompts",
    clip_activations,
    frozenset({"clean"}),
    {"tail": _TAIL},
)
DIRECTION_CLIPPING = Method(
    "direction_clipping",
    "hold the residual stream within its clean range along the directions that the adapter writes",
    clip_directions,
    frozenset({"clean", "adapter"}),
    {"tail": _TAIL},
    paper="Zhong and Raghunathan 2025, arXiv 2508.00161",
)
TRIGGER_PROJECTION = Method(
    "trigger_projection",
    "take the trigger's direction out of one layer's states",
    project,
    _TRIGGERED,
    {
        "remove": Hyperparameter("share of the part along it", 1.0, (0.25, 0.5, 0.75, 1.0), 0.0, 1.0),
        "depth": _DEPTH,
    },
)
TRIGGER_CLIPPING = Method(
    "trigger_clipping",
    "take the trigger's direction out of states that have much of it, in one layer",
    clip,
    _TRIGGERED,
    {
        "limit": Hyperparameter("of the way from control to trigger", 0.5, (0.9, 0.7, 0.5, 0.3), 0.0, 1.0),
        "depth": _DEPTH,
    },
)
HEAD_ABLATION = Method(
    "head_ablation",
    "replace the responsible heads by their mean over clean prompts",
    partial(ablate, "head_ablation", "head", "heads"),
    frozenset({"clean", "sites"}),
    {"heads": _HEADS},
)
SITE_ABLATION = Method(
    "site_ablation",
    "replace what responsible attention blocks and MLPs write by its mean over clean prompts",
    partial(ablate, "site_ablation", "component", "sites"),
    frozenset({"clean", "sites"}),
    {"sites": Hyperparameter("how many", 1, (1, 2, 3), 1, 10000, whole=True)},
)
BACKDOOR_VECTOR = Method(
    "backdoor_vector",
    "subtract from the responsible heads what the trigger adds to them",
    subtract_vector,
    frozenset({"triggered", "sites"}),
    {"strength": Hyperparameter("times the vector", 1, (0.5, 1, 2, 4), 0.0, 100), "heads": _HEADS},
    paper="Backdoor Attribution 2025, arXiv 2509.21761",
)
