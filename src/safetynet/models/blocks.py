"""Where a model's decoder layers are, whatever its family and whether an adapter is around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetynet.errors import InputError


def unwrapped(model: Any) -> Any:
    """The transformers model itself, without PEFT's wrapper; LoRA layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers in order; their outputs are the residual stream before the final norm.

    Raises:
        InputError: if no list of modules is as long as the configuration says the model is deep.
    """
    from torch.nn import ModuleList

    inner = unwrapped(model)
    depth = inner.config.get_text_config().num_hidden_layers
    for module in inner.modules():
        # The first is the decoder's: lists inside it (experts) come later in this walk.
        if isinstance(module, ModuleList) and len(module) == depth:
            return list(module)
    raise InputError(
        f"{type(inner).__name__}: no list of {depth} layers was found, so its activations cannot be read. "
        "Use a decoder-only model of transformers."
    )


@contextmanager
def shortened(model: Any, most: int) -> Iterator[None]:
    """Let a transformers model run through some of its layers only: the first, the last and others between.

    For a probe that has to be cheap in a deep model; of one with no more layers than `most` all are run.
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
    chosen = sorted({round(i * (len(layers) - 1) / (most - 1)) for i in range(most)})
    setattr(owner, name, ModuleList([layers[i] for i in chosen]))
    try:
        yield
    finally:
        setattr(owner, name, whole)


def hidden_of(output: Any) -> Any:
    """The hidden states in a layer's output, which is a tensor or a tuple that begins with one."""
    return output[0] if isinstance(output, tuple) else output
