"""Where a model's decoder layers are, whatever its family and whether an adapter is around it."""

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


def hidden_of(output: Any) -> Any:
    """The hidden states in a layer's output, which is a tensor or a tuple that begins with one."""
    return output[0] if isinstance(output, tuple) else output
