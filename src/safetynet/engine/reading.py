"""Activations of many prompts, read at chosen positions, batch by batch.

In: token ids of many prompts. Out: one vector per prompt and site, or its mean over prompts or tokens.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from safetynet.engine.batch import BATCH_TOKENS, Prompts, batches, check_positions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.models.causal_lm import CausalLM

Positions = Sequence[Sequence[int]]
"""Per prompt some positions, from its first token; negative ones count from its end."""


def activations(
    model: CausalLM,
    prompts: Prompts,
    sites: Sequence[Site],
    positions: Positions | None = None,
    *,
    tokens: int = BATCH_TOKENS,
) -> Iterator[dict[Site, list[Tensor]]]:
    """Values of some sites at some positions of each prompt, one batch of prompts after the other.

    Args:
        model: the model.
        prompts: token ids of N prompts.
        sites: where to read; `head` without an index holds all heads of a layer side by side.
        positions: per prompt the positions to read; None for all of its tokens.
        tokens: of one batch.

    Yields:
        By site one tensor per prompt of the batch, (positions, width), in the model's precision and place.

    Raises:
        InputError: if a site or position does not exist, a prompt has none, or for what `trace` refuses.
    """
    if positions is not None:
        check_positions(prompts, positions)
    for part, batch in batches(model, prompts, tokens):
        recorded = trace(model, batch, sites, columns=0)
        rows = range(len(batch.ids))
        if positions is None:
            columns = [list(range(batch.width - batch.length(row), batch.width)) for row in rows]
        else:
            columns = [batch.columns(row, positions[part][row]) for row in rows]
        yield {site: [recorded.value(site)[row, columns[row]] for row in rows] for site in sites}


def mean_activations(
    model: CausalLM,
    prompts: Prompts,
    sites: Sequence[Site],
    positions: Positions | None = None,
    *,
    tokens: int = BATCH_TOKENS,
) -> dict[Site, Tensor]:
    """Mean of each site's values over all positions of all prompts, (width,) fp32 on the CPU.

    Arguments and errors as in `activations`: a mean head output (`positions=[[-1]] * len(prompts)` at the
    last token, None over all tokens), or the two means whose difference is a direction.
    """
    sums: dict[Site, Tensor] = {}
    count = 0
    for batch in activations(model, prompts, sites, positions, tokens=tokens):
        for site, values in batch.items():
            # In fp64: a sum over many tokens in the model's precision would lose the last ones.
            total = torch.cat(values).double().sum(0).cpu()
            sums[site] = sums[site] + total if site in sums else total
        count += sum(len(x) for x in batch[sites[0]])
    return {site: (total / count).float() for site, total in sums.items()}


def residuals(
    model: CausalLM, prompts: Prompts, positions: Positions | None = None, *, tokens: int = BATCH_TOKENS
) -> np.ndarray:
    """The residual stream after each layer, one vector per prompt.

    Args:
        model: the model.
        prompts: token ids of N prompts.
        positions: per prompt the positions whose mean is taken; None for the last token alone.
        tokens: of one batch.

    Returns:
        (N, layers, width) fp32.

    Raises:
        InputError: if a position does not exist, a prompt has none, or for what `trace` refuses.
    """
    if positions is not None:
        check_positions(prompts, positions)
    vectors = []
    for part, batch in batches(model, prompts, tokens):
        recorded = trace(model, batch, columns=0)
        weights = torch.zeros(batch.ids.shape, device=batch.ids.device)  # (B, S), each row's sum is 1
        read = positions[part] if positions is not None else [[-1]] * len(batch.ids)
        for row, inside in enumerate(read):
            weights[row, batch.columns(row, inside)] = 1 / len(inside)
        layers = range(recorded.architecture.shape.layers)
        states = (recorded.value(Site("resid_post", layer)).float() for layer in layers)
        vectors.append(torch.stack([torch.einsum("bs,bsd->bd", weights, x) for x in states], 1).cpu())
    return torch.cat(vectors).numpy()


def check_heads(architecture: Architecture, heads: Sequence[Site]) -> None:
    """Refuse what is no list of single heads of this model.

    Raises:
        InputError: naming the site.
    """
    if not heads:
        raise InputError("heads: there are none. Give at least one.")
    for site in heads:
        if site.component != "head" or site.index is None:
            raise InputError(f"heads: {site} is no single head. Give sites such as head 3.1.")
        architecture.check(site)
