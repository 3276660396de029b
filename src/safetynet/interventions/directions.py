"""Directions of the residual stream that separate triggered from placebo runs.

In: prompts of both runs. Out: a direction per layer, a table of how far the runs lie apart along it, and what
adding it does. That a direction separates two runs does not make it the cause: `project_out`, `clip` and
`steer` of the engine test that.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.batch import BATCH_TOKENS, Prompts, check_pairs
from safetynet.engine.edits import Edit, steer
from safetynet.engine.metrics import Metric
from safetynet.engine.reading import Positions, residuals
from safetynet.engine.runs import Progress, metric_changes
from safetynet.engine.sites import Site
from safetynet.errors import InputError
from safetynet.interventions.effects import estimates
from safetynet.models.blocks import decoder_layers
from safetynet.models.causal_lm import CausalLM


@dataclass(frozen=True)
class Directions:
    """Difference of the means of triggered and placebo runs after each layer."""

    unit: Tensor
    """(layers, width) fp32 of length 1, from placebo to triggered; 0 where the means are equal."""
    norm: Tensor
    """(layers,) length of the difference. Noise makes it longer, never shorter: see `separation`."""
    triggered: Tensor
    """(layers, width) mean of the triggered runs."""
    placebo: Tensor
    """(layers, width) mean of the placebo runs."""


def mean_difference(
    model: CausalLM,
    triggered: Prompts,
    placebo: Prompts,
    positions: Positions | None = None,
    *,
    tokens: int = BATCH_TOKENS,
) -> Directions:
    """Difference of means (Marks and Tegmark, arXiv 2310.06824; Arditi et al., arXiv 2406.11717).

    Args:
        model: the model.
        triggered: one prompt per group.
        placebo: the same prompts with a placebo in the trigger's place.
        positions: per group the positions whose mean is taken, such as those after the trigger, in both
            runs; None for the last token.
        tokens: of one batch.

    Raises:
        InputError: if the runs differ in length, or a position does not exist.
    """
    check_pairs(triggered=triggered, placebo=placebo)
    means = [
        torch.from_numpy(residuals(model, rows, positions, tokens=tokens).mean(0, dtype=np.float64)).float()
        for rows in (triggered, placebo)
    ]
    difference = means[0] - means[1]
    norm = difference.norm(dim=-1)
    unit = difference / norm.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return Directions(unit, norm, *means)


def separation(
    model: CausalLM,
    triggered: Prompts,
    placebo: Prompts,
    other: Prompts | None = None,
    positions: Positions | None = None,
    *,
    seed: int = 0,
    tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """How far triggered and placebo runs lie apart along a direction that was found on other groups.

    The direction is the mean difference of one half of the groups, on which each difference of the other half
    is projected. Without a common direction this is 0 on average; the length of a mean difference never is.
    The same between both placebos (`other`) is the control. Other arguments as in `mean_difference`.

    Returns:
        layer, value (mean, in units of the residual stream), low, high (95 % bootstrap over the second half's
        groups), n (groups of that half), control, control_low, control_high.

    Raises:
        InputError: as in `mean_difference`, and below 4 groups.
    """
    check_pairs(triggered=triggered, placebo=placebo, other=other)
    if len(triggered) < 4:
        raise InputError(f"separation: {len(triggered)} groups are too few for two halves, give at least 4.")
    base = residuals(model, placebo, positions, tokens=tokens)
    values, *control = (
        _held_out(residuals(model, rows, positions, tokens=tokens) - base, seed)
        for rows in (triggered, other)
        if rows is not None
    )
    return estimates({"layer": list(range(values.shape[1]))}, values, control[0] if control else None)


def _held_out(differences: np.ndarray, seed: int) -> np.ndarray:
    """(n, layers, width) to (n // 2, layers): one half's along the mean direction of the other."""
    order = np.random.default_rng(seed).permutation(len(differences))
    half = len(order) // 2
    mean = differences[order[half:]].mean(0, dtype=np.float64)
    length = np.linalg.norm(mean, axis=-1)
    along = np.einsum("nld,ld->nl", differences[order[:half]], mean)
    return np.divide(along, length, out=np.zeros_like(along), where=length > 0)


def steering(
    model: CausalLM,
    prompts: Prompts,
    vector: Tensor,
    metric: Metric,
    *,
    position: int = -1,
    controls: int = 10,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What adding a vector once, at one position, does to a metric: layer by layer.

    Args:
        model: the model.
        prompts: without the trigger, to induce; with the trigger and a negated vector, to suppress.
        vector: (width,), such as the backdoor vector of arXiv 2509.21761.
        metric: its rows are these prompts.
        position: of the last prompt token, from the end.
        controls: how many random directions of the same length are added for comparison.
        progress: called with prompts done and prompts in all.

    Returns:
        layer (after which it is added), effect (mean change of the metric, in its unit), low, high (95 %
        bootstrap over prompts), n, random, random_low, random_high (of the mean over the random directions).

    Raises:
        InputError: if there is no random direction, or for what `trace` refuses.
    """
    if controls < 1:
        raise InputError(f"steering: controls is {controls}; compare with at least one random direction.")
    layers = range(len(decoder_layers(model)))
    vectors = [vector, *(random_direction(vector, seed) for seed in range(controls))]
    sets = [
        [Edit(Site("resid_post", layer), steer(added, 1.0), (position,))]
        for added in vectors
        for layer in layers
    ]
    changes = metric_changes(model, prompts, sets, metric, progress)
    changes = changes.reshape(len(prompts), len(vectors), len(layers))
    return estimates(
        {"layer": list(layers)}, changes[:, 0], changes[:, 1:].mean(1), name="effect", beside="random"
    )


def random_direction(direction: Tensor, seed: int = 0) -> Tensor:
    """The control of a direction, (width,): another of the same length, drawn evenly from all."""
    drawn = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed)).to(direction)
    return drawn * direction.norm() / drawn.norm()
