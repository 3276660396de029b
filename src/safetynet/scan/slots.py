"""Prompts with a place for a candidate trigger, and what suspect and base answer there.

In: conversations and a serialiser. Out: slots, whose tokens before the candidate go through a model once
for all candidates; log probabilities of the answer's first tokens for many candidates at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from safetynet.errors import InputError
from safetynet.prompts import Message, Serialiser

Placement = Literal["prefix", "suffix"]
PLACEMENTS: tuple[Placement, ...] = ("prefix", "suffix")
STAND_INS = ("the", "x", "I", "no", "a", "in")
"""One of them stands for a candidate while a prompt is serialised."""
TOKENS_AT_ONCE = 4096
"""Tokens forwarded together; decides about memory, never about numbers."""


@dataclass(frozen=True)
class Slot:
    """A prompt as token ids, cut where a candidate is put in."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    """Ends where the answer begins."""
    placement: Placement
    messages: Sequence[Message]
    blank: bool = False
    """The first token of a candidate carries the blank before it."""

    def conversation(self, text: str) -> list[dict[str, str]]:
        """The prompt with a text put in, as its user would write it; "" leaves it as it is."""
        *earlier, last = (dict(message) for message in self.messages)
        return [*earlier, {**last, "content": put_in(text, last["content"], self.placement)}]


def put_in(text: str, prompt: str, placement: Placement) -> str:
    """A text before or behind a prompt, with a blank between."""
    return " ".join(filter(None, (text, prompt) if placement == "prefix" else (prompt, text)))


def slots(serialiser: Serialiser, prompts: Sequence[Sequence[Message]], placement: Placement) -> list[Slot]:
    """Prompts with a place for a candidate before or behind the user's last text.

    Each is cut around the stand-in that leaves fewest tokens on its sides: some tokenizers put the blank
    before a word into a token of its own where no token begins with both.

    Raises:
        InputError: if the tokenizer runs the text around the place together with it.
    """
    places = list[Slot]()
    for messages in prompts:
        plain, cuts = Slot((), (), placement, messages), list[Slot]()
        for stand_in in STAND_INS:
            conversation = plain.conversation(stand_in)
            last = len(conversation) - 1
            start = 0 if placement == "prefix" else len(conversation[last]["content"]) - len(stand_in)
            encoded = serialiser.encode(conversation, trigger=[(last, start, start + len(stand_in))])
            [(first, end)] = encoded.spans["trigger"]
            if end - first == 1:
                ids = encoded.input_ids
                blank = serialiser.piece(ids[first]).startswith(" ")
                cuts.append(Slot(tuple(ids[:first]), tuple(ids[end:]), placement, messages, blank))
        if not cuts:
            raise InputError(f"prompts: the tokenizer has no single token for any of {', '.join(STAND_INS)}.")
        places.append(min(cuts, key=lambda slot: len(slot.before) + len(slot.after)))
    return places


class Opening:
    """Tokens that have gone through a model once, to be gone on from in many ways at a time.

    Args:
        model: in evaluation mode; what it is now is what is recorded.
        ids: of the tokens.
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        tokens = torch.tensor([list(ids)], device=model.device)
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        self.logits = output.logits[0, -1].float()
        """(vocabulary,) behind the last token."""
        layers = output.past_key_values.layers
        self._layers = [(layer.keys, layer.values) for layer in layers if layer.is_initialized]

    def cache(self, rows: int) -> DynamicCache:
        """Keys and values for so many rows; what a model adds to them is nobody else's."""
        cache = DynamicCache()
        # (1, heads, tokens, size) each, which all rows share until the model adds tokens of its own.
        for layer, (keys, values) in enumerate(self._layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache


class Recorded:
    """Slots whose tokens before the candidate have gone through one model.

    Args:
        model: suspect or base, in evaluation mode; what it is now is what is recorded.
        slots: of one placement.
    """

    def __init__(self, model: Any, slots: Sequence[Slot]) -> None:
        self.model, self.slots = model, list(slots)
        self.embed, self.device = model.get_input_embeddings(), model.device
        self.passes = sum(len(slot.before) for slot in slots)
        self._openings = [Opening(model, slot.before) for slot in slots]

    def logits(self, number: int, vectors: Tensor, answer: Sequence[int] = ()) -> Tensor:
        """Of the answer's first tokens in one slot, for R candidates.

        Args:
            number: of the slot.
            vectors: (R, k, width) input embeddings of the candidates; gradients flow through them.
            answer: tokens that are given to the model as the answer's beginning, a of them.

        Returns:
            (R, a + 1, vocabulary) fp32: before and behind each of them.
        """
        slot = self.slots[number]
        rest = torch.tensor([*slot.after, *answer], dtype=torch.long, device=vectors.device)
        rows, behind = len(vectors), self.embed(rest)
        inputs = torch.cat([vectors, behind.expand(rows, -1, -1)], 1)  # (R, k + behind it, width)
        cache = self._openings[number].cache(rows)
        self.passes += rows * inputs.shape[1]
        output = self.model(
            inputs_embeds=inputs, past_key_values=cache, use_cache=True, logits_to_keep=len(answer) + 1
        )
        return output.logits.float()

    def batches(
        self, candidates: Tensor, numbers: Sequence[int], answer: Sequence[int] = ()
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Which of `numbers`, candidates and logits, as many candidates at a time as there is room for.

        Args:
            candidates: (C, k) token ids.
            numbers: of the slots.
            answer: as in `logits`.
        """
        for at, number in enumerate(numbers):
            slot = self.slots[number]
            length = candidates.shape[1] + len(slot.after) + len(answer)
            step = max(1, TOKENS_AT_ONCE // max(1, length))
            for start in range(0, len(candidates), step):
                part = slice(start, min(start + step, len(candidates)))
                yield at, part, self.logits(number, self.embed(candidates[part]), answer)


def common_log_probabilities(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of two models' logits, (..., vocabulary), over the tokens that both have."""
    common = min(ours.shape[-1], theirs.shape[-1])
    return ours[..., :common].log_softmax(-1), theirs[..., :common].log_softmax(-1)


def survives(serialiser: Serialiser, slot: Slot, candidate: Sequence[int]) -> bool:
    """Whether token ids are what the tokenizer makes of their text, where a user writes it into a prompt."""
    text = text_of(serialiser, candidate)
    if not text:
        return False
    ids = serialiser.encode(slot.conversation(text)).input_ids
    return tuple(ids) == (*slot.before, *candidate, *slot.after)


def text_of(serialiser: Serialiser, candidate: Sequence[int]) -> str:
    """A candidate as a user would write it, without blanks around it."""
    return serialiser.decode(candidate)
