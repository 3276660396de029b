"""The live check of a model: one short forward pass shows that its sites are what the documents say they are.

In: a model's layers and the modules found by name. Out: `CheckedSites`, kept for each model: which components
are sites of which layers, and why the others are not. Two rows are run, a prompt of five tokens and its first
three behind padding, with readers in place, and edits that change nothing. A reader has to see what an edit
sees; the layer's input and what attention and MLP add have to sum up to its output; the three tokens have to
have the same states in both rows. One layer of each kind is then called again for some columns, as resumed
runs do it.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut
from safetynet.engine.hooks import PlacedEdit, contribution, exclusive, hooked
from safetynet.engine.resume import COLUMN_ARGUMENTS, ResumedLayers, ScheduledEdit, ScheduledRun
from safetynet.engine.sites import MODULES, Architecture, CheckedSites, Site
from safetynet.engine.trace import Trace, forward, recording
from safetynet.errors import InputError
from safetynet.models.blocks import evaluating, hidden_of, unwrapped
from safetynet.models.parts import Parts, Shape

TOKENS, SHORT = 5, 3
"""Of the two prompts."""
EDITED = ("query", "key", "value", "head", "attn_out", "mlp_out")
"""Components whose edits and readers have hooks of their own; `resid_mid` is edited where `attn_out` is."""
SHARED_KINDS = (bool, int, float, str, type(None))
"""Kinds of arguments that are the same for every row and column."""
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
IGNORES_MASK = "its attention does not heed a mask, so that nothing can be cut"

_CHECKED: "weakref.WeakKeyDictionary[Any, tuple[object, CheckedSites | str]]" = weakref.WeakKeyDictionary()


def check_sites(architecture: Architecture) -> CheckedSites:
    """Check a model once, and again only if other modules take its layers' places.

    Adapters change nothing of where sites are: attaching, swapping or removing one asks for no check.

    Raises:
        InputError: if the model has no residual stream that its layers pass on, or is not all in memory.
    """
    inner = unwrapped(architecture.model)
    # What a check holds for: each layer's modules and their kinds, whatever adapter is around them.
    modules = [
        (parts.attention, parts.attention_end, parts.before_mlp, parts.mlp, parts.mlp_end, parts.output)
        for parts in architecture.layers
    ]
    built = tuple(
        (id(parts.layer), parts.multiplier, *(type(getattr(x, "base_layer", x)) for x in of_layer))
        for parts, of_layer in zip(architecture.layers, modules, strict=True)
    )
    entry = _CHECKED.get(inner)
    if entry is None or entry[0] != built:
        if any(parameter.is_meta for parameter in inner.parameters()):
            raise InputError(
                "model: some of its weights are offloaded or on the meta device, where nothing can be read "
                "or changed. Load it whole on one device, in 4 bit if it is too large (model.quantisation)."
            )
        with torch.no_grad(), exclusive(inner), evaluating(inner):
            entry = _CHECKED[inner] = (built, _check(architecture))
    if isinstance(entry[1], str):
        raise InputError(f"model: {entry[1]}")
    return entry[1]


def _check(architecture: Architecture) -> CheckedSites | str:
    """What the pass shows, or why the model has no sites at all."""
    inner = unwrapped(architecture.model)
    size = inner.config.get_text_config().vocab_size
    # Different tokens, away from the ends of the vocabulary, where special ones are.
    ids = torch.linspace(size / 7, size * 6 / 7, TOKENS).long().tolist()
    recorded = Trace(architecture, Batch.of([ids, ids[:SHORT]], device=inner.device))
    with _observed(recorded) as observed:
        forward(inner, recorded.batch, use_cache=True)
    layers = range(architecture.shape.layers)
    outputs = [observed["after", layer] for layer in layers if ("after", layer) in observed]
    if refused := _no_stream(recorded, outputs):
        return refused
    absent: dict[tuple[str, int], str] = {}
    sizes: dict[tuple[str, int], tuple[int, int]] = {}
    plain = []
    for layer, parts in enumerate(architecture.layers):
        cached = (getattr(observed["cache", layer], "layers", None) or [])[layer : layer + 1]
        held = [getattr(entry, name, None) for entry in cached for name in ("keys", "values")]
        # DeepSeek's cache holds what keys and values are made from, which is no head's.
        latent = getattr(parts.attention, "kv_lora_rank", None) is not None
        by_head = len(held) == 2 and not latent and all(isinstance(x, Tensor) and x.ndim == 4 for x in held)
        seen = _Evidence(
            parts=parts,
            batch=recorded.batch,
            before=recorded.inputs[layer],
            after=observed["after", layer],
            read={site.component: values for site, values in recorded.read.items() if site.layer == layer},
            edited={name: observed[name, layer] for name in EDITED if (name, layer) in observed},
            attention=observed.get(("attention", layer)),
            projected=observed.get(("projected", layer)),
            routed=observed.get(("routed", layer)),
            keys=held[0] if by_head else None,
            values=held[1] if by_head else None,
        )
        reasons, head_sizes = _absent(seen, architecture.shape)
        absent |= {(component, layer): reason for component, reason in reasons.items()}
        sizes |= {(component, layer): size for component, size in head_sizes.items()}
        if seen.plain_attention:
            plain.append(layer)
    not_resumable, pointwise, ignoring_masks = _call_again(recorded)
    absent |= {("attention", layer): IGNORES_MASK for layer in ignoring_masks}
    return CheckedSites(absent, sizes, frozenset(plain), pointwise, not_resumable)


# ---- the pass, and what it shows of each layer ----

Observed = dict[tuple[str, int], Any]
"""What hooks kept of the pass, by what it is and layer; values that edits saw by their component."""


@contextmanager
def _observed(recorded: Trace) -> Iterator[Observed]:
    """Hooks that keep what a pass shows; behind them edits that change nothing but by rounding."""
    observed: Observed = {}
    layers = recorded.architecture.layers
    sites = [
        Site(name, layer)
        for layer, parts in enumerate(layers)
        for name in (*EDITED, "resid_mid")
        if MODULES[name](parts) is not None
    ]

    def keep(name: str, layer: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            observed[name, layer] = (args, output) if name == "routed" else output
            if name == "after":
                observed[name, layer] = hidden_of(output)
                caches = (x for x in (*args, *kwargs.values()) if isinstance(x, Cache))
                observed["cache", layer] = next(caches, None)

        return hook

    def unchanging(site: Site) -> Edit:
        def change(x: Tensor) -> Tensor:
            observed[site.component, site.layer] = x.clone()
            return x

        return Edit(site, change)

    with ExitStack() as stack:
        stack.enter_context(recording(recorded, sites))
        for layer, parts in enumerate(layers):
            modules = {"after": parts.layer, "attention": parts.attention, "projected": parts.output}
            for name, module in (modules | {"routed": parts.experts}).items():
                if module is not None:
                    handle = module.register_forward_hook(keep(name, layer), with_kwargs=True)
                    stack.callback(handle.remove)
            edited = [site for site in sites if site.layer == layer and site.component in EDITED]
            placed = [PlacedEdit(unchanging(site), slice(None), slice(None)) for site in edited]
            stack.enter_context(hooked(recorded.architecture, layer, placed))
        yield observed


@dataclass
class _Evidence:
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
    def plain_attention(self) -> bool:
        """Whether attention returns what its output projection gives, and one thing more beside it."""
        pair = isinstance(self.attention, tuple) and len(self.attention) == 2
        return pair and self.projected is not None and equal(self.attention[0], self.projected)


def _no_stream(recorded: Trace, outputs: Sequence[Tensor]) -> str:
    """Why a model has no residual stream that its layers pass on; "" where it has."""
    modules = unwrapped(recorded.architecture.model).named_modules()
    tables = (module for name, module in modules if name.endswith(".position_embeddings"))
    if any(getattr(table, "padding_idx", None) is not None for table in tables):
        return "its positions are counted from a padding token's, not from 0, as RoBERTa's are."
    inputs, depth = recorded.inputs, recorded.architecture.shape.layers
    shape = (*recorded.batch.ids.shape, inputs[0].shape[-1])
    if len(inputs) != depth or len(outputs) != depth:
        return f"its {depth} layers were run {len(inputs)} times in one pass; each has to run once."
    if any(x.shape != shape for x in (*inputs, *outputs)):
        return f"its layers pass on {tuple(inputs[-1].shape)} numbers and not {shape}, a state per token."
    for layer, (left, entered) in enumerate(zip(outputs, inputs[1:], strict=False)):
        if not equal(left, entered):
            return f"what leaves layer {layer} is not what enters layer {layer + 1}."
    for layer, states in enumerate((inputs[0], *outputs), -1):
        if not alike(states[1, -SHORT:], states[0, :SHORT]):
            return (
                "a prompt's states change with the padding before it or the tokens behind it (after layer "
                f"{layer}), so that its sites mean nothing in a batch. Take a causal language model."
            )
    return ""


# ---- why a component is no site of a layer ----


def _absent(seen: _Evidence, shape: Shape) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Reasons by component, and of components with heads their number and the columns of each."""
    why = {name: UNNAMED[name] for name, get in MODULES.items() if get(seen.parts) is None}
    for name, values in seen.edited.items():
        read = seen.read.get(name)
        if read is None or values.shape != read.flatten(0, 1).shape:
            why[name] = "its module is not called once for each token of a batch"
        elif not equal(values.reshape(read.shape), read):
            why[name] = "what is read there is not what an edit would change"
    why = _wrong_sums(seen) | why
    # Heads and the columns of each, from the widths seen; the cache shows how wide a head's values are.
    widths = {name: values.shape[-1] for name, values in seen.read.items()}
    heads, kv_heads = shape.heads, shape.kv_heads
    if seen.values is not None:
        kv_heads, columns = seen.values.shape[1], seen.values.shape[-1]
        heads = heads if widths.get("head", 1) % columns else widths.get("head", 1) // columns
    counts = {"query": heads, "key": kv_heads, "value": kv_heads, "head": heads}
    sizes = {name: (count, widths[name] // count) for name, count in counts.items() if name in widths}
    sizes["attention"] = (heads, 1)
    for name in ("query", "key", "value", "head"):
        if name not in why and name in sizes:
            count, columns = sizes[name]
            cached = {"query": seen.keys, "key": seen.keys, "value": seen.values}.get(name)
            if count * columns != widths[name] or (cached is not None and columns != cached.shape[-1]):
                why[name] = f"its {widths[name]} columns are not those of {count} heads"
            elif name == "head" and (reason := _mixed_heads(seen, count, columns)):
                why[name] = reason
    if seen.parts.experts is not None and (reason := _inseparable_experts(seen, shape)):
        why |= {"router": reason, "expert": reason}
    return why, {name: size for name, size in sizes.items() if name not in why}


def _wrong_sums(seen: _Evidence) -> dict[str, str]:
    """Where attention and MLP do not add to the stream what is read behind them."""
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


def _adds_up(seen: _Evidence, total: Tensor, *terms: Tensor | None) -> bool:
    """Whether a sum is its terms', elementwise and within rounding; not where one of them is missing."""
    present = [term for term in terms if term is not None and term.shape == total.shape]
    if len(present) < len(terms):
        return False
    tokens = seen.batch.mask.bool().cpu()
    # (tokens of both prompts, width) in fp64, so that this sum adds no rounding of its own.
    whole, first, *others = (x.detach().cpu().double()[tokens] for x in (total, *present))
    size = sum((x.abs() for x in others), whole.abs() + first.abs())
    bound = size * ROUNDINGS * precision(total, *present)
    # NaN is not above the bound: whoever asks for a metric of it is told.
    return not bool(((sum(others, first) - whole).abs() > bound).any())


def _mixed_heads(seen: _Evidence, count: int, columns: int) -> str:
    """Why what enters the output projection is not heads side by side; "" where it is, or cannot be shown."""
    alone = seen.parts.attention_end is seen.parts.output
    if seen.projected is None or not (alone or equal(hidden_of(seen.attention), seen.projected)):
        return "attention does not return what its output projection gives"
    cached = seen.values
    if cached is None or (columns, seen.batch.width) != (cached.shape[-1], cached.shape[2]):
        return ""
    # The first token sees itself alone: a head's output is its value, or less of it where sinks take a share.
    # Both (heads, columns); of grouped heads, several have one value.
    first = seen.read["head"][0, 0].detach().cpu().double().unflatten(0, (count, columns))
    value = cached[0, :, 0].detach().cpu().double().repeat_interleave(count // cached.shape[1], 0)
    if first.shape != value.shape:
        return MIXED
    cosine = torch.cosine_similarity(first, value, dim=-1)
    zero = (first.norm(dim=-1) == 0) | (value.norm(dim=-1) == 0)
    return MIXED if (cosine[~zero] < 1 - precision(cached)).any() else ""


def _inseparable_experts(seen: _Evidence, shape: Shape) -> str:
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
    x, index, weights = x[:1], index[:1], weights[:1]  # one token is enough
    apart = contribution(experts, (x, index, weights), first)
    apart = apart + contribution(experts, (x, index, weights * (index != first)), None)
    return "" if alike(apart, output[:1]) else "what its experts add is not the sum of each one's"


# ---- whether layers can be called again for some columns ----


def _call_again(recorded: Trace) -> tuple[str, bool, list[int]]:
    """Why layers cannot be called for some columns, whether for scattered ones, and which ignore masks."""
    if not recorded.cache_name:
        return "its layers take no cache of keys and values, so that runs cannot be resumed.", True, []
    layers = recorded.architecture.layers
    # Of layers that are built alike and get the same mask, one stands for all.
    kinds: dict[object, list[int]] = {}
    for layer, (parts, arguments) in enumerate(zip(layers, recorded.arguments, strict=True)):
        known = (*COLUMN_ARGUMENTS, *(k for k, x in arguments.items() if isinstance(x, SHARED_KINDS)))
        if unknown := [name for name in arguments if name not in known]:
            return f"its layers take {unknown[0]}, which is not known by column: no run is resumed.", True, []
        if parts.attention is None:
            return f"layer {layer} has no attention that keeps keys and values: no run is resumed.", True, []
        inside = tuple(name for name, _ in parts.attention.named_children())
        kind = (type(parts.layer), type(parts.attention), inside, id(arguments.get("attention_mask")))
        kinds.setdefault(kind, []).append(layer)
    pointwise, ignoring_masks = True, []
    for first, *others in kinds.values():
        try:
            from_start, at_column, cut_shows = _call_layer_again(recorded, first)
        except Exception as error:  # noqa: BLE001  # whatever a layer of someone else's raises means the same
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"layer {first} cannot be run for some columns of a prompt ({why}).", True, []
        if not from_start:
            why = f"layer {first} gives other states when some columns of a prompt are run again."
            return why, True, []
        # Attention that counts columns itself, as if they followed each other, shows it in long prompts only:
        # GPT-Neo lays a square mask of its own from the last column backwards, Llama 4 counts cached columns.
        attention = layers[first].attention
        masks = any(x.ndim > 1 and x.shape[-1] == x.shape[-2] for x in attention.buffers())
        counts = masks or bool(getattr(attention, "attn_temperature_tuning", False))
        pointwise &= at_column and not counts
        ignoring_masks += [] if cut_shows else [first, *others]
    return "", pointwise, ignoring_masks


def _call_layer_again(recorded: Trace, layer: int) -> tuple[bool, bool, bool]:
    """Whether a layer gives its own states from a column on and at one column, and whether a cut shows."""
    inputs, start = recorded.inputs[layer], TOKENS - SHORT
    expected = recorded.value(Site("resid_post", layer))
    rows = [ScheduledRun(row, row, layer, 0, ()) for row in range(2)]
    keys, values = ResumedLayers(recorded, 0).keys_values(layer, inputs, rows)
    recorded.keys, recorded.values = ([x] * recorded.architecture.shape.layers for x in (keys, values))
    resumed = ResumedLayers(recorded, start)
    suffix = resumed.from_start(layer, inputs[:, start:], rows)
    # Two runs of one prompt, which share its keys and values; in the second, an edge is cut.
    cut = ScheduledEdit(layer, (start,), KnockOut(layer, (start,), (0,)), local=True)
    twice = [rows[0], ScheduledRun(1, 0, layer, 0, (cut,))]
    column, states = torch.tensor([start]), inputs[[0, 0], start : start + 1]
    whole, severed = resumed.at_columns(layer, twice, column, *resumed.recorded(layer, twice), states)
    return (
        alike(suffix, expected[:, start:]),
        alike(whole[None], expected[:1, start : start + 1]),
        not equal(whole, severed),
    )


# ---- when two ways of computing agree ----


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
