"""Prompts in batches of bounded size, and states of the residual stream read from them.

In: token ids of many prompts. Out: batches, or one vector per prompt and layer. Only one batch's activations
exist at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from safetynet.engine.batch import Batch
from safetynet.engine.sites import Anatomy, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError

Rows = Sequence[Sequence[int]]
"""Token ids of prompts, unpadded."""
TOKENS = 4096
"""Tokens of one batch, padding included; decides about memory, never about numbers."""


def batches(model: Any, rows: Rows, tokens: int = TOKENS) -> Iterator[tuple[slice, Batch]]:
    """Rows in their order, as many at a time as `tokens` hold; at least one.

    Yields:
        Which rows, and their batch on the model's device.

    Raises:
        InputError: if there are no rows, or an empty one.
    """
    if not rows:
        raise InputError("prompts: there are none. Give at least one.")
    device = next(model.parameters()).device
    start = 0
    while start < len(rows):
        stop, longest = start, 0
        while stop < len(rows):
            longest = max(longest, len(rows[stop]))
            if stop > start and (stop + 1 - start) * longest > tokens:
                break
            stop += 1
        yield slice(start, stop), Batch.of(rows[start:stop], device=device)
        start = stop


def residuals(
    model: Any, rows: Rows, positions: Sequence[Sequence[int]] | None = None, *, tokens: int = TOKENS
) -> np.ndarray:
    """The residual stream after each layer, one vector per prompt.

    Args:
        model: a causal LM of transformers in evaluation mode.
        rows: token ids of N prompts.
        positions: per prompt the positions whose mean is taken; None for the last token alone.
        tokens: of one batch.

    Returns:
        (N, layers, width) fp32.

    Raises:
        InputError: if a position does not exist, a prompt has none, or for what `trace` refuses.
    """
    if positions is not None:
        check_positions(rows, positions)
    found = []
    for part, batch in batches(model, rows, tokens):
        run = trace(model, batch, columns=0)
        weights = torch.zeros(batch.ids.shape, device=batch.ids.device)
        for i, own in enumerate(positions[part] if positions is not None else [[-1]] * len(batch.ids)):
            weights[i, batch.columns(i, own)] = 1 / len(own)
        layers = range(run.anatomy.shape.layers)
        states = (run.value(Site("resid_post", layer)) for layer in layers)
        found.append(torch.stack([torch.einsum("bs,bsd->bd", weights, x.float()) for x in states], 1).cpu())
    return torch.cat(found).numpy()


def check_positions(rows: Rows, positions: Sequence[Sequence[int]]) -> None:
    """Refuse positions that are not as many lists as prompts, or an empty list.

    Raises:
        InputError: naming the prompt.
    """
    if len(positions) != len(rows):
        raise InputError(f"positions: {len(positions)} lists for {len(rows)} prompts; give one for each.")
    empty = [i for i, own in enumerate(positions) if not len(own)]
    if empty:
        raise InputError(f"positions: prompt {empty[0]} has none. Leave it out, or choose other positions.")


def check_pairs(**runs: Rows | None) -> None:
    """Refuse runs of different numbers of prompts, whose rows are no groups.

    Raises:
        InputError: with the numbers.
    """
    counts = {name: len(rows) for name, rows in runs.items() if rows is not None}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"groups: each has one prompt of every run, at least one group; given: {given}.")


def check_heads(anatomy: Anatomy, heads: Sequence[Site]) -> None:
    """Refuse what is no list of single heads of this model.

    Raises:
        InputError: naming the site.
    """
    if not heads:
        raise InputError("heads: there are none. Give at least one.")
    for site in heads:
        if site.component != "head" or site.index is None:
            raise InputError(f"heads: {site} is no single head. Give sites such as head 3.1.")
        anatomy.check(site)
