"""Attribution patching: every site's effect at once, from one forward and one backward pass over both runs.

In: pairs. Out: for each component, layer and position of each pair a signed estimate and a score to rank
by, and sweeps that measure only the most promising spots exactly (Nanda 2023; Kramar et al. 2024, AtP*).

A gradient sees nothing of what a saturated attention does under a large change. What a state does through
its own layer's queries and keys is therefore recomputed through the softmax, as AtP* does. Where the whole
way to the answer is saturated, as it is under a working backdoor, that is not enough; the score is the
length of the states' difference times the length of the gradient at both ends, which no cancellation can
hide (docs/interventions.md).
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from safetynet.engine.batch import Batch, check_length
from safetynet.engine.hooks import exclusive
from safetynet.engine.metrics import Metric
from safetynet.engine.sitecheck import alike
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import Trace, check_supported, forward, recording
from safetynet.errors import InputError
from safetynet.interventions.pairs import Pairs
from safetynet.interventions.sweep import Measured, Spot, positions, sweep
from safetynet.models.blocks import received, receiving, unwrapped

WATCHED = "safetynet-watched"
_WATCHABLE: "weakref.WeakSet[Any]" = weakref.WeakSet()
ESTIMATED = ("resid_pre", "resid_mid", "attn_out", "mlp_out")
SHARE = 0.05
"""Of all spots, those that are measured exactly."""


@dataclass
class _Attention:
    """One layer's attention: queries and keys (B, heads, S, d), pattern and scores (B, heads, S, S)."""

    query: Tensor
    key: Tensor
    pattern: Tensor
    scores: Tensor
    scale: float
    cap: float | None
    sinks: Tensor | None
    """(heads,) scores of what takes attention and gives nothing, in GPT-OSS."""

    def rows(self, chosen: slice) -> "_Attention":
        """Some rows of the batch."""
        query, key, pattern, scores = (
            x.detach()[chosen] for x in (self.query, self.key, self.pattern, self.scores)
        )
        return _Attention(query, key, pattern, scores, self.scale, self.cap, self.sinks)


@dataclass(frozen=True)
class Attribution:
    """Estimates for components, layers, B pairs and the S columns of their left-padded batch."""

    estimate: np.ndarray
    """(components, layers, B, S): change of the metric, in its unit, if the source's state were put in."""
    score: np.ndarray
    """The same shape, never negative: what to rank by."""


def attribute(
    model: Any,
    pairs: Pairs,
    components: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    *,
    receiving: str = "triggered",
    source: str = "placebo",
    metric: Metric | None = None,
) -> Attribution:
    """Estimate what patching any single site would change.

    Args:
        model: a causal LM in evaluation mode.
        pairs: aligned prompts; all of them are held in memory, so give a batch.
        components: places of the residual stream.
        receiving: run that would be changed.
        source: run whose states would be put in.
        metric: of these pairs; their logit difference by default.

    Raises:
        InputError: if there is no such component, the model's attention computes what cannot be watched, or
            as `trace`.
    """
    metric = metric or pairs.metric()
    architecture = Architecture.of(model)
    sites = [Site(component, layer) for component in components for layer in range(architecture.shape.layers)]
    for site in sites:
        architecture.check(site)
    both = Batch.of([*pairs.ids[receiving], *pairs.ids[source]], device=model.device)
    check_length(model, both)
    check_supported(model)
    check_watched(architecture, both)
    with exclusive(model), _watched(model) as watched, torch.enable_grad():
        found, logits = _forward(architecture, both, sites, metric.columns)
        total = metric.compute(logits, torch.arange(len(pairs)).repeat(2)).sum()
        inside = [x for one in watched for x in (one.query, one.key, one.pattern)]
        wanted = [*(found.value(site) for site in sites), *inside]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, wanted, strict=True)]
    own, given = slice(0, len(pairs)), slice(len(pairs), None)
    estimates, scores = [], []
    for site, gradient in zip(sites, filled, strict=False):
        # Some layers hold a batch's rows below each other.
        states, gradient = (x.detach().reshape(*both.ids.shape, -1) for x in (found.value(site), gradient))
        difference = states[given] - states[own]
        estimate = (difference * gradient[own]).sum(-1).float()
        if site.component == "resid_pre":
            inner = filled[len(sites) + 3 * site.layer :][:3]
            attention = watched[site.layer]
            estimate += _correction(attention.rows(own), attention.rows(given), *(g[own] for g in inner))
        estimates.append(estimate)
        lengths = gradient.norm(dim=-1).float()
        scores.append(difference.norm(dim=-1).float() * (lengths[own] + lengths[given]))
    shape = (len(components), architecture.shape.layers, *estimates[0].shape)
    return Attribution(*(torch.stack(x).reshape(shape).cpu().numpy() for x in (estimates, scores)))


def _correction(own: _Attention, given: _Attention, dq: Tensor, dk: Tensor, dp: Tensor) -> Tensor:
    """(B, S): what the softmax really does with a position's own query and key, less its linear estimate."""
    query, key = given.query - own.query, given.key - own.key
    linear = (dq * query).sum((1, 3)) + (dk * key).sum((1, 3))
    pattern = own.pattern
    row = (dp * pattern).sum(-1)
    # A key: one column of the scores changes, for every query.
    scores = _capped(own.query @ given.key.transpose(2, 3) * own.scale, own.cap)
    grown = torch.exp((scores - own.scores).clamp(-30, 30))
    norm = (1 + pattern * (grown - 1)).clamp_min(1e-6)
    by_key = (row[..., None] + dp * pattern * (grown - 1)) / norm - row[..., None]
    # A query: one row of the scores changes.
    scores = _capped(given.query @ own.key.transpose(2, 3) * own.scale, own.cap)
    changed = _pattern(scores.masked_fill(pattern == 0, -torch.inf), own.sinks).nan_to_num()
    by_query = (dp * (changed - pattern)).sum(-1)
    return (by_key.sum((1, 2)) + by_query.sum(1) - linear).float()


def _forward(
    architecture: Architecture, batch: Batch, sites: Sequence[Site], columns: int
) -> tuple[Trace, Tensor]:
    """A forward pass whose states stay in the graph, which begins at what enters the first layer."""
    found = Trace(architecture, batch)

    def root(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Weights need no gradients, and a backward pass without them costs no more than a forward one.
        states = received(module, args, kwargs).detach().requires_grad_()
        return receiving(module, args, kwargs, states)

    handle = architecture.layers[0].layer.register_forward_pre_hook(root, with_kwargs=True)
    frozen = [parameter for parameter in architecture.model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with recording(found, sites, detach=False):
            output = forward(architecture.model, batch, columns, use_cache=False)
    finally:
        handle.remove()
        for parameter in frozen:
            parameter.requires_grad_()
    return found, output.logits[:, -columns:].float()


@contextmanager
def _watched(model: Any) -> Iterator[list[_Attention]]:
    """Run attention through our own eager arithmetic, which keeps queries, keys and patterns."""
    kept: list[_Attention] = []

    def attend(
        _: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **more: Any,
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        cap = more.get("softcap")
        scores = _capped(query @ key.transpose(2, 3) * scaling, cap)
        if attention_mask is not None:
            scores = scores + attention_mask
        # In less than the mask's own precision its least value would be infinite, and padding not a number.
        precise = torch.promote_types(query.dtype, torch.float32)
        sinks = None if more.get("s_aux") is None else more["s_aux"].detach()
        pattern = _pattern(scores.to(precise), sinks).to(query.dtype)
        kept.append(_Attention(query, key, pattern, scores.detach(), scaling, cap, sinks))
        return (pattern @ value).transpose(1, 2).contiguous(), None

    inner = unwrapped(model)
    was = inner.config._attn_implementation
    AttentionInterface.register(WATCHED, attend)
    AttentionMaskInterface.register(WATCHED, eager_mask)
    inner.set_attn_implementation(WATCHED)
    try:
        yield kept
    finally:
        inner.set_attn_implementation(was)


def _pattern(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """(B, heads, S, S) softmax of scores; what sinks take of it is left out."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    beside = sinks.to(scores)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, beside], dim=-1), dim=-1)[..., :-1]


def check_watched(architecture: Architecture, batch: Batch) -> None:
    """Refuse attention that is not the softmax that is watched; looked at once for each model."""
    inner = unwrapped(architecture.model)
    if inner in _WATCHABLE:
        return
    row = Batch.of([batch.tokens(0)], device=batch.ids.device)
    with torch.no_grad(), exclusive(inner):
        own = forward(inner, row, use_cache=False).logits
        with _watched(inner) as watched:
            logits = forward(inner, row, use_cache=False).logits
    if len(watched) != architecture.shape.layers or not alike(logits[:, -1:], own[:, -1:]):
        raise InputError(
            "model: attribution follows attention through transformers' interface, where it sees "
            f"{len(watched)} of this model's {architecture.shape.layers} layers, or not all that they "
            "compute. Measure the sites themselves (without --fast)."
        )
    _WATCHABLE.add(inner)


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)


@dataclass(frozen=True)
class Fast:
    """A sweep of which only the most promising spots were measured exactly."""

    measured: Measured
    """Of the chosen spots."""
    scores: np.ndarray
    """(S,) of all spots, mean over pairs."""
    agreement: float
    """Spearman's rank correlation of score and size of the measured change, over the chosen spots."""


def fast_sweep(
    model: Any,
    pairs: Pairs,
    spots: Sequence[Spot],
    *,
    receiving: str = "triggered",
    source: str = "placebo",
    share: float = SHARE,
) -> Fast:
    """Rank all spots by attribution, then measure the top ones exactly.

    Args:
        model: a causal LM in evaluation mode.
        pairs: aligned prompts.
        spots: of the residual stream's components, at roles or single positions.
        receiving: run that is changed.
        source: run whose states are put in.
        share: of the spots that are measured; at least one.

    Raises:
        InputError: for a component that attribution does not estimate.
    """
    components = sorted({spot.site.component for spot in spots})
    wrong = sorted(set(components) - set(ESTIMATED))
    if wrong:
        raise InputError(
            f"fast: attribution estimates {', '.join(ESTIMATED)}, not {wrong[0]}. Sweep it exactly."
        )
    parts = []
    for _, own in pairs.parts():
        found = attribute(model, own, components, receiving=receiving, source=source)
        parts.append(_by_spot(found.score, own, spots, components))
    scores = np.concatenate(parts, axis=1).mean(1)
    chosen = sorted(np.argsort(-scores, kind="stable")[: max(1, round(share * len(spots)))].tolist())
    exact = sweep(model, pairs, [spots[i] for i in chosen], receiving=receiving, source=source)
    sizes = np.abs(exact.change).mean(1)
    agreement = spearmanr(scores[chosen], sizes).statistic if len(chosen) > 2 else np.nan
    return Fast(exact, scores, float(agreement))


def _by_spot(found: np.ndarray, pairs: Pairs, spots: Sequence[Spot], components: Sequence[str]) -> np.ndarray:
    """(spots, B): scores summed over each spot's positions."""
    width = found.shape[-1]
    values = np.zeros((len(spots), len(pairs)))
    for s, spot in enumerate(spots):
        own = found[components.index(spot.site.component), spot.site.layer]
        for b in range(len(pairs)):
            length = len(pairs.roles[b])
            columns = [width - length + p for p in positions(pairs, spot, b)]
            values[s, b] = own[b, columns].sum()
    return values
