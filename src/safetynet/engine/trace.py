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
from safetynet.engine.sites import MODULES, Architecture, Site
from safetynet.errors import InputError
from safetynet.models.blocks import hidden_of, received, replaced, unwrapped, with_hidden
from safetynet.models.causal_lm import CausalLM
from safetynet.models.parts import Parts, adapters
from safetynet.models.support import check_model

ATTENTION_KERNELS = ("eager", "sdpa")
"""Implementations of attention that take a mask."""
LOGITS_AT_ONCE = 2**24
"""Numbers: 64 MB in fp32."""


@dataclass
class Trace:
    """A forward pass over a batch of B prompts of S columns."""

    architecture: Architecture
    batch: Batch
    inputs: list[Tensor] = field(default_factory=list)
    """(B, S, width) into each layer."""
    arguments: list[dict[str, Any]] = field(default_factory=list)
    """What else the model passed to each layer, but its cache."""
    cache_name: str = ""
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
    tuple_length: int = 0
    """Of what this model's layers return; 0 where they return a tensor."""

    def value(self, site: Site) -> Tensor:
        """(B, S, k) values of a site that was asked for, or that every trace holds."""
        if site.component in ("embedding", "resid_pre"):
            return self.inputs[site.layer]
        if site.component == "resid_post":
            if site.layer < self.architecture.shape.layers - 1:
                return self.inputs[site.layer + 1]
            assert self.output is not None
            return self.output
        if site in self.read:
            return self.read[site]  # the tensor itself, not a view of it: gradients are asked for by identity
        return self.read[Site(site.component, site.layer, module=site.module)][
            ..., self.architecture.span(site)
        ]


def trace(
    model: CausalLM,
    batch: Batch,
    sites: Sequence[Site] = (),
    *,
    columns: int = 1,
    resume: bool = False,
) -> Trace:
    """Run the model once and keep what is asked for.

    Args:
        model: the model.
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
    architecture = Architecture.of(model)
    check_length(model, batch)
    check_supported(model)
    for site in sites:
        architecture.check(site)
    recorded, checked = Trace(architecture, batch), architecture.checked
    if resume and checked.not_resumable:
        raise InputError(f"model: {checked.not_resumable}")
    if resume:
        sites = [*sites, *(Site("head", layer) for layer in sorted(checked.plain_attention))]
    cache = DynamicCache() if resume else None
    with torch.no_grad(), exclusive(model), recording(recorded, sites):
        output = forward(model, batch, columns, past_key_values=cache, use_cache=resume)
    if columns:
        recorded.logits = output.logits[:, -columns:].float()
    if cache is not None:
        layers: list[Any] = list(cache.layers)
        recorded.keys, recorded.values = [x.keys for x in layers], [x.values for x in layers]
    return recorded


def forward(model: CausalLM, batch: Batch, columns: int = 1, **more: Any) -> Any:
    """One forward pass over a batch, with logits of the last columns, and at least one.

    Some models take no positions or keep all logits: they get only what they take.
    """
    arguments = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": batch.position_ids,
        "logits_to_keep": max(1, columns),
        **more,
    }
    parameters = inspect.signature(unwrapped(model).forward).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return model(**arguments)


def check_supported(model: CausalLM) -> None:
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
    if attention not in ATTENTION_KERNELS:
        raise InputError(
            f"model: attention {attention!r} takes no mask of the engine's. Load it with attn_implementation "
            f"{' or '.join(ATTENTION_KERNELS)}."
        )


@contextmanager
def recording(recorded: Trace, sites: Sequence[Site], detach: bool = True) -> Iterator[None]:
    """Fill a trace while the model runs; `detach=False` keeps values as they are in the graph."""
    whole = {  # heads of a layer share one tensor; what one expert adds is computed for that one alone
        site if site.component == "expert" else Site(site.component, site.layer, module=site.module)
        for site in sites
    }
    layers = recorded.architecture.layers

    def keep_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # By their names, since families pass some arguments by position and others by name.
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        recorded.inputs.append(arguments.pop(next(iter(bound.signature.parameters))))
        # A resumed layer gets a cache of its own, under the same name.
        for name in [name for name, value in arguments.items() if isinstance(value, Cache)]:
            recorded.cache_name = name
            del arguments[name]
        recorded.arguments.append(arguments)

    def keep_output(_module: Any, _args: Any, output: Any) -> None:
        recorded.output = hidden_of(output)
        recorded.tuple_length = len(output) if isinstance(output, tuple | list) else 0

    with ExitStack() as stack:
        for index, parts in enumerate(layers):
            stack.callback(parts.layer.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            for site in whole:
                # The stream between layers is kept in any case: it is what the next one gets.
                if site.layer == index and site.component not in ("embedding", "resid_pre", "resid_post"):
                    stack.callback(_reader(recorded, parts, site, detach).remove)
        stack.callback(layers[-1].layer.register_forward_hook(keep_output).remove)
        yield


def _reader(recorded: Trace, parts: Parts, site: Site, detach: bool) -> Any:
    """A hook that keeps the values of one site."""
    if site.component == "adapter" and not site.module:
        raise InputError(f"site {site}: its values cannot be read; name a module for an adapter.")
    rows = len(recorded.batch.ids)

    def keep(values: Tensor) -> None:
        if detach:
            # A copy: Falcon adds to what its MLP has returned. OPT's MLP gets rows below each other.
            values = values.detach().clone().reshape(rows, -1, values.shape[-1])
        recorded.read[site] = values

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(received(module, args, kwargs))

    def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        match site.component:
            case "attn_out" | "mlp_out":
                values = times(hidden_of(output), parts.multiplier)
            case "router":
                values = dense_weights(args[1], args[2], recorded.architecture.shape.experts)
            case "expert":
                values = times(contribution(module.forward, args, site.index), parts.multiplier)
            case "adapter":
                values = output - without_adapter(module, args)
            case _:
                values = hidden_of(output)
        keep(values)
        # Gradients are asked for what is added, so that it has to be on the way to the answer.
        if not detach and site.component in ("attn_out", "mlp_out"):
            return with_hidden(output, times(values, 1 / parts.multiplier))
        return without_adapter(module, args) + values if not detach and site.component == "adapter" else None

    if site.component == "adapter":
        return adapters(parts.layer)[site.module].register_forward_hook(after)
    module = MODULES[site.component](parts)
    if site.component in ("head", "resid_mid"):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def logits_of(recorded: Trace, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of states that left the last layer, (R, n, width), through the model's own norm and head.

    The model is called with its layers passed over, so that what a family does to its logits (capping,
    scaling) is done here too.

    Yields:
        A slice of the R rows and their logits, (rows, n, vocabulary) fp32, so that a large vocabulary does
        not decide the memory.
    """
    model = recorded.architecture.model
    inner = unwrapped(model)
    vocabulary = inner.config.get_text_config().vocab_size
    step = max(1, LOGITS_AT_ONCE // (vocabulary * states.shape[1]))
    layers = [parts.layer for parts in recorded.architecture.layers]
    nothing = [None] * (recorded.tuple_length - 1)
    for start in range(0, len(states), step):
        part = slice(start, min(start + step, len(states)))
        output = (states[part], *nothing) if recorded.tuple_length else states[part]
        # Every layer passes on the same states, so that the last one's output is theirs, whatever goes in.
        with exclusive(model), replaced(layers, lambda *_, output=output, **__: output):
            ids = torch.zeros(states[part].shape[:2], dtype=torch.long, device=states.device)
            logits = inner(input_ids=ids, use_cache=False).logits.float()
        yield part, logits  # with the layers in place: whoever takes them may run the model, or fail
