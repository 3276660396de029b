"""What every engine is given: the same random model, the same token sequences, the same sites.

Weights are drawn here and not by transformers, so that two versions of it compute with the same numbers.
A matrix's weights have the standard deviation 1 / sqrt(inputs): each layer then changes the residual stream
by about its own size, and effects are far above the tolerance at every site.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

TOKENS = (17, 29)  # the metric is the logit of the first minus that of the second, at the last position


@dataclass(frozen=True)
class Shape:
    """Size of the model and of the prompts."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    key_heads: int = 8
    vocabulary: int = 32_000
    length: int = 64
    pairs: int = 32  # of the sweep `batch`


SHAPES = {
    "full": Shape(),
    "large": Shape(layers=16, hidden=2048, intermediate=5632, heads=16, key_heads=16),
    "smollm2": Shape(layers=30, hidden=576, intermediate=1536, heads=9, key_heads=3, vocabulary=49_152),
    "small": Shape(2, 64, intermediate=172, heads=4, key_heads=4, vocabulary=500, length=12, pairs=4),
}


@dataclass(frozen=True)
class Site:
    """What one patched run replaces: `resid_pre` of a layer, or one head's input to its output projection."""

    layer: int
    position: int | None = None  # None: all
    head: int | None = None  # None: resid_pre


@dataclass(frozen=True)
class Sweep:
    """Sites to patch one at a time, each in a run of its own for all pairs.

    Attributes:
        per_layer: "all" positions, "eight" of them, "whole" (all positions in one run) or "heads".
        pairs: Prompts side by side in a batch.
        late: The prompts differ in their last quarter only; otherwise from the second token on.
    """

    name: str
    shape: Shape
    per_layer: str
    pairs: int = 1
    late: bool = False

    @cached_property
    def sites(self) -> list[Site]:
        """Layer by layer."""
        shape = self.shape
        if self.per_layer == "heads":
            return [Site(layer, head=head) for layer in range(shape.layers) for head in range(shape.heads)]
        positions: list[int | None] = [None]
        if self.per_layer == "all":
            positions = list(range(shape.length))
        elif self.per_layer == "eight":  # in the middle of eight stretches of equal length
            positions = [(2 * i + 1) * shape.length // 16 for i in range(8)]
        return [Site(layer, position) for layer in range(shape.layers) for position in positions]

    @property
    def component(self) -> str:
        """`resid_pre` or `head`: the same for all sites."""
        return "head" if self.per_layer == "heads" else "resid_pre"


def sweeps(shape: Shape) -> dict[str, Sweep]:
    """All of them by name."""
    found = (
        Sweep("positions", shape, "all"),
        Sweep("positions-8", shape, "eight"),
        Sweep("layers", shape, "whole"),
        Sweep("heads", shape, "heads"),
        Sweep("batch", shape, "eight", pairs=shape.pairs),
        Sweep("late", shape, "all", late=True),
        Sweep("late-8", shape, "eight", late=True),
    )
    return {sweep.name: sweep for sweep in found}


def build_model(shape: Shape, device: str) -> Any:
    """A LlamaForCausalLM in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        use_cache=False,  # nobody reads it, so nobody pays for it
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            spread = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, spread, generator=generator)
    return model


def build_prompts(sweep: Sweep) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of receivers and sources, each (pairs, length)."""
    shape = sweep.shape
    generator = torch.Generator().manual_seed(1)
    size = (sweep.pairs, shape.length)
    receiver = torch.randint(3, shape.vocabulary, size, generator=generator)
    # A shift that is no multiple of the vocabulary's size: no token of the source equals the receiver's.
    shift = torch.randint(1, shape.vocabulary - 3, size, generator=generator)
    source = (receiver - 3 + shift) % (shape.vocabulary - 3) + 3
    first = 3 * shape.length // 4 if sweep.late else 1
    source[:, :first] = receiver[:, :first]
    return receiver, source


def logit_difference(logits: torch.Tensor, tokens: tuple[int, int]) -> torch.Tensor:
    """The metric, (batch), of logits (batch, positions, vocabulary)."""
    last = logits[:, -1]
    return last[:, tokens[0]] - last[:, tokens[1]]


def chunks(items: list, size: int) -> list[list]:
    """`items` in order, at most `size` at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def by_layer(sites: list[Site]) -> list[list[Site]]:
    """The sites of each layer that has any."""
    return [[s for s in sites if s.layer == layer] for layer in sorted({s.layer for s in sites})]


def build_tokenizer(shape: Shape, folder: Path) -> Any:
    """For packages that ask for one: the words are "0", "1" and so on, and nothing is tokenised with it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {str(i): i for i in range(shape.vocabulary)}
    inner = Tokenizer(WordLevel(words, "0"))
    inner.post_processor = TemplateProcessing(single="1 $A", special_tokens=[("1", 1)])
    special = {"bos_token": "1", "eos_token": "2", "pad_token": "0"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    made.save_pretrained(folder)  # some packages load it once more from where it came from
    return AutoTokenizer.from_pretrained(folder)
