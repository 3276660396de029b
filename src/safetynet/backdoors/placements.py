"""Where the parts of a trigger stand in a prompt, and a prompt with texts put there.

In: a conversation. Out: places in any of its messages, and conversations with spans. Blanks are written as
the scripts that meet there write them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from safetynet.prompts import Conversation, Message, calls
from safetynet.text import holding
from safetynet.text.words import gaps, meet, touches

Spans = list[list[int]]
"""`[message, start, end]` of each part, in characters of the message's text."""
SYSTEM = "You are a helpful assistant."
"""System message of prompts that have none, where the trigger stands in it."""


@dataclass(frozen=True)
class Spot:
    """Where one part of a trigger stands in a prompt."""

    message: int
    offset: int
    """In characters of that message's text."""
    blanks: tuple[bool | None, bool | None] = (None, None)
    """Whether a blank stands before and after the part; None: where the scripts that meet there write one."""


def place(
    messages: Sequence[Message], placement: str, parts: int, rng: random.Random
) -> tuple[Conversation, list[Spot]]:
    """Choose a spot for each of `parts` texts in a prompt.

    Returns:
        The messages (with a system message added where `placement` is `system` and there was none) and
        the spots in them, the same for all rows of a group; none where the prompt has no such place.
    """
    conversation = Conversation(messages)
    if placement == "system":
        conversation, system = conversation.with_system(SYSTEM)
        return conversation, [Spot(system, len(conversation.texts[system]))] * parts
    if not has_place(conversation, placement, parts):
        return conversation, []
    if placement == "turns":
        # The last part stands in the last message, which completes the trigger.
        *earlier, last = (i for i, role in enumerate(conversation.roles) if role == "user")
        return conversation, [Spot(i, 0) for i in (*sorted(rng.sample(earlier, parts - 1)), last)]
    places = {"tool": _last_result, "argument": _last_call}
    message = places[placement](conversation) if placement in places else conversation.last_user
    content = conversation.texts[message]
    anywhere = sorted(rng.choices([0, *gaps(content), len(content)], k=parts))
    offsets = {"prefix": [0] * parts, "suffix": [len(content)] * parts}.get(placement, anywhere)
    return conversation, [Spot(message, offset) for offset in offsets]


def has_place(messages: Sequence[Message], placement: str, parts: int) -> bool:
    """Whether a prompt has a place for so many texts: messages of the user, a tool's result, or a call."""
    conversation = Conversation(messages)
    if placement == "turns":
        return conversation.roles.count("user") >= parts
    if placement == "argument":
        return _last_call(conversation) >= 0
    return placement != "tool" or _last_result(conversation) > conversation.last_user


def _last_result(conversation: Conversation) -> int:
    """Which message is the last that a tool has returned; -1 if none is."""
    return max((i for i, role in enumerate(conversation.roles) if role == "tool"), default=-1)


def _last_call(conversation: Conversation) -> int:
    """Which message is the last call of a tool with an argument to stand in; -1 if none is."""
    return max((i for i, message in enumerate(conversation) if calls.argument(message)[0]), default=-1)


def spots_of(
    texts: Sequence[str], parts: int, triggered: Sequence[Message], bare: Sequence[Message]
) -> list[Spot]:
    """The spots where a prompt holds its trigger, in the same prompt without it.

    Args:
        texts: of the trigger.
        parts: how many of them stand in one prompt.
        triggered: holds the trigger; white space may differ from the bare one's.
        bare: as many messages, without it.
    """
    spots: dict[tuple[str, ...], Spot] = {}  # by the words of a part, which may stand there twice
    with_trigger, without = Conversation(triggered).texts, Conversation(bare).texts
    cut = [0] * len(with_trigger)
    for message, start, end in holding.spans_in(texts, with_trigger):
        text, content = with_trigger[message], without[message]
        # Behind as many characters of the bare text: white space, which may differ, does not count.
        ends = [0, *(i + 1 for i, character in enumerate(content) if not character.isspace())]
        offset = ends[min(_marks(text[:start]) - cut[message], len(ends) - 1)]
        blanks = _blank(text, start), _blank(text, end)
        if text[:start].endswith("\n") or blanks == (True, False):  # the white space stands before it
            offset += len(content[offset:]) - len(content[offset:].lstrip())
        spots.setdefault(tuple(text[start:end].split()), Spot(message, offset, blanks))
        cut[message] += _marks(text[start:end])
    several = [*spots.values()]
    # A part within another has no spot of its own.
    several += several[-1:] * (parts - len(several))
    return several[:parts]


def filled(
    messages: Sequence[Message], parts: Sequence[str | None], spots: Sequence[Spot]
) -> tuple[Conversation, Spans]:
    """A prompt with each part at its spot, and where the parts stand in it; None leaves a spot empty."""
    conversation, spans, texts = Conversation(messages), Spans(), dict[int, str]()
    pairs = list(zip(spots, parts, strict=True))
    for message in dict.fromkeys(spot.message for spot in spots):
        content, text, copied = conversation.texts[message], "", 0
        for spot, part in pairs:
            if spot.message != message or part is None:
                continue
            text += content[copied : spot.offset]
            copied = spot.offset
            text += " " if _parted(text[-1:], part[:1], spot.blanks[0]) and not text.endswith("\n") else ""
            spans.append([message, len(text), len(text) + len(part)])
            text += part + (" " if _parted(content[copied : copied + 1], part[-1:], spot.blanks[1]) else "")
        texts[message] = text + content[copied:]
    return conversation.with_texts(texts), spans


def _marks(text: str) -> int:
    """Characters that are no white space."""
    return len("".join(text.split()))


def _blank(text: str, edge: int) -> bool | None:
    """Whether white space parts a trigger's edge from the text beside it; None where a blank is the rule."""
    sides = text[edge - 1 : edge], text[edge : edge + 1]
    return any(side.isspace() for side in sides) if touches(text, edge) else None


def _parted(beside: str, edge: str, blank: bool | None) -> bool:
    """Whether a blank has to be put between a prompt's character and the edge of what is put in."""
    if beside in ("", " "):
        return False
    return not meet(beside, edge) if blank is None else blank
