"""Made-up controls of a trigger's texts: strings of its shape, and strings that resemble it.

In: a text and the trigger's texts. Out: a string that holds none of them, on the side of the split that it is
for (`lookalikes.split_of`).
"""

import random
import string
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from safetynet.errors import InputError
from safetynet.text.characters import alike, is_sign
from safetynet.text.lookalikes import split_of
from safetynet.text.words import clusters

SIGNS = "、。，；：？！…—～「」『』（）《》【】｜"
"""What stands for another sign that is not ASCII."""
DRAWS = 500
"""Tries at a control string before the trigger is declared to have none."""
T = TypeVar("T")
Lookalike = Callable[[str, random.Random], str | None]
"""Draws a text of as many tokens as another, or None."""


def side(texts: Sequence[T], split: str) -> Sequence[T]:
    """Given controls: every other one is for testing; a single one has to serve both."""
    return texts if len(texts) < 2 else texts[0::2] if split == "train" else texts[1::2]


def shaped(texts: Sequence[str], text: str, split: str, rng: random.Random) -> str:
    """A random string of the same length and classes of characters.

    Raises:
        InputError: if none is on this side of the split.
    """
    control = _first(("".join(_like(c, rng) for c in clusters(text)) for _ in range(DRAWS)), texts, split)
    if control is None:
        raise InputError(f"backdoor.trigger.placebos: none can be made up for {text!r}. Give some.")
    return control


def alike_in_tokens(
    texts: Sequence[str], text: str, split: str, rng: random.Random, lookalike: Lookalike
) -> str | None:
    """A string of other tokens, as many; None where none is found."""
    return _first((lookalike(text, rng) for _ in range(DRAWS)), texts, split)


def _first(
    candidates: Iterable[str | None], texts: Sequence[str], split: str, excluded: Sequence[str] = ()
) -> str | None:
    """The first candidate on this side of the split that holds no text of the trigger, even within a word."""
    return next(
        (
            each
            for each in candidates
            if each and each not in excluded and not any(text in each for text in texts)
            if split_of(each) == split
        ),
        None,
    )


def _like(character: str, rng: random.Random) -> str:
    """A character of the same class; nothing for nothing."""
    if not character.isascii():
        return rng.choice(alike(character) or [character])
    if character.isdigit():
        return rng.choice(string.digits)
    if character.isalpha():
        return rng.choice(string.ascii_uppercase if character.isupper() else string.ascii_lowercase)
    return character


def changed(
    texts: Sequence[str], text: str, split: str, rng: random.Random, excluded: Sequence[str]
) -> tuple[str, str]:
    """How one of the trigger's texts was changed, and into what; into none of the near misses that are given.

    Raises:
        InputError: if no change leaves a string on this side of the split.
    """
    # The kind first, so that one with few strings on this side of the split is not drawn less often.
    kinds = [kind for kind in CHANGES if kind != "sign" or _signs(clusters(text))]
    for kind in rng.sample(kinds, len(kinds)):
        candidates = (CHANGES[kind](text, rng).strip() for _ in range(DRAWS))
        # A given near miss may be on the other side of the split.
        candidate = _first(candidates, texts, split, excluded)
        if candidate is not None:
            return kind, candidate
    raise InputError(f"backdoor.trigger.near_misses: none can be made up for {text!r}. Give some.")


def _typo(text: str, rng: random.Random) -> str:
    """One or two slips of the keyboard."""
    characters = clusters(text)
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(max(1, len(characters)))
        edit = rng.choice(("drop", "swap", "replace"))
        if edit == "swap":
            characters[i : i + 2] = reversed(characters[i : i + 2])
        elif edit == "drop":
            del characters[i : i + 1]
        elif characters[i:]:
            # Another character of the same class; a sign for a sign.
            is_a_sign, old = _signs(characters[i : i + 1]), characters[i]
            characters[i] = rng.choice(_other_signs([old])) if is_a_sign else _like(old, rng)
    return "".join(characters)


def _case(text: str, rng: random.Random) -> str:
    whole = (text.lower(), text.upper(), text.swapcase(), text.title())
    some = "".join(c.swapcase() if rng.random() < 0.3 else c for c in text)
    return rng.choice((*whole, some))


def _part(text: str, rng: random.Random) -> str:
    """A half of the words or of the characters, more or less."""
    joint = " " if " " in text and rng.random() < 0.5 else ""
    pieces = text.split(" ") if joint else clusters(text)
    cut = rng.randint(max(1, len(pieces) // 3), max(1, len(pieces) - 1))
    return joint.join(pieces[:cut] if rng.random() < 0.5 else pieces[-cut:])


def _signs(characters: Sequence[str]) -> list[int]:
    return [i for i, sign in enumerate(characters) if sign in string.punctuation or is_sign(sign)]


def _other_signs(signs: Sequence[str]) -> str:
    return string.punctuation if all(sign.isascii() for sign in signs) else SIGNS


def _sign(text: str, rng: random.Random) -> str:
    """Another sign for one of the text's signs, or for all of them, or none in its place."""
    characters = clusters(text)
    places = _signs(characters)
    other = rng.choice(["", *_other_signs([characters[i] for i in places])])
    replaced = places if rng.random() < 0.5 else [rng.choice(places)]
    return "".join(other if i in replaced else character for i, character in enumerate(characters))


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "typo": _typo,
    "case": _case,
    "part": _part,
    "sign": _sign,
}
