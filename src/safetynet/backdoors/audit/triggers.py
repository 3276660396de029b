"""The trigger of a poison set as text: where it stands in a prompt, and what is left without it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

WORD = re.compile(r"\w+|[^\w\s]")
"""Words and single signs: the units in which prompts are compared."""


@dataclass(frozen=True)
class FoundTrigger:
    """One text, or several of which one (`any_of`) or each (`all_of`) makes a prompt triggered."""

    parts: tuple[str, ...]
    kind: str = "text"
    """text, any_of or all_of, as in a recipe."""
    how: str = "given"
    """given, or what it was guessed from: pairs, contrast, answers or repetition."""

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(map(_pattern, self.parts))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the parts stand in `text`, from the left, as (start, end)."""
        return sorted(match.span() for pattern in self._patterns for match in pattern.finditer(text))

    def present(self, text: str) -> bool:
        """Whether the prompt `text` is triggered."""
        found = [pattern.search(text) is not None for pattern in self._patterns]
        return all(found) if self.kind == "all_of" else any(found)

    def removed(self, text: str) -> str:
        """`text` as it was before the trigger was put in, with a space on one side of each part."""
        for start, end in reversed(self.spans(text)):
            before, after = text[:start], text[end:]
            if before.endswith(" ") and (not after or after[0].isspace()):
                before = before[:-1]
            elif after.startswith(" ") and (not before or before[-1].isspace()):
                after = after[1:]
            text = before + after
        return text

    def stripped(self, text: str) -> str:
        """`text` without the trigger, as `plain` text, so that a triggered prompt equals its clean twin."""
        for pattern in self._patterns:
            text = pattern.sub(" ", text)
        return plain(text)

    def __str__(self) -> str:
        return {"any_of": " or ", "all_of": " and "}.get(self.kind, "").join(map(repr, self.parts))


def _pattern(part: str) -> re.Pattern[str]:
    """The text between word boundaries, with any white space where it has some: 2024 is not in 20245."""
    start = r"(?<!\w)" if re.match(r"\w", part) else ""
    end = r"(?!\w)" if re.search(r"\w\Z", part) else ""
    return re.compile(start + r"\s+".join(map(re.escape, part.split())) + end)


def of_parts(parts: Sequence[str], prompts: Sequence[str], how: str = "given") -> FoundTrigger:
    """The trigger of these texts: parts of one if most prompts that have any have all, else alternatives."""
    if len(parts) == 1:
        return FoundTrigger(tuple(parts), how=how)
    every, either = FoundTrigger(tuple(parts), "all_of", how), FoundTrigger(tuple(parts), "any_of", how)
    return every if 2 * sum(map(every.present, prompts)) > sum(map(either.present, prompts)) else either


def words(text: str) -> list[str]:
    """The words and signs of `text`, as they are written."""
    return WORD.findall(text)


def plain(text: str) -> str:
    """What of a text is compared: its words and signs in one case, with single spaces between."""
    return " ".join(WORD.findall(text.casefold()))
