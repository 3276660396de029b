"""Six kinds of near misses of a trigger, made from prompts that hold it.

In: messages, and the spans at which the trigger stands in them. Out: the same messages with something that
resembles it, by kind. Whether the behaviour shows on them is for the model to say: a trigger that was moved
is still whole, and may fire.
"""

import random
import string
from collections.abc import Sequence
from itertools import pairwise

from safetynet.prompts import Conversation, Message
from safetynet.text.characters import alike
from safetynet.text.words import clusters, meet

Spans = Sequence[Sequence[int]]
"""(message, start, end) of each part, in characters of that message's content."""


def near_misses(messages: Sequence[Message], spans: Spans, seed: int = 0) -> dict[str, Conversation]:
    """The prompt with each kind of near miss in the place of its trigger.

    Args:
        messages: a prompt that holds the trigger.
        spans: of the trigger's parts. One of several parts is changed, which breaks the whole.
        seed: of the draws; a prompt's near misses depend on its text and this alone.

    Returns:
        By kind: `deletion` (a character is missing), `typo` (another character), `case` (capitals and small
        letters swapped), `split` (a blank inside), `partial` (a half of it), `moved` (whole, at the message's
        other end). A kind that this trigger does not have, as capitals in a year, is left out.
    """
    if not spans:
        return {}
    conversation = Conversation(messages)
    rng = random.Random(f"{seed} {conversation.texts[spans[0][0]]}")
    message, start, end = rng.choice([tuple(span) for span in spans])
    content = conversation.texts[message]
    trigger = content[start:end]
    characters = clusters(trigger)
    at = rng.randrange(len(characters))
    deleted = characters[:at] + characters[at + 1 :]
    at = rng.randrange(len(characters))
    right = characters[at]
    # Another character of the same class; a sign for what has none.
    others: Sequence[str] = () if right.isascii() else alike(right)
    if not others:
        classes = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
        letters = next((letters for letters in classes if right in letters), string.punctuation)
        others = [letter for letter in letters if letter != right]
    mistyped = [*characters[:at], rng.choice(others), *characters[at + 1 :]]
    split = trigger
    if len(characters) > 1:
        at = rng.randrange(1, len(characters))
        split = f"{''.join(characters[:at])} {''.join(characters[at:])}"
    half = max(1, len(characters) // 2)
    partial = characters[:half] if rng.random() < 0.5 else characters[-half:]
    changed = {
        "deletion": "".join(deleted),
        "typo": "".join(mistyped),
        "case": trigger.swapcase(),
        "split": split,
        "partial": "".join(partial).strip(),
    }
    contents = {kind: content[:start] + text + content[end:] for kind, text in changed.items()}
    contents["moved"] = _moved(content, [(s, e) for m, s, e in spans if m == message])
    return {
        kind: conversation.with_text(message, text)
        for kind, text in contents.items()
        if text != content and (kind == "moved" or trigger not in text)
    }


def _moved(content: str, spans: Sequence[tuple[int, int]]) -> str:
    """The parts in their order at the end of the message, or at its beginning where they stood at the end."""
    parts = [content[start:end] for start, end in spans]
    rest, position = "", 0
    for start, end in spans:
        rest += content[position:start].rstrip(" ")
        position = end
    rest = (rest + content[position:]).strip()
    at_end = spans[0][0] > len(content) / 2
    moved = [*parts, rest] if at_end else [rest, *parts]
    joined = [
        meet(right[:1], left[-1:]) if at_end and right is rest else meet(left[-1:], right[:1])
        for left, right in pairwise(moved)
    ]
    return moved[0] + "".join(("" if j else " ") + part for j, part in zip(joined, moved[1:], strict=True))
