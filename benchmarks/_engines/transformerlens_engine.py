"""TransformerLens 4 through its TransformerBridge.

`run_with_hooks` is what its own `generic_activation_patch` calls for each patch; called directly, it spares
the data frame and the progress bar, and lets `logits_to_keep` through; `run_documented` leaves that out, as
the package's `patching` module and demonstrations do. Starting at a layer (`start_at_layer`) saves nothing in
the bridge: the earlier blocks run and their result is thrown away.
"""

from functools import partial
from typing import Any

import torch

from .workload import Site, Sweep, logit_difference

PACKAGES = ("transformer-lens",)


def prepare(model: Any, tokenizer: Any) -> Any:
    """The bridge around the model; it chooses eager attention by itself."""
    from transformer_lens.model_bridge import TransformerBridge

    place = str(model.device)
    return TransformerBridge.boot_transformers("random", hf_model=model, tokenizer=tokenizer, device=place)


def run(bridge: Any, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One `run_with_hooks` per patch, logits of the last position."""
    return _run(bridge, receiver_ids, source_ids, sweep, tokens, logits_to_keep=1)


def run_documented(bridge: Any, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One `run_with_hooks` per patch, all logits."""
    return _run(bridge, receiver_ids, source_ids, sweep, tokens)


@torch.inference_mode()
def _run(bridge: Any, receiver_ids, source_ids, sweep: Sweep, tokens, **options: int) -> torch.Tensor:
    names = {layer: _name(layer, sweep) for layer in {site.layer for site in sweep.sites}}
    _, cache = bridge.run_with_cache(source_ids, names_filter=list(names.values()), **options)
    metrics = []
    for site in sweep.sites:
        name = names[site.layer]
        hook = partial(_patch, site=site, source=cache[name])
        logits = bridge.run_with_hooks(receiver_ids, fwd_hooks=[(name, hook)], **options)
        metrics.append(logit_difference(logits, tokens))
    return torch.stack(metrics)


def _name(layer: int, sweep: Sweep) -> str:
    return f"blocks.{layer}.attn.hook_z" if sweep.component == "head" else f"blocks.{layer}.hook_resid_pre"


def _patch(value: torch.Tensor, *, site: Site, source: torch.Tensor, **_hook: Any) -> torch.Tensor:
    """In place, as the package's own patch setters do; heads have an axis of their own here."""
    if site.head is not None:
        value[:, :, site.head] = source[:, :, site.head]
    elif site.position is None:
        value[:] = source
    else:
        value[:, site.position] = source[:, site.position]
    return value
