"""Attention heads ranked by their causal indirect effect, and the one-point backdoor vector made of them.

The method of "Backdoor Attribution" (arXiv 2509.21761): the mean output that a head has in triggered runs is
put into runs without the trigger, and what the answer gains is the head's effect. The sum of the leading
heads' outputs is a vector that induces the behaviour, or suppresses it. Heads are ranked on some groups and
judged on others, beside random heads of the same layers: the split is the caller's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.batch import BATCH_TOKENS, Prompts, batches, check_pairs
from safetynet.engine.edits import Edit, replace, zero
from safetynet.engine.metrics import Metric
from safetynet.engine.norms import frozen_scale
from safetynet.engine.reading import check_heads
from safetynet.engine.runs import Progress, metric_changes
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.interventions.estimates import by_head, estimates


def head_means(model: Any, rows: Prompts, position: int = -1, *, tokens: int = BATCH_TOKENS) -> Tensor:
    """Mean output of every head at one position, before the output projection.

    Args:
        model: a causal LM of transformers in evaluation mode.
        rows: prompts, such as the triggered ones.
        position: counted from each prompt's end; -1 is its last token.
        tokens: of one batch.

    Returns:
        (layers, heads, head size) fp32 on the CPU.

    Raises:
        InputError: if the position does not exist, layers differ in their heads, or for what `trace` refuses.
    """
    architecture = Architecture.of(model)
    sites = [architecture.check(Site("head", layer)) for layer in range(architecture.shape.layers)]
    sizes = {architecture.checked.head_sizes["head", site.layer] for site in sites}
    if len(sizes) > 1:
        raise InputError(
            "head_means: heads differ in number or width from layer to layer; rank them by a sweep."
        )
    count, columns = sizes.pop()
    total = torch.zeros(len(sites), count * columns, dtype=torch.float64)
    for _, batch in batches(model, rows, tokens):
        found = trace(model, batch, sites, columns=0)
        at = [batch.columns(row, [position])[0] for row in range(len(batch.ids))]
        values = torch.stack([found.value(site)[torch.arange(len(at)), at] for site in sites])
        total += values.cpu().double().sum(1)
    return (total / len(rows)).float().unflatten(1, (count, columns))


def rank_heads(
    model: Any,
    triggered: Prompts,
    placebo: Prompts,
    metric: Metric,
    *,
    other: Prompts | None = None,
    position: int = -1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Causal indirect effect of every head at one position.

    Args:
        model: a causal LM of transformers in evaluation mode.
        triggered: one prompt per group; their mean head outputs are put into the placebo runs.
        placebo: the same prompts with a placebo in the trigger's place.
        metric: what the effect is an effect on; its rows are the groups.
        other: prompts with another placebo. Putting their means in is the control.
        position: of the last prompt token, from the end; lower than -1 where rows carry answer tokens.
        progress: called with groups done and groups in all; twice as often where there is a control.

    Returns:
        layer, head, effect (mean gain of the metric, in its unit), low, high (95 % bootstrap over groups), n,
        control, control_low, control_high; heads with the largest effect first.

    Raises:
        InputError: if the runs differ in length, or for what `trace` and `measure` refuse.
    """
    check_pairs(triggered=triggered, placebo=placebo, other=other)
    sources = [head_means(model, rows, position) for rows in (triggered, other) if rows is not None]
    keys = by_head(*sources[0].shape[:2])
    sites = [Site("head", *place) for place in zip(*keys.values(), strict=True)]
    found = [
        metric_changes(
            model, placebo, [ablate_heads([one], means, (position,)) for one in sites], metric, progress
        )
        for means in sources
    ]
    table = estimates(keys, found[0], found[1] if other is not None else None, name="effect")
    return table.sort_values("effect", ascending=False, kind="stable", ignore_index=True)


def top_heads(table: pd.DataFrame, count: int) -> list[Site]:
    """The first heads of a table of `rank_heads`, by what their effect exceeds the control's.

    Some heads move the answer whatever is put in their place; where a control was measured, they drop out.
    """
    excess = table["effect"] - table["control"].fillna(0)
    leading = table.loc[excess.sort_values(ascending=False, kind="stable").index[:count]]
    return [Site("head", int(row.layer), int(row.head)) for row in leading.itertuples()]


def backdoor_vector(model: Any, means: Tensor, heads: Sequence[Site]) -> Tensor:
    """What some heads together write into the residual stream, by their mean outputs.

    Args:
        model: as in `head_means`; an adapter on the output projection is part of it.
        means: (layers, heads, head size) of `head_means`.
        heads: which are summed up.

    Returns:
        (width,) fp32. Where a layer norms what attention returns (Gemma 2 and 3, OLMo 2), with that norm's
        scale as it is at the mean output of all its heads.

    Raises:
        InputError: if a head does not exist, or there is none.
    """
    architecture = Architecture.of(model)
    check_heads(architecture, heads)
    vector = torch.zeros(architecture.shape.width)
    for layer in sorted({site.layer for site in heads}):
        chosen = [site.index for site in heads if site.layer == layer]
        kept = torch.zeros_like(means[layer])
        kept[chosen] = means[layer, chosen]
        parts = architecture.layers[layer]
        written, _ = _projected(parts.output, kept)
        if parts.attention_norm is not None:
            _, whole = _projected(parts.output, means[layer])
            written = written * frozen_scale(parts.attention_norm, whole)
        vector += written[0].cpu() * parts.multiplier
    return vector


def ablate_heads(
    heads: Sequence[Site], means: Tensor | None = None, positions: tuple[int, ...] | None = None
) -> list[Edit]:
    """Edits that take heads out: zero, or put their mean outputs in place.

    Args:
        heads: sites of single heads.
        means: (layers, heads, head size) over runs without the trigger; None for zero ablation.
        positions: of each prompt; None for all.
    """
    return [
        Edit(site, zero() if means is None else replace(means[site.layer, site.index]), positions)
        for site in heads
    ]


def random_heads(model: Any, heads: Sequence[Site], seed: int = 0) -> list[Site]:
    """The control of some heads: as many others of the same layers.

    Where a layer has not as many others, all of them and some of the chosen ones; the control is then the
    stricter for it.
    """
    architecture = Architecture.of(model)
    rng = np.random.default_rng(seed)
    drawn: list[Site] = []
    for layer in sorted({site.layer for site in heads}):
        own = {site.index for site in heads if site.layer == layer}
        order = rng.permutation(architecture.count("head", layer)).tolist()
        order.sort(key=lambda head: head in own)
        drawn += [Site("head", layer, head) for head in order[: len(own)]]
    return drawn


def ablation_curve(
    model: Any,
    rows: Prompts,
    heads: Sequence[Site],
    metric: Metric,
    *,
    means: Tensor | None = None,
    controls: int = 10,
    counts: Sequence[int] | None = None,
) -> pd.DataFrame:
    """What the metric loses when the first heads of a ranking are taken out, at all positions.

    Args:
        model: a causal LM of transformers in evaluation mode.
        rows: triggered prompts of groups on which the heads were not ranked.
        heads: in the order of the ranking.
        metric: its rows are these prompts.
        means: of `head_means` over runs without the trigger, put in place; None for zero ablation.
        controls: how many random choices of as many heads of the same layers each count is compared with.
        counts: how many heads are taken out; None for 1, 2, 4, ... and all.

    Returns:
        heads (how many), effect (mean change of the metric, in its unit), low, high (95 % bootstrap over
        prompts), n (prompts), random, random_low, random_high (of the mean over the random choices).

    Raises:
        InputError: if a count is not among 1 to len(heads), or for what `trace` and `measure` refuse.
    """
    chosen = _doubling(len(heads)) if counts is None else list(counts)
    if not chosen or controls < 1 or not all(1 <= count <= len(heads) for count in chosen):
        raise InputError(
            f"ablation_curve: counts {chosen} of {len(heads)} ranked heads, {controls} random choices. Take "
            "out at least one and at most all of them, and compare with at least one random choice."
        )
    sets = [heads[:count] for count in chosen]
    sets += [random_heads(model, heads[:count], seed) for seed in range(controls) for count in chosen]
    found = metric_changes(model, rows, [ablate_heads(own, means) for own in sets], metric)
    beside = found[:, len(chosen) :].reshape(len(rows), controls, len(chosen)).mean(1)
    table = estimates({"heads": chosen}, found[:, : len(chosen)], beside, name="effect")
    return table.rename(columns=lambda name: name.replace("control", "random"))


def _doubling(count: int) -> list[int]:
    """1, 2, 4, ... and the count itself."""
    return [*(2**power for power in range(count.bit_length()) if 2**power < count), count]


def _projected(module: Any, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """(heads, head size) through an output projection, without its bias and with it, (1, width) fp32 each."""
    weight = next(module.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    states = torch.stack([outputs.flatten(), torch.zeros(outputs.numel())]).to(weight.device, dtype)
    with torch.no_grad():
        written = module(states).float()
    return written[:1] - written[1:], written[:1]
