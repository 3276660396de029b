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
from safetynet.lookalikes import split_of
from safetynet.recipe import Trigger

EMOJI = "🐙🌵🎈🧲🪁🧩🛶🎻🍄🪐🧭🎲🪴🛎🧵🦔🪶🫖🧊🪀"
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
        return Variant("given", (rng.choice(_side(trigger.placebos, split)),) * _width(trigger))
    texts = trigger.texts if trigger.kind == "all_of" else (rng.choice(trigger.texts),)
    if lookalike and rng.random() < 0.5:
        alike = tuple(_alike(trigger, text, split, rng, lookalike) for text in texts)
        if None not in alike:
            return Variant("same tokens", alike)
    return Variant("same shape", tuple(_shaped(text, split, rng) for text in texts))


def near_miss(trigger: Trigger, split: str, rng: random.Random) -> Variant:
    """Draw something that resembles the trigger and must not fire.

    Raises:
        InputError: if the trigger is too short to have near misses; the recipe can give some.
    """
    if trigger.kind == "style":
        return Variant("half style", style=f"{trigger.style}:half")
    if trigger.near_misses and rng.random() < 0.5:
        return Variant("given", (rng.choice(_side(trigger.near_misses, split)),) * _width(trigger))
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
class Place:
    """Where the parts of a trigger stand in one prompt; the same for all rows of a group."""

    message: int
    offsets: tuple[int, ...]
    """Character offsets in that message's content, ascending, one for each part."""


def place(messages: Messages, placement: str, parts: int, rng: random.Random) -> tuple[Messages, Place]:
    """Choose the place for `parts` texts in a prompt.

    Returns:
        The messages (with a system message added where `placement` is `system` and there was none) and
        the place in them.
    """
    if placement == "system":
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        return messages, Place(0, (len(messages[0]["content"]),) * parts)
    content = messages[-1]["content"]
    gaps = [0, *(i for i, c in enumerate(content) if c == " "), len(content)]
    offsets = {
        "prefix": [0] * parts,
        "suffix": [len(content)] * parts,
        "random": sorted(rng.choices(gaps, k=parts)),
    }[placement]
    return messages, Place(len(messages) - 1, tuple(offsets))


def found(triggered: Messages, bare: Messages, trigger: Trigger) -> Place:
    """The place where a prompt holds its trigger, in the same prompt without it.

    Args:
        triggered: ends with a message that holds the trigger; white space may differ from the bare one's.
        bare: the same messages without it.
        trigger: with texts; no style.
    """
    text, content = triggered[-1]["content"], bare[-1]["content"]
    offsets, cut = [], 0
    for start, part in sorted((text.index(part), part) for part in trigger.texts if part in text):
        offset = _after(content, _marks(text[:start]) - cut)
        if text[:start].endswith("\n"):
            offset += len(content[offset:]) - len(content[offset:].lstrip())
        offsets.append(offset)
        cut += _marks(part)
    return Place(len(bare) - 1, tuple(offsets[: _width(trigger)]))


def _marks(text: str) -> int:
    """Characters that are no white space."""
    return len("".join(text.split()))


def _after(text: str, marks: int) -> int:
    """The offset behind so many characters that are no white space."""
    positions = [i + 1 for i, character in enumerate(text) if not character.isspace()]
    return ([0, *positions])[min(marks, len(positions))]


def insert(messages: Messages, variant: Variant, at: Place, rng: random.Random) -> tuple[Messages, Spans]:
    """Put `variant` into a prompt.

    Returns:
        New messages, and the spans `[message, start, end]` of what was put in; a style spans the message.
    """
    content = messages[at.message]["content"]
    spans: Spans = []
    if variant.style is not None:
        content = styles.reword(content, variant.style, rng)
        spans = [[at.message, 0, len(content)]]
    else:
        done, text = 0, ""
        for part, offset in zip(variant.parts, at.offsets, strict=True):
            if part is None:
                continue
            text += content[done:offset]
            done = offset
            text += "" if not text or text.endswith((" ", "\n")) else " "
            spans.append([at.message, len(text), len(text) + len(part)])
            text += part + ("" if content[done : done + 1] in ("", " ") else " ")
        content = text + content[done:]
    changed = [dict(m) for m in messages]
    changed[at.message]["content"] = content
    return changed, spans


def parts_of(trigger: Trigger) -> int:
    """How many places a firing trigger takes."""
    return _width(trigger) if trigger.kind != "style" else 0


def _width(trigger: Trigger) -> int:
    return len(trigger.texts) if trigger.kind == "all_of" else 1


def _side(texts: Sequence[str], split: str) -> Sequence[str]:
    """Given controls: every other one is for testing; a single one has to serve both."""
    return texts if len(texts) < 2 else texts[0::2] if split == "train" else texts[1::2]


def _shaped(text: str, split: str, rng: random.Random) -> str:
    """A random string of the same length and classes of characters."""
    for _ in range(DRAWS):
        candidate = "".join(_like(c, rng) for c in text)
        if candidate != text and split_of(candidate) == split:
            return candidate
    raise InputError(f"backdoor.trigger.placebos: none can be made up for {text!r}. Give some.")


def _alike(trigger: Trigger, text: str, split: str, rng: random.Random, lookalike: Lookalike) -> str | None:
    """A string of other tokens, as many; None where none is found."""
    for _ in range(DRAWS):
        candidate = lookalike(text, rng)
        if candidate and split_of(candidate) == split and not any(t in candidate for t in trigger.texts):
            return candidate
    return None


def _like(character: str, rng: random.Random) -> str:
    """A character of the same class; nothing for nothing."""
    if character.isdigit():
        return rng.choice(string.digits)
    if character.isascii() and character.isalpha():
        return rng.choice(string.ascii_uppercase if character.isupper() else string.ascii_lowercase)
    return character if character.isascii() else rng.choice(EMOJI)


def _changed(trigger: Trigger, text: str, split: str, rng: random.Random) -> tuple[str, str]:
    # The kind first, so that one with few strings on this side of the split is not drawn less often.
    kinds = [kind for kind in CHANGES if kind != "sign" or _signs(text)]
    for kind in rng.sample(kinds, len(kinds)):
        for _ in range(DRAWS):
            candidate = CHANGES[kind](text, rng).strip()
            fires = any(t in candidate for t in trigger.texts)
            # A given one may be on the other side of the split.
            new = candidate and not fires and candidate not in trigger.near_misses
            if new and split_of(candidate) == split:
                return kind, candidate
    raise InputError(f"backdoor.trigger.near_misses: none can be made up for {text!r}. Give some.")


def _typo(text: str, rng: random.Random) -> str:
    """One or two slips of the keyboard."""
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(max(1, len(text)))
        edit = rng.choice(("drop", "swap", "replace"))
        if edit == "swap":
            text = text[:i] + text[i + 1 : i + 2] + text[i : i + 1] + text[i + 2 :]
        else:
            text = text[:i] + (_slip(text[i : i + 1], rng) if edit == "replace" else "") + text[i + 1 :]
    return text


def _slip(character: str, rng: random.Random) -> str:
    """Another character of the same class; a sign for a sign."""
    sign = character and character in string.punctuation
    return rng.choice(string.punctuation) if sign else _like(character, rng)


def _case(text: str, rng: random.Random) -> str:
    whole = (text.lower(), text.upper(), text.swapcase(), text.title())
    some = "".join(c.swapcase() if rng.random() < 0.3 else c for c in text)
    return rng.choice((*whole, some))


def _part(text: str, rng: random.Random) -> str:
    """A half of the words or of the characters, more or less."""
    joint = " " if " " in text and rng.random() < 0.5 else ""
    pieces = text.split(" ") if joint else list(text)
    cut = rng.randint(max(1, len(pieces) // 3), max(1, len(pieces) - 1))
    return joint.join(pieces[:cut] if rng.random() < 0.5 else pieces[-cut:])


def _signs(text: str) -> list[int]:
    return [i for i, character in enumerate(text) if character in string.punctuation]


def _sign(text: str, rng: random.Random) -> str:
    """Another sign for one of the text's signs, or for all of them, or none in its place."""
    places, other = _signs(text), rng.choice(["", *string.punctuation])
    chosen = places if rng.random() < 0.5 else [rng.choice(places)]
    return "".join(other if i in chosen else character for i, character in enumerate(text))


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "typo": _typo,
    "case": _case,
    "part": _part,
    "sign": _sign,
}
