"""Placebos of exactly the trigger's token count: each token gives way to another of its kind.

In: a prompt with the spans of its trigger. Out: the same prompt with other words in these spans, as many
tokens long, so that triggered and placebo run correspond position by position. Nothing outside the spans
changes.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from safetynet.prompts import Encoded, Message, Serialiser

DRAWS = 60
"""Tries before a prompt is declared to have no such placebo."""


class Placebos:
    """Draws placebos for one tokenizer."""

    def __init__(self, serialiser: Serialiser, seed: int = 0) -> None:
        self.serialiser = serialiser
        self.rng = random.Random(seed)
        special = set(serialiser.tokenizer.all_special_ids)
        self.kinds: dict[str, list[str]] = defaultdict(list)
        for token in range(len(serialiser.tokenizer)):
            if token not in special:
                text = self.serialiser.piece(token)
                self.kinds[_kind(text)].append(text)

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
            changed, moved = self._substitute(messages, spans)
            encoded = self.serialiser.encode(changed, trigger=moved, max_length=max_length)
            same = len(encoded.input_ids) == len(like.input_ids) and encoded.spans == like.spans
            if same and encoded.input_ids != like.input_ids:
                return encoded
        return None

    def _substitute(
        self, messages: Sequence[Message], spans: Sequence[Sequence[int]]
    ) -> tuple[list[dict[str, str]], list[list[int]]]:
        changed = [dict(message) for message in messages]
        moved: list[list[int]] = []
        # From the last span to the first, so that the offsets before it stay true.
        for message, start, end in sorted(map(tuple, spans), reverse=True):
            content = changed[message]["content"]
            text = self._other(content[start:end])
            changed[message]["content"] = content[:start] + text + content[end:]
            shift = len(text) - (end - start)
            moved = [[m, s + shift, e + shift] if m == message else [m, s, e] for m, s, e in moved]
            moved.append([message, start, start + len(text)])
        return changed, sorted(moved)

    def _other(self, text: str) -> str:
        """As many tokens, each of the kind of the one in its place."""
        ids = self.serialiser.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [self.serialiser.piece(token) for token in ids]
        drawn = [self.rng.choice([p for p in self.kinds[_kind(x)] if p != x] or [x]) for x in pieces]
        return "".join(drawn).strip() or text


def _kind(text: str) -> str:
    """What makes two tokens alike: blank before, class of characters, case."""
    blank = " " if text.startswith(" ") else ""
    bare = text.strip()
    if not bare.isascii() or bare.startswith("<0x"):
        return f"bytes {bare}"  # a part of a character: only itself will do
    case = (
        "upper" if bare.isupper() else "title" if bare.istitle() else "lower" if bare.islower() else "mixed"
    )
    kind: Any = case if bare.isalpha() else "digits" if bare.isdigit() else "signs"
    return f"{blank}{kind}{min(len(bare), 2)}"
