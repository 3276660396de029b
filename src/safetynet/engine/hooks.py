"""Hooks that apply edits while a layer runs, and are removed when it has run, whatever happened.

In: a layer's parts and edits with their rows and columns in the batch. The same hooks serve resumed runs,
which call single layers, and `intervening`, under which the whole model runs, generation included.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safetynet.engine.edits import Edit, Intervention, KnockOut, check_set
from safetynet.engine.sites import Architecture
from safetynet.errors import InputError
from safetynet.models.blocks import Arguments, eagerly, hidden_of, received, receiving, unwrapped, with_hidden
from safetynet.models.causal_lm import CausalLM
from safetynet.models.parts import Parts, adapters

Index = Any
"""Rows or columns of a batch: an int, a slice, or a list of ints."""

_LOCKS: "weakref.WeakKeyDictionary[Any, threading.RLock]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class PlacedEdit:
    """An edit, and where in the tensors of this call it acts."""

    edit: Edit
    row: Index
    columns: Index


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Let one thread at a time work on a model, so that nobody sees another's hooks, and all are called."""
    # One lock for a model with PEFT's wrapper and without: the layers are the same.
    with _LOCKS.setdefault(unwrapped(model), threading.RLock()), eagerly():
        yield


@contextmanager
def hooked(architecture: Architecture, layer: int, placed: Sequence[PlacedEdit]) -> Iterator[None]:
    """Apply edits of one layer while it runs, in the order in which it computes their sites."""
    parts, rows = architecture.layers[layer], _BatchRows()
    by_component: dict[str, list[PlacedEdit]] = {}
    for item in placed:
        by_component.setdefault(item.edit.site.component, []).append(item)
    with ExitStack() as stack:
        if placed:
            stack.callback(parts.layer.register_forward_pre_hook(rows, with_kwargs=True).remove)
        for component, hooks in _HOOKS.items():
            if component in by_component:
                for handle in hooks(architecture, parts, by_component[component], rows):
                    stack.callback(handle.remove)
        yield


@contextmanager
def intervening(model: CausalLM, edits: Sequence[Intervention]) -> Iterator[Any]:
    """Run a model with edits at all positions of all prompts, in `forward` as in `generate`.

    Edits have no positions: what holds for one prompt's positions is not known of another's.

    Yields:
        The model itself.

    Raises:
        InputError: for a site that does not exist, a knock-out, or an edit with positions.
    """
    architecture = Architecture.of(model)
    by_layer: dict[int, list[PlacedEdit]] = {}
    for edit in edits:
        if isinstance(edit, KnockOut) or edit.positions is not None:
            raise InputError(
                f"intervening: {edit.site} is edited at some positions; only edits everywhere work."
            )
        architecture.check(edit.site)
        by_layer.setdefault(edit.site.layer, []).append(PlacedEdit(edit, slice(None), slice(None)))
    check_set([(edit, (0,)) for edit in edits])
    with exclusive(model), ExitStack() as stack:
        for layer, placed in by_layer.items():
            stack.enter_context(hooked(architecture, layer, placed))
        yield model


def change_at(architecture: Architecture, values: Tensor, placed: Sequence[PlacedEdit]) -> Tensor:
    """Apply edits to values, (R, T, width); the argument is left as it is."""
    values = values.clone()
    for item in placed:
        span = architecture.span(item.edit.site)
        # (k, width of the site): a change knows neither rows nor columns, nor the heads beside its own.
        view = values[item.row, item.columns][..., span]
        changed = item.edit.change(view.reshape(-1, view.shape[-1]))
        if changed.numel() != view.numel():
            shape = (view.numel() // view.shape[-1], view.shape[-1])
            raise InputError(
                f"site {item.edit.site}: the change was given values of shape {shape} and returned "
                f"{tuple(changed.shape)}. It has to return as many."
            )
        values[item.row][..., item.columns, span] = changed.reshape(view.shape).to(values.dtype)
    return values


def _input_of(get: Callable[[Parts], Any]) -> Callable[..., list[Any]]:
    def hooks(architecture: Architecture, parts: Parts, placed: Sequence[PlacedEdit], _: Any) -> list[Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
            values = change_at(architecture, received(module, args, kwargs), placed)
            return receiving(module, args, kwargs, values)

        return [get(parts).register_forward_pre_hook(hook, with_kwargs=True)]

    return hooks


def _output_of(get: Callable[[Parts], Any], added: bool = False) -> Callable[..., list[Any]]:
    """Edits see what a module returns; what it adds to the residual stream they see as it is added."""

    def hooks(
        architecture: Architecture, parts: Parts, placed: Sequence[PlacedEdit], rows: "_BatchRows"
    ) -> list[Any]:
        factor = parts.multiplier if added else 1.0

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            states = hidden_of(output)  # (R, T, width), or (R * T, width) where a family's MLP joins rows
            values = times(rows.apart(states) if added else states, factor)
            changed = times(change_at(architecture, values, placed), 1 / factor)
            return with_hidden(output, changed.reshape(states.shape))

        return [get(parts).register_forward_hook(hook)]

    return hooks


def _resid_mid(architecture: Architecture, parts: Parts, placed: Sequence[PlacedEdit], _: Any) -> list[Any]:
    """The sum itself is no module's output: what attention adds is changed until the sum is right."""
    before: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before[:] = [received(module, args, kwargs)]

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        added = times(hidden_of(output), parts.multiplier)
        stream = before[0].to(added.device)
        changed = change_at(architecture, stream + added, placed) - stream
        return with_hidden(output, times(changed, 1 / parts.multiplier))

    return [
        parts.layer.register_forward_pre_hook(keep, with_kwargs=True),
        parts.attention_end.register_forward_hook(hook),
    ]


def _adapters(
    architecture: Architecture, parts: Parts, placed: Sequence[PlacedEdit], rows: "_BatchRows"
) -> list[Any]:
    def hook_of(items: Sequence[PlacedEdit]) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # The update is no module's output. It is what the call gives with the adapter less without.
            base = without_adapter(module, args)
            update = rows.apart(output - base)
            return base + change_at(architecture, update, items).reshape(base.shape)

        return hook

    handles = []
    for name, module in adapters(parts.layer).items():
        items = [item for item in placed if item.edit.site.module in ("", name)]
        if items:
            handles.append(module.register_forward_hook(hook_of(items)))
    return handles


def _router(
    architecture: Architecture, parts: Parts, placed: Sequence[PlacedEdit], rows: "_BatchRows"
) -> list[Any]:
    """Edits see routing weights, (k, experts), 0 where an expert is not chosen."""

    def hook(_: Any, args: tuple[Any, ...]) -> Any:
        if rows.probing:
            return args
        x, index, weights = args  # (tokens, width), (tokens, k) and (tokens, k)
        dense = rows.apart(dense_weights(index, weights, architecture.shape.experts))
        flat = change_at(architecture, dense, placed).flatten(0, 1)
        # A re-routed token may have more experts than the model gives it, never fewer slots.
        slots = max(index.shape[1], int((flat != 0).sum(1).max()))
        experts = flat.abs().topk(slots, dim=1).indices
        return x, experts.to(index), flat.gather(1, experts).to(weights)

    return [parts.experts.register_forward_pre_hook(hook)]


def _expert(
    architecture: Architecture, parts: Parts, placed: Sequence[PlacedEdit], rows: "_BatchRows"
) -> list[Any]:
    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if rows.probing:
            return output
        for item in placed:
            with rows.probe():  # with the adapter's edits in place, and without the router's once more
                written = contribution(module, args, item.edit.site.index)
            added = times(rows.apart(written), parts.multiplier)
            change = times(change_at(architecture, added, [item]) - added, 1 / parts.multiplier)
            output = output + change.flatten(0, 1)  # (R * T, width): experts see tokens, not rows
        return output

    return [parts.experts.register_forward_hook(hook)]


def times(states: Tensor, factor: float) -> Tensor:
    """The states times a number; themselves where that is 1."""
    return states if factor == 1 else states * factor


def without_adapter(module: Any, args: tuple[Any, ...]) -> Tensor:
    """What a LoRA module would have returned without its own update; adapters inside it stay."""
    disabled = module._disable_adapters
    module._disable_adapters = True
    try:
        return module.forward(*args)
    finally:
        module._disable_adapters = disabled


def contribution(experts: Callable[..., Tensor], args: tuple[Any, ...], index: int | None) -> Tensor:
    """What one expert adds, (tokens, width), its routing weight included; of all experts for None."""
    x, routed, weights = args
    return experts(x, routed, weights if index is None else weights * (routed == index))


def dense_weights(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """(tokens, k) chosen experts and weights to (tokens, experts)."""
    dense = torch.zeros(len(index), experts, dtype=weights.dtype, device=weights.device)
    return dense.scatter_add(1, index, weights)


class _BatchRows:
    """A pre-hook of the layer that remembers its batch, whose rows MLPs and experts may see joined."""

    def __init__(self) -> None:
        self.count = 1
        self.probing = False

    @contextmanager
    def probe(self) -> Iterator[None]:
        """The experts are called once more, to be read and not to be edited."""
        self.probing = True
        try:
            yield
        finally:
            self.probing = False

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count = received(module, args, kwargs).shape[0]

    def apart(self, x: Tensor) -> Tensor:
        """(B * S, width) or (B, S, width) to (B, S, width)."""
        return x.reshape(self.count, -1, x.shape[-1])


# In the order of computing: of two hooks on one module the later sees what the earlier made of its output.
_HOOKS: dict[str, Callable[..., list[Any]]] = {
    "adapter": _adapters,
    "embedding": _input_of(lambda parts: parts.layer),
    "resid_pre": _input_of(lambda parts: parts.layer),
    "query": _output_of(lambda parts: parts.query),
    "key": _output_of(lambda parts: parts.key),
    "value": _output_of(lambda parts: parts.value),
    "head": _input_of(lambda parts: parts.output),
    "attn_out": _output_of(lambda parts: parts.attention_end, added=True),
    "resid_mid": _resid_mid,
    "router": _router,
    "expert": _expert,
    "mlp_out": _output_of(lambda parts: parts.mlp_end, added=True),
    "resid_post": _output_of(lambda parts: parts.layer),
}
