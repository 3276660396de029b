"""Directions of the residual stream that tell triggered from placebo runs, and edits along them.

In: prompts of both runs. Out: a direction per layer, a table of how far the runs lie apart along it, and
edits that remove or subtract it. That a direction tells two runs apart does not make it the cause: the edits
test that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.batch import BATCH_TOKENS, Prompts, check_pairs
from safetynet.engine.edits import Edit, project_out, steer
from safetynet.engine.metrics import Metric
from safetynet.engine.reading import residuals
from safetynet.engine.runs import Progress, metric_changes
from safetynet.engine.sites import Site
from safetynet.errors import InputError
from safetynet.interventions.estimates import estimates
from safetynet.models.blocks import decoder_layers

Positions = Sequence[Sequence[int]] | None


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
    model: Any,
    triggered: Prompts,
    placebo: Prompts,
    positions: Positions = None,
    *,
    tokens: int = BATCH_TOKENS,
) -> Directions:
    """Difference of means (Marks and Tegmark, arXiv 2310.06824; Arditi et al., arXiv 2406.11717).

    Args:
        model: a causal LM of transformers in evaluation mode.
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
    model: Any,
    triggered: Prompts,
    placebo: Prompts,
    other: Prompts | None = None,
    positions: Positions = None,
    *,
    seed: int = 0,
    tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """How far triggered and placebo runs lie apart along a direction that was found on other groups.

    The direction is the mean difference of one half of the groups, on which each difference of the other half
    is projected. Without a common direction this is 0 on average; the length of a mean difference never is.

    Args:
        model: as in `mean_difference`.
        triggered: one prompt per group.
        placebo: the same prompts with a placebo in the trigger's place.
        other: with another placebo; the same measure between both placebos is the control.
        positions: as in `mean_difference`.
        seed: of the split in halves.
        tokens: of one batch.

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
    values = _held_out(residuals(model, triggered, positions, tokens=tokens) - base, seed)
    control = None
    if other is not None:
        control = _held_out(residuals(model, other, positions, tokens=tokens) - base, seed)
    return estimates({"layer": list(range(values.shape[1]))}, values, control)


def project(
    direction: Tensor,
    layers: Sequence[int],
    centre: Tensor | None = None,
    positions: tuple[int, ...] | None = None,
) -> list[Edit]:
    """Edits that take a direction out of the residual stream after each of these layers.

    Args:
        direction: (width,), of any length but 0.
        layers: after which it is taken out.
        centre: (width,) state whose component along the direction is put in place, such as the placebo
            runs' mean; None puts 0, which is itself far from usual states.
        positions: of each prompt; None for all.

    Raises:
        InputError: if the direction has no length.
    """
    if not direction.norm() > 0:
        raise InputError("project: the direction has no length. Are the two runs the same?")
    change = project_out(direction, centre)
    return [Edit(Site("resid_post", layer), change, positions) for layer in layers]


def subtract(vector: Tensor, layer: int, positions: tuple[int, ...] | None = None) -> list[Edit]:
    """The edit that takes a vector, (width,), from the residual stream after one layer.

    A negated vector is added: so is the backdoor vector of arXiv 2509.21761 used to suppress a behaviour, or
    to induce it.
    """
    return [Edit(Site("resid_post", layer), steer(vector, -1.0), positions)]


def steering(
    model: Any,
    rows: Prompts,
    vector: Tensor,
    metric: Metric,
    *,
    position: int = -1,
    controls: int = 10,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What adding a vector once, at one position, does to a metric: layer by layer.

    Args:
        model: a causal LM of transformers in evaluation mode.
        rows: prompts without the trigger, to induce; with the trigger and a negated vector, to suppress.
        vector: (width,), such as the backdoor vector of arXiv 2509.21761.
        metric: its rows are these prompts.
        position: of the last prompt token, from the end.
        controls: how many random directions of the same length are added for comparison.
        progress: called with prompts done and prompts in all.

    Returns:
        layer (after which it is added), effect (mean change of the metric, in its unit), low, high (95 %
        bootstrap over prompts), n, random, random_low, random_high (of the mean over the random directions).

    Raises:
        InputError: if there is no random direction, or for what `trace` and `measure` refuse.
    """
    if controls < 1:
        raise InputError(f"steering: controls is {controls}; compare with at least one random direction.")
    layers = range(len(decoder_layers(model)))
    vectors = [vector, *(random_direction(vector, seed) for seed in range(controls))]
    sets = [subtract(-one, layer, (position,)) for one in vectors for layer in layers]
    found = metric_changes(model, rows, sets, metric, progress).reshape(len(rows), len(vectors), len(layers))
    table = estimates({"layer": list(layers)}, found[:, 0], found[:, 1:].mean(1), name="effect")
    return table.rename(columns=lambda name: name.replace("control", "random"))


def random_direction(direction: Tensor, seed: int = 0) -> Tensor:
    """The control of a direction, (width,): another of the same length, drawn evenly from all."""
    drawn = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed)).to(direction)
    return drawn * direction.norm() / drawn.norm()


def _held_out(differences: np.ndarray, seed: int) -> np.ndarray:
    """(n, layers, width) to (n // 2, layers): one half's along the mean direction of the other."""
    order = np.random.default_rng(seed).permutation(len(differences))
    half = len(order) // 2
    mean = differences[order[half:]].mean(0, dtype=np.float64)
    length = np.linalg.norm(mean, axis=-1)
    along = np.einsum("nld,ld->nl", differences[order[:half]], mean)
    return np.divide(along, length, out=np.zeros_like(along), where=length > 0)
