"""Attention heads ranked by their causal indirect effect, and the one-point backdoor vector made of them.

The method of "Backdoor Attribution" (arXiv 2509.21761): the mean output that a head has in triggered runs is
put into runs without the trigger, and what the answer gains is the head's effect. The sum of the leading
heads' outputs is a vector that induces the behaviour, or suppresses it. Heads are ranked on some groups and
judged on others, beside random heads of the same layers: the split is the caller's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.interventions.edits import Edit, replace, zero
from safetynet.interventions.estimates import by_head, estimates
from safetynet.interventions.metrics import Metric
from safetynet.interventions.norms import frozen_scale
from safetynet.interventions.plan import Run
from safetynet.interventions.reading import TOKENS, Rows, batches, check_pairs
from safetynet.interventions.sites import Anatomy, Site
from safetynet.interventions.trace import trace
from safetynet.interventions.wave import measure

Head = tuple[int, int]
"""Layer and head."""


def head_means(model: Any, rows: Rows, position: int = -1, *, tokens: int = TOKENS) -> Tensor:
    """Mean output of every head at one position, before the output projection.

    Args:
        model: a causal LM of transformers in evaluation mode.
        rows: prompts, such as the triggered ones.
        position: counted from each prompt's end; -1 is its last token.
        tokens: of one batch.

    Returns:
        (layers, heads, head size) fp32 on the CPU.

    Raises:
        InputError: if the position does not exist, or for what `trace` refuses.
    """
    anatomy = Anatomy.of(model)
    sites = [Site("head", layer) for layer in range(anatomy.shape.layers)]
    total = torch.zeros(len(sites), anatomy.shape.heads * anatomy.shape.head_size, dtype=torch.float64)
    for _, batch in batches(model, rows, tokens):
        found = trace(model, batch, sites, columns=0)
        at = [batch.columns(row, [position])[0] for row in range(len(batch.ids))]
        values = torch.stack([found.value(site)[torch.arange(len(at)), at] for site in sites])
        total += values.double().sum(1).cpu()
    return (total / len(rows)).float().unflatten(1, (anatomy.shape.heads, anatomy.shape.head_size))


def rank_heads(
    model: Any,
    triggered: Rows,
    placebo: Rows,
    metric: Metric,
    *,
    other: Rows | None = None,
    position: int = -1,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Causal indirect effect of every head at one position.

    Args:
        model: a causal LM of transformers in evaluation mode.
        triggered: one prompt per group; their mean head outputs are put into the placebo runs.
        placebo: the same prompts with a placebo in the trigger's place.
        metric: what the effect is an effect on; its rows are the groups.
        other: prompts with another placebo. Putting their means in is the control.
        position: of the last prompt token, from the end; lower than -1 where rows carry answer tokens.
        progress: called with runs done and runs in all.

    Returns:
        layer, head, effect (mean gain of the metric, in its unit), low, high (95 % bootstrap over groups), n,
        control, control_low, control_high; heads with the largest effect first.

    Raises:
        InputError: if the runs differ in length, or for what `trace` and `measure` refuse.
    """
    check_pairs(triggered=triggered, placebo=placebo, other=other)
    shape = Anatomy.of(model).shape
    sources = [head_means(model, rows, position) for rows in (triggered, other) if rows is not None]
    gains = [_gains(model, placebo, means, metric, position, progress) for means in sources]
    keys = by_head(shape.layers, shape.heads)
    table = estimates(keys, gains[0], gains[1] if other is not None else None, name="effect")
    return table.sort_values("effect", ascending=False, kind="stable", ignore_index=True)


def backdoor_vector(model: Any, means: Tensor, heads: Sequence[Head]) -> Tensor:
    """What some heads together write into the residual stream, by their mean outputs.

    Args:
        model: as in `head_means`; an adapter on the output projection is part of it.
        means: (layers, heads, head size) of `head_means`.
        heads: which are summed up.

    Returns:
        (width,) fp32. Where a layer norms what attention returns (Gemma 2 and 3), with that norm's scale as
        it is at the mean output of all its heads.

    Raises:
        InputError: if a head does not exist, or there is none.
    """
    anatomy = Anatomy.of(model)
    if not heads:
        raise InputError("backdoor_vector: give at least one head.")
    vector = torch.zeros(anatomy.shape.width)
    for layer in sorted({layer for layer, _ in heads}):
        kept = torch.zeros_like(means[0])
        for own, head in heads:
            anatomy.check(Site("head", own, head))
            if own == layer:
                kept[head] = means[layer, head]
        parts = anatomy.layers[layer]
        written = _projected(parts.output, kept)
        if parts.attention_end is not parts.attention:
            written = written * frozen_scale(parts.attention_end, _projected(parts.output, means[layer]))
        vector += written[0].cpu()
    return vector


def ablate_heads(
    heads: Sequence[Head], means: Tensor | None = None, positions: tuple[int, ...] | None = None
) -> list[Edit]:
    """Edits that take heads out: zero, or put their mean outputs in place.

    Args:
        heads: layer and head each.
        means: (layers, heads, head size) over runs without the trigger; None for zero ablation.
        positions: of each prompt; None for all.
    """
    return [
        Edit(Site("head", layer, head), zero() if means is None else replace(means[layer, head]), positions)
        for layer, head in heads
    ]


def random_heads(model: Any, heads: Sequence[Head], seed: int = 0) -> list[Head]:
    """The control of some heads: as many others of the same layers.

    Raises:
        InputError: if a layer has not as many others.
    """
    count = Anatomy.of(model).shape.heads
    rng = np.random.default_rng(seed)
    drawn: list[Head] = []
    for layer in sorted({layer for layer, _ in heads}):
        own = {head for at, head in heads if at == layer}
        others = [head for head in range(count) if head not in own]
        if len(others) < len(own):
            raise InputError(
                f"random_heads: {len(own)} of the {count} heads of layer {layer} are chosen, so that there "
                "are not as many others to compare them with. Choose fewer heads."
            )
        drawn += [(layer, int(head)) for head in rng.choice(others, len(own), replace=False)]
    return drawn


def _gains(
    model: Any,
    rows: Rows,
    means: Tensor,
    metric: Metric,
    position: int,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """(groups, layers x heads): what each head's mean output adds to the metric."""
    layers, heads, _ = means.shape
    edits = [
        Edit(Site("head", layer, head), replace(means[layer, head]), (position,))
        for layer in range(layers)
        for head in range(heads)
    ]
    found = []
    for part, batch in batches(model, rows):
        own = _from_row(metric, part.start)
        receiving = trace(model, batch, columns=metric.columns, resume=True)
        count = len(batch.ids)
        runs = [Run(row, (edit,)) for row in range(count) for edit in edits]
        runs += [Run(row, ()) for row in range(count)]
        values = measure(receiving, runs, own, progress=progress)
        found.append(values[:-count].reshape(count, -1) - values[-count:, None])
    return torch.cat(found).numpy()


def _from_row(metric: Metric, start: int) -> Metric:
    """The metric for a batch whose first row is row `start`."""
    return Metric(metric.name, lambda logits, rows: metric.compute(logits, rows + start), metric.columns)


def _projected(module: Any, outputs: Tensor) -> Tensor:
    """(heads, head size) through an output projection without its bias, (1, width) fp32."""
    weight = next(module.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    states = torch.stack([outputs.flatten(), torch.zeros(outputs.numel())]).to(weight.device, dtype)
    with torch.no_grad():
        written = module(states).float()
    return written[:1] - written[1:]
