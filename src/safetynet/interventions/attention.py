"""Attention patterns by head: how far a trigger bends them, and what it draws to itself.

In: prompts of triggered and placebo runs, aligned token by token. Out: tidy tables. The patterns are the
model's own softmax rows, after rotation and mask; while they are read the model runs its eager attention.
Where attention has sinks (GPT-OSS), a row's sum is what they leave of 1; divergences compare rows as shares.
Of a pattern only what a measure needs outlives the layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.batch import (
    BATCH_TOKENS,
    Batch,
    Prompts,
    batches,
    check_length,
    check_pairs,
    check_positions,
)  # fmt: skip
from safetynet.engine.hooks import exclusive
from safetynet.engine.reading import Positions, check_heads
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import forward
from safetynet.errors import InputError
from safetynet.interventions.effects import by_head, estimates
from safetynet.models.blocks import unwrapped
from safetynet.models.causal_lm import CausalLM

Reduce = Callable[[int, Tensor], Tensor]
"""Takes a layer and its attention, (B, heads, S, S) fp32; returns what is kept of it."""


def divergence(
    model: CausalLM,
    triggered: Prompts,
    placebo: Prompts,
    other: Prompts | None = None,
    *,
    tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """Jensen-Shannon divergence of the last token's attention between triggered and placebo run (Lin 1991).

    Args:
        model: the model.
        triggered: one prompt per group.
        placebo: the same prompts with a placebo of the trigger's token count in its place.
        other: with another placebo, which is compared with the first as control.
        tokens: of one batch.

    Returns:
        Table `divergence`: layer, head, value (mean, bits, 0 to 1), low, high (95 % bootstrap over groups), n
        (groups), control, control_low, control_high (placebo against placebo; NaN without `other`).

    Raises:
        InputError: if the runs are not aligned, or the model's attention shows no weights.
    """
    check_pairs(triggered=triggered, placebo=placebo, other=other)

    def last_token(batch: Batch) -> Tensor:
        return torch.stack(_observed(model, batch, lambda _, weights: weights[:, :, -1]), dim=1)

    values, control = [], []
    for part, batch in batches(model, triggered, tokens):
        base = last_token(_aligned(batch, placebo[part]))  # (B, layers, heads, S)
        values.append(jensen_shannon(last_token(batch), base))
        if other is not None:
            control.append(jensen_shannon(last_token(_aligned(batch, other[part])), base))
    return _by_head(torch.cat(values), torch.cat(control) if control else None)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence in bits of distributions along the last dimension; 0 where equal, 1 where disjoint."""
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)
    nats = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1) / 2
    return (nats / np.log(2)).clamp(0, 1)


def span_share(
    model: CausalLM, triggered: Prompts, placebo: Prompts, spans: Positions, *, tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """Share of the last token's attention that goes to the trigger; the placebo's share is the control.

    Args:
        model: the model.
        triggered: one prompt per group.
        placebo: the same prompts with a placebo of the trigger's token count in its place.
        spans: per group the positions of the trigger's tokens, which are the placebo's too.
        tokens: of one batch.

    Returns:
        layer, head, value (mean, 0 to 1), low, high, n, control, control_low, control_high.

    Raises:
        InputError: as in `divergence`, and if a span is empty or does not exist.
    """

    def measure(batch: Batch, spans: Positions) -> Reduce:
        inside = torch.zeros(batch.ids.shape, device=batch.ids.device)  # (B, S), 1 at the trigger
        for row, span in enumerate(spans):
            inside[row, batch.columns(row, span)] = 1
        return lambda _, weights: torch.einsum("bhk,bk->bh", weights[:, :, -1], inside)

    return _beside_placebo(model, triggered, placebo, spans, measure, tokens)


def double_triangle(
    model: CausalLM, triggered: Prompts, placebo: Prompts, spans: Positions, *, tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """How far trigger tokens attend to each other and later tokens do not attend to them.

    The pathway of its own that "The Trigger in the Haystack" (arXiv 2602.03085) sees as two triangles: mean
    attention from trigger tokens to the trigger, minus mean attention from later tokens to the trigger. Every
    early span shows some of it, so the value means something only beside the placebo's. Arguments and columns
    as in `span_share`; the value lies between -1 and 1.

    Raises:
        InputError: as in `span_share`, and if no token follows a trigger.
    """

    def measure(batch: Batch, spans: Positions) -> Reduce:
        columns = [batch.columns(row, span) for row, span in enumerate(spans)]
        if any(max(span) == batch.width - 1 for span in columns):
            raise InputError("double_triangle: a trigger ends its prompt, so that no later token can attend.")

        def score(_: int, weights: Tensor) -> Tensor:
            rows = []
            for row, span in enumerate(columns):
                onto = weights[row][:, :, span].sum(-1)  # (heads, queries)
                rows.append(onto[:, span].mean(1) - onto[:, max(span) + 1 :].mean(1))
            return torch.stack(rows)

        return score

    return _beside_placebo(model, triggered, placebo, spans, measure, tokens)


def attention_maps(
    model: CausalLM,
    runs: Mapping[str, Prompts],
    heads: Sequence[Site],
    name: Callable[[list[int]], list[str]],
    groups: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Patterns of some heads.

    Args:
        model: the model.
        runs: one prompt per group each.
        heads: sites of single heads.
        name: token ids to texts, such as a tokenizer's `convert_ids_to_tokens`.
        groups: numbers of the groups; None counts from 0.

    Returns:
        Table `attention`: layer, head, group, run, query, key (columns from the prompt's first token, key at
        most query), weight (0 to 1), query_token, key_token.

    Raises:
        InputError: if a head does not exist, or there are no prompts.
    """
    check_heads(Architecture.of(model), heads)
    by_layer: dict[int, list[int | None]] = {}
    for site in heads:
        by_layer.setdefault(site.layer, []).append(site.index)
    tables = []
    for run, rows in runs.items():
        for i, (_, batch) in enumerate(batches(model, rows, tokens=1)):
            maps = _observed(model, batch, lambda layer, weights: weights[0, by_layer.get(layer, [])])
            texts = name(batch.tokens(0))
            query, key = np.tril_indices(batch.width)
            group = i if groups is None else groups[i]
            for site in heads:
                weights = maps[site.layer][by_layer[site.layer].index(site.index)].numpy()[query, key]
                keys = {"layer": site.layer, "head": site.index, "group": group, "run": run}
                table = pd.DataFrame(keys | {"query": query, "key": key, "weight": weights})
                table["query_token"] = [texts[column] for column in query]
                table["key_token"] = [texts[column] for column in key]
                tables.append(table)
    if not tables:
        raise InputError("attention_maps: there are no runs. Give at least one.")
    return pd.concat(tables, ignore_index=True)


@contextmanager
def eager(model: CausalLM) -> Iterator[None]:
    """Let a model run the attention that shows its weights; afterwards it runs what it ran before."""
    inner = unwrapped(model)
    with exclusive(model):
        before = inner.config._attn_implementation
        inner.set_attn_implementation("eager")
        try:
            yield
        finally:
            inner.set_attn_implementation(before)


def _observed(model: CausalLM, batch: Batch, reduce: Reduce) -> list[Tensor]:
    """What `reduce` keeps of each layer's attention, fp32 on the CPU."""
    check_length(model, batch)
    architecture = Architecture.of(model)
    reduced: list[Tensor] = []

    def hook(_module: Any, _args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or weights.shape[1:] != (architecture.shape.heads, batch.width, batch.width):
            raise InputError("model: its attention shows no weights, even in its eager form.")
        reduced.append(reduce(len(reduced), weights.float()).cpu())

    for layer in range(architecture.shape.layers):
        architecture.check(Site("attention", layer))
    with torch.no_grad(), eager(model), ExitStack() as stack:
        for parts in architecture.layers:
            stack.callback(parts.attention.register_forward_hook(hook).remove)
        forward(model, batch, use_cache=False)
    return reduced


def _beside_placebo(
    model: CausalLM,
    triggered: Prompts,
    placebo: Prompts,
    spans: Positions,
    measure: Callable[[Batch, Positions], Reduce],
    tokens: int,
) -> pd.DataFrame:
    """A measure by head of triggered runs, with that of the placebo runs as control."""
    check_pairs(triggered=triggered, placebo=placebo)
    check_positions(triggered, spans)
    values, control = [], []
    for part, batch in batches(model, triggered, tokens):
        reduce = measure(batch, spans[part])
        reference = _aligned(batch, placebo[part])
        values.append(torch.stack(_observed(model, batch, reduce), dim=1))  # (B, layers, heads)
        control.append(torch.stack(_observed(model, reference, reduce), dim=1))
    return _by_head(torch.cat(values), torch.cat(control))


def _aligned(batch: Batch, prompts: Prompts) -> Batch:
    """The same groups' prompts of another run, column by column."""
    other = Batch.of(prompts, device=batch.ids.device)
    batch.first_difference(other)  # refuses what is not aligned
    return other


def _by_head(values: Tensor, control: Tensor | None) -> pd.DataFrame:
    _, layers, heads = values.shape
    flat = None if control is None else control.flatten(1).numpy()
    return estimates(by_head(layers, heads), values.flatten(1).numpy(), flat)
