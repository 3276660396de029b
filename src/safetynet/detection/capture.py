"""Capture: one forward pass of the model per prompt, from which every detector is fed.

In: a Hugging Face model, with or without adapter, its serialiser, prompts. Out: `Features`, in the prompts'
order. Three views cost more than that pass: `divergence` one with the adapter off, `probe` one with the probe
behind the prompt, and the generated views an answer. Draws and judges nothing.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from safetynet.detection import answers, contrasts
from safetynet.detection.features import COMPARED, GENERATED, Features, FeatureSpec, check_finite, concatenate
from safetynet.detection.readers import Place, Reader
from safetynet.errors import InputError
from safetynet.models.identity import Identity, identify
from safetynet.models.support import check_model
from safetynet.prompts import Encoded, Message, Serialiser, pad
from safetynet.prompts.truncation import losses
from safetynet.run.directory import digest
from safetynet.run.progress import ProgressLog

log = logging.getLogger(__name__)
Side = Literal["left", "right"]


def capture(  # noqa: PLR0913  # what is captured, and how, by keyword
    model: Any,
    serialiser: Serialiser,
    prompts: Sequence[Sequence[Message]],
    spec: FeatureSpec,
    *,
    triggers: Sequence[Sequence[Sequence[int]]] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    cache: Path | None = None,
) -> Features:
    """Features of prompts, in their order.

    Args:
        model: a causal LM in evaluation mode.
        serialiser: turns messages into token ids, exactly as in training.
        prompts: conversations that end with a user message.
        spec: what to keep.
        triggers: per prompt, the spans that truncation must spare, as in evaluation.
        batch_size: prompts per batch; batches are of similar length.
        max_length: truncate as in training with this limit; None for no limit.
        cache: a folder, from which features of the same weights, number type, token ids and spec are read.

    Raises:
        InputError: if there are no prompts, a view is not possible with this model, or activations overflow.
    """
    if not prompts:
        raise InputError("capture: there are no prompts. Give at least one.")
    check_model(model, "detect")
    spans = [()] * len(prompts) if triggers is None else triggers
    encoded = [
        serialiser.encode(p, trigger=t, max_length=max_length) for p, t in zip(prompts, spans, strict=True)
    ]
    if told := losses((e.lost for e in encoded), serialiser.truncation):
        log.warning("capture: %s", told)
    identity = identify(model)
    path = None if cache is None else cache / f"{_key(identity, encoded, spec)}.safetensors"
    if path is not None and (found := _cached(path)) is not None:
        return found
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids), reverse=True)
    parts = [
        Features(arrays, identity, spec)
        for arrays in _batches(model, serialiser, [(prompts[i], encoded[i]) for i in order], spec, batch_size)
    ]
    features = concatenate(parts).take(np.argsort(order))
    check_finite(features.arrays)
    if path is not None:
        features.save(path)
    return features


def stream(
    model: Any,
    serialiser: Serialiser,
    prompts: Sequence[Sequence[Message]],
    spec: FeatureSpec,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Iterator[Features]:
    """Features batch by batch in the prompts' order, for `partial_fit`; nothing accumulates."""
    check_model(model, "detect")
    identity = identify(model)
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        batch = [(p, serialiser.encode(p, max_length=max_length)) for p in chosen]
        for arrays in _batches(model, serialiser, batch, spec, batch_size):
            check_finite(arrays)
            yield Features(arrays, identity, spec)


def padded(
    encoded: Sequence[Encoded], serialiser: Serialiser, side: Side, device: Any
) -> tuple[dict[str, Any], Place]:
    """Model inputs of a batch of prompts, and where in it they lie.

    Positions are counted from each prompt's own first token, or padding on the left would shift them.
    """
    ids = pad([e.input_ids for e in encoded], serialiser.pad_id, side)
    mask = pad([[1] * len(e.input_ids) for e in encoded], 0, side)
    width = ids.shape[1]
    user = pad([_user_mask(e) for e in encoded], 0, side).float()
    lengths = mask.sum(1)
    last = torch.full_like(lengths, width - 1) if side == "left" else lengths - 1
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0).to(device),
    }
    return inputs, Place(last.to(device), user.to(device))


def forward(model: Any, reader: Reader, inputs: dict[str, Any], place: Place) -> dict[str, Tensor]:
    """One pass over prompts; logits are made only where a prompt ends."""
    reader.begin(place)
    model(**inputs, use_cache=False, logits_to_keep=torch.unique(place.last))
    return reader.take()


def complete(
    model: Any,
    serialiser: Serialiser,
    reader: Reader,
    prompts: Sequence[Sequence[Message]],
    batch: tuple[dict[str, Any], Place],
    read: dict[str, Tensor],
    spec: FeatureSpec,
) -> dict[str, np.ndarray]:
    """Every view of a batch whose ordinary pass has just been read; makes the passes that others need.

    Args:
        model: the hooked model.
        serialiser: as in training.
        reader: of the model's hooks.
        prompts: conversations of the batch.
        batch: as `padded` gives it.
        read: what the reader took of the pass.
        spec: the views that are wanted.
    """
    inputs, place = batch
    views: dict[str, Tensor] = {v: read[v] for v in spec.views if v in read}
    if "confidence" in spec.views:
        views["confidence"] = answers.confidence(read["logits"])
    if COMPARED & set(spec.views):
        off = contrasts.without_adapter(model, reader, inputs, place)
        if "divergence" in spec.views:
            views["divergence"] = contrasts.divergence(read, off)
        if "unexplained" in spec.views:
            lengths = inputs["attention_mask"].sum(1)
            views["unexplained"] = contrasts.unexplained(
                model, serialiser, prompts, lengths, read["logits"], off["logits"]
            )
    if "probe" in spec.views:
        views["probe"] = contrasts.probe(model, serialiser, prompts, str(spec.probe))
    if "attention" in spec.views:
        views["attention"] = contrasts.segregation(model, inputs, place, spec.layers)
    if set(spec.views) & set(GENERATED):
        views |= answers.follow(model, serialiser, reader, inputs, spec)
    return {name: np.asarray(views[name].float().cpu()) for name in spec.views}


def _batches(
    model: Any,
    serialiser: Serialiser,
    prompts: Sequence[tuple[Sequence[Message], Encoded]],
    spec: FeatureSpec,
    size: int,
) -> Iterator[dict[str, np.ndarray]]:
    with torch.no_grad(), Reader(model, spec) as reader:
        progress = ProgressLog("reading activations, prompts", len(prompts))
        for start in range(0, len(prompts), size):
            progress.update(start)
            chosen = prompts[start : start + size]
            batch = padded([e for _, e in chosen], serialiser, "left", model.device)
            read = forward(model, reader, *batch)
            yield complete(model, serialiser, reader, [m for m, _ in chosen], batch, read, spec)


def _cached(path: Path) -> Features | None:
    """Features that are there and whole; a damaged file is captured anew."""
    if not path.exists():
        return None
    try:
        return Features.load(path)
    except InputError as error:
        log.warning("%s It is captured anew.", error)
        return None


def _user_mask(encoded: Encoded) -> list[int]:
    mask = [0] * len(encoded.input_ids)
    for start, end in encoded.spans["user"]:
        mask[start:end] = [1] * (end - start)
    # An empty message has no token of its own; its mean is then that of the whole prompt.
    return mask if any(mask) else [1] * len(mask)


def _key(identity: Identity, encoded: Sequence[Encoded], spec: FeatureSpec) -> str:
    return digest(
        [
            identity.as_dict(),
            [e.input_ids for e in encoded],
            [e.spans["user"] for e in encoded],
            spec.as_dict(),
        ]
    )
