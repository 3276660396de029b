"""pyvene: one call per patch; and the patches of a layer side by side, each row with a place of its own.

The source's activations are collected once and handed over as `source_representations`: with `sources`,
pyvene would run the source again for each patch, which `run_documented` lets it do. A place given as a number
takes its faster path (`use_fast`), which a batch whose rows differ cannot take. Each layer has an
`IntervenableModel`, made once; `keep_last_dim` lets one intervention take any number of positions.
"""

from typing import Any

import torch

from .workload import Sweep, by_layer, chunks, logit_difference

PACKAGES = ("pyvene",)
ROWS = 32
# Component of a sweep -> what pyvene calls it, and the unit that a place counts.
COMPONENTS = {"resid_pre": ("block_input", "pos"), "head": ("head_attention_value_output", "h")}


def prepare(model: Any, _tokenizer: Any) -> dict[str, Any]:
    """The wrappers: to collect from all layers, and to patch a layer with equal or different rows."""
    import pyvene as pv

    layers = range(model.config.num_hidden_layers)
    collected = {"resid_pre": "block_input", "head": "attention_value_output"}
    wrap = pv.IntervenableModel
    prepared = {
        "collect": {
            component: wrap(
                [
                    {
                        "layer": layer,
                        "component": name,
                        "intervention": pv.CollectIntervention(keep_last_dim=True),
                    }
                    for layer in layers
                ],
                model,
            )
            for component, name in collected.items()
        }
    }
    for kind in ("equal", "different"):  # two sets, since a wrapper keeps `use_fast` once it was set
        prepared[kind] = {
            (component, layer): wrap(
                {
                    "layer": layer,
                    "component": name,
                    "unit": unit,
                    "intervention": pv.VanillaIntervention(keep_last_dim=True),
                },
                model,
            )
            for component, (name, unit) in COMPONENTS.items()
            for layer in layers
        }
    return prepared


@torch.no_grad()
def run(prepared: dict[str, Any], receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One call per patch."""
    source = _capture(prepared, source_ids, sweep)
    metrics = []
    for site in sweep.sites:
        place = site.position if site.head is None else site.head
        value = source[site.layer] if place is None else source[site.layer][:, [place]]
        locations = None if place is None else {"sources->base": place}
        logits = _patched(prepared["equal"], sweep.component, site.layer, receiver_ids, locations, value)
        metrics.append(logit_difference(logits, tokens))
    return torch.stack(metrics)


@torch.no_grad()
def run_documented(prepared: dict[str, Any], receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One call per patch with base and source, as in the package's guide: all logits, source run again."""
    metrics = []
    for site in sweep.sites:
        place = site.position if site.head is None else site.head
        if place is None:
            place = list(range(receiver_ids.shape[1]))
        wrapper = prepared["equal"][sweep.component, site.layer]
        _, output = wrapper(
            base={"input_ids": receiver_ids},
            sources=[{"input_ids": source_ids}],
            unit_locations={"sources->base": place},
        )
        metrics.append(logit_difference(output.logits, tokens))
    return torch.stack(metrics)


@torch.no_grad()
def run_batched(prepared: dict[str, Any], receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """The patches of a layer as rows of one batch."""
    if sweep.per_layer == "whole":
        raise NotImplementedError("one patch per layer: there is nothing to batch")
    source = _capture(prepared, source_ids, sweep)
    pairs = len(receiver_ids)
    metrics = []
    for layer in by_layer(sweep.sites):
        for sites in chunks(layer, max(1, ROWS // pairs)):
            places = [site.position if site.head is None else site.head for site in sites]
            rows = [[[place] for place in places for _ in range(pairs)]]
            value = torch.cat([source[sites[0].layer][:, [place]] for place in places])
            ids = receiver_ids.repeat(len(sites), 1)
            locations = {"sources->base": (rows, rows)}
            logits = _patched(prepared["different"], sweep.component, sites[0].layer, ids, locations, value)
            metrics.append(logit_difference(logits, tokens).view(len(sites), pairs))
    return torch.cat(metrics)


def _capture(prepared: dict[str, Any], ids: torch.Tensor, sweep: Sweep) -> list[torch.Tensor]:
    """For each layer (pairs, positions, hidden), or (pairs, heads, positions, size)."""
    (_, kept), _ = prepared["collect"][sweep.component](base={"input_ids": ids})
    pairs = len(ids)
    # The rows of a batch come one by one: put them together again.
    per_layer = [torch.stack(rows) for rows in chunks(kept, pairs)] if kept[0].ndim == 2 else kept
    if sweep.component == "head":
        heads = sweep.shape.heads
        return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in per_layer]
    return per_layer


def _patched(
    wrappers: dict[tuple[str, int], Any],
    component: str,
    layer: int,
    ids: torch.Tensor,
    locations: dict[str, Any] | None,
    value: torch.Tensor,
) -> torch.Tensor:
    """Logits of the last position."""
    wrapper = wrappers[component, layer]
    _, output = wrapper(
        base={"input_ids": ids, "logits_to_keep": 1},
        unit_locations=locations,
        source_representations={wrapper.sorted_keys[0]: value},
    )
    return output.logits
