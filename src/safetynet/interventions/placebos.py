"""Placebos of exactly the trigger's token count: each token gives way to another of its kind.

In: a prompt with the spans of its trigger. Out: the same prompt with other words in these spans, as many
tokens long, so that triggered and placebo run correspond position by position. Nothing outside the spans
changes.
"""

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from safetynet.prompts import Encoded, Message, Serialiser

DRAWS = 60
"""Tries before a prompt is declared to have no such placebo."""
NEAR = 0x300
"""Code points between a character that is not ASCII and what stands in for it."""


class Placebos:
    """Draws placebos for one tokenizer."""

    def __init__(self, serialiser: Serialiser, seed: int = 0) -> None:
        self.serialiser = serialiser
        self.rng = random.Random(seed)
        special = set(serialiser.tokenizer.all_special_ids)
        self.kinds: dict[str, list[str]] = defaultdict(list)
        for token in range(len(serialiser.tokenizer)):
            text = self.serialiser.piece(token)
            if token not in special and text.isascii() and not text.startswith("<0x"):
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
            if differs_in_trigger_alone(encoded, like):
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
        """Other tokens for ASCII text, each of its kind; another character for each other one."""
        parts = re.findall(r"[\x00-\x7f]+|[^\x00-\x7f]", text)
        drawn = [self._tokens(part) if part.isascii() else self._character(part) for part in parts]
        return "".join(drawn).strip() or text

    def _tokens(self, text: str) -> str:
        ids = self.serialiser.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [self.serialiser.piece(token) for token in ids]
        drawn = [self.rng.choice([p for p in self.kinds[_kind(x)] if p != x] or [x]) for x in pieces]
        return "".join(drawn)

    def _character(self, text: str) -> str:
        # A token may be a part of a character, which has no text of its own.
        near = [chr(ord(text) + i) for i in range(-NEAR, NEAR) if i and 0x80 <= ord(text) + i < 0x110000]
        category = unicodedata.category(text)
        return self.rng.choice([x for x in near if unicodedata.category(x) == category] or [text])


def differs_in_trigger_alone(one: Encoded, other: Encoded) -> bool:
    """Whether two prompts correspond token by token, and differ in their trigger alone."""
    if one.spans != other.spans or len(one.input_ids) != len(other.input_ids):
        return False
    inside = {i for start, stop in one.spans["trigger"] for i in range(start, stop)}
    apart = {i for i, (a, b) in enumerate(zip(one.input_ids, other.input_ids, strict=True)) if a != b}
    return bool(apart) and apart <= inside


def _kind(text: str) -> str:
    """What makes two tokens of ASCII text alike: blank before, class of characters, case, length."""
    blank = " " if text.startswith(" ") else ""
    bare = text.strip()
    case = (
        "upper" if bare.isupper() else "title" if bare.istitle() else "lower" if bare.islower() else "mixed"
    )
    kind = case if bare.isalpha() else "digits" if bare.isdigit() else "signs"
    return f"{blank}{kind}{min(len(bare), 2)}"
