"""What each layer would answer, and how much of the answer each layer writes.

In: prompts of triggered and placebo runs, the token that the behaviour answers with. Out: tidy tables. States
are read through the model's own final norm and head, capping included. A lens is a reading, not a cause:
believe it if an intervention at the same site agrees.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from safetynet.interventions.effects import means
from safetynet.models.blocks import decoder_layers
from safetynet.models.causal_lm import CausalLM

Runs = Mapping[str, Prompts]
"""Prompts by run, such as `triggered` and its control, `placebo`."""


def lens(model: CausalLM, runs: Runs, targets: Sequence[int], *, tokens: int = BATCH_TOKENS) -> pd.DataFrame:
    """Log probability of the target after each layer, at the last token (logit lens, nostalgebraist 2020).

    Args:
        model: the model.
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
    for run, part, batch in _batches(model, runs, targets, tokens):
        recorded = trace(model, batch, columns=0)
        states = _depths(recorded)[:, :, -1:]  # (layers + 1, B, 1, width)
        depth = len(states)
        answers = torch.tensor(targets[part]).repeat(depth)
        values = np.empty(len(answers))
        with torch.no_grad():
            for rows, logits in logits_of(recorded, states.flatten(0, 1)):
                token = answers[rows].to(logits.device)[:, None]
                values[rows] = logits[:, -1].log_softmax(-1).gather(1, token)[:, 0].cpu()
        tables.append((run, values.reshape(depth, -1).T))
    layers = list(range(-1, tables[0][1].shape[1] - 1))
    return _by_run(tables, {"layer": layers})


def lens_map(
    model: CausalLM,
    runs: Mapping[str, Sequence[int]],
    target: int,
    name: Callable[[list[int]], list[str]],
    roles: Sequence[str],
    group: int = 0,
) -> pd.DataFrame:
    """The logit lens at every token of one group.

    Args:
        model: the model.
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
        recorded = trace(model, Batch.of([ids], device=next(model.parameters()).device), columns=0)
        states = _depths(recorded)[:, 0]  # (layers + 1, S, width)
        tops, chances = [], []
        with torch.no_grad():
            for _, logits in logits_of(recorded, states):
                tops += logits.argmax(-1).flatten().tolist()
                chances += logits.softmax(-1)[..., target].flatten().tolist()
        depth, width = states.shape[:2]
        table = pd.DataFrame({"group": group, "run": run, "layer": np.repeat(range(-1, depth - 1), width)})
        table["column"] = list(range(width)) * depth
        table["token"], table["role"] = name(list(ids)) * depth, list(roles) * depth
        tables.append(table.assign(top=name(tops), probability=chances))
    return pd.concat(tables, ignore_index=True)


def logit_attribution(
    model: CausalLM, runs: Runs, targets: Sequence[int], others: Sequence[int], *, tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """How much each layer's attention and MLP write for the target against another token, at the last token.

    Direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"): the
    final norm's scale is taken as it is at the last state, so that the parts add up to the logit difference
    before any capping, what the model multiplies its logits with included. What a part does through later
    layers is not in it.

    Args:
        model: the model, with an RMS norm at the end.
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
    layers = range(len(decoder_layers(model)))
    sites = [Site(component, layer) for layer in layers for component in ("attn_out", "mlp_out")]
    tables = []
    for run, part, batch in _batches(model, runs, targets, tokens, others):
        recorded = trace(model, batch, sites)
        last = [recorded.inputs[0][:, -1], *(recorded.value(site)[:, -1] for site in sites)]
        parts = torch.stack(last, 1).float()  # (B, 1 + 2 * layers, width)
        assert recorded.output is not None
        assert recorded.logits is not None
        norm, whole = final_norm(model), recorded.output[:, -1]
        with torch.no_grad():
            normed = norm(whole)
        contrast = contrasts(model, normed, targets[part], others[part])
        # (B, width): what a state before the norm is multiplied with for the difference of the two logits.
        reader = frozen_scale(norm, whole) * (contrast * logit_scale(model, normed, recorded.logits[:, -1]))
        written = torch.einsum("bpd,bd->bp", parts, reader)
        total = (whole.float() * reader).sum(-1, keepdim=True)
        rest = total - written.sum(1, keepdim=True)
        tables.append((run, torch.cat([written, rest, total], 1).cpu().numpy()))
    components = ["embedding", *(site.component for site in sites), "rest", "total"]
    return _by_run(tables, {"component": components, "layer": [-1, *(site.layer for site in sites), -1, -1]})


def _batches(
    model: CausalLM, runs: Runs, targets: Sequence[int], tokens: int, others: Sequence[int] | None = None
) -> Iterator[tuple[str, slice, Batch]]:
    """Every run's prompts, batch by batch, if each prompt has its tokens."""
    for run, prompts in runs.items():
        for answers in (targets, targets if others is None else others):
            if len(prompts) != len(answers) or not len(prompts):
                raise InputError(
                    f"run {run}: {len(prompts)} prompts, but {len(answers)} target tokens; give one each."
                )
        for part, batch in batches(model, prompts, tokens):
            yield run, part, batch


def _depths(recorded: Trace) -> Tensor:
    """(layers + 1, B, S, width): the embedding, and what each layer left."""
    layers = range(recorded.architecture.shape.layers)
    return torch.stack([recorded.inputs[0], *(recorded.value(Site("resid_post", i)) for i in layers)])


def _by_run(parts: Sequence[tuple[str, np.ndarray]], keys: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Run by run the mean over groups of values, (groups, K), that came in parts."""
    tables = []
    for run in dict.fromkeys(run for run, _ in parts):
        values = np.concatenate([values for name, values in parts if name == run])
        mean, low, high = means(values)
        columns = {"run": run, **keys, "value": mean, "low": low, "high": high, "n": len(values)}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)
