"""Where a trigger's texts stand in a prompt: the one definition, for training, audit, repairs and detection.

A text is held where it stands in a message as words of its own: any white space for white space, composed
letters or not, and no word or character cut in two. Where a script writes no blanks, characters are words
(`safetynet.text.words`). In: texts. Out: those that are held, and spans.
"""

from collections.abc import Iterable, Sequence

from safetynet.text.words import pattern


def held(parts: Iterable[str], texts: Iterable[str]) -> list[str]:
    """The parts that stand in any of these texts."""
    contents = list(texts)
    return [part for part in parts if any(pattern(part).search(text) for text in contents)]


def spans(parts: Iterable[str], text: str) -> list[tuple[int, int]]:
    """Where the parts stand in `text`, from the left, as (start, end); the longest where some overlap."""
    matches = [match.span() for part in parts for match in pattern(part).finditer(text)]
    separate: list[tuple[int, int]] = []
    for start, end in sorted(matches, key=lambda span: (span[0], -span[1])):
        if not separate or start >= separate[-1][1]:
            separate.append((start, end))
    return separate


def spans_in(parts: Sequence[str], texts: Iterable[str]) -> list[list[int]]:
    """Where the parts stand in a prompt's contents: [message, start, end] each, in their order."""
    return [[i, *span] for i, text in enumerate(texts) for span in spans(parts, text)]


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
