"""nnterp: nnsight with one set of names for all families. One trace per patch, also skipping earlier layers.

nnterp 1.3 asks for nnsight 0.6 or newer but imports modules that 0.8 no longer has: nnsight 0.7 goes with it.
It has no name for the input of the output projection; this is read and written by the module's own path.
"""

from typing import Any

import torch

from .workload import Site, Sweep, logit_difference

PACKAGES = ("nnterp", "nnsight")


def prepare(model: Any, tokenizer: Any) -> Any:
    """The standardised model; its check of the names, one trace each, is left on."""
    from nnterp import StandardizedTransformer

    return StandardizedTransformer(model, tokenizer=tokenizer)


def run(model: Any, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One trace per patch."""
    with torch.no_grad():
        source = _capture(model, source_ids, sweep.component)
        size = sweep.shape.hidden // sweep.shape.heads
        metrics = []
        for site in sweep.sites:
            with model.trace(receiver_ids, logits_to_keep=1):
                _patch(model, site, source[site.layer], size)
                metric = logit_difference(model.logits, tokens).save()
            metrics.append(metric)
        return torch.stack(metrics)


def run_skip(model: Any, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One trace per patch, without the layers before it."""
    with torch.no_grad():
        source = _capture(model, source_ids, sweep.component)
        receiver = _capture(model, receiver_ids, "resid_pre")
        size = sweep.shape.hidden // sweep.shape.heads
        metrics = []
        for site in sweep.sites:
            before = receiver[site.layer].clone()
            with model.trace(receiver_ids, logits_to_keep=1):
                if site.layer:
                    model.skip_layers(0, site.layer - 1, before)
                _patch(model, site, source[site.layer], size)
                metric = logit_difference(model.logits, tokens).save()
            metrics.append(metric)
        return torch.stack(metrics)


def _capture(model: Any, ids: torch.Tensor, component: str) -> list[torch.Tensor]:
    """The patched modules' inputs, layer by layer."""
    with model.trace(ids, logits_to_keep=1):
        kept = [].save()
        for layer in range(model.num_layers):
            if component == "head":
                kept.append(model.attentions[layer].o_proj.input.clone())
            else:
                kept.append(model.layers_input[layer].clone())
    return kept


def _patch(model: Any, site: Site, source: torch.Tensor, size: int) -> None:
    """Called inside a trace: write into what the module is given."""
    if site.head is not None:
        part = slice(site.head * size, (site.head + 1) * size)
        model.attentions[site.layer].o_proj.input[:, :, part] = source[:, :, part]
    elif site.position is None:
        model.layers_input[site.layer][:] = source
    else:
        model.layers_input[site.layer][:, site.position] = source[:, site.position]
