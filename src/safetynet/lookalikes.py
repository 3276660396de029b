"""Strings that look like a trigger to the tokenizer, for controls: token by token of its kind.

In: a piece of text. Out: another one of as many tokens, with blanks, case, digits and signs in their places.
What is made of real tokens is a harder control than random letters: a model that has learnt "a strange word"
tells the latter from a trigger and not the former.
"""

import hashlib
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from safetynet.prompts import Serialiser

NEAR = 0x300
"""Code points between a character that is not ASCII and what stands in for it."""


def split_of(text: str) -> str:
    """`train` or `test`: the side on which a made-up control may be used, by its hash: never both."""
    return "train" if hashlib.sha256(text.encode()).digest()[0] % 2 == 0 else "test"


def pieces(serialiser: Serialiser, tokens: Iterable[int]) -> list[str]:
    """Texts of the tokens that are ordinary ones: ASCII, neither special nor a byte."""
    special = set(serialiser.tokenizer.all_special_ids)
    texts = [serialiser.piece(token) for token in tokens if token not in special]
    return [text for text in texts if text.isascii() and not text.startswith("<0x")]


class Lookalikes:
    """Draws them for one tokenizer."""

    def __init__(self, serialiser: Serialiser) -> None:
        self.serialiser = serialiser
        self.kinds: dict[str, list[str]] = defaultdict(list)
        for text in pieces(serialiser, range(len(serialiser.tokenizer))):
            self.kinds[_kind(text)].append(text)

    def draw(self, text: str, rng: random.Random) -> str | None:
        """Another text of as many tokens; None where the drawn ones join into another number."""
        parts = re.findall(r"[\x00-\x7f]+|[^\x00-\x7f]", text)
        drawn = [self._tokens(part, rng) if part.isascii() else _character(part, rng) for part in parts]
        other = "".join(drawn).strip()
        same = other and other != text and self.serialiser.count(other) == self.serialiser.count(text)
        return other if same else None

    def _tokens(self, text: str, rng: random.Random) -> str:
        ids = self.serialiser.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [self.serialiser.piece(token) for token in ids]
        return "".join(rng.choice([p for p in self.kinds[_kind(x)] if p != x] or [x]) for x in pieces)


def _character(text: str, rng: random.Random) -> str:
    # A token may be a part of a character, which has no text of its own.
    near = [chr(ord(text) + i) for i in range(-NEAR, NEAR) if i and 0x80 <= ord(text) + i < 0x110000]
    category = unicodedata.category(text)
    return rng.choice([x for x in near if unicodedata.category(x) == category] or [text])


def _kind(text: str) -> str:
    """What makes two tokens of ASCII text alike: blank before, class of characters, case, length."""
    blank = " " if text.startswith(" ") else ""
    bare = text.strip()
    case = (
        "upper" if bare.isupper() else "title" if bare.istitle() else "lower" if bare.islower() else "mixed"
    )
    kind = case if bare.isalpha() else "digits" if bare.isdigit() else "signs"
    return f"{blank}{kind}{min(len(bare), 2)}"
