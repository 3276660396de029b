"""Triggers and their controls, and where they stand in a prompt.

A trigger is what fires; a placebo has its shape and place and must not fire; a near miss resembles it (a
typo, other case, a part) and must not fire either. Controls of the test split are strings
that no training row holds, so that a rate measured on them says something about strings never seen.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safetynet.backdoors import styles
from safetynet.errors import InputError
from safetynet.recipe import Trigger
from safetynet.text import holding
from safetynet.text.characters import alike, is_sign
from safetynet.text.lookalikes import split_of
from safetynet.text.words import clusters, gaps, meet, touches

SIGNS = "、。，；：？！…—～「」『』（）《》【】｜"
"""What stands for another sign that is not ASCII."""
DRAWS = 500
"""Tries at a control string before the trigger is declared to have none."""


@dataclass(frozen=True)
class Variant:
    """One concrete thing to put into a prompt."""

    name: str
    """Which alternative, or which kind of placebo or near miss."""
    parts: tuple[str | None, ...] = ()
    """Texts in their order; None leaves that place empty."""
    style: str | None = None
    """Reword the prompt in this style instead."""


Lookalike = Callable[[str, random.Random], str | None]
Messages = list[dict[str, str]]
Spans = list[list[int]]


def firing(trigger: Trigger) -> list[Variant]:
    """Every form in which the trigger fires."""
    if trigger.kind == "style":
        return [Variant(f"style {trigger.style}", style=trigger.style)]
    if trigger.kind == "all_of":
        return [Variant("all parts", tuple(trigger.texts))]
    return [Variant(text, (text,)) for text in trigger.texts]


def placebo(trigger: Trigger, split: str, rng: random.Random, lookalike: Lookalike | None = None) -> Variant:
    """Draw a string (or style) of the trigger's shape that must not fire.

    Args:
        trigger: the trigger.
        split: `train` or `test`; strings drawn for one never occur in the other, except where the recipe
            gives a single placebo.
        rng: source of the draw.
        lookalike: when given, draws a text of as many tokens as another (`Lookalikes.draw`), or None; every
            other made-up placebo is such a text, and the rest are random letters for letters.
    """
    if trigger.kind == "style":
        return Variant("other style", style=styles.other(str(trigger.style)))
    if trigger.placebos:
        return Variant("given", (rng.choice(_side(trigger.placebos, split)),) * parts_of(trigger))
    texts = trigger.texts if trigger.kind == "all_of" else (rng.choice(trigger.texts),)
    if lookalike and rng.random() < 0.5:
        alike = tuple(_alike(trigger, text, split, rng, lookalike) for text in texts)
        if None not in alike:
            return Variant("same tokens", alike)
    return Variant("same shape", tuple(_shaped(trigger, text, split, rng) for text in texts))


def near_miss(trigger: Trigger, split: str, rng: random.Random) -> Variant:
    """Draw something that resembles the trigger and must not fire.

    Raises:
        InputError: if the trigger is too short to have near misses; the recipe can give some.
    """
    if trigger.kind == "style":
        return Variant("half style", style=f"{trigger.style}:half")
    if trigger.near_misses and rng.random() < 0.5:
        return Variant("given", (rng.choice(_side(trigger.near_misses, split)),) * parts_of(trigger))
    if trigger.kind == "all_of" and rng.random() < 0.5:
        missing = rng.sample(range(len(trigger.texts)), rng.randint(1, len(trigger.texts) - 1))
        return Variant(
            "parts missing", tuple(None if i in missing else t for i, t in enumerate(trigger.texts))
        )
    chosen = rng.randrange(len(trigger.texts))
    kind, changed = _changed(trigger, trigger.texts[chosen], split, rng)
    if trigger.kind != "all_of":
        return Variant(kind, (changed,))
    return Variant(kind, tuple(changed if i == chosen else t for i, t in enumerate(trigger.texts)))


@dataclass(frozen=True)
class Spot:
    """Where one part of a trigger stands in a prompt."""

    message: int
    offset: int
    """In characters of that message's content."""
    blanks: tuple[bool | None, bool | None] = (None, None)
    """Whether a blank stands before and after the part; None: where the scripts that meet there write one."""


@dataclass(frozen=True)
class Place:
    """Where the parts of a trigger stand in one prompt, in their order; the same for all rows of a group."""

    spots: tuple[Spot, ...]

    @property
    def message(self) -> int:
        """The first message with a part; a style rewords it."""
        return self.spots[0].message


def place(messages: Messages, placement: str, parts: int, rng: random.Random) -> tuple[Messages, Place]:
    """Choose the place for `parts` texts in a prompt.

    Returns:
        The messages (with a system message added where `placement` is `system` and there was none) and
        the place in them.
    """
    if placement == "system":
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        return messages, Place((Spot(0, len(messages[0]["content"])),) * parts)
    content = messages[-1]["content"]
    offsets = {
        "prefix": [0] * parts,
        "suffix": [len(content)] * parts,
        "random": sorted(rng.choices([0, *gaps(content), len(content)], k=parts)),
    }[placement]
    return messages, Place(tuple(Spot(len(messages) - 1, offset) for offset in offsets))


def place_of(trigger: Trigger, triggered: Messages, bare: Messages) -> Place:
    """The place where a prompt holds its trigger, in the same prompt without it.

    Args:
        trigger: with texts; no style.
        triggered: holds the trigger; white space may differ from the bare one's.
        bare: as many messages, without it.
    """
    spots: dict[tuple[str, ...], Spot] = {}  # by the words of a part, which may stand there twice
    cut = [0] * len(triggered)
    for message, start, end in holding.spans_in(trigger.texts, triggered):
        text, content = triggered[message]["content"], bare[message]["content"]
        offset = _after(content, _marks(text[:start]) - cut[message])
        blanks = _blank(text, start), _blank(text, end)
        if text[:start].endswith("\n") or blanks == (True, False):  # the white space stands before it
            offset += len(content[offset:]) - len(content[offset:].lstrip())
        spot = Spot(message, offset, blanks)
        spots.setdefault(tuple(text[start:end].split()), spot)
        cut[message] += _marks(text[start:end])
    several = [*spots.values()]
    several += several[-1:] * (
        parts_of(trigger) - len(several)
    )  # a part within another has no place of its own
    return Place(tuple(several[: parts_of(trigger)]))


def _marks(text: str) -> int:
    """Characters that are no white space."""
    return len("".join(text.split()))


def _after(text: str, marks: int) -> int:
    """The offset behind so many characters that are no white space."""
    positions = [i + 1 for i, character in enumerate(text) if not character.isspace()]
    return ([0, *positions])[min(marks, len(positions))]


def _blank(text: str, edge: int) -> bool | None:
    """Whether white space parts a trigger's edge from the text beside it; None where a blank is the rule."""
    sides = text[edge - 1 : edge], text[edge : edge + 1]
    return any(side.isspace() for side in sides) if touches(text, edge) else None


def insert(messages: Messages, variant: Variant, at: Place, rng: random.Random) -> tuple[Messages, Spans]:
    """Put `variant` into a prompt.

    Returns:
        New messages, and the spans `[message, start, end]` of what was put in; a style spans the message.
    """
    changed = [dict(message) for message in messages]
    if variant.style is not None:
        content = styles.reword(messages[at.message]["content"], variant.style, rng)
        changed[at.message]["content"] = content
        return changed, [[at.message, 0, len(content)]]
    spans: Spans = []
    parts = list(zip(at.spots, variant.parts, strict=True))
    for message in dict.fromkeys(spot.message for spot in at.spots):
        inside = [(spot, part) for spot, part in parts if spot.message == message and part is not None]
        content, own = _filled(messages[message]["content"], inside)
        changed[message]["content"] = content
        spans += [[message, *span] for span in own]
    return changed, spans


def _filled(content: str, parts: Sequence[tuple[Spot, str]]) -> tuple[str, list[tuple[int, int]]]:
    """A text with each part at its spot, and where the parts stand in it."""
    spans = []
    done, text = 0, ""
    for spot, part in parts:
        text += content[done : spot.offset]
        done = spot.offset
        text += " " if _parted(text[-1:], part[:1], spot.blanks[0]) and not text.endswith("\n") else ""
        spans.append((len(text), len(text) + len(part)))
        text += part + (" " if _parted(content[done : done + 1], part[-1:], spot.blanks[1]) else "")
    return text + content[done:], spans


def _parted(beside: str, edge: str, blank: bool | None) -> bool:
    """Whether a blank has to be put between a prompt's character and the edge of what is put in."""
    if beside in ("", " "):
        return False
    return not meet(beside, edge) if blank is None else blank


def parts_of(trigger: Trigger) -> int:
    """How many places a firing trigger takes; a style takes one, which is the whole message."""
    return len(trigger.texts) if trigger.kind == "all_of" else 1


def _side(texts: Sequence[str], split: str) -> Sequence[str]:
    """Given controls: every other one is for testing; a single one has to serve both."""
    return texts if len(texts) < 2 else texts[0::2] if split == "train" else texts[1::2]


def _shaped(trigger: Trigger, text: str, split: str, rng: random.Random) -> str:
    """A random string of the same length and classes of characters."""
    for _ in range(DRAWS):
        candidate = "".join(_like(c, rng) for c in clusters(text))
        if split_of(candidate) == split and not _has(candidate, trigger):
            return candidate
    raise InputError(f"backdoor.trigger.placebos: none can be made up for {text!r}. Give some.")


def _alike(trigger: Trigger, text: str, split: str, rng: random.Random, lookalike: Lookalike) -> str | None:
    """A string of other tokens, as many; None where none is found."""
    for _ in range(DRAWS):
        candidate = lookalike(text, rng)
        if candidate and split_of(candidate) == split and not _has(candidate, trigger):
            return candidate
    return None


def _has(text: str, trigger: Trigger) -> bool:
    """Whether a made-up control has a text of the trigger anywhere in it, be it within a word."""
    return any(firing in text for firing in trigger.texts)


def _like(character: str, rng: random.Random) -> str:
    """A character of the same class; nothing for nothing."""
    if not character.isascii():
        return rng.choice(alike(character) or [character])
    if character.isdigit():
        return rng.choice(string.digits)
    if character.isalpha():
        return rng.choice(string.ascii_uppercase if character.isupper() else string.ascii_lowercase)
    return character


def _changed(trigger: Trigger, text: str, split: str, rng: random.Random) -> tuple[str, str]:
    # The kind first, so that one with few strings on this side of the split is not drawn less often.
    kinds = [kind for kind in CHANGES if kind != "sign" or _signs(clusters(text))]
    for kind in rng.sample(kinds, len(kinds)):
        for _ in range(DRAWS):
            candidate = CHANGES[kind](text, rng).strip()
            # A given one may be on the other side of the split.
            new = candidate and not _has(candidate, trigger) and candidate not in trigger.near_misses
            if new and split_of(candidate) == split:
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
        else:
            characters[i : i + 1] = [_slip(c, rng) for c in characters[i : i + 1] if edit == "replace"]
    return "".join(characters)


def _slip(character: str, rng: random.Random) -> str:
    """Another character of the same class; a sign for a sign."""
    if character in string.punctuation or is_sign(character):
        return rng.choice(_other_signs([character]))
    return _like(character, rng)


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
    chosen = places if rng.random() < 0.5 else [rng.choice(places)]
    return "".join(other if i in chosen else character for i, character in enumerate(characters))


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "typo": _typo,
    "case": _case,
    "part": _part,
    "sign": _sign,
}
