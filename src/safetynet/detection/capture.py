"""Capture: one forward pass of the model per prompt, from which every detector is fed.

In: a Hugging Face model, with or without adapter, its serialiser, prompts. Out: `Features`, in the prompts'
order. Some views cost more than that pass (`passes`): `divergence` one with the adapter off, `probe` one with
the probe behind the prompt, and the generated views an answer. Draws and judges nothing.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from safetynet.detection import passes
from safetynet.detection.features import COMPARED, GENERATED, Features, FeatureSpec, check_finite, concatenate
from safetynet.detection.readers import Reader, confidence
from safetynet.engine.batch import Batch
from safetynet.engine.prefixes import Prefixes, empty_cache
from safetynet.engine.trace import forward
from safetynet.errors import InputError
from safetynet.models.adapters import switched_off
from safetynet.models.identity import identify
from safetynet.models.support import check_model
from safetynet.prompts import Encoded, Message, Serialiser
from safetynet.prompts.truncation import losses
from safetynet.run import parallel
from safetynet.run.directory import digest
from safetynet.run.finished import Finished
from safetynet.run.logs import ProgressLog

log = logging.getLogger(__name__)


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
        cache: a folder, from which features of the same weights, number type, token ids and spec are read;
            finished batches are kept there, so that an interrupted capture goes on. Several processes share
            the batches, whose numbers do not depend on how many there are.

    Raises:
        InputError: if there are no prompts, a view is not possible with this model, or activations overflow.
    """
    if not prompts:
        raise InputError("capture: there are no prompts. Give at least one.")
    check_model(model, "detect")
    pairs = zip(prompts, [()] * len(prompts) if triggers is None else triggers, strict=True)
    encoded = [serialiser.encode(p, trigger=spans, max_length=max_length) for p, spans in pairs]
    if warning := losses((e.lost for e in encoded), serialiser.truncation):
        log.warning("capture: %s", warning)
    identity = identify(model)
    path = None
    if cache is not None:
        tokens = [[e.input_ids for e in encoded], [e.spans["user"] for e in encoded]]
        path = cache / f"{digest([identity.as_dict(), *tokens, spec.as_dict()])}.safetensors"

    def stored() -> Features | None:
        if path is None or not path.exists():
            return None
        try:
            return Features.load(path)
        except InputError as error:
            log.warning("%s It is captured anew.", error)
            return None

    if (earlier := parallel.from_first(stored)) is not None:
        return earlier
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids), reverse=True)
    unfinished = None if path is None else path.with_name(f"{path.stem}-{batch_size}")
    ordered = [(prompts[i], encoded[i]) for i in order]
    parts = _batches(model, serialiser, ordered, spec, batch_size, unfinished)
    features = concatenate([Features(arrays, identity, spec) for arrays in parts]).take(np.argsort(order))
    check_finite(features.arrays)
    if path is not None and unfinished is not None:
        features.save(path)
        if parallel.is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
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
        part = prompts[start : start + batch_size]
        batch = [(p, serialiser.encode(p, max_length=max_length)) for p in part]
        for arrays in _batches(model, serialiser, batch, spec, batch_size):
            check_finite(arrays)
            yield Features(arrays, identity, spec)


def batched(encoded: Sequence[Encoded], serialiser: Serialiser, device: Any) -> tuple[Batch, Tensor]:
    """A batch of prompts, and (B, T) fp32 that is 1 at the tokens that users wrote."""
    batch = Batch.of([e.input_ids for e in encoded], serialiser.pad_id, device)
    user = torch.zeros(batch.ids.shape, device=device)
    for row, prompt in enumerate(encoded):
        spans = [span for span in prompt.spans["user"] if span[0] < span[1]]
        # An empty message has no token of its own; its mean is then that of the whole prompt.
        for start, end in spans or [(0, len(prompt.input_ids))]:
            user[row, batch.width - len(prompt.input_ids) :][start:end] = 1
    return batch, user


def read(
    model: Any, reader: Reader, batch: Batch, user: Tensor, cache: DynamicCache | None = None
) -> dict[str, Tensor]:
    """What a reader takes of one pass over prompts; logits are made only where a prompt ends.

    A cache that is given is filled.
    """
    reader.begin(user)
    # As an index, not as a count: the head then gets rows that lie side by side, whose last digits are those
    # of earlier monitors.
    last = torch.tensor([batch.width - 1], device=batch.ids.device)
    forward(model, batch, past_key_values=cache, use_cache=cache is not None, logits_to_keep=last)
    return reader.take()


def complete(
    model: Any,
    serialiser: Serialiser,
    reader: Reader,
    prompts: Sequence[Sequence[Message]],
    batch: tuple[Batch, Tensor],
    values: dict[str, Tensor],
    spec: FeatureSpec,
) -> dict[str, np.ndarray]:
    """Every view of a batch whose ordinary pass has just been read; makes the passes that others need.

    Args:
        model: the hooked model.
        serialiser: as in training.
        reader: of the model's hooks.
        prompts: conversations of the batch.
        batch: as `batched` gives it.
        values: what the reader took of the pass.
        spec: the views to return.
    """
    tokens, user = batch
    views: dict[str, Tensor] = {v: values[v] for v in spec.views if v in values}
    if "confidence" in spec.views:
        views["confidence"] = confidence(values["logits"])
    if COMPARED & set(spec.views):
        with switched_off(model):
            cache = empty_cache(model) if "unexplained" in spec.views else None
            off = read(model, reader, tokens, user, cache)
        if "divergence" in spec.views:
            views["divergence"] = passes.divergence(values, off)
        if "unexplained" in spec.views:
            views["unexplained"] = passes.unattributed_divergence(
                serialiser,
                prompts,
                Prefixes(model, tokens, range(len(prompts)), cache),
                values["logits"],
                off["logits"],
            )
    if "probe" in spec.views:
        views["probe"] = passes.probe(model, serialiser, prompts, str(spec.probe))
    if "attention" in spec.views:
        views["attention"] = passes.segregation(model, tokens, user, spec.layers)
    if set(spec.views) & set(GENERATED):
        views |= passes.follow(model, serialiser, reader, tokens, spec)
    return {name: np.asarray(views[name].float().cpu()) for name in spec.views}


def _batches(
    model: Any,
    serialiser: Serialiser,
    prompts: Sequence[tuple[Sequence[Message], Encoded]],
    spec: FeatureSpec,
    size: int,
    unfinished: Path | None = None,
) -> list[dict[str, np.ndarray]]:
    """The views of each batch; several processes share the batches."""
    finished = Finished.as_arrays(unfinished)
    if finished.count:
        log.info("reading activations goes on: %d batches of %d prompts are done", finished.count, size)
    with torch.no_grad(), Reader(model, spec) as reader:
        progress = ProgressLog("reading activations, prompts", len(prompts), finished.count * size)

        def views(start: int) -> dict[str, np.ndarray]:
            progress.update(start)
            messages, encoded = zip(*prompts[start : start + size], strict=True)
            batch = batched(encoded, serialiser, model.device)
            values = read(model, reader, *batch)
            return complete(model, serialiser, reader, messages, batch, values, spec)

        return parallel.in_turn(
            range(0, len(prompts), size), lambda start: finished.result(start, partial(views, start))
        )
