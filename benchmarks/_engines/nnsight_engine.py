"""nnsight: one trace per patch; 32 invokes per trace; one trace per patch that skips the layers before it.

`run_skip` is the package's own shortcut (`Envoy.skip`): the layers before the patched one do not run, and
what comes out of the last of them is the receiver's.
"""

from typing import Any

import torch

from .workload import Site, Sweep, by_layer, chunks, logit_difference

PACKAGES = ("nnsight",)
INVOKES = 32


def prepare(model: Any, tokenizer: Any) -> Any:
    """The wrapper that can batch invokes."""
    from nnsight import TransformersModel

    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")


def run(model: Any, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One trace per patch."""
    with torch.no_grad():
        source = _capture(model, source_ids, sweep.component)
        size = sweep.shape.hidden // sweep.shape.heads
        metrics = []
        for site in sweep.sites:
            with model.trace(receiver_ids, logits_to_keep=1):
                _patch(model, site, source[site.layer], size)
                metric = logit_difference(model.lm_head.output, tokens).save()
            metrics.append(metric)
        return torch.stack(metrics)


def run_batched(model: Any, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """The patches of a layer as invokes of one trace, which runs them as one batch of 32 prompts."""
    with torch.no_grad():
        source = _capture(model, source_ids, sweep.component)
        size = sweep.shape.hidden // sweep.shape.heads
        found = []
        for layer in by_layer(sweep.sites):
            for sites in chunks(layer, max(1, INVOKES // len(receiver_ids))):
                with model.trace(logits_to_keep=1) as tracer:
                    metrics = [].save()
                    for site in sites:
                        with tracer.invoke(receiver_ids):
                            _patch(model, site, source[site.layer], size)
                            metrics.append(logit_difference(model.lm_head.output, tokens))
                found.extend(metrics)
        return torch.stack(found)


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
                for layer in model.model.layers[: site.layer]:
                    layer.skip(before)
                _patch(model, site, source[site.layer], size)
                metric = logit_difference(model.lm_head.output, tokens).save()
            metrics.append(metric)
        return torch.stack(metrics)


def _capture(model: Any, ids: torch.Tensor, component: str) -> list[torch.Tensor]:
    """The patched modules' inputs, layer by layer."""
    with model.trace(ids, logits_to_keep=1):
        kept = [].save()
        for layer in model.model.layers:
            module = layer.self_attn.o_proj if component == "head" else layer
            kept.append(module.input.clone())
    return kept


def _patch(model: Any, site: Site, source: torch.Tensor, size: int) -> None:
    """Called inside a trace: write into what the module is given."""
    layer = model.model.layers[site.layer]
    if site.head is not None:
        part = slice(site.head * size, (site.head + 1) * size)
        layer.self_attn.o_proj.input[:, :, part] = source[:, :, part]
    elif site.position is None:
        layer.input[:] = source
    else:
        layer.input[:, site.position] = source[:, site.position]
