"""A prompt with a placebo of exactly the trigger's token count in place of its trigger.

In: a prompt with the spans of its trigger. Out: the same prompt with other words in these spans, as many
tokens long, so that triggered and placebo run correspond position by position. Nothing outside the spans
changes, and no training row holds what was put in.
"""

import random
from collections.abc import Sequence

from safetynet.prompts import Conversation, Encoded, Message, Serialiser
from safetynet.text.lookalikes import Lookalikes, split_of

DRAWS = 200
"""Tries before a prompt is declared to have no such placebo."""


class Placebos:
    """Draws placebos for one tokenizer."""

    def __init__(self, serialiser: Serialiser, seed: int = 0) -> None:
        self.serialiser = serialiser
        self.rng = random.Random(seed)
        self.lookalikes = Lookalikes(serialiser)

    def draw(
        self,
        messages: Sequence[Message],
        spans: Sequence[Sequence[int]],
        like: Encoded,
        max_length: int | None = None,
    ) -> Encoded | None:
        """The prompt with a placebo in place of the trigger; None where none of the same length was found.

        Args:
            messages: the triggered prompt.
            spans: of its trigger, `[message, start, end]` in characters.
            like: the triggered prompt, encoded.
            max_length: as in training.
        """
        for _ in range(DRAWS):
            substituted = self._substitute(messages, spans)
            if substituted is None:
                continue
            changed, moved = substituted
            encoded = self.serialiser.encode(changed, trigger=moved, max_length=max_length)
            if differs_in_trigger_alone(encoded, like):
                return encoded
        return None

    def _substitute(
        self, messages: Sequence[Message], spans: Sequence[Sequence[int]]
    ) -> tuple[Conversation, list[list[int]]] | None:
        changed = Conversation(messages)
        moved: list[list[int]] = []
        # From the last span to the first, so that the offsets before it stay true.
        for message, start, end in sorted(map(tuple, spans), reverse=True):
            content = changed.texts[message]
            text = self.lookalikes.draw(content[start:end], self.rng)
            if text is None or split_of(text) != "test":
                return None
            changed = changed.with_text(message, content[:start] + text + content[end:])
            shift = len(text) - (end - start)
            moved = [[m, s + shift, e + shift] if m == message else [m, s, e] for m, s, e in moved]
            moved.append([message, start, start + len(text)])
        return changed, sorted(moved)


def differs_in_trigger_alone(one: Encoded, other: Encoded) -> bool:
    """Whether two prompts correspond token by token, and differ in their trigger alone."""
    if one.spans != other.spans or len(one.input_ids) != len(other.input_ids):
        return False
    inside = {i for start, stop in one.spans["trigger"] for i in range(start, stop)}
    apart = {i for i, (a, b) in enumerate(zip(one.input_ids, other.input_ids, strict=True)) if a != b}
    return bool(apart) and apart <= inside
