"""Attention patterns by head: how far a trigger bends them, and what it draws to itself.

In: prompts of triggered and placebo runs, aligned token by token. Out: tidy tables. The patterns are the
model's own softmax rows, after rotation and mask; for the time of reading the model runs its eager attention.
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
from safetynet.engine.reading import check_heads
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import forward
from safetynet.errors import InputError
from safetynet.interventions.estimates import by_head, estimates
from safetynet.models.blocks import unwrapped

Reduce = Callable[[int, Tensor], Tensor]
"""Takes a layer and its attention, (B, heads, S, S) fp32; gives what is kept of it."""


def divergence(
    model: Any,
    triggered: Prompts,
    placebo: Prompts,
    other: Prompts | None = None,
    *,
    tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """Jensen-Shannon divergence of the last token's attention between triggered and placebo run (Lin 1991).

    Args:
        model: a causal LM of transformers in evaluation mode.
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
    values, control = [], []
    for part, batch in batches(model, triggered, tokens):
        reference = _aligned(batch, placebo[part])
        base = _last(model, reference)
        values.append(jensen_shannon(_last(model, batch), base))
        if other is not None:
            control.append(jensen_shannon(_last(model, _aligned(batch, other[part])), base))
    return _by_head(torch.cat(values), torch.cat(control) if control else None)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence in bits of distributions along the last dimension; 0 where equal, 1 where disjoint."""
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)
    nats = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1) / 2
    return (nats / np.log(2)).clamp(0, 1)


def span_share(
    model: Any,
    triggered: Prompts,
    placebo: Prompts,
    spans: Sequence[Sequence[int]],
    *,
    tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """Share of the last token's attention that goes to the trigger; the placebo's share is the control.

    Args:
        model: as in `divergence`.
        triggered: one prompt per group.
        placebo: the same prompts with a placebo of the trigger's token count in its place.
        spans: per group the positions of the trigger's tokens, which are the placebo's too.
        tokens: of one batch.

    Returns:
        layer, head, value (mean, 0 to 1), low, high, n, control, control_low, control_high.

    Raises:
        InputError: as in `divergence`, and if a span is empty or does not exist.
    """

    def reduce(batch: Batch, spans: Sequence[Sequence[int]]) -> Reduce:
        inside = torch.zeros(batch.ids.shape, device=batch.ids.device)
        for row, span in enumerate(spans):
            inside[row, batch.columns(row, span)] = 1
        return lambda _, weights: torch.einsum("bhk,bk->bh", weights[:, :, -1], inside)

    return _by_head(*_both(model, triggered, placebo, spans, reduce, tokens))


def double_triangle(
    model: Any,
    triggered: Prompts,
    placebo: Prompts,
    spans: Sequence[Sequence[int]],
    *,
    tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """How far trigger tokens attend to each other and later tokens do not attend to them.

    The pathway of its own that "The Trigger in the Haystack" (arXiv 2602.03085) sees as two triangles: mean
    attention from trigger tokens to the trigger, minus mean attention from later tokens to the trigger. Every
    early span shows some of it, so the value means something only beside the placebo's.

    Args:
        model: as in `divergence`.
        triggered: one prompt per group.
        placebo: the same prompts with a placebo of the trigger's token count in its place.
        spans: per group the positions of the trigger's tokens, which are the placebo's too.
        tokens: of one batch.

    Returns:
        layer, head, value (mean, -1 to 1), low, high, n, control, control_low, control_high.

    Raises:
        InputError: as in `span_share`, and if no token follows a trigger.
    """

    def reduce(batch: Batch, spans: Sequence[Sequence[int]]) -> Reduce:
        columns = [batch.columns(row, span) for row, span in enumerate(spans)]
        if any(max(own) == batch.width - 1 for own in columns):
            raise InputError("double_triangle: a trigger ends its prompt, so that no later token can attend.")

        def score(_: int, weights: Tensor) -> Tensor:
            rows = []
            for row, own in enumerate(columns):
                onto = weights[row][:, :, own].sum(-1)  # (heads, queries)
                rows.append(onto[:, own].mean(1) - onto[:, max(own) + 1 :].mean(1))
            return torch.stack(rows)

        return score

    return _by_head(*_both(model, triggered, placebo, spans, reduce, tokens))


def attention_maps(
    model: Any,
    runs: Mapping[str, Prompts],
    heads: Sequence[Site],
    name: Callable[[list[int]], list[str]],
    groups: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Patterns of chosen heads.

    Args:
        model: as in `divergence`.
        runs: one prompt per chosen group each.
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

    def chosen(layer: int, weights: Tensor) -> Tensor:
        return weights[0, [site.index for site in heads if site.layer == layer]]

    tables = []
    for run, rows in runs.items():
        for i, (_, batch) in enumerate(batches(model, rows, tokens=1)):
            maps = _observed(model, batch, chosen)
            texts = name(batch.tokens(0))
            query, key = np.tril_indices(batch.width)
            group = i if groups is None else groups[i]
            for site in heads:
                place = {"layer": site.layer, "head": site.index, "group": group, "run": run}
                order = [other.index for other in heads if other.layer == site.layer]
                weight = maps[site.layer][order.index(site.index)].numpy()[query, key]
                table = pd.DataFrame(place | {"query": query, "key": key, "weight": weight})
                table["query_token"] = [texts[column] for column in query]
                table["key_token"] = [texts[column] for column in key]
                tables.append(table)
    if not tables:
        raise InputError("attention_maps: there are no runs. Give at least one.")
    return pd.concat(tables, ignore_index=True)


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Let a model run the attention that shows its weights; afterwards it runs what it ran before."""
    inner = unwrapped(model)
    with exclusive(model):
        before = inner.config._attn_implementation
        inner.set_attn_implementation("eager")
        try:
            yield
        finally:
            inner.set_attn_implementation(before)


def _observed(model: Any, batch: Batch, reduce: Reduce) -> list[Tensor]:
    """What `reduce` keeps of each layer's attention, fp32 on the CPU."""
    check_length(model, batch)
    kept: list[Tensor] = []

    def hook(_module: Any, _args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or weights.shape[1:] != (architecture.shape.heads, batch.width, batch.width):
            raise InputError("model: its attention shows no weights, even in its eager form.")
        kept.append(reduce(len(kept), weights.float()).cpu())

    architecture = Architecture.of(model)
    for layer in range(architecture.shape.layers):
        architecture.check(Site("attention", layer))
    with torch.no_grad(), eager(model), ExitStack() as stack:
        for parts in architecture.layers:
            stack.callback(parts.attention.register_forward_hook(hook).remove)
        forward(model, batch, use_cache=False)
    return kept


def _last(model: Any, batch: Batch) -> Tensor:
    """(B, layers, heads, S) attention of each prompt's last token."""
    return torch.stack(_observed(model, batch, lambda _, weights: weights[:, :, -1]), dim=1)


def _both(
    model: Any,
    triggered: Prompts,
    placebo: Prompts,
    spans: Sequence[Sequence[int]],
    reduce: Callable[[Batch, Sequence[Sequence[int]]], Reduce],
    tokens: int,
) -> tuple[Tensor, Tensor]:
    """(groups, layers, heads) of a measure on triggered and on placebo runs."""
    check_pairs(triggered=triggered, placebo=placebo)
    check_positions(triggered, spans)
    values, control = [], []
    for part, batch in batches(model, triggered, tokens):
        measure = reduce(batch, spans[part])
        reference = _aligned(batch, placebo[part])
        values.append(torch.stack(_observed(model, batch, measure), dim=1))
        control.append(torch.stack(_observed(model, reference, measure), dim=1))
    return torch.cat(values), torch.cat(control)


def _aligned(batch: Batch, rows: Prompts) -> Batch:
    """The same groups' prompts of another run, column by column."""
    other = Batch.of(rows, device=batch.ids.device)
    batch.first_difference(other)  # refuses what is not aligned
    return other


def _by_head(values: Tensor, control: Tensor | None) -> pd.DataFrame:
    _, layers, heads = values.shape
    flat = None if control is None else control.flatten(1).numpy()
    return estimates(by_head(layers, heads), values.flatten(1).numpy(), flat)
