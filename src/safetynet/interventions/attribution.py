"""Attribution patching: every site's effect at once, from one forward and one backward pass over both runs.

In: pairs. Out: for each component, layer and position of each pair a signed estimate and a score to rank
by; and for the spots of a sweep, heads and adapter modules among them, the order in which `racing` measures
them (Nanda 2023; Kramar et al. 2024, AtP*).

A gradient sees nothing of what a saturated attention does under a large change. What a state does through
its own layer's queries and keys is therefore recomputed through the softmax, as AtP* does. Where the whole
way to the answer is saturated, as it is under a working backdoor, that is not enough; the score is the
length of the activations' difference times the length of the gradient at both ends, which no cancellation
can hide (docs/interventions.md).
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
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
from safetynet.interventions.sweep import Spot, positions
from safetynet.models.blocks import received, receiving, unwrapped
from safetynet.models.causal_lm import CausalLM
from safetynet.vocabulary import Mode

WATCHED = "safetynet-watched"
_WATCHABLE: "weakref.WeakSet[Any]" = weakref.WeakSet()
RANKED = ("embedding", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "adapter")
"""Components that `scores` orders."""
GRADIENTS_AT_ONCE = 4
"""Pairs whose graph of a forward pass is in memory together."""


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

    def rows(self, part: slice) -> "_Attention":
        """Some rows of the batch."""
        names = ("query", "key", "pattern", "scores")
        return replace(self, **{name: getattr(self, name).detach()[part] for name in names})


@dataclass(frozen=True)
class Attribution:
    """Estimates for components, layers, B pairs and the S columns of their left-padded batch."""

    estimate: np.ndarray
    """(components, layers, B, S): change of the metric, in its unit, if the source's values were put in."""
    score: np.ndarray
    """The same shape, never negative: what to rank by."""


def attribute(
    model: CausalLM,
    pairs: Pairs,
    components: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    *,
    receiving: str = "triggered",
    source: str = "placebo",
    metric: Metric | None = None,
) -> Attribution:
    """Estimate what patching any single site would change.

    Args:
        model: the model.
        pairs: aligned prompts; all of them are held in memory, so give a batch.
        components: of the residual stream.
        receiving: run that would be changed.
        source: run whose values would be put in.
        metric: of these pairs; their logit difference by default.

    Raises:
        InputError: if there is no such component, the model's attention computes what cannot be watched, or
            as `trace`.
    """
    metric = metric or pairs.metric()
    architecture = Architecture.of(model)
    depth = architecture.shape.layers
    sites = [architecture.check(Site(name, layer)) for name in components for layer in range(depth)]
    both = Batch.of([*pairs.ids[receiving], *pairs.ids[source]], device=model.device)
    check_length(model, both)
    check_supported(model)
    check_watched(architecture, both)
    with exclusive(model), _watched(model) as watched, torch.enable_grad():
        recorded, logits = _forward(architecture, both, sites, metric.columns)
        total = metric.compute(logits, torch.arange(len(pairs)).repeat(2)).sum()
        inside = [x for attention in watched for x in (attention.query, attention.key, attention.pattern)]
        tensors = [*(recorded.value(site) for site in sites), *inside]
        gradients = [
            torch.zeros_like(x) if gradient is None else gradient
            for gradient, x in zip(
                torch.autograd.grad(total, tensors, allow_unused=True), tensors, strict=True
            )
        ]
    # The batch's first half are the receiving runs, its second half the source runs.
    first, second = slice(0, len(pairs)), slice(len(pairs), None)
    estimates, scores = [], []
    for site, gradient in zip(sites, gradients, strict=False):
        # Some layers hold a batch's rows below each other.
        values, slope = (x.detach().reshape(*both.ids.shape, -1) for x in (recorded.value(site), gradient))
        difference = values[second] - values[first]  # (B, S, width)
        estimate = (difference * slope[first]).sum(-1).float()
        if site.component == "resid_pre":
            attention = watched[site.layer]
            slopes = gradients[len(sites) + 3 * site.layer :][:3]
            estimate += _correction(
                attention.rows(first), attention.rows(second), *(x[first] for x in slopes)
            )
        estimates.append(estimate)
        lengths = slope.norm(dim=-1).float()
        scores.append(difference.norm(dim=-1).float() * (lengths[first] + lengths[second]))
    shape = (len(components), depth, *estimates[0].shape)
    return Attribution(*(torch.stack(x).reshape(shape).cpu().numpy() for x in (estimates, scores)))


def _correction(base: _Attention, source: _Attention, dq: Tensor, dk: Tensor, dp: Tensor) -> Tensor:
    """What the softmax really does with a position's own query and key, less its linear estimate.

    The QK fix of AtP* (Kramar et al. 2024, arXiv 2403.00745), for queries and for keys at once.

    Args:
        base: of the receiving run.
        source: of the run whose values are put in.
        dq: gradient of the metric by `base.query`.
        dk: by `base.key`.
        dp: by `base.pattern`.

    Returns:
        (B, S), summed over heads.
    """
    query, key, pattern = source.query - base.query, source.key - base.key, base.pattern
    linear = (dq * query).sum((1, 3)) + (dk * key).sum((1, 3))
    row = (dp * pattern).sum(-1)
    # A key: one column of the scores changes, for every query. Its weight p becomes p g / (1 + p (g - 1)),
    # where g is what exp(score) grows by, and the others shrink by the same norm: no second softmax.
    scores = _capped(base.query @ source.key.transpose(2, 3) * base.scale, base.cap)
    grown = torch.exp((scores - base.scores).clamp(-30, 30))
    norm = (1 + pattern * (grown - 1)).clamp_min(1e-6)
    by_key = (row[..., None] + dp * pattern * (grown - 1)) / norm - row[..., None]
    # A query: one row of the scores changes.
    scores = _capped(source.query @ base.key.transpose(2, 3) * base.scale, base.cap)
    changed = _pattern(scores.masked_fill(pattern == 0, -torch.inf), base.sinks).nan_to_num()
    by_query = (dp * (changed - pattern)).sum(-1)
    return (by_key.sum((1, 2)) + by_query.sum(1) - linear).float()


def _forward(
    architecture: Architecture, batch: Batch, sites: Sequence[Site], columns: int
) -> tuple[Trace, Tensor]:
    """A forward pass whose states stay in the graph, which begins at what enters the first layer."""
    recorded = Trace(architecture, batch)

    def root(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Weights need no gradients, and a backward pass without them costs no more than a forward one.
        states = received(module, args, kwargs).detach().requires_grad_()
        return receiving(module, args, kwargs, states)

    handle = architecture.layers[0].layer.register_forward_pre_hook(root, with_kwargs=True)
    trained = [parameter for parameter in architecture.model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with recording(recorded, sites, detach=False):
            output = forward(architecture.model, batch, columns, use_cache=False)
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_()
    return recorded, output.logits[:, -columns:].float()


@contextmanager
def _watched(model: CausalLM) -> Iterator[list[_Attention]]:
    """Run attention through our own eager arithmetic, which keeps queries, keys and patterns."""
    watched: list[_Attention] = []

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
        # In less than the mask's own precision its least value would be infinite, and padding NaN.
        precise = torch.promote_types(query.dtype, torch.float32)
        sinks = None if more.get("s_aux") is None else more["s_aux"].detach()
        pattern = _pattern(scores.to(precise), sinks).to(query.dtype)
        watched.append(_Attention(query, key, pattern, scores.detach(), scaling, cap, sinks))
        return (pattern @ value).transpose(1, 2).contiguous(), None

    inner = unwrapped(model)
    before = inner.config._attn_implementation
    AttentionInterface.register(WATCHED, attend)
    AttentionMaskInterface.register(WATCHED, eager_mask)
    inner.set_attn_implementation(WATCHED)
    try:
        yield watched
    finally:
        inner.set_attn_implementation(before)


def _pattern(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """(B, heads, S, S) softmax of scores; what sinks take of it is left out."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    beside = sinks.to(scores)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, beside], dim=-1), dim=-1)[..., :-1]


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)


def check_watched(architecture: Architecture, batch: Batch) -> None:
    """Refuse attention that is not the softmax that is watched; looked at once for each model."""
    inner = unwrapped(architecture.model)
    if inner in _WATCHABLE:
        return
    row = Batch.of([batch.tokens(0)], device=batch.ids.device)
    with torch.no_grad(), exclusive(inner):
        expected = forward(inner, row, use_cache=False).logits
        with _watched(inner) as watched:
            logits = forward(inner, row, use_cache=False).logits
    if len(watched) != architecture.shape.layers or not alike(logits[:, -1:], expected[:, -1:]):
        raise InputError(
            "model: attribution follows attention through transformers' interface, where it sees "
            f"{len(watched)} of this model's {architecture.shape.layers} layers, or not all that they "
            "compute. Measure the sites themselves (safetynet intervene)."
        )
    _WATCHABLE.add(inner)


def ranks(spots: Sequence[Spot], mode: Mode) -> bool:
    """Whether `scores` can order these spots under this mode."""
    has_gradient = all(spot.site.component in RANKED for spot in spots)
    whole = all(spot.site.module for spot in spots if spot.site.component == "adapter")
    return has_gradient and whole and mode in ("patch", "zero", "off")


def scores(
    model: CausalLM,
    pairs: Pairs,
    spots: Sequence[Spot],
    *,
    receiving: str = "triggered",
    source: str = "placebo",
    mode: Mode = "patch",
) -> np.ndarray:
    """Order spots by what they might change, from a forward and a backward pass over both runs.

    A spot's score is the length of what the intervention changes there times the length of the gradient,
    added over both runs, and over the spot's positions; the mean over pairs is given. It has no unit.

    Args:
        model: the model.
        pairs: aligned prompts.
        spots: of components in `RANKED`.
        receiving: run that is changed.
        source: run whose values are put in (patch).
        mode: `patch`, `zero` or `off`.

    Returns:
        (S,), never negative; infinite for adapters of fused experts, which have no gradient and come first.

    Raises:
        InputError: as `trace`.
    """
    architecture = Architecture.of(model)
    check_supported(model)
    whole = [Site(spot.site.component, spot.site.layer, module=spot.site.module) for spot in spots]
    # PEFT puts a fused parameter's update into the weights in place, through which no gradient comes.
    fused = [
        s.module != "" and hasattr(architecture.adapters[s.layer][s.module], "parameter_name") for s in whole
    ]
    sites = sorted({site for site, skipped in zip(whole, fused, strict=True) if not skipped}, key=str)
    totals = np.where(fused, np.inf, 0.0)
    for _, part in pairs.parts(GRADIENTS_AT_ONCE):
        both = Batch.of([*part.ids[receiving], *part.ids[source]], device=model.device)
        check_length(model, both)
        metric, count = part.metric(), len(part)
        with exclusive(model), torch.enable_grad():
            recorded, logits = _forward(architecture, both, sites, metric.columns)
            total = metric.compute(logits, torch.arange(count).repeat(2)).sum()
            values = [recorded.value(site) for site in sites]
            slopes = torch.autograd.grad(total, values, allow_unused=True)
        by_site = dict(zip(sites, zip(values, slopes, strict=True), strict=True))
        for s, spot in enumerate(spots):
            if fused[s]:
                continue
            value, slope = by_site[whole[s]]
            if slope is None:  # nothing that is read comes after it
                continue
            if spot.update:
                value = value - recorded.inputs[spot.site.layer]
            span = architecture.span(spot.site)
            value, slope = (
                x.detach().reshape(*both.ids.shape, -1)[..., span].float() for x in (value, slope)
            )
            changed = (value[count:] if mode == "patch" else 0) - value[:count]  # (B, S, k)
            lengths = slope.norm(dim=-1)
            score = changed.norm(dim=-1) * (lengths[:count] + lengths[count:])
            for b in range(count):
                first = both.width - len(part.roles[b])  # column of the pair's first token
                totals[s] += float(score[b, [first + p for p in positions(part, spot, b)]].sum())
    return totals / len(pairs)
