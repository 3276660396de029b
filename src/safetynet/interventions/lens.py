"""What each layer would answer, and how much of the answer each layer writes.

In: prompts of triggered and placebo runs, the token that the behaviour answers with. Out: tidy tables. States
are read through the model's own final norm and head, capping included. A lens is a reading, not a cause:
what it shows is believed when an intervention at the same place agrees.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.batch import BATCH_TOKENS, Batch, Prompts, batches
from safetynet.engine.norms import contrasts, final_norm, frozen_scale, logit_scale
from safetynet.engine.sites import Site
from safetynet.engine.trace import Trace, logits_of, trace
from safetynet.errors import InputError
from safetynet.interventions.estimates import means
from safetynet.models.blocks import decoder_layers

Runs = Mapping[str, Prompts]
"""Prompts by run, such as `triggered` and its control, `placebo`."""


def lens(model: Any, runs: Runs, targets: Sequence[int], *, tokens: int = BATCH_TOKENS) -> pd.DataFrame:
    """Log probability of the target after each layer, at the last token (logit lens, nostalgebraist 2020).

    Args:
        model: a causal LM of transformers in evaluation mode.
        runs: N prompts each, of the same N groups; the placebo run is the triggered run's control.
        targets: per group the behaviour's first token.
        tokens: of one batch.

    Returns:
        Table `lens`: run, layer (-1 for the embedding), value (mean, nats), low, high (95 % bootstrap over
        groups), n. The last layer's value is the model's own.

    Raises:
        InputError: if a run has not one prompt per target, or for what `trace` refuses.
    """
    tables = []
    for name, rows in runs.items():
        _check(name, rows, targets)
        values = []
        for part, batch in batches(model, rows, tokens):
            found = trace(model, batch, columns=0)
            states = _depths(found)[:, :, -1:]
            wanted = torch.tensor(targets[part]).repeat(len(states))
            values.append(_log_probabilities(found, states.flatten(0, 1), wanted).reshape(len(states), -1).T)
        table = _by_run(name, np.concatenate(values), {"layer": list(range(-1, values[0].shape[1] - 1))})
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def lens_map(
    model: Any,
    runs: Mapping[str, Sequence[int]],
    target: int,
    name: Callable[[list[int]], list[str]],
    roles: Sequence[str],
    group: int = 0,
) -> pd.DataFrame:
    """The logit lens at every token of one group.

    Args:
        model: as in `lens`.
        runs: one prompt of S tokens each.
        target: the token whose probability is followed.
        name: token ids to texts, such as a tokenizer's `convert_ids_to_tokens`.
        roles: what each of the S columns is: system, before, trigger, after, template, last.
        group: number of the group.

    Returns:
        Table `lens_map`: group, run, layer (-1 the embedding), column, token, role, top (the likeliest next
        token), probability (of the target as next token, 0 to 1).

    Raises:
        InputError: if a prompt has not one token per role, or for what `trace` refuses.
    """
    tables = []
    for run, ids in runs.items():
        if len(ids) != len(roles):
            raise InputError(f"lens_map: run {run} has {len(ids)} tokens, but there are {len(roles)} roles.")
        found = trace(model, Batch.of([ids], device=next(model.parameters()).device), columns=0)
        states = _depths(found)[:, 0]
        tops, chances = [], []
        with torch.no_grad():
            for _, logits in logits_of(found, states):
                tops += logits.argmax(-1).flatten().tolist()
                chances += logits.softmax(-1)[..., target].flatten().tolist()
        depth, width = states.shape[:2]
        table = pd.DataFrame({"group": group, "run": run, "layer": np.repeat(range(-1, depth - 1), width)})
        table["column"] = list(range(width)) * depth
        table["token"], table["role"] = name(list(ids)) * depth, list(roles) * depth
        tables.append(table.assign(top=name(tops), probability=chances))
    return pd.concat(tables, ignore_index=True)


def logit_attribution(
    model: Any, runs: Runs, targets: Sequence[int], others: Sequence[int], *, tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """How much each layer's attention and MLP write for the target against another token, at the last token.

    Direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"): the
    final norm's scale is taken as it is at the last state, so that the parts add up to the logit difference
    before any capping, what the model multiplies its logits with included. What a part does through later
    layers is not in it.

    Args:
        model: as in `lens`, with an RMS norm at the end.
        runs: N prompts each, of the same N groups; the placebo run is the control.
        targets: per group the behaviour's first token.
        others: per group the token that it is compared with.
        tokens: of one batch.

    Returns:
        run, component (embedding, attn_out, mlp_out, rest, total), layer (-1 where none), value (mean,
        logits), low, high (95 % bootstrap over groups), n. `total` is the logit difference itself, `rest`
        what the parts leave of it: rounding, or something else that the model adds.

    Raises:
        InputError: as in `lens`, for a model whose final norm subtracts a mean or whose logits are no
            multiple of what its head gives, and where attention or MLPs are no sites of every layer.
    """
    tables = []
    for name, rows in runs.items():
        _check(name, rows, targets)
        _check(name, rows, others)
        values = []
        for part, batch in batches(model, rows, tokens):
            values.append(_written(model, batch, targets[part], others[part]))
        layers = (values[0].shape[1] - 3) // 2
        keys = {
            "component": ["embedding", *["attn_out", "mlp_out"] * layers, "rest", "total"],
            "layer": [-1, *np.repeat(range(layers), 2).tolist(), -1, -1],
        }
        tables.append(_by_run(name, np.concatenate(values), keys))
    return pd.concat(tables, ignore_index=True)


def _written(model: Any, batch: Batch, targets: Sequence[int], others: Sequence[int]) -> np.ndarray:
    """(B, parts): logits that the embedding, each attention and MLP, the rest and all together write."""
    depth = range(len(decoder_layers(model)))
    sites = [Site(component, layer) for layer in depth for component in ("attn_out", "mlp_out")]
    found = trace(model, batch, sites)
    parts = torch.stack([found.inputs[0][:, -1], *(found.value(site)[:, -1] for site in sites)], 1).float()
    assert found.output is not None
    assert found.logits is not None
    norm, whole = final_norm(model), found.output[:, -1]
    with torch.no_grad():
        normed = norm(whole)
    contrast = contrasts(model, normed, targets, others) * logit_scale(model, normed, found.logits[:, -1])
    reader = frozen_scale(norm, whole) * contrast
    each = torch.einsum("bpd,bd->bp", parts, reader)
    total = (whole.float() * reader).sum(-1, keepdim=True)
    return torch.cat([each, total - each.sum(1, keepdim=True), total], 1).cpu().numpy()


def _depths(found: Trace) -> Tensor:
    """(layers + 1, B, S, width): the embedding, and what each layer left."""
    layers = range(found.architecture.shape.layers)
    return torch.stack([found.inputs[0], *(found.value(Site("resid_post", layer)) for layer in layers)])


def _log_probabilities(found: Trace, states: Tensor, wanted: Tensor) -> np.ndarray:
    """(R, 1, width) and (R,) tokens to (R,) nats."""
    values = np.empty(len(states))
    with torch.no_grad():
        for part, logits in logits_of(found, states):
            chosen = wanted[part].to(logits.device)[:, None]
            values[part] = logits[:, -1].log_softmax(-1).gather(1, chosen)[:, 0].cpu()
    return values


def _by_run(name: str, values: np.ndarray, keys: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    value, low, high = means(values)
    return pd.DataFrame({"run": name, **keys, "value": value, "low": low, "high": high, "n": len(values)})


def _check(name: str, rows: Prompts, targets: Sequence[int]) -> None:
    if len(rows) != len(targets) or not len(rows):
        raise InputError(f"run {name}: {len(rows)} prompts, but {len(targets)} target tokens; give one each.")
