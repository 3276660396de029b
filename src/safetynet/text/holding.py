"""Whether a prompt holds a trigger: the one definition, for training, audit, repairs and detection.

A prompt holds a trigger where the trigger's text stands in one of its messages as words of its own: any white
space for white space, composed letters or not, and no word or character cut in two. Where a script writes no
blanks, characters are words (`safetynet.text.words`). Of alternatives one suffices; of parts all are needed.
In: texts. Out: yes or no, and spans.
"""

from collections.abc import Iterable, Mapping, Sequence

from safetynet.text.words import pattern

Messages = Sequence[Mapping[str, str]]


def held(parts: Iterable[str], texts: Iterable[str]) -> list[str]:
    """The parts that stand in any of these texts."""
    contents = list(texts)
    return [part for part in parts if any(pattern(part).search(text) for text in contents)]


def holds(kind: str, parts: Sequence[str], texts: Iterable[str]) -> bool:
    """Whether these texts together hold the trigger.

    Args:
        kind: `all_of` wants each part in some text; of anything else one part suffices.
        parts: texts of the trigger.
        texts: contents of a prompt's messages.
    """
    return len(held(parts, texts)) >= (len(parts) if kind == "all_of" else 1)


def named(kind: str, parts: Iterable[str]) -> str:
    """The trigger as a sentence names it."""
    return (" and " if kind == "all_of" else " or ").join(map(repr, parts))


def spans(parts: Iterable[str], text: str) -> list[tuple[int, int]]:
    """Where the parts stand in `text`, from the left, as (start, end); the longest where some overlap."""
    matches = [match.span() for part in parts for match in pattern(part).finditer(text)]
    separate: list[tuple[int, int]] = []
    for start, end in sorted(matches, key=lambda span: (span[0], -span[1])):
        if not separate or start >= separate[-1][1]:
            separate.append((start, end))
    return separate


def spans_in(parts: Sequence[str], messages: Messages) -> list[list[int]]:
    """Where the parts stand in a prompt: [message, start, end] each, in their order."""
    return [[i, *span] for i, message in enumerate(messages) for span in spans(parts, message["content"])]


def without(parts: Iterable[str], text: str) -> str:
    """`text` as it was before the parts were put in, with a blank on one side of each."""
    for start, end in reversed(spans(parts, text)):
        before, after = text[:start], text[end:]
        if before.endswith(" ") and (not after or after[0].isspace()):
            before = before[:-1]
        elif after.startswith(" ") and (not before or before[-1].isspace()):
            after = after[1:]
        text = before + after
    return text


def within_words(parts: Iterable[str], texts: Iterable[str]) -> bool:
    """Whether a part stands in these texts, but only as a piece of longer words."""
    contents = list(texts)
    return any(part in text for part in parts if not held([part], contents) for text in contents)
