"""Where a model's decoder layers are, and what their hooks see, whatever its family and what is around it."""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from safetynet.errors import InputError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's call, as a forward pre-hook gets and returns them."""


def unwrapped(model: Any) -> Any:
    """The transformers model itself, without the wrappers of PEFT and torch.compile; LoRA layers stay."""
    model = getattr(model, "_orig_mod", model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, "_orig_mod", inner)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers in order; their outputs are the residual stream before the final norm.

    Raises:
        InputError: if the model has an encoder too, or no list of modules is as long as the configuration
            says the model is deep.
    """
    from torch.nn import ModuleList

    inner = unwrapped(model)
    if getattr(inner.config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(inner).__name__}: an encoder reads its prompts, so that no decoder has all their states. "
            "Use a decoder-only model of transformers."
        )
    depth = inner.config.get_text_config().num_hidden_layers
    # A model of images and text may have an encoder that is as deep as the decoder, and stands before it.
    scopes = [inner.get_decoder(), inner] if hasattr(inner, "get_decoder") else [inner]
    for module in (module for scope in scopes for module in scope.modules()):
        # The first is the decoder's: lists inside it (experts) come later in this walk.
        if isinstance(module, ModuleList) and len(module) == depth:
            return list(module)
    raise InputError(
        f"{type(inner).__name__}: no list of {depth} layers was found, so its activations cannot be read. "
        "Use a decoder-only model of transformers."
    )


@contextmanager
def shortened(model: Any, most: int) -> Iterator[None]:
    """Let a transformers model run through its first layers only.

    For a probe that has to be cheap in a deep model; of one with no more layers than `most` all are run.
    Models tell by a layer's place in the list which mask and positions it takes, so that no other will do.
    """
    from torch.nn import ModuleList

    layers = decoder_layers(model)
    lists = (
        (owner, name, module)
        for owner in model.modules()
        for name, module in owner.named_children()
        if isinstance(module, ModuleList) and list(module) == layers
    )
    owner, name, whole = next(lists)
    if len(layers) <= most:
        yield
        return
    setattr(owner, name, ModuleList(layers[:most]))
    try:
        yield
    finally:
        setattr(owner, name, whole)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout and gradient checkpointing, which also switches the cache off; module by module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def replaced(modules: Sequence[Any], forward: Callable[..., Any]) -> Iterator[None]:
    """Let modules compute nothing of their own: a call of one is, hooks apart, a call of `forward`."""
    # Only what stands in the instance: accelerate and PEFT may have put a forward of theirs there.
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            if original is None:
                del module.forward
            else:
                module.forward = original


def hidden_of(output: Any) -> Any:
    """The hidden states in a layer's output, which is a tensor or a sequence that begins with one."""
    return output[0] if isinstance(output, tuple | list) else output


def with_hidden(output: Any, states: Any) -> Any:
    """A layer's output with other hidden states."""
    if isinstance(output, list):
        return [states, *output[1:]]
    return (states, *output[1:]) if isinstance(output, tuple) else states


def received(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module is called with first, by position or by name: a layer's hidden states."""
    return args[0] if args else kwargs[_first_name(module)]


def receiving(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], states: Any) -> Arguments:
    """The same call with another first argument."""
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {_first_name(module): states})


def _first_name(module: Any) -> str:
    return next(iter(inspect.signature(module.forward).parameters))


class _Eager:
    """How many threads want code of torch.compile to run as it is written, and how it ran before them."""

    lock = threading.Lock()
    threads = 0
    stance: Any = None


@contextmanager
def eagerly() -> Iterator[None]:
    """Run what torch.compile has made as it was written: compiled code calls no hook that came later.

    The compiler's stance is the process's, not the thread's: the first that needs it sets it, and the last
    puts back what was there.
    """
    import torch

    with _Eager.lock:
        if not _Eager.threads:
            _Eager.stance = torch.compiler.set_stance("force_eager")
            _Eager.stance.__enter__()
        _Eager.threads += 1
    try:
        yield
    finally:
        with _Eager.lock:
            _Eager.threads -= 1
            if not _Eager.threads:
                _Eager.stance.__exit__(None, None, None)
