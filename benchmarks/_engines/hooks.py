"""Plain PyTorch hooks: the reference. One forward per patch, as people write it, and two faster variants.

`run_tail` computes logits of the last position only; `run_batched` also sends the patches of a layer, 32 rows
at a time, as one batch.
"""

from collections.abc import Callable
from typing import Any

import torch

from .workload import Site, Sweep, by_layer, chunks, logit_difference

PACKAGES: tuple[str, ...] = ()
ROWS = 32


def prepare(model: Any, _tokenizer: Any) -> Any:
    """The model itself."""
    return model


def run(model, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One whole forward per patch."""
    return _sweep(model, receiver_ids, source_ids, sweep, tokens)


def run_tail(model, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """One forward per patch, with the logits of the last position."""
    return _sweep(model, receiver_ids, source_ids, sweep, tokens, logits_to_keep=1)


@torch.no_grad()
def run_batched(model, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """The patches of a layer side by side, with the logits of the last position."""
    source = _capture(model, source_ids, sweep)
    pairs = len(receiver_ids)
    size = sweep.shape.hidden // sweep.shape.heads
    metrics = []
    for layer in by_layer(sweep.sites):
        for sites in chunks(layer, max(1, ROWS // pairs)):

            def patch(hidden: torch.Tensor, sites: list[Site] = sites) -> torch.Tensor:
                hidden = hidden.clone()
                for row, site in enumerate(sites):
                    rows = slice(row * pairs, (row + 1) * pairs)
                    _write(hidden[rows], source[site.layer], site, size)
                return hidden

            ids = receiver_ids.repeat(len(sites), 1)
            logits = _patched(model, ids, sites[0].layer, sweep, patch, logits_to_keep=1)
            metrics.append(logit_difference(logits, tokens).view(len(sites), pairs))
    return torch.cat(metrics)


@torch.no_grad()
def _sweep(model, receiver_ids, source_ids, sweep: Sweep, tokens, **options: int) -> torch.Tensor:
    source = _capture(model, source_ids, sweep)
    size = sweep.shape.hidden // sweep.shape.heads
    metrics = []
    for site in sweep.sites:

        def patch(hidden: torch.Tensor, site: Site = site) -> torch.Tensor:
            hidden = hidden.clone()
            _write(hidden, source[site.layer], site, size)
            return hidden

        logits = _patched(model, receiver_ids, site.layer, sweep, patch, **options)
        metrics.append(logit_difference(logits, tokens))
    return torch.stack(metrics)


def _capture(model: Any, ids: torch.Tensor, sweep: Sweep) -> dict[int, torch.Tensor]:
    """The input of each patched module in the source's run."""
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(_module: Any, args: tuple) -> None:
            kept[layer] = args[0]

        return hook

    layers = sorted({site.layer for site in sweep.sites})
    handles = [_module(model, layer, sweep).register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        model(ids, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _patched(
    model: Any,
    ids: torch.Tensor,
    layer: int,
    sweep: Sweep,
    patch: Callable[[torch.Tensor], torch.Tensor],
    **options: int,
) -> torch.Tensor:
    """Logits of one run in which the input of the layer's module has gone through `patch`."""

    def hook(_module: Any, args: tuple) -> tuple:
        return (patch(args[0]), *args[1:])

    handle = _module(model, layer, sweep).register_forward_pre_hook(hook)
    try:
        return model(ids, **options).logits
    finally:
        handle.remove()


def _module(model: Any, layer: int, sweep: Sweep) -> Any:
    block = model.model.layers[layer]
    return block.self_attn.o_proj if sweep.component == "head" else block


def _write(hidden: torch.Tensor, source: torch.Tensor, site: Site, size: int) -> None:
    """Replace in place what the site names; both are (pairs, positions, width)."""
    if site.head is not None:
        part = slice(site.head * size, (site.head + 1) * size)
        hidden[:, :, part] = source[:, :, part]
    elif site.position is None:
        hidden[:] = source
    else:
        hidden[:, site.position] = source[:, site.position]
