"""The live check of a model: one short forward pass shows that its sites are what the documents say they are.

In: a model's layers and the modules that their names tell. Out: a `Verdict`, kept for each model: which
components are sites of which layers, and why the others are not. Two rows are run, a prompt of five tokens
and its first three behind padding, with readers in place, and edits that change nothing. What a reader sees
is what an edit sees; what attention and MLP add, with the layer's input, is the layer's output; and the three
tokens have the same states in both rows. One layer of each kind is then called again for some columns, as
patched runs do it.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from safetynet.engine.absence import Seen, absent, alike, equal
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut
from safetynet.engine.hooks import Placed, exclusive, hooked
from safetynet.engine.plan import Planned, PlannedEdit
from safetynet.engine.resume import PLACED, Resumed
from safetynet.engine.sites import MODULES, Anatomy, Site, Verdict
from safetynet.engine.trace import Trace, forward, recording
from safetynet.errors import InputError
from safetynet.models.blocks import hidden_of, unwrapped
from safetynet.models.parts import Parts

TOKENS, SHORT = 5, 3
EDITED = ("query", "key", "value", "head", "attn_out", "mlp_out")
"""Components whose edits and readers have hooks of their own; `resid_mid` is edited where `attn_out` is."""
PLAIN = (bool, int, float, str, type(None))
"""Kinds of arguments that are the same for every row and column."""
DEAF = "its attention does not heed a mask, so that nothing can be cut"

_VERDICTS: "weakref.WeakKeyDictionary[Any, tuple[object, Verdict | str]]" = weakref.WeakKeyDictionary()


def verdict_of(anatomy: Anatomy) -> Verdict:
    """The verdict on a model, which is checked once, and again only if other modules take the layers' places.

    Adapters change nothing of where sites are: attaching, swapping or removing one asks for no check.

    Raises:
        InputError: if the model has no residual stream that its layers pass on, or is not all in memory.
    """
    inner = unwrapped(anatomy.model)
    built = tuple(_built(parts) for parts in anatomy.layers)
    known = _VERDICTS.get(inner)
    if known is None or known[0] != built:
        if any(parameter.is_meta for parameter in inner.parameters()):
            raise InputError(
                "model: some of its weights are offloaded or on the meta device, where nothing can be read "
                "or changed. Load it whole on one device, in 4 bit if it is too large (model.quantisation)."
            )
        with torch.no_grad(), exclusive(inner), _evaluating(inner):
            known = _VERDICTS[inner] = (built, _checked(anatomy))
    if isinstance(known[1], str):
        raise InputError(f"model: {known[1]}")
    return known[1]


def _built(parts: Parts) -> tuple[object, ...]:
    """What a verdict on a layer holds for: its modules' kinds, whatever adapter is around them."""
    modules = (parts.attention, parts.attention_end, parts.before_mlp, parts.mlp, parts.mlp_end, parts.output)
    return (id(parts.layer), parts.multiplier, *(type(getattr(x, "base_layer", x)) for x in modules))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, whatever mode the model and its modules are in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _checked(anatomy: Anatomy) -> Verdict | str:
    """The verdict, or why there is none."""
    inner = unwrapped(anatomy.model)
    size = inner.config.get_text_config().vocab_size
    ids = torch.linspace(size / 7, size * 6 / 7, TOKENS).long().tolist()
    found = Trace(anatomy, Batch.of([ids, ids[:SHORT]], device=inner.device))
    with _watched(found) as kept:
        forward(inner, found.batch, use_cache=True)
    layers = range(anatomy.shape.layers)
    if refused := _stream(found, [kept["after", layer] for layer in layers if ("after", layer) in kept]):
        return refused
    why: dict[tuple[str, int], str] = {}
    sizes: dict[tuple[str, int], tuple[int, int]] = {}
    shown = [_seen(found, kept, layer) for layer in layers]
    for layer, seen in enumerate(shown):
        reasons, widths = absent(seen, anatomy.shape)
        why |= {(component, layer): reason for component, reason in reasons.items()}
        sizes |= {(component, layer): width for component, width in widths.items()}
    resumable, pointwise, deaf = _resumed(found)
    why |= {("attention", layer): DEAF for layer in deaf}
    plain = frozenset(layer for layer in layers if shown[layer].plain)
    return Verdict(why, sizes, plain, pointwise, resumable)


Kept = dict[tuple[str, int], Any]
"""What hooks kept of a pass, by what it is and layer; values that edits saw by their component."""


@contextmanager
def _watched(found: Trace) -> Iterator[Kept]:
    """Hooks that keep what a pass shows; behind them edits that change nothing but by rounding."""
    kept: Kept = {}
    sites = [
        Site(name, layer)
        for layer, parts in enumerate(found.anatomy.layers)
        for name in (*EDITED, "resid_mid")
        if MODULES[name](parts) is not None
    ]
    with ExitStack() as stack:
        stack.enter_context(recording(found, sites))
        for layer, parts in enumerate(found.anatomy.layers):
            for module, hook in _keepers(kept, layer, parts):
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            edited = [site for site in sites if site.layer == layer and site.component in EDITED]
            placed = [Placed(_unchanging(kept, site), slice(None), slice(None)) for site in edited]
            stack.enter_context(hooked(found.anatomy, layer, placed))
        yield kept


def _unchanging(kept: Kept, site: Site) -> Edit:
    def change(x: Tensor) -> Tensor:
        kept[site.component, site.layer] = x.clone()
        return x

    return Edit(site, change)


def _keepers(kept: Kept, layer: int, parts: Parts) -> Iterator[tuple[Any, Any]]:
    """Modules of a layer, and hooks that keep what they return."""

    def keep(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            kept[name, layer] = (args, output) if name == "routed" else output
            if name == "after":
                kept[name, layer] = hidden_of(output)
                kept["cache", layer] = next(
                    (x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None
                )

        return hook

    modules = {"after": parts.layer, "attention": parts.attention, "projected": parts.output}
    for name, module in (modules | {"routed": parts.experts}).items():
        if module is not None:
            yield module, keep(name)


def _seen(found: Trace, kept: Kept, layer: int) -> Seen:
    """What the pass showed of one layer."""
    parts, cache = found.anatomy.layers[layer], kept["cache", layer]
    cached = (getattr(cache, "layers", None) or [])[layer : layer + 1]
    held = [getattr(one, name, None) for one in cached for name in ("keys", "values")]
    # DeepSeek's cache holds what keys and values are made from, which is no head's.
    latent = getattr(parts.attention, "kv_lora_rank", None) is not None
    by_head = len(held) == 2 and not latent and all(isinstance(x, Tensor) and x.ndim == 4 for x in held)
    return Seen(
        parts=parts,
        batch=found.batch,
        before=found.inputs[layer],
        after=kept["after", layer],
        read={site.component: values for site, values in found.read.items() if site.layer == layer},
        edited={name: kept[name, layer] for name in EDITED if (name, layer) in kept},
        attention=kept.get(("attention", layer)),
        projected=kept.get(("projected", layer)),
        routed=kept.get(("routed", layer)),
        keys=held[0] if by_head else None,
        values=held[1] if by_head else None,
    )


def _stream(found: Trace, outputs: Sequence[Tensor]) -> str:
    """Why a model has no residual stream that its layers pass on; "" where it has."""
    modules = unwrapped(found.anatomy.model).named_modules()
    tables = (module for name, module in modules if name.endswith(".position_embeddings"))
    if any(getattr(table, "padding_idx", None) is not None for table in tables):
        return "its positions are counted from a padding token's, not from 0, as RoBERTa's are."
    depth, shape = found.anatomy.shape.layers, (*found.batch.ids.shape, found.inputs[0].shape[-1])
    if len(found.inputs) != depth or len(outputs) != depth:
        return f"its {depth} layers were run {len(found.inputs)} times in one pass; each has to run once."
    if any(x.shape != shape for x in (*found.inputs, *outputs)):
        return (
            f"its layers pass on {tuple(found.inputs[-1].shape)} numbers and not {shape}, a state per token."
        )
    for layer, (left, entered) in enumerate(zip(outputs, found.inputs[1:], strict=False)):
        if not equal(left, entered):
            return f"what leaves layer {layer} is not what enters layer {layer + 1}."
    for layer, states in enumerate((found.inputs[0], *outputs), -1):
        if not alike(states[1, -SHORT:], states[0, :SHORT]):
            return (
                "a prompt's states change with the padding before it or the tokens behind it (after layer "
                f"{layer}), so that its sites mean nothing in a batch. Take a causal language model."
            )
    return ""


def _resumed(found: Trace) -> tuple[str, bool, list[int]]:
    """Why layers cannot be called for some columns, whether for scattered ones, and which heed no mask."""
    if not found.cache:
        return "its layers take no cache of keys and values, so that runs cannot be resumed.", True, []
    kinds: dict[object, list[int]] = {}
    for layer, (parts, arguments) in enumerate(zip(found.anatomy.layers, found.arguments, strict=True)):
        unknown = [name for name, x in arguments.items() if name not in PLACED and not isinstance(x, PLAIN)]
        if unknown:
            return f"its layers take {unknown[0]}, which is not known by column: no run is resumed.", True, []
        if parts.attention is None:
            return f"layer {layer} has no attention that keeps keys and values: no run is resumed.", True, []
        inside = tuple(name for name, _ in parts.attention.named_children())
        kind = (type(parts.layer), type(parts.attention), inside, id(arguments.get("attention_mask")))
        kinds.setdefault(kind, []).append(layer)
    pointwise, deaf = True, []
    for layers in kinds.values():
        try:
            suffix, scattered, heeding = _called_again(found, layers[0])
        except Exception as error:  # noqa: BLE001  # whatever a layer of someone else's raises means the same
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"layer {layers[0]} cannot be run for some columns of a prompt ({why}).", True, []
        if not suffix:
            return (
                f"layer {layers[0]} gives other states when some columns of a prompt are run again.",
                True,
                [],
            )
        pointwise &= scattered and not _counts(found.anatomy.layers[layers[0]].attention)
        deaf += [] if heeding else layers
    return "", pointwise, deaf


def _counts(attention: Any) -> bool:
    """Whether attention counts columns itself, as if they followed each other, which shows in long prompts.

    GPT-Neo lays a mask of its own from the last column backwards; Llama 4 counts from what is cached.
    """
    masks = any(x.ndim > 1 and x.shape[-1] == x.shape[-2] for x in attention.buffers())
    return masks or bool(getattr(attention, "attn_temperature_tuning", False))


def _called_again(found: Trace, layer: int) -> tuple[bool, bool, bool]:
    """Whether a layer gives its own states from a column on, and at one column; whether it hears a cut."""
    inputs, expected, start = found.inputs[layer], found.value(Site("resid_post", layer)), TOKENS - SHORT
    rows = [Planned(row, row, layer, 0, ()) for row in range(2)]
    keys, values = Resumed(found, 0).keys_values(layer, inputs, rows)
    found.keys, found.values = ([x] * found.anatomy.shape.layers for x in (keys, values))
    resumed = Resumed(found, start)
    suffix = resumed.suffix(layer, inputs[:, start:], rows)
    # Two runs of one prompt, which share its keys and values; in the second, an edge is cut.
    cut = PlannedEdit(layer, (start,), KnockOut(layer, (start,), (0,)), wide=False)
    twice = [rows[0], Planned(1, 0, layer, 0, (cut,))]
    column, states = torch.tensor([start]), inputs[[0, 0], start : start + 1]
    one = resumed.at(layer, twice, column, *resumed.recorded(layer, twice), states)
    return (
        alike(suffix, expected[:, start:]),
        alike(one[:1], expected[:1, start : start + 1]),
        not equal(one[0], one[1]),
    )
