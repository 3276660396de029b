"""What a model needs, counted before it is there: parameters, memory of training and inference, disk, time.

In: a model's configuration and a recipe's training section. Out: numbers, in bytes, operations and seconds.
The model is built without its weights and goes through one training step on tensors that have shapes and no
numbers, so that everything is counted in the code that runs later. It knows no GPU's overhead and no
fragmentation.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from safetynet.families import Family
from safetynet.recipe import Training
from safetynet.training import attach
from safetynet.training.loss import LOGITS_AT_ONCE, causal_lm

NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Per weight: 4 bits, a byte of scale for every 64, and four bytes for every 256 of these (double
quantisation, Dettmers et al. 2023, arXiv 2305.14314)."""
SHAPES = FakeTensorMode()
"""Tensors made inside have shapes and no numbers."""
UNMASKED = "safetynet_unmasked"
"""sdpa as it runs on rows that are padded on the right: causal by itself. Where tensors hold no numbers,
transformers cannot see that a mask is not needed, and would count one."""
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, lambda *_, **__: None)
STATE_BYTES = 12
"""Per trained parameter, beside itself: gradient and Adam's two moments in fp32."""


@dataclass(frozen=True)
class Needs:
    """Of one model, trained as a recipe says."""

    parameters: int
    trained: int
    """Of these or, with LoRA, beside these."""
    active: int
    """Parameters that one token passes through: of a mixture of experts, those of the chosen ones."""
    weights_bytes: int
    """Of the model as it is loaded, without adapter."""
    trained_bytes: int
    """Adapter, gradients and optimiser; in full fine-tuning gradients and optimiser."""
    activations_bytes: int
    """Kept between forward and backward of one part of `batch_size` rows."""
    recomputed_bytes: int
    """Of one layer, made again in the backward pass; 0 without gradient checkpointing."""
    logits_bytes: int
    """Of the head, a part at a time, with their gradient."""
    cache_bytes_per_token: int
    """Keys and values of one position of one prompt."""

    @property
    def training_bytes(self) -> int:
        """All that training has in memory at once."""
        return sum(
            (
                self.weights_bytes,
                self.trained_bytes,
                self.activations_bytes,
                self.recomputed_bytes,
                self.logits_bytes,
            )
        )

    @property
    def saved_bytes(self) -> int:
        """Of the adapter on disk, in fp32."""
        return 4 * self.trained

    def generation_bytes(self, rows: int, tokens: int) -> int:
        """Weights, and keys and values of `rows` prompts with their answers of `tokens` together."""
        return self.weights_bytes + rows * tokens * self.cache_bytes_per_token

    def training_operations(self, tokens: int, full: bool) -> float:
        """Floating-point operations of training on so many tokens.

        2 per active parameter forward, 2 for the gradients of activations, 2 more for those of weights where
        all are trained (Kaplan et al. 2020, arXiv 2001.08361; attention itself is left out, as there).
        """
        return float(tokens) * self.active * (6 if full else 4)

    def forward_operations(self, tokens: int) -> float:
        """Floating-point operations of reading so many tokens."""
        return 2.0 * tokens * self.active


def needs(
    config: PreTrainedConfig,
    cfg: Training,
    family: Family,
    *,
    quantised: bool = False,
    tokens: int | None = None,
) -> Needs:
    """Count what training `config`'s model needs.

    Args:
        config: of the model; its weights are not needed.
        cfg: method, LoRA's rank and targets, rows of a part, precision (fp32 keeps weights in four bytes).
        family: says what LoRA adapts by default.
        quantised: linear modules are in 4 bit; fused experts and the head stay as they are.
        tokens: of a row; by default `cfg.max_length`.
    """
    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=UNMASKED)
        parameters = sum(p.numel() for p in model.parameters())
        in_4_bit = sum(m.weight.numel() for m in _linear(model)) if quantised else 0
        trained_model = attach(model, cfg, family, seed=0)
    trained = sum(p.numel() for p in trained_model.parameters() if p.requires_grad)
    full = cfg.method == "full"
    width, words = dtype.itemsize, config.get_text_config().vocab_size
    rows, tokens = cfg.batch_size, tokens or cfg.max_length
    _give_shapes(trained_model)
    activations, recomputed = _kept(trained_model, rows, tokens, dtype), 0
    if cfg.gradient_checkpointing:
        recomputed = activations // config.get_text_config().num_hidden_layers
        causal_lm(trained_model).gradient_checkpointing_enable({"use_reentrant": False})
        activations = _kept(trained_model, rows, tokens, dtype)
    return Needs(
        parameters=parameters,
        trained=trained,
        active=parameters - _resting(config, model),
        weights_bytes=round(width * (parameters - in_4_bit) + NF4_BYTES * in_4_bit),
        # Adapters are in fp32 beside weights of any precision.
        trained_bytes=trained * (STATE_BYTES + (0 if full else 4)),
        activations_bytes=activations,
        recomputed_bytes=recomputed,
        logits_bytes=3 * 4 * min(LOGITS_AT_ONCE, rows * tokens * words),
        cache_bytes_per_token=_cache(config, width),
    )


def _linear(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def _resting(config: PreTrainedConfig, model: nn.Module) -> int:
    """Parameters of the experts that a token is not sent to."""
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", None)
    if not experts:
        return 0
    fused = sum(
        p.numel() for name, p in model.named_parameters() if ".experts." in name and "lora_" not in name
    )
    return round(fused * (1 - text.num_experts_per_tok / experts))


def _cache(config: PreTrainedConfig, width: int) -> int:
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head * width)


def _kept(model: Any, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass of the body leaves for the backward pass, parameters not counted."""
    lm: Any = causal_lm(model)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            kept[key] = tensor
        return tensor

    lm.train()
    mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32)
    with _quiet(), SHAPES, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        lm.base_model(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _give_shapes(model: nn.Module) -> None:
    """Tensors with shapes and no numbers in place of all parameters and buffers."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                with SHAPES:
                    empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                with SHAPES:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of what does not matter where nothing is computed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
