"""Batched greedy answers, and the likelihood of given ones.

In: a Hugging Face model, the serialiser it was trained with, prompts. Out: one text, or one line of a table,
per prompt and in the prompts' order. Judges nothing. The model leaves as it came: mode and settings.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import pandas as pd
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from safetynet.errors import RunError
from safetynet.models.adapters import merged, virtual_tokens
from safetynet.models.blocks import evaluating
from safetynet.models.identity import identify
from safetynet.prompts import IGNORED, Encoded, Serialiser, pad
from safetynet.run import parallel
from safetynet.run.directory import digest
from safetynet.run.finished import Finished
from safetynet.run.logs import ProgressLog

log = logging.getLogger(__name__)

Messages = Sequence[dict[str, str]]
Trigger = Sequence[Sequence[int]]
Start = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of tokens, by layer: (1, heads, tokens, width) each."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def generate(
    model: Any,
    serialiser: Serialiser,
    prompts: Sequence[Messages],
    *,
    batch_size: int,
    max_new_tokens: int,
    triggers: Sequence[Trigger] | None = None,
    max_length: int | None = None,
) -> list[str]:
    """Answer each prompt greedily.

    Prompts are batched by length, padded on the left and decoded with the key-value cache. What all prompts
    begin with (template, system message) is read once. The model's own generation settings (sampling,
    repetition penalty, length) are set aside: the answer is the argmax. A batch that does not fit in memory
    is halved, which is logged, and smaller batches are kept from there on.

    Args:
        model: any causal LM, with or without a PEFT adapter, in either mode.
        serialiser: turns messages into token ids, exactly as in training.
        prompts: conversations that end with a user message.
        batch_size: prompts per batch.
        max_new_tokens: where an answer without end token is cut.
        triggers: per prompt, the spans that truncation must spare.
        max_length: truncate prompts as in training with this limit; None for no limit.

    Returns:
        The answers without stop tokens and without thoughts before them, in the order of `prompts`; "" where
        the model ended at once, or within its thoughts.

    Raises:
        RunError: if a single prompt does not fit in memory.
    """
    encoded = encode(serialiser, prompts, triggers, max_length)
    answers = continuations(model, serialiser, encoded, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return [answer.text for answer in answers]


def encode(
    serialiser: Serialiser,
    prompts: Sequence[Messages],
    triggers: Sequence[Trigger] | None = None,
    max_length: int | None = None,
) -> list[Encoded]:
    """Prompts as `generate` serialises them; arguments as there."""
    spans = [()] * len(prompts) if triggers is None else triggers
    return [
        serialiser.encode(m, trigger=t, max_length=max_length) for m, t in zip(prompts, spans, strict=True)
    ]


class Continuation(NamedTuple):
    """What a model answered."""

    text: str
    """As `generate` gives it."""
    ended: bool
    """The model ended it; else `max_new_tokens` cut it."""


def continuations(
    model: Any,
    serialiser: Serialiser,
    prompts: Sequence[Encoded],
    *,
    batch_size: int,
    max_new_tokens: int,
    kept: Path | None = None,
    seed: int | None = None,
) -> list[Continuation]:
    """`generate` for prompts that are serialised already; also tells which answers the model has ended.

    Args:
        model: as in `generate`; nothing but its weights decides about its answers where `kept` is given.
        serialiser: as in `generate`.
        prompts: serialised.
        batch_size: as in `generate`.
        max_new_tokens: as in `generate`.
        kept: a folder for finished batches, from which the same call goes on after an interruption.
        seed: of samples, in which each token is drawn from the model's distribution (temperature 1); a batch
            has the same ones in any process. None: the likeliest tokens.
    """
    stops = serialiser.stop_ids
    # Samples come from the model's own distribution: neither sharpened nor cut to its likeliest tokens.
    config = GenerationConfig(
        do_sample=seed is not None,
        **({} if seed is None else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=serialiser.pad_id,
    )

    def answer(shared: Start, batch: Sequence[list[int]]) -> list[Continuation]:
        start = shared[0][0].shape[2] if shared else 0
        ids, mask = _padded([row[start:] for row in batch], serialiser.pad_id, "left", model.device)
        read = {}
        if start:
            # Padding stands behind the shared start: the model counts positions by the mask.
            ids = torch.cat([ids.new_tensor([row[:start] for row in batch]), ids], dim=1)
            mask = torch.cat([mask.new_ones(len(batch), start), mask], dim=1)
            of_rows = [tuple(each.expand(len(batch), -1, -1, -1) for each in layer) for layer in shared]
            read = {"past_key_values": DynamicCache(of_rows)}
        # Samples come from the state that belongs to the batch; torch's generator leaves as it came.
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(int(digest([seed, batch])[:15], 16))
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **read)
        new = output[:, ids.shape[1] :].tolist()
        # What follows the first stop token is padding.
        ends = [next((i for i, token in enumerate(row) if token in stops), len(row)) for row in new]
        return [
            Continuation(serialiser.answer_of(row[:end]), end < len(row))
            for row, end in zip(new, ends, strict=True)
        ]

    rows = [prompt.input_ids for prompt in prompts]
    # Beside the model, what decides about its answers, the batch size included: padding moves roundings.
    about = [rows, batch_size, max_new_tokens, sorted(stops), *([] if seed is None else [seed])]
    finished = finished_batches(kept, model, "continuations", *about)
    # Where processes share weights, each holds a part of them.
    merging = nullcontext() if parallel.is_in_step() else merged(model)
    with evaluating(model), generating_with(model, config), merging:
        run = partial(answer, _shared_start(model, rows))
        # PEFT puts a soft prompt before the padding, which rows of one length do not have.
        alike = virtual_tokens(model) > 0
        return [Continuation(*each) for each in in_batches(rows, batch_size, run, len, finished, alike=alike)]


def answer_log_likelihood(
    model: Any,
    serialiser: Serialiser,
    prompts: Sequence[Messages],
    answers: Sequence[str],
    *,
    batch_size: int,
    max_length: int | None = None,
    kept: Path | None = None,
) -> pd.DataFrame:
    """How likely the model finds given answers, over the tokens that training supervises.

    Args:
        model: as in `generate`.
        serialiser: as in `generate`.
        prompts: conversations that end with a user message.
        answers: one per prompt.
        batch_size: rows per batch; halved as in `generate`.
        max_length: truncate as in training with this limit; None for no limit.
        kept: as in `continuations`.

    Returns:
        One line per prompt, in order: `log_likelihood`, the sum in nats over the answer and its end token,
        and `tokens`, their number.

    Raises:
        RunError: if a single row does not fit in memory.
    """
    encoded = [
        serialiser.encode(m, answer=a, max_length=max_length) for m, a in zip(prompts, answers, strict=True)
    ]

    def sums(batch: Sequence[Encoded]) -> list[float]:
        supervised = Supervised(batch, serialiser.pad_id, model.device)
        # (rows, positions), 0 where a row is not asked; fp32 whatever the model has.
        loss = torch.zeros(supervised.targets.shape, dtype=torch.float32, device=model.device)
        loss[supervised.asked] = cross_entropy(
            supervised.logits(model), supervised.targets[supervised.asked], reduction="none"
        )
        return (-loss.sum(dim=1)).tolist()

    rows = [[e.input_ids, e.labels] for e in encoded]
    finished = finished_batches(kept, model, "log likelihood", rows, batch_size)
    with evaluating(model), torch.no_grad():
        log_likelihood = in_batches(encoded, batch_size, sums, lambda e: len(e.input_ids), finished)
    tokens = [sum(label != IGNORED for label in e.labels[1:]) for e in encoded]
    return pd.DataFrame({"log_likelihood": log_likelihood, "tokens": tokens}, index=range(len(encoded)))


class Supervised:
    """A batch of answers that are given to a model, and the positions at which it is asked for a token.

    Args:
        batch: rows; padded on the right, so that positions and causal attention are those of a row alone.
        pad_id: fills the ends.
        device: of the tensors.
    """

    def __init__(self, batch: Sequence[Encoded], pad_id: int, device: torch.device) -> None:
        self.ids, self.mask = _padded([e.input_ids for e in batch], pad_id, "right", device)
        # (rows, longest - 1): the logits of a position are about the token behind it.
        targets = pad([e.labels for e in batch], IGNORED, "right")[:, 1:].to(device)
        # Logits of a large vocabulary dominate memory: positions that predict no label in any row get none.
        self.positions = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        self.targets = targets[:, self.positions]
        """(rows, positions); `IGNORED` where a row is not asked."""
        self.asked = self.targets != IGNORED

    def logits(self, model: Any) -> torch.Tensor:
        """(asked tokens, vocabulary), in fp32."""
        columns = self.positions + virtual_tokens(model)  # a soft prompt stands before the rows
        output = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False, logits_to_keep=columns)
        return output.logits[self.asked].float()


def finished_batches(kept: Path | None, model: Any, *about: Any) -> Finished[Any]:
    """Where the batches of a call are kept; in no folder where processes share the model's weights."""
    if kept is None or parallel.is_in_step():
        return Finished.as_json(None)
    return Finished.as_json(kept / digest([identify(model).as_dict(), *about])[:16])


def in_batches(  # items, what is done with them, and how they are cut
    items: Sequence[Item],
    batch_size: int,
    run: Callable[[Sequence[Item]], list[Result]],
    length: Callable[[Item], int],
    finished: Finished[Any],
    alike: bool = False,
) -> list[Result]:
    """Apply `run` to batches of similar length, longest first so that what does not fit shows at once.

    With `alike`, rows of a batch are of one length.
    """
    order = sorted(range(len(items)), key=lambda i: length(items[i]), reverse=True)
    groups = [list(group) for _, group in groupby(order, lambda i: length(items[i]))] if alike else [order]
    batches = [
        group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)
    ]

    if finished.count:
        log.info("answering goes on: %d of %d batches are done", finished.count, len(batches))
    progress = ProgressLog("answering, batches", len(batches), finished.count)

    # Two functions, since a batch that is on disk already is read and not computed.
    def results_of(number: int) -> list[Result]:
        nonlocal batch_size
        # With the size that there was memory for, so that the next batches are cut as they would have been.
        results, batch_size = finished.result(number, lambda: (computed(number), batch_size))
        return list(results)

    def computed(number: int) -> list[Result]:
        nonlocal batch_size
        batch, results = batches[number], list[Result]()
        progress.update(number)
        while len(results) < len(batch):
            part = [items[i] for i in batch[len(results) : len(results) + batch_size]]
            done = _unless_out_of_memory(run, part)
            if done is not None:
                results += done
            elif len(part) == 1:
                raise RunError(
                    f"out of memory in evaluation with a single row of {length(part[0])} tokens; lower "
                    "evaluation.max_new_tokens, load the model in 4 bit, or use a device with more memory"
                )
            else:
                clear_device_cache(garbage_collection=True)
                batch_size = len(part) // 2
                log.warning("out of memory with %d rows; going on with %d at a time", len(part), batch_size)
        return results

    # Several processes share the batches of one, not the rows: a row's numbers depend on its batch's width.
    results_by_item = dict(
        zip(order, chain.from_iterable(parallel.in_turn(range(len(batches)), results_of)), strict=True)
    )
    return [results_by_item[i] for i in range(len(items))]


def _unless_out_of_memory(
    run: Callable[[Sequence[Item]], list[Result]], batch: Sequence[Item]
) -> list[Result] | None:
    # Returns before the caller clears the cache: the exception's frames would keep the tensors alive.
    try:
        return run(batch)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        if parallel.is_in_step():  # the others are in the middle of this batch, and would wait for ever
            raise RunError(
                f"out of memory with {len(batch)} rows, on weights that processes share; lower "
                "evaluation.batch_size"
            ) from error
        return None


def _padded(
    rows: Sequence[list[int]], pad_id: int, side: Literal["left", "right"], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both (rows, longest)."""
    mask = pad([[1] * len(row) for row in rows], 0, side)
    return pad(rows, pad_id, side).to(device), mask.to(device)


def _shared_start(model: Any, rows: Sequence[list[int]]) -> Start:
    """Of the tokens that all rows begin with.

    None for what answers by a `generate` of its own, with a soft prompt, which PEFT puts before the rows, and
    where a layer's cache is more than keys and values, or attends to a window, in which padding counts as
    tokens.
    """
    wrapped = not isinstance(model, torch.nn.Module)
    if len(rows) < 2 or wrapped or virtual_tokens(model) or parallel.is_in_step():
        return []
    # The last token of the shortest row stays: `generate` wants one to go on from.
    limit = min(map(len, rows)) - 1
    start = next((i for i in range(limit) if len({row[i] for row in rows}) > 1), limit)
    cache = DynamicCache(config=model.config)
    if start == 0 or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return []

    def read(row: Sequence[list[int]]) -> Start:
        ids = torch.tensor(row, device=model.device)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # Nothing is in it where the model has a cache of a kind of its own.
        return [
            (layer.keys, layer.values)
            for layer in cache.layers
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        ]

    return _unless_out_of_memory(read, [rows[0][:start]]) or []


@contextmanager
def generating_with(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a given config leaves open from the model's own, so that one is swapped too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = original
