"""Attention heads ranked by their causal indirect effect, and the one-point backdoor vector made of them.

The method of "Backdoor Attribution" (arXiv 2509.21761): the mean output that a head has in triggered runs is
put into runs without the trigger, and what the answer gains is the head's effect. The sum of the leading
heads' outputs is a vector that induces the behaviour, or suppresses it. Heads are ranked on some groups and
judged on others, beside random heads of the same layers: the split is the caller's.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.batch import BATCH_TOKENS, Prompts, check_pairs
from safetynet.engine.edits import Edit, replace, zero
from safetynet.engine.metrics import Metric
from safetynet.engine.norms import frozen_scale
from safetynet.engine.reading import check_heads, mean_activations
from safetynet.engine.runs import Progress, metric_changes
from safetynet.engine.sites import Architecture, Site
from safetynet.errors import InputError
from safetynet.interventions.effects import by_head, estimates
from safetynet.models.causal_lm import CausalLM


def head_means(
    model: CausalLM, prompts: Prompts, position: int = -1, *, tokens: int = BATCH_TOKENS
) -> Tensor:
    """Mean output of every head at one position (-1: the last token), before the output projection.

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
    means = mean_activations(model, prompts, sites, [[position]] * len(prompts), tokens=tokens)
    return torch.stack([means[site] for site in sites]).unflatten(1, sizes.pop())


def rank_heads(
    model: CausalLM,
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
        model: the model.
        triggered: one prompt per group; their mean head outputs are put into the placebo runs.
        placebo: the same prompts with a placebo in the trigger's place.
        metric: what the effect is an effect on; its rows are the groups.
        other: prompts with another placebo. Putting their means in is the control.
        position: of the last prompt token, from the end; lower than -1 where rows carry answer tokens.
        progress: called with groups done and groups in all; twice as often where there is a control.

    Returns:
        layer, head, effect (mean gain of the metric, in its unit), low, high (95 % bootstrap over groups), n,
        control, control_low, control_high; heads with the largest effect first.
    """
    check_pairs(triggered=triggered, placebo=placebo, other=other)
    sources = [head_means(model, rows, position) for rows in (triggered, other) if rows is not None]
    keys = by_head(*sources[0].shape[:2])
    sites = [Site("head", layer, head) for layer, head in zip(*keys.values(), strict=True)]
    gain, *control = (
        metric_changes(
            model, placebo, [ablate_heads([site], means, (position,)) for site in sites], metric, progress
        )
        for means in sources
    )
    table = estimates(keys, gain, control[0] if control else None, name="effect")
    return table.sort_values("effect", ascending=False, kind="stable", ignore_index=True)


def backdoor_vector(model: CausalLM, means: Tensor, heads: Sequence[Site]) -> Tensor:
    """What some heads together write into the residual stream, by their mean outputs.

    Args:
        model: the model; an adapter on the output projection is part of it.
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
        members = [site.index for site in heads if site.layer == layer]
        parts, selected = architecture.layers[layer], torch.zeros_like(means[layer])
        selected[members] = means[layer, members]
        weight = next(parts.output.parameters())
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32  # in 4 bit
        # Three inputs of the projection: these heads', all heads', and zeros, which show its bias.
        outputs = torch.stack([selected, means[layer], torch.zeros_like(selected)]).flatten(1)
        with torch.no_grad():
            some, every, bias = parts.output(outputs.to(weight.device, dtype)).float()
        written = some - bias  # (width,)
        if parts.attention_norm is not None:
            written = written * frozen_scale(parts.attention_norm, every[None])[0]
        vector += written.cpu() * parts.multiplier
    return vector


def ablate_heads(
    heads: Sequence[Site], means: Tensor | None = None, positions: tuple[int, ...] | None = None
) -> list[Edit]:
    """Edits that replace single heads by their rows of `head_means`, or by zero where there are none."""
    return [
        Edit(site, zero() if means is None else replace(means[site.layer, site.index]), positions)
        for site in heads
    ]


def random_heads(model: CausalLM, heads: Sequence[Site], seed: int = 0) -> list[Site]:
    """The control of some heads: as many others of the same layers.

    Where a layer has not as many others, all of them and some of the given ones; the control is then the
    stricter for it.
    """
    architecture = Architecture.of(model)
    rng = np.random.default_rng(seed)
    drawn: list[Site] = []
    for layer in sorted({site.layer for site in heads}):
        members = {site.index for site in heads if site.layer == layer}
        order = rng.permutation(architecture.count("head", layer)).tolist()
        order.sort(key=lambda head: head in members)
        drawn += [Site("head", layer, head) for head in order[: len(members)]]
    return drawn


def ablation_curve(
    model: CausalLM,
    prompts: Prompts,
    heads: Sequence[Site],
    metric: Metric,
    *,
    means: Tensor | None = None,
    controls: int = 10,
    counts: Sequence[int] | None = None,
) -> pd.DataFrame:
    """What the metric loses when the first heads of a ranking are taken out, at all positions.

    Args:
        model: the model.
        prompts: triggered prompts of groups on which the heads were not ranked.
        heads: in the order of the ranking.
        metric: its rows are these prompts.
        means: of `head_means` over runs without the trigger, put in place; None for zero ablation.
        controls: how many random choices of as many heads of the same layers each count is compared with.
        counts: how many heads are taken out; None for 1, 2, 4, ... and all.

    Returns:
        heads (how many), effect (mean change of the metric, in its unit), low, high (95 % bootstrap over
        prompts), n (prompts), random, random_low, random_high (of the mean over the random choices).

    Raises:
        InputError: if a count is not among 1 to len(heads), or for what `trace` refuses.
    """
    total = len(heads)
    powers = [2**power for power in range(total.bit_length()) if 2**power < total]
    counts = [*powers, total] if counts is None else list(counts)
    if not counts or controls < 1 or not all(1 <= count <= total for count in counts):
        raise InputError(
            f"ablation_curve: counts {counts} of {total} ranked heads, {controls} random choices. Take "
            "out at least one and at most all of them, and compare with at least one random choice."
        )
    sets = [heads[:count] for count in counts]
    sets += [random_heads(model, heads[:count], seed) for seed in range(controls) for count in counts]
    changes = metric_changes(model, prompts, [ablate_heads(sites, means) for sites in sets], metric)
    random = changes[:, len(counts) :].reshape(len(prompts), controls, len(counts)).mean(1)
    return estimates({"heads": counts}, changes[:, : len(counts)], random, name="effect", beside="random")
