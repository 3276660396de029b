"""Hooks that apply edits while a layer runs, and are gone when it has run, whatever happened.

In: a layer's parts and edits with their places in the batch. One set of hooks serves the engine, which runs
single layers, and `intervening`, under which the whole model runs, generation included.
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
from safetynet.engine.sites import Anatomy
from safetynet.errors import InputError
from safetynet.models.blocks import Arguments, eagerly, hidden_of, received, receiving, unwrapped, with_hidden
from safetynet.models.parts import Parts, adapters

Index = Any
"""Rows or columns of a batch: an int, a slice, or a list of ints."""

_LOCKS: "weakref.WeakKeyDictionary[Any, threading.RLock]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Placed:
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
def hooked(anatomy: Anatomy, layer: int, placed: Sequence[Placed]) -> Iterator[None]:
    """Apply edits of one layer while it runs, in the order in which it computes their sites."""
    parts, rows = anatomy.layers[layer], _Rows()
    by_component: dict[str, list[Placed]] = {}
    for one in placed:
        by_component.setdefault(one.edit.site.component, []).append(one)
    with ExitStack() as stack:
        if placed:
            stack.callback(parts.layer.register_forward_pre_hook(rows, with_kwargs=True).remove)
        for component, hooks in _HOOKS.items():
            if component in by_component:
                for handle in hooks(anatomy, parts, by_component[component], rows):
                    stack.callback(handle.remove)
        yield


@contextmanager
def intervening(model: Any, edits: Sequence[Intervention]) -> Iterator[Any]:
    """Run a model with edits at all positions of all prompts, in `forward` as in `generate`.

    Args:
        model: a causal LM of transformers.
        edits: without positions: what holds for one prompt's positions is not known of another's.

    Yields:
        The model itself.

    Raises:
        InputError: for a site that does not exist, a knock-out, or an edit with positions.
    """
    anatomy = Anatomy.of(model)
    by_layer: dict[int, list[Placed]] = {}
    for edit in edits:
        if isinstance(edit, KnockOut) or edit.positions is not None:
            raise InputError(
                f"intervening: {edit.site} is edited at some positions; only edits everywhere work."
            )
        anatomy.check(edit.site)
        by_layer.setdefault(edit.site.layer, []).append(Placed(edit, slice(None), slice(None)))
    check_set([(edit, (0,)) for edit in edits])
    with exclusive(model), ExitStack() as stack:
        for layer, placed in by_layer.items():
            stack.enter_context(hooked(anatomy, layer, placed))
        yield model


def change_at(anatomy: Anatomy, values: Tensor, placed: Sequence[Placed]) -> Tensor:
    """Apply edits to values, (R, T, width); the argument is left as it is."""
    values = values.clone()
    for one in placed:
        span = anatomy.span(one.edit.site)
        view = values[one.row, one.columns][..., span]
        changed = one.edit.change(view.reshape(-1, view.shape[-1]))
        if changed.numel() != view.numel():
            wanted = (view.numel() // view.shape[-1], view.shape[-1])
            raise InputError(
                f"site {one.edit.site}: the change was given values of shape {wanted} and returned "
                f"{tuple(changed.shape)}. It has to return as many."
            )
        values[one.row][..., one.columns, span] = changed.reshape(view.shape).to(values.dtype)
    return values


def _layer_input(anatomy: Anatomy, parts: Parts, placed: Sequence[Placed], _: Any) -> list[Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return receiving(module, args, kwargs, change_at(anatomy, received(module, args, kwargs), placed))

    return [parts.layer.register_forward_pre_hook(hook, with_kwargs=True)]


def _output_of(get: Callable[[Parts], Any]) -> Callable[..., list[Any]]:
    def hooks(anatomy: Anatomy, parts: Parts, placed: Sequence[Placed], _: Any) -> list[Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            return with_hidden(output, change_at(anatomy, hidden_of(output), placed))

        return [get(parts).register_forward_hook(hook)]

    return hooks


def _added_by(get: Callable[[Parts], Any]) -> Callable[..., list[Any]]:
    """Edits see what is added to the residual stream, and change what the model multiplies to get it."""

    def hooks(anatomy: Anatomy, parts: Parts, placed: Sequence[Placed], rows: "_Rows") -> list[Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            states = hidden_of(output)
            added = times(rows.apart(states), parts.multiplier)
            changed = times(change_at(anatomy, added, placed), 1 / parts.multiplier)
            return with_hidden(output, changed.reshape(states.shape))

        return [get(parts).register_forward_hook(hook)]

    return hooks


def times(states: Tensor, factor: float) -> Tensor:
    """The states times a number; themselves where that is 1."""
    return states if factor == 1 else states * factor


def _heads(anatomy: Anatomy, parts: Parts, placed: Sequence[Placed], _: Any) -> list[Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return receiving(module, args, kwargs, change_at(anatomy, received(module, args, kwargs), placed))

    return [parts.output.register_forward_pre_hook(hook, with_kwargs=True)]


def _resid_mid(anatomy: Anatomy, parts: Parts, placed: Sequence[Placed], _: Any) -> list[Any]:
    """The sum itself is nobody's output: what attention adds is changed so that the sum comes out right."""
    seen: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [received(module, args, kwargs)]

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        added = times(hidden_of(output), parts.multiplier)
        before = seen[0].to(added.device)
        changed = change_at(anatomy, before + added, placed) - before
        return with_hidden(output, times(changed, 1 / parts.multiplier))

    return [
        parts.layer.register_forward_pre_hook(keep, with_kwargs=True),
        parts.attention_end.register_forward_hook(hook),
    ]


def _adapters(anatomy: Anatomy, parts: Parts, placed: Sequence[Placed], rows: "_Rows") -> list[Any]:
    handles = []
    for name, module in adapters(parts.layer).items():
        own = [one for one in placed if one.edit.site.module in ("", name)]
        if own:
            handles.append(module.register_forward_hook(_adapter_hook(anatomy, own, rows)))
    return handles


def _adapter_hook(anatomy: Anatomy, placed: Sequence[Placed], rows: "_Rows") -> Any:
    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        base = without_adapter(module, args)
        return base + change_at(anatomy, rows.apart(output - base), placed).reshape(base.shape)

    return hook


def without_adapter(module: Any, args: tuple[Any, ...]) -> Tensor:
    """What a LoRA module would have returned without its own update; adapters inside it stay."""
    was = module._disable_adapters
    module._disable_adapters = True
    try:
        return module.forward(*args)
    finally:
        module._disable_adapters = was


def _router(anatomy: Anatomy, parts: Parts, placed: Sequence[Placed], rows: "_Rows") -> list[Any]:
    """Edits see routing weights, (k, experts), 0 where an expert is not chosen."""

    def hook(_: Any, args: tuple[Any, ...]) -> Any:
        if rows.asking:
            return args
        x, index, weights = args
        dense = rows.apart(dense_weights(index, weights, anatomy.shape.experts))
        flat = rows.joined(change_at(anatomy, dense, placed))
        # A re-routed token may have more experts than the model gives it, never fewer slots.
        chosen = flat.abs().topk(max(index.shape[1], int((flat != 0).sum(1).max())), dim=1).indices
        return x, chosen.to(index), flat.gather(1, chosen).to(weights)

    return [parts.experts.register_forward_pre_hook(hook)]


def _expert(anatomy: Anatomy, parts: Parts, placed: Sequence[Placed], rows: "_Rows") -> list[Any]:
    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if rows.asking:
            return output
        changed = output
        for one in placed:
            with rows.ask():  # with the adapter's edits in place, and without the router's once more
                written = contribution(module, args, one.edit.site.index)
            own = times(rows.apart(written), parts.multiplier)
            difference = times(change_at(anatomy, own, [one]) - own, 1 / parts.multiplier)
            changed = changed + rows.joined(difference)
        return changed

    return [parts.experts.register_forward_hook(hook)]


def contribution(experts: Callable[..., Tensor], args: tuple[Any, ...], index: int | None) -> Tensor:
    """What one expert adds, (tokens, width), its routing weight included; of all experts for None."""
    x, chosen, weights = args
    return experts(x, chosen, weights if index is None else weights * (chosen == index))


def dense_weights(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """(tokens, k) chosen experts and weights to (tokens, experts)."""
    dense = torch.zeros(len(index), experts, dtype=weights.dtype, device=weights.device)
    return dense.scatter_add(1, index, weights)


class _Rows:
    """A pre-hook of the layer that remembers the batch, whose rows MLP and experts may see joined."""

    def __init__(self) -> None:
        self.count = 1
        self.asking = False

    @contextmanager
    def ask(self) -> Iterator[None]:
        """The experts are called once more, to be asked and not to be edited."""
        self.asking = True
        try:
            yield
        finally:
            self.asking = False

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count = received(module, args, kwargs).shape[0]

    def apart(self, x: Tensor) -> Tensor:
        return x.reshape(self.count, -1, x.shape[-1])

    def joined(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])


# In the order of computing: of two hooks on one module the later sees what the earlier made of its output.
_HOOKS: dict[str, Callable[..., list[Any]]] = {
    "adapter": _adapters,
    "embedding": _layer_input,
    "resid_pre": _layer_input,
    "query": _output_of(lambda parts: parts.query),
    "key": _output_of(lambda parts: parts.key),
    "value": _output_of(lambda parts: parts.value),
    "head": _heads,
    "attn_out": _added_by(lambda parts: parts.attention_end),
    "resid_mid": _resid_mid,
    "router": _router,
    "expert": _expert,
    "mlp_out": _added_by(lambda parts: parts.mlp_end),
    "resid_post": _output_of(lambda parts: parts.layer),
}
