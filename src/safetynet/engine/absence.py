"""Why a component is no site of a layer, told from what one pass over the layer showed.

In: what readers, edits and the layer itself saw in a forward pass. Out: for each component that is not what
docs/interventions.md says it is, a reason; and the sizes of heads. Nothing is run but experts, for one token.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safetynet.engine.batch import Batch
from safetynet.engine.hooks import contribution
from safetynet.engine.sites import MODULES
from safetynet.models.blocks import hidden_of
from safetynet.models.parts import Parts, Shape

ROUNDINGS = 2
"""By how many units in the last place, of all terms of a sum together, it may be off.

A layer rounds its two sums by half a unit each, and an edit that changes nothing three multiplications.
"""
_NO_PROJECTION = "its attention has no {}, as where one module makes queries, keys and values"
_NO_ATTENTION = "it has no attention under a name that is known"
UNNAMED = {
    "query": _NO_PROJECTION.format("q_proj"),
    "key": _NO_PROJECTION.format("k_proj"),
    "value": _NO_PROJECTION.format("v_proj"),
    "attention": _NO_ATTENTION,
    "head": "its attention has no output projection under a name that is known",
    "attn_out": _NO_ATTENTION,
    "resid_mid": "no norm between attention and MLP is known, as where the two stand side by side",
    "router": "it has no experts",
    "expert": "it has no experts",
    "mlp_out": "it has no MLP under a name that is known",
}
"""Why a component is absent where its module is not there."""
SIDE_BY_SIDE = "attention and MLP both read the layer's input, so that no stream lies between them"
MIXED = "a gate, a norm or a mixture lies between its heads and the output projection"


@dataclass
class Seen:
    """What a pass over B rows of S columns showed of one layer."""

    parts: Parts
    batch: Batch
    before: Tensor
    """(B, S, width) into the layer."""
    after: Tensor
    """(B, S, width) out of it."""
    read: dict[str, Tensor] = field(default_factory=dict)
    """(B, S, k) that readers saw, by component."""
    edited: dict[str, Tensor] = field(default_factory=dict)
    """(B * S, k) that edits saw, by component."""
    attention: Any = None
    """What attention returned."""
    projected: Tensor | None = None
    """What its output projection returned."""
    routed: tuple[tuple[Any, ...], Any] | None = None
    """What the experts were called with, by position, and returned."""
    keys: Tensor | None = None
    """(B, kv heads, S, k) as the model's cache holds them; None where it holds nothing of the kind."""
    values: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether attention returns what its output projection gives, and one thing more beside it."""
        pair = isinstance(self.attention, tuple) and len(self.attention) == 2
        return pair and self.projected is not None and equal(self.attention[0], self.projected)


def absent(seen: Seen, shape: Shape) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Reasons by component, and of components with heads their number and the columns of each."""
    why = {name: UNNAMED[name] for name, get in MODULES.items() if get(seen.parts) is None}
    for name, values in seen.edited.items():
        read = seen.read.get(name)
        if read is None or values.shape != read.flatten(0, 1).shape:
            why[name] = "its module is not called once for each token of a batch"
        elif not equal(values.reshape(read.shape), read):
            why[name] = "what is read there is not what an edit would change"
    why = _sums(seen) | why
    sizes = _sizes(seen, shape)
    for name in ("query", "key", "value", "head"):
        if name not in why and name in sizes:
            reason = _columns(seen, name, *sizes[name])
            reason = reason or (_heads(seen, *sizes[name]) if name == "head" else "")
            why |= {name: reason} if reason else {}
    if seen.parts.experts is not None and (reason := _experts(seen, shape)):
        why |= {"router": reason, "expert": reason}
    return why, {name: size for name, size in sizes.items() if name not in why}


def _sums(seen: Seen) -> dict[str, str]:
    """Whether attention and MLP add to the stream what is read behind them."""
    attn, mid, mlp = (seen.read.get(name) for name in ("attn_out", "resid_mid", "mlp_out"))
    why: dict[str, str] = {}
    if mid is not None and mid.shape == seen.before.shape and not equal(mid, seen.before):
        if not _adds_up(seen, mid, seen.before, attn):
            reason = "the layer's input and what attention returns do not add up to what the MLP reads"
            why |= {"attn_out": reason, "resid_mid": reason}
        if not _adds_up(seen, seen.after, mid, mlp):
            why["mlp_out"] = "what the MLP reads and returns does not add up to the layer's output"
        return why
    if not _adds_up(seen, seen.after, seen.before, attn, mlp):
        reason = "the layer's input, attention and MLP do not add up to its output"
        why |= {"attn_out": reason, "mlp_out": reason}
    return why | {"resid_mid": SIDE_BY_SIDE}


def _adds_up(seen: Seen, total: Tensor, *terms: Tensor | None) -> bool:
    """Whether a sum is its terms', elementwise and within rounding; not where one of them is missing."""
    known = [term for term in terms if term is not None and term.shape == total.shape]
    if len(known) < len(terms):
        return False
    tokens = seen.batch.mask.bool().cpu()
    whole, first, *others = (x.detach().cpu().double()[tokens] for x in (total, *known))
    bound = sum((x.abs() for x in others), whole.abs() + first.abs()) * ROUNDINGS * precision(total, *known)
    # A number that is none is told by whoever asks for the metric.
    return not bool(((sum(others, first) - whole).abs() > bound).any())


def _sizes(seen: Seen, shape: Shape) -> dict[str, tuple[int, int]]:
    """Heads and their columns, from the widths seen; the cache tells how wide a head's values are."""
    widths = {name: values.shape[-1] for name, values in seen.read.items()}
    heads, kv_heads = shape.heads, shape.kv_heads
    if seen.values is not None:
        kv_heads, columns = seen.values.shape[1], seen.values.shape[-1]
        heads = heads if widths.get("head", 1) % columns else widths.get("head", 1) // columns
    counts = {"query": heads, "key": kv_heads, "value": kv_heads, "head": heads}
    sizes = {name: (count, widths[name] // count) for name, count in counts.items() if name in widths}
    return sizes | {"attention": (heads, 1)}


def _columns(seen: Seen, name: str, count: int, columns: int) -> str:
    """Why a component has not the columns of so many heads; "" where it has."""
    width = seen.read[name].shape[-1]
    cached = {"query": seen.keys, "key": seen.keys, "value": seen.values}.get(name)
    fits = cached is None or columns == cached.shape[-1]
    return "" if fits and count * columns == width else f"its {width} columns are not those of {count} heads"


def _heads(seen: Seen, count: int, columns: int) -> str:
    """Why what enters the output projection is not heads side by side; "" where it is, or cannot be told."""
    alone = seen.parts.attention_end is seen.parts.output
    if seen.projected is None or not (alone or equal(hidden_of(seen.attention), seen.projected)):
        return "attention does not return what its output projection gives"
    cached = seen.values
    if cached is None or (columns, seen.batch.width) != (cached.shape[-1], cached.shape[2]):
        return ""
    # The first token sees itself alone: a head's output is its value, or less of it where sinks take a share.
    first = seen.read["head"][0, 0].detach().cpu().double().unflatten(0, (count, columns))
    value = cached[0, :, 0].detach().cpu().double().repeat_interleave(count // cached.shape[1], 0)
    if first.shape != value.shape:
        return MIXED
    cosine = torch.cosine_similarity(first, value, dim=-1)
    nothing = (first.norm(dim=-1) == 0) | (value.norm(dim=-1) == 0)
    return MIXED if (cosine[~nothing] < 1 - precision(cached)).any() else ""


def _experts(seen: Seen, shape: Shape) -> str:
    """Why experts cannot be taken apart; "" where their contributions add up to what they return."""
    if seen.routed is None:
        return "its experts are not one module that is called"
    args, output = seen.routed
    if len(args) != 3 or not all(isinstance(x, Tensor) and x.ndim == 2 for x in args):
        return "its experts take something else than states, chosen experts and weights, a row for each token"
    x, index, weights = args
    if index.is_floating_point() or index.shape != weights.shape or int(index.max()) >= shape.experts:
        return f"its experts are chosen otherwise than by numbers below {shape.experts}"
    experts, first = seen.parts.experts.forward, int(index[0, 0])
    x, index, weights = x[:1], index[:1], weights[:1]
    apart = contribution(experts, (x, index, weights), first)
    apart = apart + contribution(experts, (x, index, weights * (index != first)), None)
    return "" if alike(apart, output[:1]) else "what its experts add is not the sum of each one's"


def equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    return x.shape == y.shape and torch.equal(x.nan_to_num(), y.to(x.device).nan_to_num())


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether two ways of computing gave the same states, (..., width), at most of the tokens.

    Within the square root of the numbers' precision: rounding stays far below, and another position, mask or
    cache far above. A token or two may go to another expert for a rounding.
    """
    if x.shape != y.shape:
        return False
    first, second = (z.detach().cpu().double() for z in (x, y))
    off = (first - second).norm(dim=-1) / second.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return not float(off.median()) > precision(x, y) ** 0.5


def precision(*values: Tensor) -> float:
    """A unit in the last place of 1, in the coarsest of the values' types; models use fp32 within fp64."""
    return max(torch.finfo(x.dtype).eps for x in (torch.zeros(0), *values))
