"""What the rest of the package asks of a language model, so that its type is written down once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class CausalLM(Protocol):
    """A causal language model of transformers in evaluation mode, with PEFT's wrapper or without.

    `unwrapped` of `models.blocks` gives the model inside of wrappers, `decoder_layers` its layers.
    """

    config: Any
    training: bool

    @property
    def device(self) -> Any:
        """Where its weights are; all of them on one device."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass, with `logits` (B, n, vocabulary) in the output."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids, (B, prompt and answer)."""

    def get_input_embeddings(self) -> Any:
        """The table of token embeddings."""

    def parameters(self, recurse: bool = True) -> "Iterator[torch.nn.Parameter]":
        """Its weights."""
