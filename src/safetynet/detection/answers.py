"""Views of a greedy answer: the state and the certainty that chose each of its tokens."""

from typing import Any

import torch
from torch import Tensor

from safetynet.detection.features import FeatureSpec
from safetynet.detection.readers import Reader
from safetynet.prompts import Serialiser


def follow(
    model: Any, serialiser: Serialiser, reader: Reader, inputs: dict[str, Any], spec: FeatureSpec
) -> dict[str, Tensor]:
    """Answer a left-padded batch greedily and read every step.

    Returns:
        `steps` (B, T, L, d) and `step_confidence` (B, T, 2) as the specification asks; NaN after the token
        that ends an answer.
    """
    stops = torch.tensor(serialiser.stop_ids, device=model.device)
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    kept: dict[str, list[Tensor]] = {"steps": [], "step_confidence": []}
    cache = None
    for _ in range(spec.tokens):
        reader.begin(None)
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache, read = output.past_key_values, reader.take()
        logits = output.logits[:, -1].float()
        if "steps" in spec.views:
            kept["steps"].append(_ended_as_nan(read["last"], running))
        kept["step_confidence"].append(_ended_as_nan(confidence(logits), running))
        token = logits.argmax(-1)
        running = running & ~torch.isin(token, stops)
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return {view: torch.stack(kept[view], 1) for view in spec.views if view in kept}


def confidence(logits: Tensor) -> Tensor:
    """(B, V) to (B, 2): log-odds of the likeliest token, and entropy in nats."""
    log = logits.float().log_softmax(-1)
    top = log.amax(-1)
    rest = torch.log(-torch.expm1(top.clamp_max(-1e-7)))
    return torch.stack([top - rest, -(log.exp() * log).sum(-1)], -1)


def _ended_as_nan(values: Tensor, running: Tensor) -> Tensor:
    shape = [-1] + [1] * (values.dim() - 1)
    return values.float().masked_fill(~running.view(shape), float("nan"))
