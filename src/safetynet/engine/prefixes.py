"""Prompts that were read once, from which others that begin like them go on.

In: a model, prompts, and versions of them. Out: logits of the token behind each version. Keys and values of
the tokens that a version shares with its prompt are not computed again. Of a model whose runs cannot be
resumed, versions are read whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from safetynet.engine.batch import Batch
from safetynet.engine.sites import Architecture
from safetynet.engine.trace import forward
from safetynet.errors import InputError
from safetynet.models.causal_lm import CausalLM


@dataclass(frozen=True, eq=False)
class Version:
    """Token ids that begin as a prompt does."""

    ids: list[int]
    prompt: int
    """Its number."""
    shared: int
    """Tokens that both begin with, the version's last one not among them."""

    @classmethod
    def of(cls, ids: list[int], prompt: int, prompt_ids: Sequence[int]) -> "Version":
        """Compare a version with its prompt."""
        most = min(len(ids) - 1, len(prompt_ids))
        return cls(ids, prompt, next((i for i in range(most) if ids[i] != prompt_ids[i]), most))

    @property
    def new(self) -> int:
        """Tokens behind those that it shares."""
        return len(self.ids) - self.shared


def empty_cache(model: CausalLM) -> DynamicCache | None:
    """A cache for a pass over prompts from which others go on; None for a model that cannot be resumed."""
    try:
        # Without a configuration its layers keep all tokens, also where attention sees a window of them.
        return None if Architecture.of(model).checked.not_resumable else DynamicCache()
    except InputError:  # its layers pass on no stream, or its weights are not all in memory
        return None


@dataclass(frozen=True)
class Prefixes:
    """Prompts that a model has read."""

    model: CausalLM
    batch: Batch
    numbers: Sequence[int]
    """Of the batch's prompts, by which versions name them."""
    cache: DynamicCache | None
    """Their keys and values, (B, kv heads, S, head size) in each layer; without, versions are read whole."""

    @classmethod
    def read(cls, model: CausalLM, batch: Batch, numbers: Sequence[int]) -> "Prefixes":
        """Read prompts for the sake of their cache."""
        cache = empty_cache(model)
        if cache is not None:
            forward(model, batch, past_key_values=cache, use_cache=True)
        return cls(model, batch, numbers, cache)

    def next_logits(self, versions: Sequence[Version], pad_id: int) -> Tensor:
        """(R, V) fp32 of the token behind each version; the one with most new tokens decides the cost."""
        batch = Batch.of([version.ids for version in versions], pad_id, self.batch.ids.device)
        # Columns of the versions' batch that the cache fills; all that lies behind them is computed.
        held = batch.width - max(version.new for version in versions)
        if self.cache is None or not held:
            return forward(self.model, batch, use_cache=False).logits[:, -1].float()
        rows = torch.tensor(
            [self.numbers.index(version.prompt) for version in versions], device=batch.ids.device
        )
        # Both are padded on the left, by different numbers of columns. What is masked may hold anything.
        shift = self.batch.mask[rows].argmax(1) - batch.mask.argmax(1)
        columns = (torch.arange(held, device=shift.device) + shift[:, None]).clamp_min(0)
        layers: list[Any] = list(self.cache.layers)
        # (B, kv heads, S, head size) to (R, held, kv heads, head size), and its axes in their order again.
        cache = DynamicCache(
            [
                tuple(
                    x[rows[:, None].to(x.device), :, columns.to(x.device)].transpose(1, 2)
                    for x in (layer.keys, layer.values)
                )
                for layer in layers
            ]
        )
        output = forward(
            self.model,
            batch,
            input_ids=batch.ids[:, held:],
            position_ids=batch.position_ids[:, held:],
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()
