"""One recorded forward pass: what each decoder layer received, so that work can go on from any of them.

In: a model and a batch. Out: a `Trace`. The model is run as it is; its own code made the masks, the rotary
embeddings and the keys and values that are kept, and its own norm and head turn states into logits.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from safetynet.engine.batch import Batch, check_length
from safetynet.engine.hooks import contribution, dense_weights, exclusive, times, without_adapter
from safetynet.engine.sites import MODULES, Anatomy, Site
from safetynet.errors import InputError
from safetynet.models.blocks import hidden_of, received, unwrapped, with_hidden
from safetynet.models.parts import Parts, adapters
from safetynet.models.support import check_model

SUPPORTED = ("eager", "sdpa")
HEAD_VALUES = 2**24
"""Logits made at once, in numbers: 64 MB in fp32."""


@dataclass
class Trace:
    """A forward pass over a batch of B prompts of S columns."""

    anatomy: Anatomy
    batch: Batch
    inputs: list[Tensor] = field(default_factory=list)
    """(B, S, width) into each layer."""
    arguments: list[dict[str, Any]] = field(default_factory=list)
    """What else the model passed to each layer, but its cache."""
    cache: str = ""
    """Name by which layers take the cache; "" where none was passed."""
    keys: list[Tensor] = field(default_factory=list)
    """(B, kv heads, S, head size) of each layer, rotated; empty when nothing will be resumed."""
    values: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None
    """(B, S, width) of the last layer, before the final norm."""
    read: dict[Site, Tensor] = field(default_factory=dict)
    """(B, S, ...) values of the sites that were asked for."""
    logits: Tensor | None = None
    """(B, n, vocabulary) fp32 of the last n columns."""
    tupled: int = 0
    """Length of the tuple that this model's layers return; 0 where they return a tensor."""

    def value(self, site: Site) -> Tensor:
        """(B, S, k) values of a site that was asked for, or that every trace holds."""
        if site.component in ("embedding", "resid_pre"):
            return self.inputs[site.layer]
        if site.component == "resid_post":
            last = site.layer == self.anatomy.shape.layers - 1
            found = self.output if last else self.inputs[site.layer + 1]
            assert found is not None
            return found
        if site in self.read:
            return self.read[site]  # the tensor itself, not a view of it: gradients are asked for by identity
        return self.read[Site(site.component, site.layer, module=site.module)][..., self.anatomy.span(site)]


def trace(
    model: Any,
    batch: Batch,
    sites: Sequence[Site] = (),
    *,
    columns: int = 1,
    resume: bool = False,
) -> Trace:
    """Run the model once and keep what is asked for.

    Args:
        model: a causal LM of transformers in evaluation mode, with or without PEFT's wrapper.
        batch: the prompts.
        sites: whose values are kept, beside the residual stream before each layer; heads of one layer share
            one tensor.
        columns: logits of so many last columns are kept; 0 for none.
        resume: keep keys, values and heads, so that runs can start at any layer and column.

    Raises:
        InputError: if a site does not exist, a prompt is longer than the model's context, the model lies on
            several devices, uses an attention kernel that takes no mask or adds positions to prompts, or its
            runs cannot be resumed where that is asked for.
    """
    anatomy = Anatomy.of(model)
    check_length(model, batch)
    check_place(model)
    for site in sites:
        anatomy.check(site)
    found, verdict = Trace(anatomy, batch), anatomy.verdict
    if resume and verdict.resumable:
        raise InputError(f"model: {verdict.resumable}")
    if resume:
        sites = [*sites, *(Site("head", layer) for layer in sorted(verdict.plain))]
    cache = DynamicCache() if resume else None
    with torch.no_grad(), exclusive(model), recording(found, sites):
        output = forward(model, batch, columns, past_key_values=cache, use_cache=resume)
    if columns:
        found.logits = output.logits[:, -columns:].float()
    if cache is not None:
        layers: list[Any] = list(cache.layers)
        found.keys, found.values = [one.keys for one in layers], [one.values for one in layers]
    return found


def forward(model: Any, batch: Batch, columns: int = 1, **more: Any) -> Any:
    """One forward pass over a batch, with logits of the last columns, and at least one.

    Some models know no positions or keep all logits: they are given what they take.
    """
    given = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": batch.position_ids,
        "logits_to_keep": max(1, columns),
        **more,
    }
    taken = inspect.signature(unwrapped(model).forward).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        given = {name: value for name, value in given.items() if name in taken}
    return model(**given)


def check_place(model: Any) -> None:
    """Refuse what the engine cannot resume.

    Raises:
        InputError: if the model lies on several devices, its attention takes no mask, it is being trained, or
            its adapter puts something before the prompt.
    """
    check_model(model, "intervene")
    if model.training:
        raise InputError("model: it is in training mode, where dropout decides. Call model.eval() first.")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise InputError(
            f"model: it lies on several devices ({', '.join(sorted(devices))}). Load it on one "
            "(model.device), in 4 bit if it is too large."
        )
    attention = getattr(model.config, "_attn_implementation", "eager")
    if attention not in SUPPORTED:
        raise InputError(
            f"model: attention {attention!r} takes no mask of the engine's. Load it with attn_implementation "
            f"{' or '.join(SUPPORTED)}."
        )


@contextmanager
def recording(found: Trace, sites: Sequence[Site], detach: bool = True) -> Iterator[None]:
    """Fill a trace while the model runs; `detach=False` keeps values as they are in the graph."""
    by_layer: dict[int, set[Site]] = {}
    for site in sites:
        whole = site if site.component == "expert" else Site(site.component, site.layer, module=site.module)
        by_layer.setdefault(site.layer, set()).add(whole)
    with ExitStack() as stack:
        for index, parts in enumerate(found.anatomy.layers):
            stack.callback(parts.layer.register_forward_pre_hook(_keep_input(found), with_kwargs=True).remove)
            for site in by_layer.get(index, ()):
                for handle in _readers(found, parts, site, detach):
                    stack.callback(handle.remove)
        last = found.anatomy.layers[-1].layer

        def keep_output(_module: Any, _args: Any, output: Any) -> None:
            found.output = hidden_of(output)
            found.tupled = len(output) if isinstance(output, tuple | list) else 0

        stack.callback(last.register_forward_hook(keep_output).remove)
        yield


def _keep_input(found: Trace) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        given = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        first = next(iter(bound.signature.parameters))
        found.inputs.append(given.pop(first))
        for name in [name for name, value in given.items() if isinstance(value, Cache)]:
            found.cache = name
            del given[name]
        found.arguments.append(given)

    return hook


def _readers(found: Trace, parts: Parts, site: Site, detach: bool) -> list[Any]:
    """Hooks that keep the values of one site."""
    if site.component in ("embedding", "resid_pre", "resid_post"):
        return []  # every trace holds them
    if site.component == "adapter" and not site.module:
        raise InputError(f"site {site}: its values cannot be read; name a module for an adapter.")
    rows = found.batch.ids.shape[0]

    def keep(values: Tensor) -> None:
        if detach:
            # A copy: Falcon adds to what its MLP has returned. OPT's MLP gets rows below each other.
            values = values.detach().clone().reshape(rows, -1, values.shape[-1])
        found.read[site] = values

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(received(module, args, kwargs))

    def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        values = _value(found, parts, site, module, args, output)
        keep(values)
        if detach or site.component not in ("attn_out", "mlp_out"):
            return None
        # Gradients are asked for what is added, so that it has to be on the way to the answer.
        return with_hidden(output, times(values, 1 / parts.multiplier))

    if site.component == "adapter":
        return [adapters(parts.layer)[site.module].register_forward_hook(after)]
    module = MODULES[site.component](parts)
    if site.component in ("head", "resid_mid"):
        return [module.register_forward_pre_hook(before, with_kwargs=True)]
    return [module.register_forward_hook(after)]


def _value(found: Trace, parts: Parts, site: Site, module: Any, args: tuple[Any, ...], output: Any) -> Tensor:
    """The values of a site, from the call of its module."""
    match site.component:
        case "attn_out" | "mlp_out":
            return times(hidden_of(output), parts.multiplier)
        case "router":
            return dense_weights(args[1], args[2], found.anatomy.shape.experts)
        case "expert":
            return times(contribution(module.forward, args, site.index), parts.multiplier)
        case "adapter":
            return output - without_adapter(module, args)
    return hidden_of(output)


def head(trace: Trace, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of states that left the last layer, (R, n, width), through the model's own norm and head.

    The model is called with its layers passed over, so that what a family does to its logits (capping,
    scaling) is done here too.

    Yields:
        A slice of the R rows and their logits, (rows, n, vocabulary) fp32, so that a large vocabulary does
        not decide the memory.
    """
    inner = unwrapped(trace.anatomy.model)
    vocabulary = inner.config.get_text_config().vocab_size
    step = max(1, HEAD_VALUES // (vocabulary * states.shape[1]))
    for start in range(0, len(states), step):
        chosen = slice(start, min(start + step, len(states)))
        part = states[chosen]
        with exclusive(trace.anatomy.model), _passed_over(trace, part):
            ids = torch.zeros(part.shape[:2], dtype=torch.long, device=part.device)
            logits = inner(input_ids=ids, use_cache=False).logits.float()
        yield chosen, logits  # with the layers in place: whoever takes them may run the model, or fail


@contextmanager
def _passed_over(trace: Trace, states: Tensor) -> Iterator[None]:
    """Every layer returns `states` and computes nothing."""
    layers = [parts.layer for parts in trace.anatomy.layers]
    own = [layer.__dict__.get("forward") for layer in layers]
    result = (states, *[None] * (trace.tupled - 1)) if trace.tupled else states
    try:
        for layer in layers:
            layer.forward = lambda *args, **kwargs: result
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
