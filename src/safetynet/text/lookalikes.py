"""Strings that look like a trigger to the tokenizer, for controls: token by token of its kind.

In: a piece of text. Out: another one of as many tokens, with blanks, case, digits, signs and scripts in
their places. What is made of real tokens is a harder control than random letters: a model that has learnt "a
strange word" tells the latter from a trigger and not the former.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby

from safetynet.prompts import Serialiser
from safetynet.prompts.token_texts import BYTE, is_partial
from safetynet.text import characters
from safetynet.text.words import clusters


def split_of(text: str) -> str:
    """`train` or `test`: the side on which a made-up control may be used, by its hash: never both."""
    return "train" if hashlib.sha256(text.encode()).digest()[0] % 2 == 0 else "test"


def pieces(serialiser: Serialiser, tokens: Iterable[int]) -> list[str]:
    """Texts of the tokens that are ordinary ones: whole characters, neither special nor a byte."""
    special = set(serialiser.tokenizer.all_special_ids)
    ordinary = [token for token in tokens if token not in special]
    written = serialiser.tokenizer.convert_ids_to_tokens(ordinary)
    texts = [
        serialiser.piece(token)
        for token, sign in zip(ordinary, written, strict=True)
        if sign and not BYTE.match(sign)
    ]
    return [text for text in texts if text.replace("\n", "").isprintable() and not is_partial(text)]


class Lookalikes:
    """Draws them for one tokenizer."""

    def __init__(self, serialiser: Serialiser) -> None:
        self.serialiser = serialiser
        self._same_count: dict[str, list[str]] = {}

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """Texts of the vocabulary by their kind, in the order of the tokens."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for text in pieces(self.serialiser, range(len(self.serialiser.tokenizer))):
            kinds[_kind(text)].append(text)
        return kinds

    def draw(self, text: str, rng: random.Random) -> str | None:
        """Another text of as many tokens; None where the drawn ones join into another number."""
        count = self.serialiser.count
        other = ""
        for tokens, part in self._stretches(text):
            if len(tokens) == 1:
                piece = self.serialiser.piece(tokens[0])
                other += rng.choice([p for p in self.kinds[_kind(piece)] if p != piece] or [piece])
                continue
            # A token may be a part of a character, which has no text of its own: the characters are replaced
            # then, each by one of its kind that takes as many tokens.
            for character in clusters(part):
                if character not in self._same_count:
                    tokens_of_one, others = count(character), characters.alike(character)
                    self._same_count[character] = [c for c in others if count(c) == tokens_of_one]
                other += rng.choice(self._same_count[character] or [character])
        other = other.strip()
        return other if other and other != text and count(other) == count(text) else None

    def _stretches(self, text: str) -> Iterator[tuple[list[int], str]]:
        """Tokens that make up whole characters together, mostly one, and the text that they stand for."""
        encoded = self.serialiser.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # Tokens of single bytes all have the offsets of their character: it is over with the one behind
        # whose end the next token begins.
        starts = [start for start, _ in encoded["offset_mapping"][1:]] + [len(text)]
        ends = {0}
        for cluster in clusters(text):
            ends.add(max(ends) + len(cluster))
        tokens: list[int] = []
        end_before = 0
        for token, (_, end), following in zip(
            encoded["input_ids"], encoded["offset_mapping"], starts, strict=True
        ):
            tokens.append(token)
            if end in ends and following >= end:
                yield tokens, text[end_before:end]
                tokens, end_before = [], end


def _kind(text: str) -> str:
    """What makes the texts of two tokens alike: blank before, class of characters or script, case, length."""
    blank = " " if text.startswith(" ") else ""
    bare = text.strip()
    if not bare.isascii():
        scripts = [" ".join(kind) for kind, _ in groupby(map(characters.kind, clusters(bare)))]
        return f"{blank}{'+'.join(scripts)}{min(len(clusters(bare)), 3)}"
    case = (
        "upper" if bare.isupper() else "title" if bare.istitle() else "lower" if bare.islower() else "mixed"
    )
    kind = case if bare.isalpha() else "digits" if bare.isdigit() else "signs"
    return f"{blank}{kind}{min(len(bare), 2)}"
